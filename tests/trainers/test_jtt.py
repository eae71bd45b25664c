"""JTT: the error set is that of a plain run, and the weights follow from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from oodprompt.errors import UserError
from oodprompt.features.encoder import evaluating
from tests.helpers.resampling import OVER, assert_resumes, assert_runs_over
from tests.helpers.runs import Arguments, Build, Run

FAST = ["OPTIM.LR", 0.02, "OPTIM.WARMUP_EPOCH", -1, "DATASET.SHAPES.CORRELATION", 0.9]


@pytest.mark.parametrize("base", ["CoOp", "MaPLe"])
def test_the_error_set_is_that_of_a_plain_run(build: Build, run: Run, tmp_path: Path, base: str) -> None:
    epochs = 4 if base == "CoOp" else 2
    run(base, "plain", *FAST, "OPTIM.MAX_EPOCH", epochs)
    plain = build(base, *FAST)
    plain.load_model(tmp_path / "plain", epochs)
    with evaluating(plain.learner):
        _, logits = plain.encoder.outputs("train", plain.learner, lambda alignment: alignment.logits)
    debiaser = build("JTT", "--base", base, *FAST, "TRAINER.JTT.FIRST_EPOCHS", epochs).debiasers[0]
    _, alone = debiaser.context.first_stage.fit(epochs, None)
    torch.testing.assert_close(alone, logits, rtol=0, atol=1e-4)
    debiaser.before_train()
    label = torch.tensor([datum.label for datum in plain.dataset.train_x])
    expected = logits.argmax(dim=1) != label
    assert 0 < expected.sum() < 40
    assert torch.equal(debiaser.error, expected)


def test_the_error_set_weighs_more(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = build("JTT", *FAST, "TRAINER.JTT.FIRST_EPOCHS", 2, "TRAINER.JTT.UP", 7.5)
    debiaser, learner = trainer.debiasers[0], trainer.learner.ctx.clone()
    debiaser.before_train()
    assert torch.equal(trainer.learner.ctx, learner)  # the second training starts where any other does
    size = int(debiaser.error.sum())
    assert f"the error set has {size:,} of 80 training images" in capsys.readouterr().out
    high, low = 80 * 7.5 / (size * 7.5 + 80 - size), 80 / (size * 7.5 + 80 - size)
    batch = next(iter(trainer.encoder.batches("train")))
    w = torch.where(debiaser.error[batch["index"]], high, low)
    assert len(w.unique()) == 2
    alignment = trainer.encoder.align(batch)
    ce = F.cross_entropy(alignment.logits, batch["label"], reduction="none")
    loss, _ = trainer.objective(alignment, batch)
    torch.testing.assert_close(loss, (w * ce).mean(), rtol=1e-5, atol=1e-6)
    assert abs(debiaser.w.mean() - 1) < 1e-6


def test_nothing_wrong_leaves_all_weights_at_one(build: Build) -> None:
    debiaser = build("JTT").debiasers[0]
    label = debiaser.context.data.train.label
    debiaser.context.first_stage.fit = lambda epochs, choose: (None, F.one_hot(label).float())
    debiaser.before_train()
    assert debiaser.done and torch.equal(debiaser.w, torch.ones(80))


def test_no_attribute_is_read(build: Build) -> None:
    trainer = build("JTT", *FAST, "TRAINER.JTT.FIRST_EPOCHS", 1)
    object.__setattr__(trainer.debiasers[0].context.data.train, "attribute", None)
    trainer.debiasers[0].before_train()
    batch = next(iter(trainer.encoder.batches("train")))
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    blind, _ = trainer.objective(
        trainer.encoder.align(batch), {**batch, "attribute": torch.full_like(batch["attribute"], -1)}
    )
    assert loss == blind and not trainer.attributes.pseudo.splits


@pytest.mark.parametrize(("key", "value"), [("FIRST_EPOCHS", 0), ("UP", 0), ("UP", "1e999")])
def test_values_that_cannot_be_are_refused(build: Build, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"TRAINER.JTT.{key}"):
        build("JTT", f"TRAINER.JTT.{key}", value)


@pytest.mark.parametrize(("base", "groups"), OVER)
def test_runs_over(run: Run, base: str, groups: str) -> None:
    assert_runs_over(run, "JTT", base, groups, "TRAINER.JTT.FIRST_EPOCHS", 1)


def test_resumed_equals_never_stopped(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumes(arguments, tmp_path, monkeypatch, "JTT", "TRAINER.JTT.FIRST_EPOCHS", 2)
