"""scripts/maintain/golden.py compare: green for equal golden runs, red for any bit that differs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.runs import REPOSITORY, load_script

LOG = "** Output: x\nepoch [1/1] batch [2/2] time 0.1 (0.2) data 0.0 loss 2.5 (2.5) lr 1e-3 eta 0:00:01\n* accuracy: 68.5%\n"


@pytest.fixture
def golden(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts" / "maintain"))
    return load_script("scripts/maintain/golden.py")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of one golden run, equal but for where they are and how long they took."""
    for name, seconds in (("before", 1.0), ("after", 2.0)):
        run = tmp_path / name / "CoOp"
        (run / "prompt_learner").mkdir(parents=True)
        file = run / "prompt_learner" / "model.pth.tar-1"
        results = {"accuracy": 0.685, "gap": float("nan"), "time": {"train_s": seconds}, "checkpoint": str(file)}
        (run / "results.json").write_text(json.dumps(results))
        (run / "discovery.json").write_text(json.dumps({"title": f"Sentence {seconds}", "format": "discovery"}))
        (run / "log.txt").write_text(LOG.replace("0.1 (0.2)", f"{seconds} ({seconds})"))
        (run / "predictions.csv").write_text(f"image,prediction\n{run}/0.png,circle\n")
        (run / "finished").touch()
        np.savez(run / "discovery.npz", influence=np.array([0.5, np.nan]))
        engine = {"config": {"SEED": 1}, "history": [{"epoch": 1}], "train_seconds": seconds}
        state = {"state_dict": {"ctx": torch.tensor([1.0, float("nan")])}, "epoch": 1, "optimizer": {"lr": 0.1}}
        torch.save({**state, "oodprompt": engine}, file)
    return tmp_path / "before", tmp_path / "after"


@pytest.fixture
def outcome(
    golden: ModuleType,
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[[], tuple[int, str]]:
    """The exit status of the command, and what it prints."""

    def run() -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["golden.py", "compare", *map(str, folders)])
        return golden.main(), capsys.readouterr().out

    return run


def rewrite_checkpoint(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "CoOp" / "prompt_learner" / "model.pth.tar-1"
    state = torch.load(file)
    change(state)
    torch.save(state, file)


def test_equal_but_for_times_places_and_wording(outcome: Callable[[], tuple[int, str]]) -> None:
    status, text = outcome()
    assert status == 0 and "| CoOp | 6 |" in text and "| equal |" in text
    assert "Note: the wording of title in discovery.json differs (CoOp)" in text


def flip_bit(state: dict[str, Any]) -> None:
    state["state_dict"]["ctx"].view(torch.int32)[0] ^= 1


CHECKPOINTS = {
    "state_dict.ctx": flip_bit,
    "oodprompt.history[0].epoch": lambda state: state["oodprompt"]["history"][0].update(epoch=2),
    "oodprompt.config.SEED": lambda state: state["oodprompt"]["config"].update(SEED=2),
    "optimizer.lr": lambda state: state["optimizer"].update(lr=0.1000001),
    "state_dict.bias is new": lambda state: state["state_dict"].update(bias=torch.zeros(1)),
}


@pytest.mark.parametrize("place", CHECKPOINTS)
def test_a_checkpoint_that_differs(
    place: str, outcome: Callable[[], tuple[int, str]], folders: tuple[Path, Path]
) -> None:
    rewrite_checkpoint(folders[1], CHECKPOINTS[place])
    status, text = outcome()
    assert status == 1 and f"prompt_learner/model.pth.tar-1: {place}" in text


def test_a_precision_that_differs(outcome: Callable[[], tuple[int, str]], folders: tuple[Path, Path]) -> None:
    rewrite_checkpoint(folders[1], lambda s: s["state_dict"].update(ctx=s["state_dict"]["ctx"].double()))
    assert outcome()[0] == 1


def test_a_new_config_key_is_a_note(outcome: Callable[[], tuple[int, str]], folders: tuple[Path, Path]) -> None:
    rewrite_checkpoint(folders[1], lambda state: state["oodprompt"]["config"].update(NEW=0))
    status, text = outcome()
    assert status == 0 and "Note: config key NEW is new (CoOp)" in text


TEXTS = {
    "results.json": ("0.685", "0.68500001"),
    "log.txt": ("68.5%", "68.6%"),
    "predictions.csv": ("circle", "diamond"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_metric_or_a_prediction_that_differs(
    name: str, outcome: Callable[[], tuple[int, str]], folders: tuple[Path, Path]
) -> None:
    file = folders[1] / "CoOp" / name
    file.write_text(file.read_text().replace(*TEXTS[name]))
    status, text = outcome()
    assert status == 1 and f"| {name}: " in text


def test_an_array_that_differs(outcome: Callable[[], tuple[int, str]], folders: tuple[Path, Path]) -> None:
    np.savez(folders[1] / "CoOp" / "discovery.npz", influence=np.array([0.5, 0.25]))
    assert outcome()[0] == 1


@pytest.mark.parametrize("name", ["results.json", "prompt_learner/model.pth.tar-1", "finished"])
def test_a_missing_file(name: str, outcome: Callable[[], tuple[int, str]], folders: tuple[Path, Path]) -> None:
    (folders[1] / "CoOp" / name).unlink()
    assert outcome()[0] == 1


def test_a_missing_run(outcome: Callable[[], tuple[int, str]], folders: tuple[Path, Path]) -> None:
    shutil.rmtree(folders[1] / "CoOp")
    assert outcome()[0] == 1


def test_a_killed_run_may_lack_the_line_of_an_epoch(golden: ModuleType) -> None:
    compare = sys.modules["golden_compare"]
    whole = ["epoch [1/2] loss 2", "epoch [2/2] loss 1", "* accuracy: 68.5%"]
    torn = ["epoch [2/2] loss 1", "* accuracy: 68.5%"]
    assert compare.common_epochs(whole, torn) == (torn, torn)
    assert compare.common_epochs(whole, ["epoch [2/2] loss 3", torn[1]])[1] != torn
