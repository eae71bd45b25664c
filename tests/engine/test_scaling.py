"""Loss scaling: gradients in fp16, steps that are skipped, and the scale in checkpoints. Torch's CPU computes it here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oodprompt import cli
from oodprompt.engine import assembly, checkpoint
from oodprompt.engine.trainer import PromptTrainer
from tests.helpers.runs import Arguments, Build, assert_same_outcome, interrupted_at, weights

AMP = ["TRAINER.PREC", "amp", "OPTIM.LR", 0.02, "OPTIM.WARMUP_EPOCH", -1]
FEW = ["DATASET.SHAPES.NUM_TRAIN", 32, "DATASET.SHAPES.NUM_VAL", 8, "DATASET.SHAPES.NUM_TEST", 8]
CASES = {
    "CoOp": ["CoOp", "OPTIM.NAME", "adam"],
    "MaPLe": ["MaPLe", *FEW, "INPUT.TRANSFORMS", "('random_flip', 'normalize')"],
    "two models": ["CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes"],
}
CTX = "prompt_learner.ctx"


@pytest.fixture(autouse=True)
def _fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "COMPUTES_IN_FP16", ["cuda", "cpu"])


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """``overflow(epoch, batch)``: the gradients of that step are infinite, as where fp16 does not hold them."""

    def at(epoch: int, batch: int) -> None:
        update = PromptTrainer.forward_backward

        def step(self: PromptTrainer, data: dict[str, Any]) -> dict[str, torch.Tensor]:
            if (self.epoch, self.batch_idx) != (epoch, batch):
                return update(self, data)
            with monkeypatch.context() as patch:
                backward = self.learner.backward
                patch.setattr(
                    self.learner, "backward", lambda loss, *rest: backward(loss * torch.tensor(torch.inf), *rest)
                )
                patch.setattr(self, "detect_anomaly", lambda loss: None)
                return update(self, data)

        monkeypatch.setattr(PromptTrainer, "forward_backward", step)

    return at


def started(build: Build, *keys: Any) -> PromptTrainer:
    trainer = build(*keys)
    trainer.before_train()
    trainer.epoch = 0
    trainer.before_epoch()
    trainer.num_batches = len(trainer.encoder.batches("train"))
    return trainer


def test_towers_compute_in_fp16_and_losses_are_scaled(build: Build) -> None:
    trainer = started(build, "CoOp", *AMP)
    assert trainer.precision == "amp" and trainer.trained.scaler.is_enabled()
    z = torch.zeros(1, trainer.clip.shape.embed_dim)
    half, full = trainer.encoder.align({"image_features": z}), trainer.learner(z)
    assert 1e-5 < (half.text_features - full.text_features).abs().max() < 1e-2
    seen = []
    trainer.learner.ctx.register_hook(seen.append)
    trainer.batch_idx = 0
    trainer.forward_backward(next(iter(trainer.encoder.batches("train"))))
    unscaled = trainer.learner.ctx.grad  # by the optimiser's step
    torch.testing.assert_close(seen[0] / trainer.trained.scaler.get_scale(), unscaled)
    assert unscaled.isfinite().all() and unscaled.any()


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_changes_nothing_but_the_scale(case: str, build: Build, overflow: Callable) -> None:
    trainer = started(build, *CASES[case], *AMP)
    batches = list(trainer.encoder.batches("train"))
    overflow(0, 1)
    trainer.batch_idx = 0
    trainer.forward_backward(batches[0])
    before = {name: value.clone() for name, value in trainer.learner.named_parameters()}
    scale = trainer.trained.scaler.get_scale()
    trainer.batch_idx = 1
    trainer.forward_backward(batches[1])
    assert [name for name, value in trainer.learner.named_parameters() if not torch.equal(value, before[name])] == []
    assert trainer.trained.scaler.get_scale() == scale / 2
    trainer.batch_idx = 0
    trainer.forward_backward(batches[1])
    assert not all(torch.equal(value, before[name]) for name, value in trainer.learner.named_parameters())


def test_the_schedule_goes_on_over_a_skipped_step(arguments: Arguments, overflow: Callable, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "whole", *AMP))
    overflow(0, 4)  # the last of its epoch
    cli.run(arguments("CoOp", "skipped", *AMP))
    rates = []
    for name in ("whole", "skipped"):
        content = checkpoint.load(checkpoint.file_of(tmp_path / name, "prompt_learner", 3))
        rates.append([row["lr"] for row in content["oodprompt"]["history"]])
    assert rates[0] == rates[1] and len(set(rates[0])) == 3
    assert not torch.equal(weights(tmp_path / "whole", 3)[CTX], weights(tmp_path / "skipped", 3)[CTX])


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_never_stopped_with_the_scale(
    case: str, arguments: Arguments, overflow: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step was skipped ahead of the stop, so the scale is not the first one."""
    trainer, *keys = CASES[case]
    keys += ["OPTIM.MAX_EPOCH", 2]
    overflow(0, 1)
    cli.run(arguments(trainer, "unbroken", *keys, *AMP))
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "forward_backward", interrupted_at(1, 1))
        with pytest.raises(KeyboardInterrupt):
            cli.run(arguments(trainer, "broken", *keys, *AMP))
    cli.run(arguments(trainer, "broken", *keys, *AMP))
    assert "resuming after epoch 1 of 2" in (tmp_path / "broken" / "log.txt").read_text()
    assert_same_outcome(tmp_path / "unbroken", tmp_path / "broken", (2,))
    files = [next((tmp_path / name).glob("*/model.pth.tar-2")) for name in ("unbroken", "broken")]
    scales = [checkpoint.load(file)["oodprompt"]["scaler"] for file in files]
    assert scales[0] == scales[1] and scales[0]["scale"] == 2.0**15 and scales[0]["_growth_tracker"] > 0
