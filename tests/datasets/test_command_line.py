"""Every data set through the command line, on its miniature tree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oodprompt import cli
from tests.helpers.trees import celeba, csv_file, metashift, nicopp, tiny_imagenet, urbancars, waterbirds
from tests.helpers.trees.writing import arguments, put

pytestmark = pytest.mark.usefixtures("undrawn")

FOLDERS = [
    f"{s}/{c}/{a}/{i}.jpg"
    for s in ("train", "val", "test")
    for c in ("cat", "dog")
    for a in ("in", "out")
    for i in "12"
]
CASES: dict[str, tuple[Callable[[Path], Any], list[str], dict[tuple[str, str], tuple[int, int]]]] = {
    # yaml file: (make the tree, keys, images of each group in testing and in training)
    "waterbirds": (
        lambda root: waterbirds.tree(root / "waterbirds" / waterbirds.ARCHIVE),
        [],
        {("landbird", "water"): (1, 0), ("waterbird", "land"): (1, 1)},
    ),
    "celeba": (
        lambda root: celeba.tree(root / "celeba"),
        [],
        {("dark hair", "male"): (1, 1), ("blond hair", "male"): (1, 1)},
    ),
    "metashift": (
        lambda root: metashift.tree(root / "metashift"),
        [],
        {("dog", "indoor"): (3, 7), ("dog", "outdoor"): (1, 7), ("cat", "indoor"): (2, 9), ("cat", "outdoor"): (3, 4)},
    ),
    "csv": (
        lambda root: csv_file.tree(root),
        ["DATASET.CSV.CLASSNAMES", "('cat', 'ant')"],
        {("cat", "outdoor"): (1, 1), ("ant", "indoor"): (1, 0)},
    ),
    "folders": (
        lambda root: put(root / "mine", *FOLDERS),
        ["DATASET.FOLDERS.DIR", "mine"],
        {(c, a): (2, 2) for c in ("cat", "dog") for a in ("in", "out")},
    ),
    "urbancars": (
        lambda root: urbancars.tree(root / "urbancars"),
        ["DATASET.URBANCARS.ATTRIBUTE", "object"],
        {
            ("urban car", "urban object"): (4, 4),
            ("urban car", "country object"): (4, 6),
            ("country car", "urban object"): (4, 12),
            ("country car", "country object"): (4, 14),
        },
    ),
    "photos_on_places": (
        tiny_imagenet.tree,
        [word for split in ("TRAIN", "VAL", "TEST") for word in (f"DATASET.PHOTOS.NUM_{split}", "8")],
        {("dog", "land"): (2, 4), ("dog", "water"): (2, 0), ("cat", "land"): (2, 0), ("cat", "water"): (2, 4)},
    ),
    "nicopp": (
        lambda root: nicopp.tree(root / "nicopp"),
        [],
        {
            ("airplane", "autumn"): (50, 15),
            ("airplane", "dim"): (5, 0),
            ("airplane", "water"): (50, 0),
            ("hot air balloon", "dim"): (50, 5),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("yaml", CASES)
def test_groups_of_a_run(tmp_path: Path, yaml: str) -> None:
    make, keys, expected = CASES[yaml]
    make(tmp_path / "data")
    cli.run(arguments(tmp_path / "data", tmp_path / "out", yaml, *keys))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {(g["class"], g["attribute"]): (g["num_samples"], g["num_train"]) for g in results["groups"]}
    assert found == expected
    assert results["num_samples"] == sum(count for count, _ in expected.values())
    assert results["worst_group_accuracy"] == min(g["accuracy"] for g in results["groups"])


def test_missing_files_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments(tmp_path, tmp_path / "out", "waterbirds")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Waterbirds: no metadata.csv in ") and "Traceback" not in error
    assert cli.main(arguments(tmp_path, tmp_path / "out", "spawrious")) == 2


def test_a_root_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = arguments(tmp_path, tmp_path / "out", "celeba")
    flags[flags.index("--root") + 1] = str(tmp_path / "none")
    assert cli.main(flags) == 2 and "--root: there is no folder" in capsys.readouterr().err
