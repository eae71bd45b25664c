"""The grid of the controlled evaluation: settings, validity, discovery beside its baselines, mitigation, one table."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from oodprompt.errors import UserError
from oodprompt.studies.evaluation import METHODS
from tests.helpers.digits import put_items
from tests.helpers.runs import load_script


@pytest.fixture(scope="module")
def idx_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of MNIST's form with a few items of each class."""
    folder = tmp_path_factory.mktemp("digits")
    put_items(folder, {"train": 12, "t10k": 12})
    return folder


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/ravl/controlled_eval.py")


def model(eps: tuple[float, float], worst: float, **precision: float) -> dict[str, Any]:
    keys = ("image_worst_group", "image_overall", "region_worst_group", "region_overall")
    return {"eps": list(eps), "precision": precision, "found": True, "attribute": "nine"} | dict.fromkeys(keys, worst)


def test_tables_average_over_seeds_then_settings(script: ModuleType) -> None:
    one, two, seeds = ("nine", 0.9), ("two", 0.9), [1, 2]
    models = {
        (one, 1): model((0.5, 0.5), 0.2, RaVL=1.0, Random=0.2),
        (one, 2): model((0.3, 0.25), 0.3, RaVL=0.8, Random=0.0),
        (two, 1): model((0.2, 0.9), 0.1, RaVL=0.5, Random=0.1),
        (two, 2): model((0.15, 0.9), 0.1, RaVL=0.5, Random=0.1),
    }
    table = script.discovery_table([one, two], models, seeds)
    mean, deviation = statistics.fmean([0.9, 0.5]), statistics.stdev([0.9, 0.5])
    row = next(line for line in table.splitlines() if "RaVL" in line)
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == [f"{mean:.2f} ± {deviation:.2f}", "0.90", "-", "-"]  # above 10, 20, 30 and 40 points
    rows = {"standard": [models[one, 1], models[two, 1]], "RaVL": [model((0, 0), 0.6), model((0, 0), 0.3)]}
    row = next(line for line in script.mitigation_table(rows).splitlines() if "RaVL" in line)
    gain = f"{statistics.fmean([40, 20]):.1f} ± {statistics.stdev([40, 20]):.1f}"
    assert [cell.strip() for cell in row.split("|")[2:-1]][-1] == gain


def test_grid_runs_and_goes_on_where_it_was(
    script: ModuleType,
    idx_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [
        "--root",
        str(idx_root),
        "--out",
        str(tmp_path),
        "--targets",
        "nine",
        "--seeds",
        "1",
        "--train",
        "120",
        "--evaluation",
        "40",
    ]
    words += ["--methods", "upsampled", "RaVL", "--jobs", "1", "OPTIM.MAX_EPOCH", "1", "DISCOVERY.THRESHOLD", "-1"]
    monkeypatch.setattr(script, "is_valid", lambda eps, tau=0.1: True)  # so short a training learns nothing
    script.run(words)
    results = json.loads((tmp_path / "results.json").read_text())
    (standard,) = results["models"]
    assert standard["target"] == "nine" and set(standard["precision"]) > {"RaVL", "Random", "George (prediction image)"}
    assert 0 <= standard["image_worst_group"] <= standard["image_overall"] <= 1
    if standard["found"]:
        assert {row["method"] for row in results["mitigations"]} == {"upsampled", "RaVL"}
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/*/measured.json")}
    capsys.readouterr()
    script.run(words)
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "ravel"], "--methods: 'ravel' is none of"),
        (["--jobs", "0"], "--jobs"),
        (["--targets", "ten"], "ten"),
        (["--v", "1.5"], "1.5"),
        (["--mitigation-seeds", "7"], "must be among --seeds"),
        (["--root", "nowhere"], "nowhere"),
    ],
)
def test_wrong_words(script: ModuleType, idx_root: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        script.run(["--root", str(idx_root), "--out", str(tmp_path), "--train", "40", "--evaluation", "40", *words])


def test_methods_are_those_of_the_paper() -> None:
    assert list(METHODS) == ["standard", "upsampled", "VL-ERM", "VL-GDRO", "RaVL"]
