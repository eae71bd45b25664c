"""ImageNet and the sets that test its classifiers, in upstream's layout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.imagenet import NAMES, VARIANTS, adversarial, imagenet, names, v2
from tests.helpers.trees.writing import MakeDataset, paths, put, write


@pytest.mark.parametrize("images", ["imagenet/images", "imagenet"])
def test_imagenet(build: MakeDataset, tmp_path: Path, images: str) -> None:
    imagenet(tmp_path, images, classes=3)
    data = build("ImageNet")
    assert data.classnames == ["tench", "goldfish", "great white shark"] and data.template == "a photo of a {}."
    assert Counter(d.label for d in data.train_x) == {0: 9, 1: 9, 2: 9} and [d.label for d in data.val] == [0, 1, 2]
    assert paths(data.test, tmp_path / images) == [
        f"val/n00{c}/ILSVRC2012_val_{i}.JPEG" for c in range(3) for i in range(2)
    ]
    assert not set(paths(data.val, tmp_path)) & set(paths(data.train_x + data.test, tmp_path))
    assert all(f"/n00{d.label}/" in d.impath for d in data.train_x + data.val + data.test) and not data.has_attributes


def test_imagenet_without_validation_and_few_shot(
    build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    imagenet(tmp_path, classes=3)
    write(tmp_path / "imagenet/split_fewshot/shot_4-seed_1.pkl", "")
    data = build("ImageNet", VAL_PERCENT=0.0, NUM_SHOTS=4, SEED=1)
    assert data.val == [] and Counter(d.label for d in data.train_x) == {0: 4, 1: 4, 2: 4} and len(data.test) == 6
    assert "shot_4-seed_1.pkl is not read" in capsys.readouterr().out
    assert build("ImageNet", SUBSAMPLE_CLASSES="base").classnames == ["tench", "goldfish"]


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(build: MakeDataset, tmp_path: Path, name: str, own: bool, capsys: pytest.CaptureFixture) -> None:
    make, folder = VARIANTS[name]
    make(tmp_path)
    names(tmp_path / (folder if own else "imagenet"))
    if own:  # ImageNet's is for those without one
        write(tmp_path / "imagenet/classnames.txt", "n000 other")
    data = build(name)
    expected = {"ImageNetA": ["great white shark", "thing 5", "thing 11"], "ImageNetR": ["goldfish", "thing 10"]}
    assert data.classnames == expected.get(name, list(NAMES.values()))
    assert data.val == [] and paths(data.train_x, tmp_path) == paths(data.test, tmp_path)
    assert Counter(d.label for d in data.test) == dict.fromkeys(range(data.num_classes), 2)
    assert data.test_only and data.template == "a photo of a {}."
    assert f"{name} is for testing only: its test images stand in for training images; train on ImageNet and" in (
        capsys.readouterr().out
    )


def test_numbers_of_v2_are_those_of_imagenet(build: MakeDataset, tmp_path: Path) -> None:
    """Folders are numbers, which sorted as words would go 0, 1, 10, 11, 2."""
    imagenet(tmp_path)
    v2(tmp_path)
    data = build("ImageNetV2")
    assert all(f"/{d.label}/" in d.impath for d in data.test)
    assert data.lab2cname == build("ImageNet").lab2cname


def test_missing_files(build: MakeDataset, tmp_path: Path) -> None:
    for name, (make, folder) in VARIANTS.items():
        with pytest.raises(UserError, match=f"^{name}: no classnames.txt in .*{folder}; expected") as error:
            build(name)
        assert f"ROOT/{folder}/" in str(error.value) and "DATASETS.md#imagenet" in str(error.value)
        names(tmp_path / folder)
        with pytest.raises(UserError, match=f"^{name}: no imagenet|^{name}: no images in "):
            build(name)
        make(tmp_path)
        build(name)
    with pytest.raises(UserError, match="^ImageNet: no train and val in .*looked in imagenet/images, imagenet"):
        build("ImageNet")


@pytest.mark.parametrize(("name", "first"), [("ImageNetV2", "3"), ("ImageNetSketch", "n003")])
def test_classes_that_lack(build: MakeDataset, tmp_path: Path, name: str, first: str) -> None:
    names(tmp_path / "imagenet")
    make, folder = VARIANTS[name]
    make(tmp_path)
    images = next(path for path in (tmp_path / folder).iterdir())
    (images / first).rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=f"^{name}: no folder {first} in {images}, one of 1 classes that lack; expected"
    ):
        build(name)


def test_wrong_folders(build: MakeDataset, tmp_path: Path) -> None:
    imagenet(tmp_path, classes=3)
    adversarial(tmp_path)
    images = tmp_path / "imagenet/images"
    (images / "val/n002").rename(images / "val/n004")
    with pytest.raises(UserError, match=f"^ImageNet: {images} has a folder n002 in one of train and val only"):
        build("ImageNet")
    (images / "val/n004").rename(images / "val/n999")
    with pytest.raises(UserError, match="^ImageNet: .*val/n999 is no class of classnames.txt; take it out"):
        build("ImageNet")
    for path in (images / "val").iterdir():
        path.rename(tmp_path / path.name)
    put(images / "val", "ILSVRC2012_val_00000001.JPEG")  # as the archive comes
    with pytest.raises(UserError, match="^ImageNet: no class's folder in .*images/val; expected"):
        build("ImageNet")
    (tmp_path / "imagenet-adversarial/imagenet-a/n000").mkdir()
    with pytest.raises(UserError, match="^ImageNetA: no image in .*imagenet-a/n000, the folder of the class 'tench'"):
        build("ImageNetA")


@pytest.mark.parametrize(("line", "problem"), [("n000 again", "'n000' comes twice"), ("n013", "'n013' has no name")])
def test_wrong_names(build: MakeDataset, tmp_path: Path, line: str, problem: str) -> None:
    imagenet(tmp_path, classes=3)
    path = write(tmp_path / "imagenet/classnames.txt", "n000 tench", line)
    with pytest.raises(UserError, match=f"^{path}, line 2: {problem}; expected a WordNet id and a class name"):
        build("ImageNet")


def test_files_that_are_no_images_are_counted(
    build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    imagenet(tmp_path, classes=2)
    put(tmp_path / "imagenet/images/train", "n000/a.txt", "n001/a.txt", "n001/._1.JPEG", "@eaDir/1.jpg")
    build("ImageNet")
    note = f"Note: passed over 2 files that are no images: 2 .txt (in {tmp_path}/imagenet/images/train)\n"
    assert note in capsys.readouterr().out
