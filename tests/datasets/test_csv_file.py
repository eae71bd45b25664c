"""A user's own csv file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from oodprompt.datasets.csv_file import combine

from oodprompt.errors import UserError
from tests.helpers.trees.csv_file import HEAD, NAMES, ROWS, tree
from tests.helpers.trees.writing import MakeDataset, groups, paths, put, write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_quotes_and_byte_order_mark(build: MakeDataset, tmp_path: Path, encoding: str) -> None:
    tree(tmp_path, encoding=encoding)
    data = build("CSV")
    assert [paths(split, tmp_path) for split in (data.train_x, data.val, data.test)] == [
        NAMES[:3],
        NAMES[3:4],
        NAMES[4:],
    ]
    assert data.classnames == ["ant", "cat"] and data.attribute_names == ("indoor", "outdoor")
    assert [(d.label, d.attribute, d.classname) for d in data.train_x] == [(1, 0, "cat"), (1, 1, "cat"), (0, 1, "ant")]
    assert data.attribute_prompts == [("a photo of indoor.",), ("a photo of outdoor.",)]
    assert data.template == "a photo of a {}." and data.has_attributes


def test_numbers_for_everything(build: MakeDataset, tmp_path: Path) -> None:
    rows = ["photos/1.jpg,1,0,10", "photos/2.jpg,0,0,9", "photos/3.jpg,1,1,9", "photos/5.jpg,0,2,10"]
    tree(tmp_path, HEAD, *rows)
    data = build("CSV")
    assert data.classnames == ["0", "1"] and data.attribute_names == ("9", "10")
    assert [(d.label, d.attribute) for d in (*data.train_x, *data.val, *data.test)] == [(1, 1), (0, 0), (1, 0), (0, 1)]
    data = build("CSV", CSV__CLASSNAMES=("dog", "cat"), ATTRIBUTE_NAMES=("sand", "snow"))
    assert data.classnames == ["dog", "cat"] and data.attribute_names == ("sand", "snow")
    assert [d.classname for d in data.train_x] == ["cat", "dog"]


def test_given_names_order_named_classes_and_attributes(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path)
    data = build("CSV", CSV__CLASSNAMES=("cat", "ant"), ATTRIBUTE_NAMES=("outdoor", "indoor"))
    assert data.classnames == ["cat", "ant"] and data.attribute_names == ("outdoor", "indoor")
    assert [(d.label, d.attribute) for d in data.train_x] == [(0, 1), (0, 0), (1, 0)]


def test_own_columns_file_and_place(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path / "set", "a.jpg", "b.jpg", "c.png")
    path = write(
        tmp_path / "set/list.csv", "fold,path,y", "train,a.jpg,0", "val,b.jpg,0", f"test,{tmp_path}/set/c.png,0"
    )
    keys = {"CSV__IMAGE": "path", "CSV__LABEL": "y", "CSV__SPLIT": "fold"}
    for extra in ({"CSV__FILE": "set/list.csv"}, {"CSV__FILE": str(path), "ROOT": ""}):
        data = build("CSV", **keys, **extra)
        assert paths((*data.train_x, *data.val, *data.test), tmp_path / "set") == ["a.jpg", "b.jpg", "c.png"]
        assert data.attribute_names == () and not data.has_attributes


def test_several_attributes_combine(build: MakeDataset, tmp_path: Path) -> None:
    tree(
        tmp_path,
        "image,label,split,scene,object",
        "photos/1.jpg,car,train,urban,cow",
        "photos/2.jpg,car,train,country,cow",
        "photos/3.jpg,car,val,urban,sign",
        "photos/5.jpg,car,test,country,",
        "photos/6.jpg,car,test,urban,cow",
    )
    data = build("CSV", CSV__ATTRIBUTES=("scene", "object"))
    assert data.attribute_names == ("country, cow", "urban, cow", "urban, sign")
    assert [d.attribute for d in (*data.train_x, *data.val, *data.test)] == [1, 0, 2, -1, 1]
    assert data.has_attributes
    assert build("CSV", CSV__ATTRIBUTES="object").attribute_names == ("cow", "sign")
    assert build("CSV", CSV__ATTRIBUTES="").attribute_names == ()


def test_names_of_combinations() -> None:
    assert combine(("a", "b"), ("x", "y")) == "x, y"
    assert combine(("a", "b"), ("1", "y")) == "a=1, y"
    assert combine(("a",), ("1",)) == "1"
    assert combine(("a", "b"), ("x", "")) == "" == combine((), ())


def test_unknown_attributes(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path, HEAD, ROWS[0], "photos/2.jpg,cat,train,", "photos/3.jpg,ant,train, ", *ROWS[3:])
    data = build("CSV")
    assert [d.attribute for d in data.train_x] == [0, -1, -1] and data.has_attributes
    tree(tmp_path, "image,label,split", *(row.rsplit(",", 1)[0] for row in ROWS))
    data = build("CSV", ATTRIBUTE_NAMES=("indoor", "outdoor"))
    assert data.attribute_names == ("indoor", "outdoor") and groups(data.test) == {(1, -1): 1, (0, -1): 1}


def test_without_validation_rows_some_training_rows_are_set_aside(
    build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    put(tmp_path, *(f"{i}.jpg" for i in range(30)), "t.jpg")
    write(
        tmp_path / "metadata.csv", HEAD, *(f"{i}.jpg,{'ab'[i % 2]},train,{i % 3}" for i in range(30)), "t.jpg,a,test,0"
    )
    drawn = [build("CSV", SEED=seed, VAL_PERCENT=0.2) for seed in (1, 2)]
    assert Counter(d.classname for d in drawn[0].val) == {"a": 3, "b": 3} and len(drawn[0].train_x) == 24
    assert paths(drawn[0].val, tmp_path) == paths(drawn[1].val, tmp_path)
    assert (
        capsys.readouterr().out.count(f"{tmp_path}/metadata.csv has no validation images: 6 of 30 training images") == 2
    )
    assert not build("CSV", VAL_PERCENT=0.0).val


@pytest.mark.parametrize(
    ("line", "row", "message"),
    [
        (1, "image,label,fold,attribute", ": column split is missing; expected image, label, split, found image, label, fold"),
        (3, "photos/2.jpg,cat,dev,indoor", ", line 3: split is train, val, test, 0, 1 or 2, not 'dev'"),
        (3, "photos/2.jpg,cat,3,indoor", ", line 3: split is train, val, test, 0, 1 or 2, not '3'"),
        (3, "photos/2.jpg,cat,train", ", line 3 has 3 fields and the header 4; put values that hold a comma"),
        (5, "photos/4, the last.jpg,ant,val,indoor", ", line 5 has 5 fields and the header 4"),
        (3, "photos/2.jpg, ,train,indoor", ", line 3: column label is empty"),
        (3, ",cat,train,indoor", ", line 3: column image is empty"),
        (3, "photos/2.jpg,cat,,indoor", ", line 3: column split is empty"),
        (3, "photos/9.jpg,cat,train,indoor", ", line 3 names .*photos/9.jpg, which is missing; restore it"),
        (6, "photos/5.jpg,cow,test,indoor", ": class 'cow' has no training row; every class needs one"),
    ],
)  # fmt: skip
def test_corrupt_files_name_file_and_line(
    build: MakeDataset, tmp_path: Path, line: int, row: str, message: str
) -> None:
    lines = [HEAD, *ROWS]
    lines[line - 1] = row
    path = tree(tmp_path, *lines)
    with pytest.raises(UserError, match=f"^{path}{message}"):
        build("CSV")


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        (ROWS, {"CSV__CLASSNAMES": ("cat", "aunt")}, ", line 4: 'ant' is not in DATASET.CSV.CLASSNAMES: did you mean 'aunt'"),
        (ROWS, {"CSV__CLASSNAMES": ("cat", "ant", "bee")}, ": class 'bee' has no training row"),
        (ROWS, {"CSV__ATTRIBUTES": ("attribute", "size")}, ": column size is missing"),
        (ROWS, {"CSV__ATTRIBUTES": "size"}, ": column size is missing"),
        (ROWS, {"ATTRIBUTE_NAMES": ("a", "b", "c")}, " has 2 attribute values: indoor; outdoor"),
        (ROWS[:4], {}, ": no row has the split test"),
        ([], {}, ": no row has the split test"),
        (["photos/1.jpg,1,0,", "photos/5.jpg,2,2,"], {}, ": numbered classes go from 0 without gaps; these are 1, 2"),
        (["photos/1.jpg,0,0,", "photos/5.jpg,2,2,"], {"CSV__CLASSNAMES": ("x", "y")}, ", line 3: '2' is not in DATASET.CSV.CLASSNAMES"),
        (["photos/1.jpg,0,0,", "photos/5.jpg,1,2,"], {}, ": class '1' has no training row"),
    ],
)  # fmt: skip
def test_files_and_keys_that_disagree(
    build: MakeDataset, tmp_path: Path, rows: list[str], keys: dict[str, Any], message: str
) -> None:
    path = tree(tmp_path, HEAD, *rows)
    with pytest.raises(UserError, match=f"{path}{message}"):
        build("CSV", **keys)


def test_names_given_twice(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path)
    with pytest.raises(UserError, match="CLASSNAMES: .* holds a name twice"):
        build("CSV", CSV__CLASSNAMES=("cat", "ant", "cat"))


def test_no_file(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        build("CSV", CSV__FILE="my.csv")
    text = str(error.value)
    assert text.startswith(f"CSV: no file {tmp_path}/my.csv (DATASET.CSV.FILE); expected")
    assert "image,label,split,attribute" in text and "get it from" not in text


def test_captions_stand_beside_the_images(build: MakeDataset, tmp_path: Path) -> None:
    rows = [f"{row},caption of {i}" for i, row in enumerate(ROWS)]
    tree(tmp_path, HEAD + ",caption", *rows)
    data = build("CSV")
    assert [d.caption for d in (*data.train_x, *data.val, *data.test)] == [f"caption of {i}" for i in range(len(ROWS))]
    tree(tmp_path, HEAD + ",words", *rows)
    assert {d.caption for d in build("CSV").train_x} == {""}
    assert build("CSV", CSV__CAPTION="words").train_x[1].caption == "caption of 1"


# --- paths that leave the folder ---------------------------------------------------------------------------------------


def test_relative_paths_stay_in_the_folder_unless_the_key_says_so(build: MakeDataset, tmp_path: Path) -> None:
    put(tmp_path, "elsewhere/a.jpg", "root/set/b.jpg", "root/c.jpg")
    rows = ["image,label,split", "../../elsewhere/a.jpg,0,train", "b.jpg,0,test", "../c.jpg,0,test"]
    write(tmp_path / "root/set/list.csv", *rows)
    keys = {"ROOT": str(tmp_path / "root"), "CSV__FILE": "set/list.csv"}
    with pytest.raises(UserError, match=r"list.csv, line 2: ../../elsewhere/a.jpg leaves .*DATASET.CSV.OUTSIDE True"):
        build("CSV", **keys)
    assert len(build("CSV", **keys, CSV__OUTSIDE=True).train_x) == 1
    write(tmp_path / "root/set/list.csv", rows[0], "b.jpg,0,train", rows[3])  # out of the folder, but not of ROOT
    assert len(build("CSV", **keys).test) == 1


def test_absolute_paths_outside_the_folder_are_counted(
    build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "elsewhere/a.jpg", "root/b.jpg")
    rows = [f"{tmp_path}/elsewhere/a.jpg,0,train", f"{tmp_path}/root/b.jpg,0,test"]
    write(tmp_path / "root/metadata.csv", "image,label,split", *rows)
    data = build("CSV", ROOT=str(tmp_path / "root"))
    assert data.train_x[0].impath == f"{tmp_path}/elsewhere/a.jpg"
    assert "Note: 1 images of" in capsys.readouterr().out
