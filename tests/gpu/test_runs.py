"""Whole runs on a GPU: against the CPU, resumed on either device, twice the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oodprompt import cli
from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer
from tests.helpers.devices import using
from tests.helpers.runs import Arguments, Run, interrupted_at, weights

pytestmark = pytest.mark.gpu

FP32 = ("TRAINER.PREC", "fp32", "TRAIN.TF32", "none")
ANCHORED = ("TRAINER.COOPOOD.ANCHOR", "attributes")
METHODS = ["CoOp", "MaPLe", "CoOpOOD"]
# Without deterministic kernels two runs on a GPU may differ by rounding, which training carries on.
ROUNDING = {"fp32": 1e-4, "amp": 1e-2}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all values of two models, on the CPU; values above 1 count by their share."""
    assert one and one.keys() == other.keys()
    pairs = [(one[key].double().cpu(), other[key].double().cpu()) for key in one]
    return max(((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in pairs if a.numel())


def interrupted(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """Run until the middle of the second epoch."""
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "forward_backward", interrupted_at(1, 1))
        with pytest.raises(KeyboardInterrupt):
            cli.run(words)


@pytest.mark.parametrize(
    ("method", "keys"), [("CoOp", ()), ("MaPLe", ("OPTIM.MAX_EPOCH", 2)), ("CoOpOOD", ANCHORED)], ids=METHODS
)
def test_a_run_is_that_of_the_cpu(run: Run, tmp_path: Path, device: str, method: str, keys: tuple[Any, ...]) -> None:
    """Within 1 of 24 test images, and 1 % of every epoch's loss; models within 0.001."""
    with using("cpu"):
        want = run(method, "cpu", *keys, *FP32)
    with using(device):
        got = run(method, "gpu", *keys, *FP32)
    assert abs(got["accuracy"] - want["accuracy"]) < 1.5 / 24
    epoch = int(keys[1]) if "OPTIM.MAX_EPOCH" in keys else 3
    histories = []
    for name in ("cpu", "gpu"):
        file = next((tmp_path / name).glob(f"*/{checkpoint.file_of('', '', epoch).name}"))
        histories.append([row["loss"] for row in checkpoint.load(file)["oodprompt"]["history"]])
    assert len(histories[0]) == epoch and histories[1] == pytest.approx(histories[0], rel=0.01)
    assert largest_difference(weights(tmp_path / "gpu", epoch), weights(tmp_path / "cpu", epoch)) < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize(("method", "keys"), [("CoOp", ()), ("CoOpOOD", ANCHORED)], ids=["CoOp", "CoOpOOD"])
def test_a_resumed_run_ends_where_the_unbroken_one_ends(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    method: str,
    keys: tuple[Any, ...],
    precision: str,
) -> None:
    keys = (*keys, "TRAINER.PREC", precision)
    with using(device):
        cli.run(arguments(method, "unbroken", *keys))
        interrupted(monkeypatch, arguments(method, "broken", *keys))
        cli.run(arguments(method, "broken", *keys))
    assert "resuming after epoch 1 of 3" in (tmp_path / "broken" / "log.txt").read_text()
    unbroken, broken = (weights(tmp_path / name, 3) for name in ("unbroken", "broken"))
    assert largest_difference(broken, unbroken) <= (0 if device == "cpu" else ROUNDING[precision])


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_run_goes_on_on_another_device(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, first: str
) -> None:
    devices = ("cpu", device) if first == "cpu" else (device, "cpu")
    with using("cpu"):
        cli.run(arguments("CoOpOOD", "unbroken", *ANCHORED, *FP32))
    with using(devices[0]):
        interrupted(monkeypatch, arguments("CoOpOOD", "broken", *ANCHORED, *FP32))
    with using(devices[1]):
        cli.run(arguments("CoOpOOD", "broken", *ANCHORED, *FP32))
    assert "resuming after epoch 1 of 3" in (tmp_path / "broken" / "log.txt").read_text()
    assert largest_difference(weights(tmp_path / "broken", 3), weights(tmp_path / "unbroken", 3)) < 1e-3


@pytest.mark.parametrize("method", ["CoOp", "MaPLe", "RaVL"])
def test_deterministic_runs_are_the_same_bit_for_bit(run: Run, tmp_path: Path, device: str, method: str) -> None:
    found = ("DISCOVERY.THRESHOLD", -1.0, "DISCOVERY.BOTH_SIGNS", False, "DISCOVERY.K_RANGE", "(4, 6)")
    keys = ("TRAIN.DETERMINISTIC", True, "TRAINER.PREC", "amp", "DISCOVERY.EPOCHS", 1, *found)
    with using(device):
        results = [run(method, name, *keys) for name in ("one", "two")]
    one, two = (weights(tmp_path / name, 3) for name in ("one", "two"))
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert json.dumps(results[0]["groups"]) == json.dumps(results[1]["groups"])
