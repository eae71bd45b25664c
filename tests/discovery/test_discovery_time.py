"""The benchmark of discovery: columns, comparison with a reference, errors in one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from oodprompt.errors import UserError
from tests.helpers.runs import load_script

FOLDER = Path(__file__).resolve().parents[2] / "speed"
SMALL = ["--regions", "300", "--dim", "16", "--centres", "6", "--k-min", "4", "--k-max", "7", "--repeats", "1"]


@pytest.fixture
def discovery_time(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script("speed/discovery_time.py")


def answer(medoids: dict[str, list[int]], **more: Any) -> dict[str, Any]:
    times = {"distances_s": 1.0, "sweep_s": 1.0, "total_s": 2.0, "peak_mib": 10.0}
    return {**times, "k": 2, "silhouette": 0.5, "objective": 1.0, "medoids": medoids} | more


def test_a_line_has_the_columns(discovery_time: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    discovery_time.run([*SMALL, "--seed", "3"])
    (case,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert tuple(case) == tuple(c for c in discovery_time.COLUMNS if "reference" not in c)[: len(case)]
    assert case.items() >= {"regions": 300, "dim": 16, "k_min": 4, "k_max": 7, "seed": 3, "threads": 1}.items()
    assert 4 <= case["k"] <= 7 and -1 < case["silhouette"] < 1 and case["objective"] > 0 and case["peak_mib"] > 20
    assert 0 < case["distances_s"] + case["sweep_s"] <= case["total_s"]


def test_reference_in_turns(
    discovery_time: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import step_time

    answers = {
        "--case": [answer({"4": [0, 1, 2, 3]}, sweep_s=s, total_s=s + 1) for s in (3.0, 1.0, 2.0)],
        "--reference-case": [answer({"4": [0, 1, 2, 3]}, sweep_s=s, total_s=s + 1) for s in (41.0, 39.0, 40.0)],
    }
    asked = []

    def run_apart(command: list[str], threads: int) -> dict[str, Any]:
        asked.append((command[0], command[2], threads))
        assert np.load(json.loads(command[3])["features"]).shape == (300, 16)
        return answers[command[2]].pop(0)

    monkeypatch.setattr(step_time, "run_apart", run_apart)
    discovery_time.run([*SMALL[:-2], "--repeats", "3", "--threads", "2", "--reference", "sh"])
    assert asked == [(sys.executable, "--case", 2), ("sh", "--reference-case", 2)] * 3
    case = json.loads(capsys.readouterr().out)
    assert tuple(case) == discovery_time.COLUMNS
    assert (case["sweep_s"], case["reference_sweep_s"], case["ratio"], case["ratio_with_distances"]) == (
        2,
        40,
        20,
        13.67,
    )
    assert case["no_worse"] == {"4": True} and case["worst_excess"] == 0


def test_objectives_are_compared_on_one_matrix(discovery_time: ModuleType) -> None:
    features = np.repeat(np.eye(3, dtype=np.float32), [4, 2, 1], axis=0)
    good, bad = [0, 4], [0, 6]  # leaves out the one region, or the two
    compared = discovery_time.compare(features, answer({"2": bad, "3": [0, 4, 6]}), answer({"2": good, "3": [0, 1, 4]}))
    assert compared == {"no_worse": {"2": False, "3": True}, "worst_excess": 1.0}
    assert discovery_time.compare(features, answer({"2": good}), answer({"2": bad}))["worst_excess"] == -0.5


def test_made_regions(discovery_time: ModuleType) -> None:
    made = discovery_time.make_regions(500, 64, 5, 0.3, seed=1)
    assert made.shape == (500, 64) and made.dtype == np.float32
    assert np.allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
    assert np.array_equal(made, discovery_time.make_regions(500, 64, 5, 0.3, seed=1))
    assert not np.array_equal(made, discovery_time.make_regions(500, 64, 5, 0.3, seed=2))
    similarity = made @ made.T
    np.fill_diagonal(similarity, 0)
    assert similarity.max(axis=1).min() > 0.85 and 0.2 < np.median(similarity) < 0.7  # of one centre; of all


@pytest.mark.parametrize(
    "words, message",
    [
        (["--k-min", "1"], "--k-min 1"),
        (["--k-max", "3"], "--k-max 3"),
        (["--regions", "300", "7"], "k-max < regions"),
        (["--repeats", "0"], "--repeats 0"),
        (["--dim", "0"], "--dim 0"),
        (["--reference", "no-such-python"], "--reference no-such-python"),
    ],
)
def test_what_cannot_run_is_refused_first(discovery_time: ModuleType, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        discovery_time.run([*SMALL, *words])


def test_a_reference_that_fails_is_an_error(discovery_time: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    discovery_time.run([*SMALL, "--reference", sys.executable])
    case = json.loads(capsys.readouterr().out)
    assert case["error"].startswith("reference: ") and "sklearn_extra" in case["error"] and "ratio" not in case
