"""CelebA in its authors' form, Kaggle's and WILDS'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.celeba import CSV, SPLIT_CSV, TXT, tree
from tests.helpers.trees.writing import MakeDataset, groups, paths, write


@pytest.mark.parametrize("form", ["txt", "csv"])
@pytest.mark.parametrize("place", ["celeba", "celebA/data", "celebA", "celebA_v1.0", "CelebA", "CelebA/data"])
def test_every_place_and_form(build: MakeDataset, tmp_path: Path, place: str, form: str) -> None:
    tree(tmp_path / place, form)
    data = build("CelebA")
    images = tmp_path / place / "img_align_celeba"
    assert paths(data.train_x, images) == ["000001.jpg", "000002.jpg", "000003.jpg", "000004.jpg"]
    assert [(d.label, d.attribute) for d in data.train_x] == [(1, 0), (0, 0), (0, 1), (1, 1)]
    assert paths(data.val, images) == ["000005.jpg"] and groups(data.val) == {(1, 0): 1}
    assert paths(data.test, images) == ["000006.jpg", "000007.jpg"] and groups(data.test) == {(0, 1): 1, (1, 1): 1}
    assert data.classnames == ["dark hair", "blond hair"] and data.attribute_names == ("female", "male")
    assert data.template == "a photo of a celebrity with {}."
    assert "woman" in " ".join(data.attribute_prompts[0]) and "a man." in " ".join(data.attribute_prompts[1])


@pytest.mark.parametrize(
    ("images", "anno", "part"),
    [
        ("img_align_celeba/img_align_celeba", "", ""),
        ("Img/img_align_celeba", "Anno", "Eval"),
        ("Img/img_align_celeba/img_align_celeba", "Anno", "Eval"),
    ],
)
def test_folders_of_kaggle_and_of_the_authors(
    build: MakeDataset, tmp_path: Path, images: str, anno: str, part: str
) -> None:
    tree(tmp_path / "celeba", "csv", images, anno, part)
    assert paths(build("CelebA").val, tmp_path / "celeba" / images) == ["000005.jpg"]


def test_one_list_of_each_form(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path / "celeba", "txt")
    folder = tmp_path / "celeba"
    (folder / "list_eval_partition.txt").unlink()
    write(folder / "list_eval_partition.csv", *SPLIT_CSV, encoding="utf-8-sig")
    write(folder / "list_attr_celeba.txt", *TXT, encoding="utf-8-sig")
    assert len(build("CelebA").train_x) == 4


def test_other_attributes(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path / "celeba")
    data = build("CelebA", CELEBA__TARGET="Smiling", CELEBA__ATTRIBUTE="5_o_Clock_Shadow")
    assert [(d.label, d.attribute) for d in data.train_x] == [(1, 0), (0, 0), (1, 1), (0, 0)]
    assert data.classnames == ["not smiling", "smiling"]
    assert data.attribute_names == ("not 5 o clock shadow", "5 o clock shadow")
    assert data.template == "a photo of a celebrity, {}."
    assert data.attribute_prompts[1] == ("a photo of a celebrity, 5 o clock shadow.",)
    data = build("CelebA", CELEBA__TARGET="Male", CELEBA__ATTRIBUTE="Blond_Hair")
    assert data.classnames == ["female", "male"] and data.attribute_names == ("dark hair", "blond hair")


def test_lists_of_a_spreadsheet_with_floats_and_a_gap(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path / "celeba", "csv")
    expected = [(d.impath, d.label, d.attribute) for d in build("CelebA").train_x]
    rows = [CSV[0], *(re.sub(r",(-?\d)", r",\1.0", line) for line in CSV[1:])]
    rows[2] = re.sub(r",[^,]*(,[^,]*)$", r",nan\1", rows[2])
    write(tmp_path / "celeba/list_attr_celeba.csv", *(row.replace(",", ";") for row in rows), encoding="utf-16")
    write(tmp_path / "celeba/list_eval_partition.csv", SPLIT_CSV[0], *(f"{line}.0" for line in SPLIT_CSV[1:]))
    found = [(d.impath, d.label, d.attribute) for d in build("CelebA").train_x]
    assert [a for *_, a in found].count(-1) == 1
    assert [row if row[2] >= 0 else (*row[:2], old[2]) for row, old in zip(found, expected, strict=True)] == expected


@pytest.mark.parametrize("form", ["txt", "csv"])
@pytest.mark.parametrize(("key", "attribute"), [("TARGET", "Blond_hair"), ("ATTRIBUTE", "Mail")])
def test_unknown_attributes(build: MakeDataset, tmp_path: Path, form: str, key: str, attribute: str) -> None:
    path = tree(tmp_path / "celeba", form)
    near = {"TARGET": "Blond_Hair", "ATTRIBUTE": "Male"}[key]
    message = f"^DATASET.CELEBA.{key}: {path} has no '{attribute}': did you mean '{near}'.* known: 5_o"
    with pytest.raises(UserError, match=message):
        build("CelebA", **{f"CELEBA__{key}": attribute})
    with pytest.raises(UserError, match="TARGET and ATTRIBUTE are both 'Male'"):
        build("CelebA", CELEBA__TARGET="Male")


def test_the_image_column_is_no_attribute(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path / "celeba", "csv")
    with pytest.raises(UserError, match="has no 'image_id'"):
        build("CelebA", CELEBA__TARGET="image_id")


LONG = "000001.jpg  1  1  1  1  1"


@pytest.mark.parametrize(
    ("form", "line", "text", "message"),
    [
        ("txt", 1, "seven", "^{attr}, line 1: expected the number of images, not 'seven'"),
        ("txt", 1, "8", "^{attr} lists 7 images, but line 1 says 8; fetch it again"),
        ("txt", 3, LONG, "^{attr}, line 3 has 6 fields, not 5; fetch it again"),
        ("txt", 5, "000003.jpg 1 2 1 1", "^{attr}, line 5: Blond_Hair '2' and Male '1' must be 1 or -1"),
        ("txt", 9, "000009.jpg 1 1 1 1", "^{attr}, line 9: '000009.jpg' comes twice or has no split in {split}"),
        ("csv", 2, "000001.jpg,1,1,1", "^{attr}, line 2 has 4 fields and the header 5"),
        ("csv", 4, "000003.jpg,1,,1,1", "^{attr}, line 4: Blond_Hair '' and Male '1' must be 1 or -1"),
        ("csv", 4, "000003.jpg,1,1,0.5,1", "^{attr}, line 4: Blond_Hair '1' and Male '0.5' must be 1 or -1"),
        ("csv", 8, "000001.jpg,1,1,1,1", "^{attr}, line 8: '000001.jpg' comes twice or has no split in {split}"),
    ],
)
def test_corrupt_attribute_lists(
    build: MakeDataset, tmp_path: Path, form: str, line: int, text: str, message: str
) -> None:
    path = tree(tmp_path / "celeba", form)
    lines = path.read_text().splitlines()
    lines[line - 1] = text
    write(path, *lines)
    split = path.with_name(f"list_eval_partition.{form}")
    with pytest.raises(UserError, match=message.format(attr=path, split=split)):
        build("CelebA")


@pytest.mark.parametrize("form", ["txt", "csv"])
@pytest.mark.parametrize("row", ["000003.jpg 3", "000003.jpg", "000003.jpg 0 1", "000003.jpg 0.5"])
def test_corrupt_split_lists(build: MakeDataset, tmp_path: Path, form: str, row: str) -> None:
    path = tree(tmp_path / "celeba", form).with_name(f"list_eval_partition.{form}")
    lines = path.read_text().splitlines()
    number = 3 if form == "txt" else 4
    lines[number - 1] = row.replace(" ", " " if form == "txt" else ",")
    write(path, *lines)
    message = f"^{path}, line {number}: expected an image and its split .0 train, 1 val, 2 test., not '{row}'"
    if form == "csv" and row.count(" ") != 1:
        message = f"^{path}, line {number} has {1 + row.count(' ')} fields and the header 2"
    with pytest.raises(UserError, match=message):
        build("CelebA")


def test_lists_of_different_length(build: MakeDataset, tmp_path: Path) -> None:
    path = tree(tmp_path / "celeba", "csv")
    write(path, *CSV[:-1])
    split = path.with_name("list_eval_partition.csv")
    with pytest.raises(UserError, match=f"^{path} lacks 1 images of {split}, '000007.jpg' is one"):
        build("CelebA")


def test_missing_image_binary_list_and_empty_list(build: MakeDataset, tmp_path: Path) -> None:
    path = tree(tmp_path / "celeba")
    (tmp_path / "celeba/img_align_celeba/000002.jpg").unlink()
    with pytest.raises(UserError, match=rf"^{path}, line 4 names .*000002\.jpg, which is missing"):
        build("CelebA")
    path.write_bytes(b"7\n\xff\xfe\n")
    with pytest.raises(
        UserError, match=f"^{path} is not a text file in UTF-8: line 2 holds the byte 0xff.*fetch it again"
    ):
        build("CelebA")
    path.write_text("")
    with pytest.raises(UserError, match=f"^{path}, line 1: expected the number of images"):
        build("CelebA")


def test_missing_files(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"^CelebA: no list_attr_celeba in {tmp_path} .looked in celeba, celebA/data, "
    ) as e:
        build("CelebA")
    assert "\n  ROOT/celeba/\n    list_attr_celeba.txt" in str(e.value) and "mmlab.ie.cuhk.edu.hk" in str(e.value)
    tree(tmp_path / "celebA", "csv")
    (tmp_path / "celebA/list_eval_partition.csv").unlink()
    with pytest.raises(UserError, match=f"^CelebA: no list_eval_partition in {tmp_path}/celebA; expected"):
        build("CelebA")
