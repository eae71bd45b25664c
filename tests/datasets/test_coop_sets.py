"""CoOp's data sets in its folders, with split files in the form of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oodprompt.datasets.coop_sets import CoOpDataset

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.errors import UserError
from tests.helpers.trees.coop_sets import FACTS, SPLIT, aircraft, tree
from tests.helpers.trees.writing import MakeDataset, paths, write


def test_the_table_is_complete() -> None:
    assert {n for n, cls in DATASET_REGISTRY.items() if issubclass(cls, CoOpDataset)} == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_splits_names_and_prompt(build: MakeDataset, tmp_path: Path, name: str) -> None:
    tree(tmp_path, name)
    data = build(name)
    folder, images, template = FACTS[name]
    for found, key in ((data.train_x, "train"), (data.val, "val"), (data.test, "test")):
        assert paths(found, tmp_path / folder / images) == [entry[0] for entry in SPLIT[key]]
        assert [(d.label, d.classname) for d in found] == [(entry[1], entry[2]) for entry in SPLIT[key]]
    assert data.template == template and data.classnames == ["ant", "big_bee", "cat"]
    assert not data.has_attributes and {d.domain for d in data.train_x} == {0} and data.attribute_names == ()
    assert "datasets/README" not in data.address and data.address.startswith("https://github.com/KaiyangZhou/CoOp/")


def test_few_shot_base_and_new(build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tree(tmp_path, "EuroSAT")
    write(tmp_path / "eurosat/split_fewshot/shot_2-seed_1.pkl", "cos\nsystem")
    shots = build("EuroSAT", NUM_SHOTS=2, SEED=1)
    assert [d.label for d in shots.train_x] == [0, 0, 1, 1, 2, 2] and len(shots.val) == 1
    assert "Note: " in (out := capsys.readouterr().out) and "shot_2-seed_1.pkl is not read; the 2 images" in out
    assert paths(shots.train_x, tmp_path) == paths(build("EuroSAT", NUM_SHOTS=2, SEED=1).train_x, tmp_path)
    assert "Note" in capsys.readouterr().out
    build("EuroSAT", NUM_SHOTS=2, SEED=2)
    build("EuroSAT", SEED=1)
    assert "Note" not in capsys.readouterr().out
    base, new = (build("EuroSAT", SUBSAMPLE_CLASSES=which) for which in ("base", "new"))
    assert base.classnames == ["ant", "big_bee"] and new.classnames == ["cat"]
    assert (len(base.test), len(new.test), len(base.val), len(new.val)) == (1, 1, 1, 0)


@pytest.mark.parametrize("name", FACTS)
def test_missing_files(build: MakeDataset, tmp_path: Path, name: str) -> None:
    folder, images, _ = FACTS[name]
    with pytest.raises(UserError, match=f"^{name}: no ") as error:
        build(name)
    text = str(error.value)
    assert f"ROOT/{folder}/" in text and (images or "cars_train") in text and "CoOp/blob/main/DATASETS.md#" in text
    path = tree(tmp_path, name)
    path.unlink()
    with pytest.raises(
        UserError, match=f"^{name}: no split_zhou_{name}.json in .*{folder}; it is not made here, fetch"
    ):
        build(name)
    assert not path.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1", "^cannot read {path}: "),
        ([1], "^{path} has no list 'train'; expected lists"),
        ({"train": []}, "^{path} has no list 'val'"),
        ({**SPLIT, "val": {"a": 1}}, "^{path} has no list 'val'"),
        ({**SPLIT, "val": [["cars_test/6.jpg", 2]]}, "^{path}, 'val' entry 1: expected .image, label, class name."),
        ({**SPLIT, "val": [["cars_test/6.jpg", "2", "cat"]]}, "'val' entry 1: expected .*not .'cars_test/6.jpg', '2'"),
        ({**SPLIT, "val": [["cars_test/6.jpg", -1, "cat"]]}, "'val' entry 1: expected"),
        (
            {**SPLIT, "val": [*SPLIT["val"], ["gone.jpg", 2, "cat"]]},
            "^{path}, 'val' entry 2 names .*gone.jpg, which is",
        ),
        ({**SPLIT, "val": [["cars_test/6.jpg", 1, "cat"]]}, "^{path}: class 1 is named 'big_bee' and 'cat'"),
    ],
)
def test_wrong_split_files(build: MakeDataset, tmp_path: Path, content: Any, message: str) -> None:
    path = tree(tmp_path, "SUN397", content)
    if isinstance(content, str):
        write(path, content)
    with pytest.raises(UserError, match=message.replace("{path}", str(path))):
        build("SUN397")


@pytest.mark.parametrize("place", ["fgvc_aircraft", "fgvc-aircraft-2013b/data"])
def test_aircraft(build: MakeDataset, tmp_path: Path, place: str) -> None:
    aircraft(tmp_path)
    if place != "fgvc_aircraft":
        (tmp_path / place).parent.mkdir()
        (tmp_path / "fgvc_aircraft").rename(tmp_path / place)
    data = build("FGVCAircraft")
    assert data.classnames == ["707-320", "DR-400", "MD 80 (a)"]
    assert data.template == "a photo of a {}, a type of aircraft."
    assert paths(data.train_x, tmp_path / place / "images") == [
        "10.jpg",
        "20.jpg",
        "11.jpg",
        "21.jpg",
        "12.jpg",
        "22.jpg",
    ]
    assert [d.label for d in data.train_x] == [0, 0, 1, 1, 2, 2] and [d.label for d in data.val] == [0, 1, 2]
    assert paths(data.val, tmp_path / place / "images") == ["30.jpg", "31.jpg", "32.jpg"] and len(data.test) == 6


def test_wrong_aircraft(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="^FGVCAircraft: no images and variants.txt and images_variant_train.txt"
    ) as error:
        build("FGVCAircraft")
    assert "DATASETS.md#fgvcaircraft" in str(error.value)
    aircraft(tmp_path)
    path = write(tmp_path / "fgvc_aircraft/images_variant_val.txt", "30 DR-40")
    with pytest.raises(UserError, match=f"^{path}, line 1: no variant 'DR-40' in variants.txt: did you mean 'DR-400'"):
        build("FGVCAircraft")
    write(path, "30 DR-400", "9 DR-400")
    with pytest.raises(UserError, match=f"^{path}, line 2 names .*images/9.jpg, which is missing; restore it"):
        build("FGVCAircraft")
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match=f"^{path} is not a text file"):
        build("FGVCAircraft")


def test_a_split_file_of_windows_and_pandas(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path, "Caltech101")
    expected = [(d.impath, d.label) for d in build("Caltech101").train_x]
    other = {key: [[i.replace("/", "\\"), float(y), c] for i, y, c in rows] for key, rows in SPLIT.items()}
    path = tree(tmp_path, "Caltech101", other)
    assert [(d.impath, d.label) for d in build("Caltech101").train_x] == expected
    other["test"][1][1] = 0.5
    tree(tmp_path, "Caltech101", other)
    with pytest.raises(UserError, match=f"^{path}, 'test' entry 2: expected .image, label, class name., not "):
        build("Caltech101")
