"""The precision in force and the kind of device are in checkpoints: what a resumed run makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oodprompt import cli
from oodprompt.engine import assembly, checkpoint
from oodprompt.errors import UserError
from tests.helpers.runs import Arguments

ONE = ["OPTIM.MAX_EPOCH", 2]


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, fp16 is in force where it is asked for, as on a GPU."""
    return lambda: monkeypatch.setattr(assembly, "COMPUTES_IN_FP16", ["cuda", "cpu"])


def changed(folder: Path, **facts: Any) -> None:
    """Change what the newest checkpoint, which becomes that of the first epoch, says of its run; None: it says nothing."""
    (file,) = folder.glob("*/model.pth.tar-2")
    content = checkpoint.load(file)
    content["epoch"] = 1
    for name, value in facts.items():
        if value is None:
            del content["oodprompt"][name]
        else:
            content["oodprompt"][name] = value
    content["oodprompt"]["history"] = content["oodprompt"]["history"][:1]
    file.unlink()
    checkpoint.save(content, file.with_name("model.pth.tar-1"))
    checkpoint.write_pointer(file.with_name("model.pth.tar-1"))
    (folder / "results.json").unlink()


def test_from_the_cpu_to_a_gpu_that_computes_in_fp16_is_refused(
    arguments: Arguments, tmp_path: Path, with_gpu: Callable[[], None]
) -> None:
    cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "fp16"))
    changed(tmp_path / "out")
    with_gpu()
    with pytest.raises(UserError, match=r"trained in fp32, and .* in fp16 now\..* add TRAINER.PREC fp32$"):
        cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "fp16"))
    cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "fp32"))  # as the message says
    assert "resuming after epoch 1" in (tmp_path / "out" / "log.txt").read_text()


def test_from_a_gpu_in_fp16_to_the_cpu_is_refused(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(assembly, "COMPUTES_IN_FP16", ["cpu"])
        cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "amp"))
    changed(tmp_path / "out", device="cuda")
    with pytest.raises(
        UserError, match=r"trained in amp \(on a GPU\), and the CPU .* fp32 now.* use a GPU, which comp"
    ):
        cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "amp"))


@pytest.mark.parametrize("scaler", [{}, {"scale": 2.0**16}], ids=["begun on the CPU", "begun on a GPU"])
def test_older_checkpoints_tell_by_the_state_of_the_scaler(
    scaler: dict[str, float], arguments: Arguments, tmp_path: Path, with_gpu: Callable[[], None]
) -> None:
    cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "fp16"))
    changed(tmp_path / "out", precision=None, device=None, scaler=scaler)
    if not scaler:
        with_gpu()
    with pytest.raises(UserError, match=f"trained in {'fp16' if scaler else 'fp32'}, "):
        cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "fp16"))


def test_older_checkpoints_go_on_in_their_precision_alone(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "out", *ONE))
    changed(tmp_path / "out", precision=None, device=None)
    with pytest.raises(UserError, match="TRAINER.PREC was '.*', now 'bf16'"):
        cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "bf16"))
    cli.run(arguments("CoOp", "out", *ONE))
    assert "resuming after epoch 1" in (tmp_path / "out" / "log.txt").read_text()


def test_another_device_in_the_same_precision_goes_on_with_a_line(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "fp32"))
    changed(tmp_path / "out", device="cuda")
    cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "fp32", "USE_CUDA", False))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(re.findall("Note: the epochs so far were trained on a GPU, the others are on the CPU", log)) == 1


def test_another_precision_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "out", *ONE))
    changed(tmp_path / "out")
    with pytest.raises(UserError, match=r"trained in fp32, .* in bf16 now.*add TRAINER.PREC fp32$"):
        cli.run(arguments("CoOp", "out", *ONE, "TRAINER.PREC", "bf16"))


def test_a_model_that_is_evaluated_in_another_precision_is_noted(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "out", *ONE))
    cli.run(arguments("CoOp", "bf16", "--eval-only", "--model-dir", tmp_path / "out", "TRAINER.PREC", "bf16"))
    log = (tmp_path / "bf16" / "log.txt").read_text()
    assert "Note: prompt_learner was trained in fp32, and this run computes in bf16" in log
