"""NICO++ in SubpopBench's layout, with and without its list."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.nicopp import CLASSES, CONTEXTS, COUNTS, tree
from tests.helpers.trees.writing import MakeDataset, groups, paths, write


@pytest.mark.parametrize("place", ["nicopp", "nicopp/track_1"])
def test_the_rule_on_sorted_names(build: MakeDataset, tmp_path: Path, place: str) -> None:
    tree(tmp_path / place)
    data = build("NICOpp")
    random.seed(666)
    expected: dict[str, int] = {}
    for group in (("autumn", "airplane"), ("dim", "hot_air_balloon"), ("dim", "airplane"), ("water", "airplane")):
        names = sorted(f"{group[0]}/{group[1]}/{i * 7 % 100:03d}.jpg" for i in range(COUNTS[group]))
        random.shuffle(names)
        size = min(75, len(names))
        expected |= {name: (1 if i < size // 3 else 2 if i < size else 0) for i, name in enumerate(names)}
    for number, split in enumerate((data.train_x, data.val, data.test)):
        got = paths(split, tmp_path / place / "public_dg_0416/train")
        assert set(got) == {name for name in expected if expected[name] == number} and len(got) == len(set(got))
        for datum, name in zip(split, got, strict=True):
            context, folder, _ = name.split("/")
            assert (datum.label, datum.attribute) == (CLASSES[folder], CONTEXTS.index(context))
    assert groups(data.train_x) == {(0, 0): 15, (1, 1): 5}
    assert groups(data.val) == {(0, 0): 25, (0, 1): 2, (1, 1): 25, (0, 5): 25}
    assert data.classnames == ["airplane", "hot air balloon"] and data.attribute_names == CONTEXTS
    assert len(data.attribute_prompts) == 6


def test_the_list_of_another_machine(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path / "nicopp")
    rows = [
        "/home/x/nicopp/public_dg_0416/train/autumn/airplane/000.jpg,0,0,0",
        "/home/x/nicopp/public_dg_0416/train/dim/hot_air_balloon/007.jpg,1,1,0",
        "/home/x/nicopp/public_dg_0416/train/dim/airplane/007.jpg,0,1,1",
        "/home/x/nicopp/public_dg_0416/train/water/airplane/007.jpg,0,5,2",
    ]
    path = write(tmp_path / "nicopp/metadata.csv", "filename,y,a,split", *rows)
    data = build("NICOpp")
    assert [groups(split) for split in (data.train_x, data.val, data.test)] == [
        {(0, 0): 1, (1, 1): 1},
        {(0, 1): 1},
        {(0, 5): 1},
    ]
    assert data.train_x[1].classname == "hot air balloon"
    write(path, "filename,y,a,split", rows[0].replace("0,0,0", "0,6,0"))
    with pytest.raises(UserError, match=f"^{path}, line 2: y 0, split 0, a 6 are out of range"):
        build("NICOpp")


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 0, "b": 2}', '{"a": 0, "b": 0}', '{"a": "0"}'])
def test_corrupt_classes(build: MakeDataset, tmp_path: Path, content: str) -> None:
    tree(tmp_path / "nicopp")
    path = write(tmp_path / "nicopp/dg_label_id_mapping.json", content)
    with pytest.raises(UserError, match=f"{path}: "):
        build("NICOpp")


def test_missing_files(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^NICOpp: no dg_label_id_mapping.json and public_dg_0416 in ") as error:
        build("NICOpp")
    assert "public_dg_0416/train/<context>/<class>/*.jpg" in str(error.value)
    write(tmp_path / "nicopp/dg_label_id_mapping.json", json.dumps(CLASSES))
    (tmp_path / "nicopp/public_dg_0416").mkdir()
    with pytest.raises(UserError, match="^NICOpp: no .jpg in "):
        build("NICOpp")
