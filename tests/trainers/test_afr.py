"""AFR: what is held out, the weights and the penalty by hand, and a start from the first training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.afr import afr_weights, hold_out
from torch import Tensor

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.features.encoder import evaluating
from tests.helpers.resampling import OVER, assert_resumes, assert_runs_over, order_of
from tests.helpers.runs import Arguments, Build, Run

FIRST = ["OPTIM.LR", 0.02, "OPTIM.WARMUP_EPOCH", -1, "TRAINER.AFR.FIRST_EPOCHS", 2, "TRAINER.AFR.SHARE", 0.4]


def parameters(trainer: PromptTrainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.learner.parameters()])


def test_the_share_of_each_class_is_held_out() -> None:
    label = np.array([0] * 20 + [1] * 10 + [2] * 2)
    masks = [hold_out(label, 0.2, np.random.default_rng(seed), ["a", "b", "c"]) for seed in (0, 0, 1)]
    assert [np.bincount(label[mask]).tolist() for mask in masks] == [[4, 2, 1]] * 3
    assert np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
    with pytest.raises(UserError, match=r"TRAINER.AFR.SHARE: 0.8 holds out all training images of 'c' \(2\)"):
        hold_out(label, 0.8, np.random.default_rng(0), ["a", "b", "c"])


def test_weights_are_the_formula() -> None:
    p, y = torch.tensor([0.9, 0.2, 0.6, 0.5, 0.1], dtype=torch.float64), torch.tensor([0, 0, 0, 2, 2])
    raw = [math.exp(-3 * value) for value in p.tolist()]
    by_count = [value / n for value, n in zip(raw, (3, 3, 3, 2, 2), strict=True)]
    expected = torch.tensor(by_count, dtype=torch.float64) * 5 / sum(by_count)
    torch.testing.assert_close(afr_weights(p, y, 3.0, 3), expected)
    equal = afr_weights(p, y, 3.0, 3, "weight")
    assert math.isclose(equal[:3].sum(), 2.5) and math.isclose(equal[3:].sum(), 2.5)
    assert math.isclose(equal[1] / equal[0], math.exp(3 * 0.7))
    torch.testing.assert_close(afr_weights(p, y, 0.0, 3)[[0, 3]], torch.tensor([5 / 6, 5 / 4], dtype=torch.float64))


@pytest.mark.parametrize("classes", ["count", "weight"])
def test_the_start_and_the_weights_are_of_the_first_training(
    build: Build, capsys: pytest.CaptureFixture[str], classes: str
) -> None:
    trainer = build("AFR", *FIRST, "TRAINER.AFR.GAMMA", 3, "TRAINER.AFR.CLASSES", classes)
    debiaser, begin = trainer.debiasers[0], parameters(trainer)
    first = (~debiaser.held_out).nonzero().flatten()
    fitted, logits = debiaser.context.first_stage.fit(2, first)
    assert torch.equal(parameters(trainer), begin)
    debiaser.before_train()
    theta = torch.cat([p.detach().flatten() for p in fitted.parameters()])
    assert torch.equal(parameters(trainer), theta) and not torch.equal(theta, begin)
    assert torch.equal(debiaser.theta_fit, theta)
    assert debiaser.theta_fit.data_ptr() != trainer.learner.ctx.data_ptr()  # it must not move with the learner
    y = debiaser.context.data.train.label
    H = debiaser.held_out
    p = F.softmax(logits, dim=1)[torch.arange(80), y]
    raw = (-3 * p[H]).exp()
    beta = [1 / (raw[y[H] == c].sum() if classes == "weight" else (y[H] == c).sum()) for c in (0, 1)]
    mu = raw * torch.stack(beta)[y[H]]
    torch.testing.assert_close(debiaser.mu[H].float(), mu / mu.mean(), rtol=1e-4, atol=1e-5)
    assert (debiaser.mu[~H] == 0).all() and debiaser.mu[H].std() > 0.1
    assert "AFR: 32 of 80 training images are held out" in capsys.readouterr().out


def test_a_resumed_run_keeps_what_it_has(build: Build) -> None:
    trainer = build("AFR", *FIRST)
    debiaser = trainer.debiasers[0]
    debiaser.done.fill_(True)
    debiaser.context.first_stage.fit = None  # must not be called
    before = parameters(trainer)
    debiaser.before_train()
    assert torch.equal(parameters(trainer), before)


def test_only_held_out_images_are_trained_on(build: Build, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    debiaser = build("AFR", *FIRST).debiasers[0]
    held_out = set(debiaser.held_out.nonzero().flatten().tolist())
    step, seen = PromptTrainer.forward_backward, []

    def watched(self: PromptTrainer, batch: dict[str, Any]) -> dict[str, Tensor]:
        seen.append(batch["index"].tolist())
        return step(self, batch)

    monkeypatch.setattr(PromptTrainer, "forward_backward", watched)
    run("AFR", "out", *FIRST)
    assert [len(batch) for batch in seen] == [16] * 6  # 32 images in each of three epochs
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert all(set(epoch) == held_out for epoch in epochs) and epochs[0] != epochs[1]


def test_the_first_training_sees_the_other_images_alone(build: Build) -> None:
    """What happens to held-out images does not show in what the first training makes of the others."""
    trainer = build("AFR", *FIRST)
    debiaser = trainer.debiasers[0]
    debiaser.before_train()
    other = build("AFR", *FIRST)
    z = other.encoder.batches("train").features[0]
    z[debiaser.held_out] = torch.randn_like(z[debiaser.held_out])
    other.debiasers[0].before_train()
    assert torch.equal(debiaser.theta_fit, other.debiasers[0].theta_fit)
    z[~debiaser.held_out] = torch.randn_like(z[~debiaser.held_out])
    again = build("AFR", *FIRST)
    again.encoder.batches("train").features[0].copy_(z)
    again.debiasers[0].before_train()
    assert not torch.equal(debiaser.theta_fit, again.debiasers[0].theta_fit)


@pytest.mark.parametrize("base", ["CoOp", "MaPLe"])
def test_loss_and_penalty_by_hand(build: Build, base: str) -> None:
    trainer = build("AFR", "--base", base, *FIRST, "TRAINER.AFR.LAMBDA", 0.3)
    debiaser = trainer.debiasers[0]
    debiaser.before_train()
    batch = next(iter(trainer.encoder.batches("train")))
    moved = [torch.randn_like(p) * 0.01 for p in trainer.learner.parameters()]
    with torch.no_grad():
        for p, by in zip(trainer.learner.parameters(), moved, strict=True):
            p += by
    alignment = trainer.encoder.align(batch)
    ce = F.cross_entropy(alignment.logits, batch["label"], reduction="none")
    weighted = (debiaser.mu[batch["index"]].float() * ce).mean()
    loss, log = trainer.objective(alignment, batch)
    square = sum(by.square().sum() for by in moved)
    torch.testing.assert_close(loss, weighted + 0.3 * square, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log["distance"], square.sqrt(), rtol=1e-3, atol=1e-6)
    own = torch.autograd.grad(loss - weighted, list(trainer.learner.parameters()))
    for gradient, by in zip(own, moved, strict=True):
        torch.testing.assert_close(gradient, 0.6 * by, rtol=1e-2, atol=1e-5)


def test_epochs_are_of_the_same_images_in_another_order(build: Build) -> None:
    trainer = build("AFR", *FIRST)
    first, second = (order_of(trainer, epoch) for epoch in range(2))
    assert sorted(first) == sorted(second) and not np.array_equal(first, second)
    other = build("AFR", *FIRST, "SEED", 2)
    assert set(first.tolist()) != set(order_of(other, 0).tolist())


def test_a_learner_that_averages_over_epochs_begins_its_average_anew(build: Build) -> None:
    trainer = build("AFR", "--base", "PromptSRC", *FIRST, "TRAINER.AFR.FIRST_EPOCHS", 1)
    trainer.debiasers[0].before_train()
    assert not trainer.learner.gpa.any()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("FIRST_EPOCHS", 0), ("SHARE", 0), ("SHARE", 1), ("GAMMA", -1), ("LAMBDA", -1)),
        *(("GAMMA", "1e999"), ("CLASSES", "wieght")),
    ],
)
def test_values_that_cannot_be_are_refused(build: Build, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"TRAINER.AFR.{key}"):
        build("AFR", f"TRAINER.AFR.{key}", value)


@pytest.mark.parametrize(("base", "groups"), OVER)
def test_runs_over(run: Run, base: str, groups: str) -> None:
    assert_runs_over(run, "AFR", base, groups, "TRAINER.AFR.FIRST_EPOCHS", 1)


def test_goes_beside_a_debiaser_over_prompts_that_are_not_trained(run: Run) -> None:
    keys = ["--base", "ZeroshotCLIP", "TRAINER.STACK", "('AFR',)", "TRAINER.AFR.LAMBDA", 1, "TRAINER.AFR.SHARE", 0.4]
    assert run("CoOpOOD", "out", *keys)["stack"] == ["AFR"]


def test_resumed_equals_never_stopped(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["TRAINER.AFR.FIRST_EPOCHS", 2, "TRAINER.AFR.SHARE", 0.5, "TRAINER.AFR.LAMBDA", 0.1]
    assert_resumes(arguments, tmp_path, monkeypatch, "AFR", *keys)


def test_logits_of_the_first_training_are_those_of_its_weights(build: Build) -> None:
    """The contract that AFR leans on: the learner that comes back is the one whose logits come back."""
    trainer = build("AFR", *FIRST)
    fitted, logits = trainer.debiasers[0].context.first_stage.fit(2, None)
    with evaluating(fitted):
        outputs = trainer.encoder.outputs("train", fitted, lambda alignment: alignment.logits)
    torch.testing.assert_close(outputs[1], logits)
