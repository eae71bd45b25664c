"""What the data sets share: csv rows, listing, setting validation images aside, numbering attributes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from oodprompt.datasets.file_lists import number_attributes, sorted_values, split_off_validation

from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import image_names
from oodprompt.data.tables import read_rows
from oodprompt.errors import UserError
from tests.helpers.trees.writing import put, write


def data(tmp_path: Path, labels: list[int], attributes: list[int] | None = None) -> list[Datum]:
    put(tmp_path, *(f"{i}.jpg" for i in range(len(labels))))
    attributes = attributes or [0] * len(labels)
    return [
        Datum(str(tmp_path / f"{i}.jpg"), y, 0, "", a) for i, (y, a) in enumerate(zip(labels, attributes, strict=True))
    ]


def config(**keys: object) -> object:
    cfg = get_cfg_default()
    for key, value in keys.items():
        set_key(cfg, key if key == "SEED" else f"DATASET.{key}", value, "test")
    return cfg


def test_rows_in_any_column_order_with_quotes_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "c, a ,b", '1,"x, y",2', "", "3,,4", encoding="utf-8-sig")
    assert list(read_rows(path, ("a", "c"))) == [(2, ["x, y", "1"]), (4, ["", "3"])]
    assert list(read_rows(path, ("c",), ("b", "absent"))) == [(2, ["1", "2", ""]), (4, ["3", "4", ""])]


@pytest.mark.parametrize("row", ["1,2,3,4", "1,2"])
def test_rows_of_the_wrong_length(tmp_path: Path, row: str) -> None:
    path = write(tmp_path / "a.csv", "a,b,c", "1,2,3", row)
    with pytest.raises(
        UserError, match=f"^{path}, line 3 has {len(row.split(','))} fields and the header 3; put values"
    ):
        list(read_rows(path, ("a",)))
    assert list(read_rows(path, ("c",), strict=False))[1] == (3, ["3" if len(row) > 3 else ""])


def test_rows_without_a_column_or_a_readable_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a:b", "1:2")
    with pytest.raises(UserError, match=f"^{path}: column a, b is missing; expected a, b, found a:b$"):
        list(read_rows(path, ("a", "b")))
    with pytest.raises(UserError, match="found nothing"):
        list(read_rows(write(tmp_path / "b.csv"), ("a",)))
    path.write_bytes(b"a,b\n\xff\xfe,\n")
    with pytest.raises(UserError, match=f"^{path} is not a csv file"):
        list(read_rows(path, ("a",)))
    with pytest.raises(UserError, match=f"^cannot read {tmp_path}: Is a directory"):
        list(read_rows(tmp_path, ("a",)))


def test_images_are_listed_by_name_and_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, "b.JPG", "a.png", "c.jpeg", "._a.jpg", "notes.txt", "Thumbs.db")
    assert image_names(tmp_path) == ["a.png", "b.JPG", "c.jpeg"]
    assert image_names(tmp_path, (".jpg",)) == ["b.JPG"]


def test_validation_is_a_share_of_every_class_in_file_order(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train = data(tmp_path, [0] * 20 + [1] * 10 + [2] * 4 + [3])
    rest, val = split_off_validation(config(VAL_PERCENT=0.2), "My data", train)
    assert Counter(d.label for d in val) == {0: 4, 1: 2, 2: 1}
    assert Counter(d.label for d in rest) == {0: 16, 1: 8, 2: 3, 3: 1}
    assert sorted(rest + val, key=train.index) == train
    assert [rest, val] == [sorted(part, key=train.index) for part in (rest, val)]
    line = "My data has no validation images: 7 of 35 training images are set aside (DATASET.VAL_PERCENT 0.2"
    assert capsys.readouterr().out.startswith(line)


def test_validation_does_not_depend_on_seed_or_attribute(tmp_path: Path) -> None:
    labels = [0, 1] * 15
    drawn = [
        [d.impath for d in split_off_validation(config(SEED=seed), "", data(tmp_path, labels, attributes))[1]]
        for seed, attributes in ((1, None), (2, [0] * 15 + [1] * 15))
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 4
    assert drawn[0] != [d.impath for d in data(tmp_path, labels)[:4]]


@pytest.mark.parametrize(("share", "held_out"), [(0.0, 0), (0.99, 8)])
def test_extreme_shares(tmp_path: Path, share: float, held_out: int) -> None:
    rest, val = split_off_validation(config(VAL_PERCENT=share), "", data(tmp_path, [0] * 5 + [1] * 5))
    assert len(val) == held_out and {d.label for d in rest} == {0, 1}


def test_numbers_sort_as_numbers() -> None:
    assert sorted_values({"10", "9", "1"}) == ["1", "9", "10"]
    assert sorted_values({"10", "9", "b"}) == ["10", "9", "b"]


def test_names_of_attributes(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"b", "a"}
    assert number_attributes(config(), Path("f"), values) == ({"a": 0, "b": 1}, ("a", "b"))
    renamed = config(ATTRIBUTE_NAMES=("x", "y"))
    assert number_attributes(renamed, Path("f"), values) == ({"a": 0, "b": 1}, ("x", "y"))
    ordered = config(ATTRIBUTE_NAMES=("b", "a", "c"))
    assert number_attributes(ordered, Path("f"), values) == ({"b": 0, "a": 1, "c": 2}, ("b", "a", "c"))
    assert number_attributes(renamed, Path("f"), set())[1] == ("x", "y")
    assert capsys.readouterr().out == "Attribute values by DATASET.ATTRIBUTE_NAMES: a is called x, b is called y\n"
    with pytest.raises(UserError, match="ATTRIBUTE_NAMES has x; a, but f has a; b: give exactly these"):
        number_attributes(config(ATTRIBUTE_NAMES=("x", "a")), Path("f"), values)
    with pytest.raises(UserError, match="ATTRIBUTE_NAMES has 2 names, but f has 3 attribute values: a; b; c"):
        number_attributes(renamed, Path("f"), {"a", "b", "c"})
