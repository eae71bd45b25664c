"""DebiasedPT: the weight rule of DPT by hand, when it is applied, and what a resume and a stack keep of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.debiased_pt import GroupWeights, group_weights
from torch import Tensor

from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from tests.helpers.resampling import assert_resumes, without_labels

Build = Callable[..., PromptTrainer]
COUNT = torch.tensor([6, 0, 3, 1])
P = torch.tensor([0.9, 0.0, 0.5, 0.2], dtype=torch.float64)


def start(trainer: PromptTrainer) -> list[dict[str, Any]]:
    """All batches of the first epoch, with everything ready for a step."""
    trainer.before_train()
    trainer.before_epoch()
    trainer.num_batches = len(trainer.encoder.batches("train"))
    return list(trainer.encoder.batches("train"))


def test_weights_are_the_formula() -> None:
    rates = [math.exp(2.0 * (1 - p)) / n if n else 0.0 for p, n in zip(P.tolist(), COUNT.tolist(), strict=True)]
    mass = sum(r * n for r, n in zip(rates, COUNT.tolist(), strict=True))
    expected = [10 * rate / mass for rate in rates]
    assert group_weights(P, COUNT, 2.0).tolist() == pytest.approx(expected, rel=1e-12)
    assert group_weights(P, COUNT, 2.0, "none").tolist() == pytest.approx([10 * rate for rate in rates], rel=1e-12)
    thirds = [3 * rate / sum(rates) for rate in rates]
    assert group_weights(P, COUNT, 2.0, "groups").tolist() == pytest.approx(thirds, rel=1e-12)


def test_shares_are_a_softmax_and_bounded() -> None:
    for eta in (0.5, 1.0, 5.0):
        share = group_weights(P, COUNT, eta) * COUNT / 10
        present = COUNT > 0
        torch.testing.assert_close(share[present], F.softmax(eta * (1 - P[present]), dim=0))
        assert share[present].max() / share[present].min() <= math.exp(eta)
        assert share.sum().item() == pytest.approx(1) and share[~present] == 0


@pytest.mark.parametrize("p", [P, torch.ones(4, dtype=torch.float64)], ids=["eta 0", "all right"])
def test_balanced_where_nothing_is_worse(p: Tensor) -> None:
    """eta = 0, or p_g = 1 in every group: all groups with images have the same share."""
    share = COUNT * group_weights(p, COUNT, 0.0 if p is P else 3.0)
    assert share.tolist() == pytest.approx([10 / 3, 0, 10 / 3, 10 / 3], rel=1e-12)


def test_loss_is_the_weighted_cross_entropy_and_weights_follow_it(build: Build) -> None:
    """One epoch by hand: balanced start, loss of each batch, mean probability per group, moving average."""
    keys = ["TRAINER.DEBIASEDPT.ETA", 3, "TRAINER.DEBIASEDPT.EMA", 0.25]
    trainer = build("DebiasedPT", *keys)
    batches = start(trainer)
    data = trainer.dataset.train_x
    group = torch.tensor([2 * d.label + d.attribute for d in data])  # pseudo-attributes are right on these images
    N_g = torch.bincount(group, minlength=4).double()
    w = 80 / (4 * N_g)
    debiaser = trainer.debiasers[0]
    torch.testing.assert_close(debiaser.w, w)
    total, count = torch.zeros(4, dtype=torch.float64), torch.zeros(4)
    for batch in batches:
        alignment = trainer.encoder.align(batch)
        loss, _ = trainer.objective(alignment, batch)
        g, ce = group[batch["index"]], F.cross_entropy(alignment.logits, batch["label"], reduction="none")
        torch.testing.assert_close(loss, (w[g].float() * ce).mean())
        for i, value in zip(g.tolist(), (-ce).exp().tolist(), strict=True):
            total[i] += value
            count[i] += 1
    torch.testing.assert_close(debiaser.w, w)  # nothing moves within the epoch
    debiaser.after_epoch(0)
    p = total / count
    m = F.softmax(3 * (1 - p), dim=0)
    torch.testing.assert_close(debiaser.w, 0.25 * w + 0.75 * 80 * m / N_g, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((N_g * debiaser.w).sum(), torch.tensor(80.0, dtype=torch.float64))
    drawn = debiaser.by_group()
    assert list(next(iter(drawn.values()))) == ["circle / water", "circle / land", "diamond / water", "diamond / land"]
    assert sum(drawn["share of the loss, $N_g w_g / N$"].values()) == pytest.approx(1)
    assert list(drawn["probability of the true class, $p_g$"].values()) == pytest.approx(p.tolist(), rel=1e-5)


def test_weights_do_not_depend_on_the_order_of_images(build: Build) -> None:
    trainer = build("DebiasedPT")
    start(trainer)
    debiaser = trainer.debiasers[0]
    torch.manual_seed(0)
    logits, label = 3 * torch.randn(80, 2), trainer.encoder.split("train").label
    weights = []
    for order in (torch.arange(80), torch.randperm(80)):
        sums = sum(debiaser._measured(logits[part], label[part], debiaser.g[part]) for part in order.split(16))
        debiaser.w.fill_(1)
        debiaser._update(sums)
        weights.append(debiaser.w.clone())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=0)
    assert weights[0].std() > 0


@pytest.mark.parametrize(("measure", "split", "count"), [("pass", "train", 80), ("held_out", "val", 16)])
def test_measured_by_a_pass_ahead_of_the_epoch(measure: str, split: str, count: int, build: Build) -> None:
    trainer = build("DebiasedPT", "TRAINER.DEBIASEDPT.MEASURE", measure, "TRAINER.DEBIASEDPT.EMA", 0)
    batches = start(trainer)
    debiaser = trainer.debiasers[0]
    z, label = trainer.encoder.frozen_features_of(split), trainer.encoder.split(split).label
    p_y = trainer.learner(z).logits.softmax(1)[torch.arange(count), label]
    data = {"train": trainer.dataset.train_x, "val": trainer.dataset.val}[split]
    group = torch.tensor([2 * d.label + d.attribute for d in data])
    p = torch.stack([p_y[group == g].mean() for g in range(4)]).double()
    torch.testing.assert_close(debiaser.p, p, rtol=1e-5, atol=1e-6)
    expected = group_weights(p, debiaser.N_g, 1.0)
    torch.testing.assert_close(debiaser.w, expected, rtol=1e-5, atol=1e-6)
    trainer.objective(trainer.encoder.align(batches[0]), batches[0])
    debiaser.after_epoch(0)
    torch.testing.assert_close(debiaser.w, expected, rtol=1e-5, atol=1e-6)
    debiaser.keys.defrost()
    debiaser.keys.EMA, w = 0.5, torch.ones(4, dtype=torch.float64)
    debiaser.w = w
    debiaser.after_epoch(0)
    assert torch.equal(debiaser.w, w)  # nothing moves at the end of an epoch
    assert trainer.learner.training  # the pass leaves the model in training mode


def test_measured_after_every_step(build: Build) -> None:
    keys = ["MEASURE", "step", "EMA", 0.9, "MOMENTUM", 0.5]
    trainer = build("DebiasedPT", *(f"TRAINER.DEBIASEDPT.{k}" if i % 2 == 0 else k for i, k in enumerate(keys)))
    batches = start(trainer)
    debiaser = trainer.debiasers[0]
    w, p = debiaser.w.clone(), None
    for batch in batches[:3]:
        alignment = trainer.encoder.align(batch)
        trainer.objective(alignment, batch)
        p_y = alignment.logits.softmax(1)[torch.arange(len(batch["label"])), batch["label"]].double()
        g = debiaser.g[batch["index"]]
        fresh = torch.stack([p_y[g == i].mean() if (g == i).any() else torch.tensor(-1.0).double() for i in range(4)])
        if p is None:
            p = fresh.clamp(min=0)
        else:
            p = torch.where(fresh >= 0, 0.5 * p + 0.5 * fresh, p)
        w = 0.9 * w + 0.1 * group_weights(p, debiaser.N_g, 1.0)
    torch.testing.assert_close(debiaser.w, w.detach(), rtol=1e-5, atol=1e-6)


def test_uniform_start_is_coop(build: Build) -> None:
    coop, ours = build("CoOp"), build("DebiasedPT", "TRAINER.DEBIASEDPT.START", "uniform")
    batch = start(ours)[0]
    coop.before_train()
    assert torch.equal(ours.debiasers[0].w, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(
        ours.objective(ours.encoder.align(batch), batch)[0],
        coop.objective(coop.encoder.align(batch), batch)[0],
        rtol=1e-6,
        atol=1e-7,
    )


def test_groups_without_images(build: Build) -> None:
    """Three attribute values are named and one is never seen: its groups have no weight and no share."""
    prompts = ["a photo of water.|the sea", "a photo of land.|a field", "a photo of a traffic jam at night in a city."]
    names = ["DATASET.ATTRIBUTE_NAMES", "('water', 'land', 'city')", "DATASET.ATTRIBUTE_PROMPTS", repr(prompts)]
    trainer = build("DebiasedPT", *names)
    start(trainer)
    debiaser = trainer.debiasers[0]
    empty = debiaser.N_g == 0
    assert len(debiaser.w) == 6 and empty.any()
    assert (debiaser.w[empty] == 0).all() and (debiaser.w[~empty] > 0).all()
    assert len(debiaser.by_group()["probability of the true class, $p_g$"]) == int((~empty).sum())


def test_true_groups_and_wrong_pseudo_groups(build: Build) -> None:
    true = build("DebiasedPT", "TRAINER.GROUPS", "true")
    noisy = build("DebiasedPT", "TRAINER.PSEUDO_NOISE", 0.25)
    for trainer in (true, noisy):
        start(trainer)
    assert torch.bincount(true.debiasers[0].g).tolist() == [32, 8, 8, 32]
    assert (true.debiasers[0].g != noisy.debiasers[0].g).sum() == 20  # a quarter of 80
    again = build("DebiasedPT", "TRAINER.PSEUDO_NOISE", 0.25)
    start(again)
    assert torch.equal(again.debiasers[0].g, noisy.debiasers[0].g)
    blind, _ = noisy.objective(noisy.encoder.align(batch := next(iter(noisy.encoder.batches("train")))), batch)
    unknown = {**batch, "attribute": torch.full_like(batch["attribute"], -1)}
    assert noisy.objective(noisy.encoder.align(batch), unknown)[0] == blind


@pytest.mark.parametrize("measure", ["epoch", "pass", "step", "held_out"])
def test_interrupted_and_resumed_equals_unbroken(
    measure: str, arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["TRAINER.DEBIASEDPT.MEASURE", measure, "TRAINER.STACK", "['CoOpOOD']", "OPTIM.LR", 0.02]
    assert_resumes(arguments, tmp_path, monkeypatch, "DebiasedPT", *keys)
    w = checkpoint.load(tmp_path / "unbroken" / "debiasedpt" / "model.pth.tar-3")["state_dict"]["w"]
    balanced = 40 / (4 * torch.tensor([16, 4, 4, 16]).double())
    assert w.std() > 0 and not torch.allclose(w, balanced)


@pytest.mark.parametrize("base", ["ZeroshotCLIP", "CoCoOp", "MaPLe", "LinearProbe"])
def test_goes_over_every_base(base: str, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    results = run("DebiasedPT", "over", "--base", base, "OPTIM.MAX_EPOCH", 1, "TRAINER.GROUPS", "true")
    assert results["base"] == base and results["groups_by"] == (None if base == "ZeroshotCLIP" else "true")
    assert (tmp_path / "over" / "groups_by_epoch.png").is_file() == (base != "ZeroshotCLIP")


def test_held_out_measures_the_images_whose_attribute_is_known(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["TRAINER.DEBIASEDPT.MEASURE", "held_out", "TRAINER.GROUPS", "true"]
    without_labels(monkeypatch, "val", slice(3, 5))
    debiaser = build("DebiasedPT", *keys).debiasers[0]
    debiaser.before_train()
    debiaser.before_epoch(0)
    assert debiaser.sums[1].sum() == 14


def test_held_out_needs_validation_images(build: Build) -> None:
    context = build("DebiasedPT").debiasers[0].context
    context.data.val = None
    cfg = build("DebiasedPT", "TRAINER.DEBIASEDPT.MEASURE", "held_out").cfg
    with pytest.raises(UserError, match="MEASURE held_out.*no validation"):
        GroupWeights(cfg, context).check()


@pytest.mark.parametrize("measure", ["held_out", "step"])
def test_a_group_that_was_never_measured_counts_as_the_mean(measure: str, build: Build) -> None:
    trainer = build("DebiasedPT", "TRAINER.DEBIASEDPT.MEASURE", measure, "TRAINER.DEBIASEDPT.ETA", 50)
    start(trainer)
    debiaser = trainer.debiasers[0]
    for name in ("p", "measured"):
        getattr(debiaser, name).zero_()
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    debiaser._update(nothing)
    assert not debiaser.p.any() and not debiaser.measured.any()
    label, g = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 2, 3])
    logits = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
    debiaser._update(debiaser._measured(logits, label, g), keep=0.9)
    p = logits.softmax(1)[torch.arange(4), label].double()
    expected = torch.stack([p[:2].mean(), torch.tensor(0.0).double(), p[2], p[3]])
    expected[1] = expected[[0, 2, 3]].mean()
    torch.testing.assert_close(debiaser.p, expected, rtol=1e-6, atol=1e-7)
    now = debiaser._measured(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.tensor([1]))
    debiaser._update(now, keep=0.9)  # the first time that it is seen, nothing of what stood for it stays
    assert debiaser.p[1].item() == pytest.approx(torch.tensor([2.0, 0.0]).softmax(0)[0].item())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["TRAINER.DEBIASEDPT.MEASURE", "never"], "TRAINER.DEBIASEDPT.MEASURE.*never"),
        (["TRAINER.DEBIASEDPT.NORMALIZE", "x"], "TRAINER.DEBIASEDPT.NORMALIZE"),
        (["TRAINER.DEBIASEDPT.START", "x"], "TRAINER.DEBIASEDPT.START"),
        (["TRAINER.DEBIASEDPT.ETA", -1], "TRAINER.DEBIASEDPT.ETA"),
        (["TRAINER.DEBIASEDPT.ETA", 1e4], "TRAINER.DEBIASEDPT.ETA"),
        (["TRAINER.DEBIASEDPT.EMA", 1.0], "TRAINER.DEBIASEDPT.EMA"),
        (["TRAINER.DEBIASEDPT.MOMENTUM", -0.1], "TRAINER.DEBIASEDPT.MOMENTUM"),
        (["TRAINER.GROUPS", "both"], "TRAINER.GROUPS.*both"),
        (["TRAINER.PSEUDO_NOISE", 1.5], "TRAINER.PSEUDO_NOISE"),
    ],
)
def test_impossible_values_are_refused(build: Build, keys: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("DebiasedPT", *keys)
