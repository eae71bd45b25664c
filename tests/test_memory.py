"""Memory that runs out, a GPU's or the machine's, ends a command in one line that says what to lower."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from oodprompt import cli, discovering, predict
from oodprompt.discovery import run as discovery_run
from oodprompt.engine import first_stage
from oodprompt.engine.objective import Objective
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.memory import memory_for
from oodprompt.runs import benchmark
from tests.helpers.runs import CONFIG, SMALL, Arguments, assert_same_outcome

GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.23 GiB is free. "
    "Including non-PyTorch memory, this process has 77.87 GiB memory in use."
)


def too_much(*_: Any, **__: Any) -> NoReturn:
    """As a GPU says it."""
    raise torch.cuda.OutOfMemoryError(GPU)


def too_much_for_the_machine(*_: Any, **__: Any) -> torch.Tensor:
    """Asks for more than any machine has."""
    return torch.empty(2**50)


def fails_at(epoch: int, batch: int, how: Callable[..., Any]) -> Callable[..., Any]:
    """``PromptTrainer.forward_backward``, but for that batch."""
    step = PromptTrainer.forward_backward
    return lambda self, data: how() if (self.epoch, self.batch_idx) == (epoch, batch) else step(self, data)


@pytest.mark.parametrize(
    ("how", "whose"),
    [
        (too_much, r"the GPU's memory ran out \(asked for 2.50 GiB\)"),
        (too_much_for_the_machine, r"memory ran out \(.*\)"),
    ],
)
def test_in_training_the_line_says_what_the_same_run_may_lower(
    how: Callable[..., Any],
    whose: str,
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(arguments("CoOpOOD", "whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "forward_backward", fails_at(1, 2, how))
        assert cli.main(arguments("CoOpOOD", "broken")) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: {whose} in epoch 2, batch 3\. Lower TRAIN.ACTIVATION_GIB \(now 4.0\) and rerun the same command, which goes "
        r"on after epoch 1\. To lower DATALOADER.TRAIN_X.BATCH_SIZE \(now 16\), choose another --output-dir\n",
        line,
    )
    assert (tmp_path / "broken" / "log.txt").read_text().endswith(line)
    assert cli.main(arguments("CoOpOOD", "broken", "TRAIN.ACTIVATION_GIB", 2)) == 0
    assert_same_outcome(tmp_path / "whole", tmp_path / "broken", (3,))


def test_ahead_of_the_first_checkpoint_everything_may_be_lowered(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptTrainer, "forward_backward", fails_at(0, 0, too_much))
    keys = ["--base", "MaPLe", "DISCOVERY.EPOCHS", 1, "DISCOVERY.THRESHOLD", -1.0, "DISCOVERY.BOTH_SIGNS", False]
    with pytest.raises(UserError, match=r"in epoch 1, batch 1\. Lower .*BATCH_SIZE \(now 16\) or REGIONS.GRID \(now"):
        cli.run(arguments("RaVL", "out", *keys))


STAGES: dict[str, tuple[list[Any], Any, str, Any, str]] = {
    "features": (["CoOp"], Encoder, "encode_image", too_much, "while computing: Features of training images, view 1/1"),
    "evaluation": (["CoOp"], Objective, "predictions", too_much, "while evaluating the val split"),
    "first stage": (
        ["JTT"],
        first_stage,
        "Objective",
        lambda *_, **__: too_much,
        "in epoch 1 of the first stage, batch 1",
    ),
    "discovery": (["RaVL", "DISCOVERY.EPOCHS", 1], discovery_run, "discover", too_much, "in discovery"),
    "elsewhere": (["CoOp"], PromptTrainer, "save_config", too_much, ""),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_line_says_what_was_being_done(
    stage: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, owner, name, how, what = STAGES[stage]
    monkeypatch.setattr(owner, name, how)
    assert cli.main(arguments(words[0], "out", *words[1:])) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(rf"error: the GPU's memory ran out \(asked for 2.50 GiB\){what and ' '}{what}\. .*\n", line)
    expected = {"discovery": "REGIONS.GRID", "elsewhere": "smaller batches", "first stage": "TRAIN_X.BATCH_SIZE"}
    assert expected.get(stage, r"Lower DATALOADER.TEST.BATCH_SIZE (now ") in line


def test_predictions_and_discovery_of_a_trained_model(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("CoOp", "out", "OPTIM.MAX_EPOCH", 1)
    Image.new("RGB", (48, 48)).save(tmp_path / "image.png")
    words = ["--model-dir", str(tmp_path / "out"), "--output", str(tmp_path / "a.csv"), str(tmp_path / "image.png")]
    encode, seen = Encoder.encode_image, []

    def one_by_one(self: Encoder, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(images))
        return encode(self, images, *rest) if self.cfg.DATALOADER.TEST.BATCH_SIZE == 1 else too_much()

    monkeypatch.setattr(Encoder, "encode_image", one_by_one)
    assert predict.main(words) == 2
    assert "while classifying images. Lower" in capsys.readouterr().err
    assert predict.main(["--batch-size", "1", *words]) == 0 and seen[-1] == 1
    assert discovering.main(["--model-dir", str(tmp_path / "out")]) == 2
    assert re.fullmatch(r"error: the GPU's memory ran out .*\n", capsys.readouterr().err)


def test_a_grid_reports_the_line_of_its_run(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PromptTrainer, "forward_backward", fails_at(0, 0, too_much))
    flags = ["--trainers", "CoOp", "--config-file", CONFIG, "--root", str(data_root), "--out", str(tmp_path / "grid")]
    assert benchmark.main([*flags, "--seeds", "1", "--opts", *SMALL]) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert (
        len(failed) == 1
        and "seed1: error: the GPU's memory ran out (asked for 2.50 GiB) in epoch 1, batch 1" in failed[0]
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            MemoryError("Unable to allocate 3.2 GiB for an array"),
            r"memory ran out \(asked for 3.2 GiB\) here\. Lower it",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
            "the GPU's memory ran out here. Lower it",
        ),
        (RuntimeError("CUDA error: out of memory"), "the GPU's memory ran out here. Lower it"),
    ],
)
def test_every_way_to_say_so_is_known(error: Exception, line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}$"), memory_for("here", "Lower it"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$"), memory_for("here", "Lower it"):
        raise RuntimeError("shapes differ")
