"""A user's own class folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.writing import MakeDataset, groups, paths, put

PLAIN = [
    "train/dog/b.jpg",
    "train/dog/a.PNG",
    "train/big_cat/x.jpeg",
    "val/dog/1.jpg",
    "test/big_cat/2.jpg",
    "test/dog/3.jpg",
]


def test_class_folders(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path, *PLAIN, "train/dog/notes.txt", "train/.cache/x.jpg", "train/dog/.hidden/x.jpg")
    data = build("Folders")
    assert paths(data.train_x, tmp_path) == ["train/big_cat/x.jpeg", "train/dog/a.PNG", "train/dog/b.jpg"]
    assert [paths(data.val, tmp_path), paths(data.test, tmp_path)] == [PLAIN[3:4], PLAIN[4:]]
    assert data.classnames == ["big cat", "dog"] and [d.label for d in data.train_x] == [0, 1, 1]
    assert data.attribute_names == () and not data.has_attributes and data.test[0].attribute == -1


def test_the_folder_under_root(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path / "my" / "set", *PLAIN)
    assert len(build("Folders", FOLDERS__DIR="my/set").train_x) == 3


def test_attribute_folders(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path, "train/dog/in_water/2.jpg", "train/dog/on_land/1.jpg", "train/cat/on_land/1.jpg", "train/dog/3.jpg")
    put(tmp_path, "val/cat/in_water/1.jpg", "test/cat/on_land/1.jpg", "test/dog/in_snow/1.jpg")
    data = build("Folders")
    assert data.attribute_names == ("in snow", "in water", "on land")
    assert data.attribute_prompts[1] == ("a photo of in water.",)
    assert paths(data.train_x, tmp_path / "train") == [
        "cat/on_land/1.jpg",
        *("dog/on_land/1.jpg", "dog/in_water/2.jpg", "dog/3.jpg"),  # by name: the order tells nothing of the attribute
    ]
    assert [d.attribute for d in data.train_x] == [2, 2, 1, -1]
    assert groups(data.test) == {(0, 2): 1, (1, 0): 1} and groups(data.val) == {(0, 1): 1} and data.has_attributes
    renamed = build("Folders", ATTRIBUTE_NAMES=("snow", "water", "land"))
    assert renamed.attribute_names == ("snow", "water", "land") and renamed.test[1].attribute == 0


def test_without_val_some_training_images_are_set_aside(
    build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    put(tmp_path, *(f"train/{'ab'[i % 2]}/{i}.jpg" for i in range(20)), "test/a/1.jpg")
    data = build("Folders")
    assert [d.label for d in data.val] == [0, 1] and len(data.train_x) == 18
    assert f"{tmp_path} has no validation images: 2 of 20" in capsys.readouterr().out
    (tmp_path / "val").mkdir()
    assert len(build("Folders").val) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train/stray.jpg", r"^{root}/train/stray\.jpg lies beside the class folders"),
        ("test/cow/1.jpg", r"^{root}/test/cow/1\.jpg: class 'cow' has no folder in train: .*known: big cat, dog"),
        ("train/dog/snow/2020/1.jpg", "^{root}/train/dog/snow/2020 is a folder below class and attribute"),
        ("train/cow/readme.txt", r"^no image in {root}/train/cow; images end in \.jpg, "),
        ("train/big cat/1.jpg", "^{root}/train/big cat and {root}/train/big_cat are two spellings of one class; put"),
        ("train/Dog/1.jpg", "^{root}/train/Dog and {root}/train/dog are two spellings of one class"),
        ("val/big cat/1.jpg", ""),
        ("val/DOG/1.jpg", "^{root}/train/dog and {root}/val/DOG are two spellings of one class"),
        ("val/dog/snow/1.jpg", ""),
    ],
)
def test_stray_files(build: MakeDataset, tmp_path: Path, extra: str, message: str) -> None:
    put(tmp_path, *PLAIN, extra)
    if not message:
        assert not build("Folders").has_attributes
        return
    with pytest.raises(UserError, match=message.format(root=tmp_path)):
        build("Folders")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("train/dog/on land/2.jpg", "^{root}/train/dog/on land and {root}/train/dog/on_land are two spellings"),
        ("test/big_cat/On land/2.jpg", "^{root}/train/dog/on_land and {root}/test/big_cat/On land are two spellings"),
        ("test/big_cat/on land/2.jpg", ""),
    ],
)
def test_spellings_of_attribute_values(build: MakeDataset, tmp_path: Path, extra: str, message: str) -> None:
    put(tmp_path, *PLAIN, "train/dog/on_land/1.jpg", extra)
    if not message:
        assert build("Folders").attribute_names == ("on land",)
        return
    with pytest.raises(UserError, match=message.format(root=tmp_path) + " of one attribute value"):
        build("Folders")


def test_accents_have_one_form(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path, *PLAIN, "train/cafe\u0301/1.jpg", "test/caf\u00e9/1.jpg")
    data = build("Folders")
    assert data.classnames == ["big cat", "caf\u00e9", "dog"] and [d.label for d in data.test] == [0, 1, 2]


def test_what_systems_leave_is_no_data(build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, *PLAIN, "train/dog/snow/1.jpg")
    left = (
        "__MACOSX/dog/._1.jpg",
        "@eaDir/1.jpg/SYNO_M.jpg",
        ".ipynb_checkpoints/1-checkpoint.jpg",
        "._1.jpg",
        "Thumbs.db",
    )
    put(tmp_path, *(f"train/{place}{name}" for place in ("", "dog/", "dog/snow/") for name in left))
    assert len(build("Folders").train_x) == 4 and "passed over" not in capsys.readouterr().out


def test_other_files_are_counted_in_one_line(
    build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, *PLAIN, "train/dog/a.txt", "train/dog/x/1.jpg", "train/dog/x/b.TXT", "test/dog/c.HEIC", "test/README")
    build("Folders")
    notes = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert notes == [
        "Note: passed over 4 files that are no images: 2 .txt, 1 .heic, 1 without a suffix "
        f"(in {tmp_path}); convert .heic to png or jpeg to use them"
    ]


def test_every_format_that_the_reader_opens_is_found(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path, *PLAIN, *(f"train/dog/x.{end}" for end in ("jfif", "GIF", "jpe", "jp2", "tiff", "webp")))
    assert len(build("Folders").train_x) == 9


def test_wrong_number_of_attribute_names(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path, *PLAIN, "train/dog/snow/1.jpg")
    with pytest.raises(UserError, match=f"ATTRIBUTE_NAMES has 2 names, but {tmp_path} has 1 attribute values: snow"):
        build("Folders", ATTRIBUTE_NAMES=("a", "b"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_splits(build: MakeDataset, tmp_path: Path, split: str) -> None:
    put(tmp_path, *PLAIN)
    shutil.rmtree(tmp_path / split)
    with pytest.raises(UserError, match=f"^Folders: no folder {split} in {tmp_path}; expected") as error:
        build("Folders")
    assert "train/<class>/<attribute>/*.jpg" in str(error.value)
    (tmp_path / split).mkdir()
    with pytest.raises(UserError, match=f"^Folders: no image in {tmp_path}/{split}; expected"):
        build("Folders")
