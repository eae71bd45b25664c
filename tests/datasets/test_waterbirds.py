"""Waterbirds in the layout of its archive."""

from __future__ import annotations

from pathlib import Path

import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.waterbirds import ARCHIVE, HEADER, ROWS, tree
from tests.helpers.trees.writing import MakeDataset, groups, paths, write


@pytest.mark.parametrize(
    "place", [f"waterbirds/{ARCHIVE}", ARCHIVE, "waterbirds", "waterbirds_v1.0", f"cub/data/{ARCHIVE}"]
)
def test_every_place(build: MakeDataset, tmp_path: Path, place: str) -> None:
    tree(tmp_path / place)
    data = build("Waterbirds")
    assert paths(data.train_x, tmp_path / place) == [row.split(",")[1] for row in ROWS[:3]]
    assert paths(data.val, tmp_path / place) == ["002.Wren/W_0002.jpg"]
    assert [groups(split) for split in (data.train_x, data.val, data.test)] == [
        {(1, 1): 1, (1, 0): 1, (0, 0): 1},
        {(0, 1): 1},
        {(0, 1): 1, (1, 0): 1},
    ]
    assert data.classnames == ["landbird", "waterbird"] and data.attribute_names == ("land", "water")
    assert [d.classname for d in data.test] == ["landbird", "waterbird"] and data.has_attributes
    assert "forest" in " ".join(data.attribute_prompts[0]) and "ocean" in " ".join(data.attribute_prompts[1])


def test_the_archive_is_preferred_to_the_folder_around_it(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path / "waterbirds" / ARCHIVE)
    write(tmp_path / "waterbirds" / "metadata.csv", "something else")
    assert len(build("Waterbirds").train_x) == 3


def test_missing_files_show_tree_and_address(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        build("Waterbirds")
    text = str(error.value)
    assert text.startswith(f"Waterbirds: no metadata.csv in {tmp_path} (looked in waterbirds/{ARCHIVE}, {ARCHIVE}, ")
    assert f"\n  ROOT/waterbirds/{ARCHIVE}/\n    metadata.csv  " in text
    assert text.endswith("\nget it from https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("7,002.Wren/W_0003.jpg,0,2,2,x", "y 0, split 2, place 2 are out of range .*place below 2"),
        ("7,002.Wren/W_0003.jpg,2,2,0,x", "y 2, split 2, place 0 are out of range .*y below 2"),
        ("7,002.Wren/W_0003.jpg,0,3,0,x", "split 3.* out of range .*split 0 train, 1 val or 2 test"),
        ("7,002.Wren/W_0003.jpg,-1,2,0,x", "y -1"),
        ("7,../../etc/x.jpg,0,2,0,x", "../../etc/x.jpg leaves the folder"),
        ("7,002.Wren/W_0003.jpg,zero,2,0,x", "y, split and place must be whole numbers"),
        ("7,002.Wren/W_0003.jpg,0", "y, split and place must be whole numbers"),
    ],
)
def test_bad_values_name_file_and_line(build: MakeDataset, tmp_path: Path, row: str, message: str) -> None:
    path = tree(tmp_path / ARCHIVE, *ROWS, row)
    with pytest.raises(UserError, match=f"^{path}, line 8: .*{message}"):
        build("Waterbirds")


def test_missing_column_and_image(build: MakeDataset, tmp_path: Path) -> None:
    path = tree(tmp_path / ARCHIVE, header=HEADER.replace("place,", "ground,"))
    with pytest.raises(UserError, match=f"^{path}: column place is missing"):
        build("Waterbirds")
    tree(tmp_path / ARCHIVE)
    (path.parent / "002.Wren" / "W_0002.jpg").unlink()
    with pytest.raises(UserError, match=rf"^{path}, line 5 names .*W_0002\.jpg, which is missing; restore it"):
        build("Waterbirds")
