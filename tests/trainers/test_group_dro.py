"""GroupDRO: q and the loss by hand, who takes no part, and batches in which groups are equally likely."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from tests.helpers.resampling import OVER, assert_resumes, assert_runs_over, groups_of, order_of, without_labels
from tests.helpers.runs import Arguments, Build, Run

TRUE = ["TRAINER.GROUPS", "true"]


def start(build: Build, *keys: Any) -> PromptTrainer:
    """A trainer whose debiaser knows the groups; nothing is trained yet."""
    trainer = build("GroupDRO", *TRUE, *keys)
    trainer.debiasers[0].before_train()
    return trainer


def group_losses(trainer: PromptTrainer, batch: dict[str, Any]) -> dict[int, Tensor]:
    """The mean cross-entropy of every group that the batch has."""
    logits, y = trainer.encoder.align(batch).logits, batch["label"]
    g = 2 * y + batch["attribute"]
    return {one: F.cross_entropy(logits[g == one], y[g == one]) for one in g.unique().tolist()}


@pytest.mark.parametrize(("step_size", "adjustment"), [(0.01, 0.0), (0.7, 0.0), (0.7, 3.0)])
def test_q_and_the_loss_are_the_algorithm(build: Build, step_size: float, adjustment: float) -> None:
    keys = ["TRAINER.GROUPDRO.STEP_SIZE", step_size, "TRAINER.GROUPDRO.ADJUSTMENT", adjustment]
    trainer = start(build, *keys, "DATALOADER.TRAIN_X.BATCH_SIZE", 6)
    N_g = np.bincount(groups_of(trainer))
    q, sizes, lacking = [0.25] * 4, [], 0
    for batch in trainer.encoder.batches("train"):
        l = {g: value.detach() for g, value in group_losses(trainer, batch).items()}
        lacking += len(l) < 4
        raised = [q[g] * math.exp(step_size * (float(l.get(g, 0)) + adjustment / N_g[g] ** 0.5)) for g in range(4)]
        q = [value / sum(raised) for value in raised]
        loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
        torch.testing.assert_close(loss, sum(q[g] * l[g] for g in l), rtol=1e-5, atol=1e-6)
        own = trainer.debiasers[0].q
        torch.testing.assert_close(own.cpu(), torch.tensor(q, dtype=torch.float64), rtol=1e-5, atol=0)
        assert math.isclose(own.sum().item(), 1, rel_tol=1e-12)
        sizes.append(own.max() - own.min())
    assert lacking and max(sizes) > 1e-3  # some batches lack a group, and q has moved


def test_the_gradient_is_that_of_the_loss_with_q_held_fixed(build: Build) -> None:
    trainer = start(build, "TRAINER.GROUPDRO.STEP_SIZE", 1)
    batch = next(iter(trainer.encoder.batches("train")))
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    (own,) = torch.autograd.grad(loss, trainer.learner.ctx)
    q = trainer.debiasers[0].q.float()
    plain = sum(q[g] * l for g, l in group_losses(trainer, batch).items())
    torch.testing.assert_close(own, torch.autograd.grad(plain, trainer.learner.ctx)[0], rtol=1e-4, atol=1e-6)


def test_without_steps_it_is_the_mean_over_groups(build: Build) -> None:
    trainer = start(build, "TRAINER.GROUPDRO.STEP_SIZE", 0, "DATALOADER.TRAIN_X.BATCH_SIZE", 40)
    batch = next(iter(trainer.encoder.batches("train")))
    l = group_losses(trainer, batch)
    assert len(l) == 4
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    torch.testing.assert_close(loss, sum(l.values()) / 4, rtol=1e-5, atol=1e-6)


def test_groups_without_training_images_take_no_part(build: Build) -> None:
    trainer = start(build, "DATASET.SHAPES.CORRELATION", 1, "TRAINER.GROUPDRO.STEP_SIZE", 1)
    debiaser = trainer.debiasers[0]
    assert debiaser.q.tolist() == [0.5, 0, 0, 0.5]
    for batch in trainer.encoder.batches("train"):
        loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
        assert loss.isfinite()
    assert debiaser.q[1] == debiaser.q[2] == 0 and math.isclose(debiaser.q.sum().item(), 1, rel_tol=1e-12)
    assert all(set(values) == {"circle / water", "diamond / land"} for values in debiaser.by_group().values())


def test_a_huge_loss_does_not_overflow(build: Build) -> None:
    trainer = start(build, "TRAINER.GROUPDRO.STEP_SIZE", 1e5)
    batch = next(iter(trainer.encoder.batches("train")))
    for _ in range(3):
        loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    assert loss.isfinite() and trainer.debiasers[0].q.isfinite().all()


def test_by_group_is_of_the_epoch(build: Build) -> None:
    trainer = start(build, "TRAINER.GROUPDRO.STEP_SIZE", 0.5)
    debiaser, batches = trainer.debiasers[0], list(trainer.encoder.batches("train"))
    for epoch, own in enumerate((batches[:2], batches[2:4])):  # what came before an epoch is not in its mean
        debiaser.before_epoch(epoch)
        for batch in own:
            trainer.objective(trainer.encoder.align(batch), batch)
    whole = {key: torch.cat([batch[key] for batch in own]) for key in ("image_features", "label", "attribute")}
    expected = group_losses(trainer, whole)
    values = debiaser.by_group()
    names = ["circle / water", "circle / land", "diamond / water", "diamond / land"]
    q, losses = values["weight of the group, $q_g$"], values["loss of the group"]
    assert q == dict(zip(names, debiaser.q.tolist(), strict=True))
    assert set(losses) == {names[g] for g in expected}
    for g, loss in expected.items():
        assert math.isclose(losses[names[g]], loss.item(), rel_tol=1e-5)


def test_epochs_are_balanced_draws(build: Build) -> None:
    trainer = build("GroupDRO", *TRUE, "DATASET.SHAPES.NUM_TRAIN", 400)
    group, orders = groups_of(trainer), [order_of(trainer, epoch) for epoch in range(4)]
    assert {len(order) for order in orders} == {400} and not np.array_equal(orders[0], orders[1])
    assert np.bincount(group).max() > 120
    assert np.abs(np.bincount(group[np.concatenate(orders)]) - 400).max() < 70


def test_unbalanced_epochs_are_those_of_plain_training(build: Build) -> None:
    unbalanced = build("GroupDRO", *TRUE, "TRAINER.GROUPDRO.BALANCED", False)
    for epoch in range(2):
        assert np.array_equal(order_of(unbalanced, epoch), order_of(build("CoOp"), epoch))


def test_attribute_labels_that_are_missing_are_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels(monkeypatch)
    build("GroupDRO").debiasers[0].before_train()
    with pytest.raises(UserError, match="80 of 80 images of the train split have no attribute label"):
        build("GroupDRO", *TRUE)


@pytest.mark.parametrize(
    ("key", "value", "more"),
    [
        ("STEP_SIZE", -1, []),
        ("STEP_SIZE", "1e999", []),
        ("ADJUSTMENT", -0.1, []),
    ],
)
def test_values_that_cannot_be_are_refused(build: Build, key: str, value: Any, more: list[str]) -> None:
    with pytest.raises(UserError, match=f"TRAINER.GROUPDRO.{key}"):
        build("GroupDRO", f"TRAINER.GROUPDRO.{key}", value, *more)


@pytest.mark.parametrize(("base", "groups"), OVER)
def test_runs_over(run: Run, base: str, groups: str, tmp_path: Path) -> None:
    assert_runs_over(run, "GroupDRO", base, groups)
    assert (tmp_path / "out" / "groups_by_epoch.png").is_file()


def test_resumed_equals_never_stopped(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumes(arguments, tmp_path, monkeypatch, "GroupDRO", "TRAINER.GROUPDRO.STEP_SIZE", 1)
