"""SUBG and RWG: the shares of the groups in an epoch; and what every method of this family is held to by a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from oodprompt.trainers.resampling import balanced_draws, balanced_subset

from oodprompt.errors import UserError
from tests.helpers.resampling import OVER, assert_resumes, assert_runs_over, groups_of, order_of, without_labels
from tests.helpers.runs import Build, Run

Arguments = Callable[..., list[str]]


SMALL_BATCHES = ["TRAINER.GROUPS", "true", "DATALOADER.TRAIN_X.BATCH_SIZE", 4]


def test_subset_has_equally_many_of_every_group_that_has_images() -> None:
    group = np.array([0] * 9 + [3] * 4 + [1] * 6)
    subset = balanced_subset(group, np.random.default_rng(0))
    assert np.bincount(group[subset]).tolist() == [4, 4, 0, 4]
    assert len(set(subset.tolist())) == 12
    assert (np.diff(group[subset]) != 0).sum() > 2  # groups are mixed, not one after the other
    seen = {i for seed in range(60) for i in balanced_subset(group, np.random.default_rng(seed)).tolist()}
    assert seen == set(range(19))


def test_draws_meet_groups_equally_and_images_of_a_group_equally() -> None:
    group = np.array([0] * 3600 + [2] * 390 + [3] * 10)
    draws = balanced_draws(group, np.random.default_rng(0))
    assert draws.shape == group.shape
    share = np.bincount(group[draws], minlength=4) / len(group)
    assert share[1] == 0 and np.abs(share[[0, 2, 3]] - 1 / 3).max() < 0.03  # 4 standard deviations
    assert np.bincount(draws)[-10:].min() > 80  # 133 of each of ten images are expected


@pytest.mark.parametrize("redraw", [True, False])
def test_subg_in_the_engine(build: Build, redraw: bool) -> None:
    trainer, again, other = (
        build("SUBG", *SMALL_BATCHES, "TRAINER.SUBG.REDRAW", redraw, "SEED", seed) for seed in (1, 1, 2)
    )
    group = groups_of(trainer)
    N_g = np.bincount(group)
    assert N_g.min() < N_g.max() / 2
    orders = [order_of(trainer, epoch) for epoch in range(3)]
    for order in orders:
        assert np.bincount(group[order]).tolist() == [N_g.min()] * 4
        assert len(set(order.tolist())) == len(order)
    assert all(np.array_equal(order, order_of(again, epoch)) for epoch, order in enumerate(orders))
    assert set(orders[0].tolist()) != set(order_of(other, 0).tolist())
    assert not np.array_equal(orders[0], orders[1])
    same = [set(orders[0].tolist()) == set(order.tolist()) for order in orders[1:]]
    assert same == [not redraw] * 2
    assert len(trainer.encoder.batches("train")) == len(orders[0]) // 4


def test_rwg_in_the_engine(build: Build) -> None:
    trainer, again = (build("RWG", *SMALL_BATCHES, "DATASET.SHAPES.NUM_TRAIN", 400) for _ in range(2))
    group, orders = groups_of(trainer), [order_of(trainer, epoch) for epoch in range(4)]
    assert {len(order) for order in orders} == {400}
    assert np.array_equal(orders[1], order_of(again, 1)) and not np.array_equal(orders[0], orders[1])
    assert np.bincount(group).max() > 120
    assert np.abs(np.bincount(group[np.concatenate(orders)]) - 400).max() < 70  # 4 standard deviations


@pytest.mark.parametrize("name", ["SUBG", "RWG"])
def test_the_loss_is_plain_cross_entropy(build: Build, name: str) -> None:
    trainer = build(name, *SMALL_BATCHES)
    batch = next(iter(trainer.encoder.batches("train")))
    alignment = trainer.encoder.align(batch)
    loss, _ = trainer.objective(alignment, batch)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(alignment.logits, batch["label"]))


def test_the_share_of_groups_is_said(build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    build("SUBG", "TRAINER.GROUPS", "true").debiasers[0].before_train()
    assert "epochs of 32 of 80 training images, 4 groups with equal shares" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SUBG", "RWG"])
def test_attribute_labels_that_are_missing_are_named(build: Build, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    without_labels(monkeypatch)
    build(name, "TRAINER.GROUPS", "pseudo").debiasers[0].before_train()
    with pytest.raises(UserError, match="80 of 80 images of the train split have no attribute label"):
        build(name, "TRAINER.GROUPS", "true").before_train()


def test_two_orders_in_one_stack_are_refused(build: Build) -> None:
    for other in ("RWG", "AFR"):
        with pytest.raises(UserError, match=f"SUBG and {other} each choose the images of an epoch"):
            build("SUBG", "TRAINER.STACK", f"['{other}']")
    build("SUBG", "TRAINER.STACK", "['GroupDRO']", "TRAINER.GROUPDRO.BALANCED", False)


@pytest.mark.parametrize("name", ["SUBG", "RWG"])
@pytest.mark.parametrize(("base", "groups"), OVER)
def test_runs_over(run: Run, name: str, base: str, groups: str) -> None:
    assert_runs_over(run, name, base, groups)


@pytest.mark.parametrize("case", ["SUBG", "SUBG False", "RWG"])
def test_resumed_equals_never_stopped(
    case: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *redraw = case.split()
    keys = ["TRAINER.SUBG.REDRAW", *redraw] if redraw else []
    assert_resumes(arguments, tmp_path, monkeypatch, name, *keys, "DATASET.SHAPES.NUM_TRAIN", 80)
