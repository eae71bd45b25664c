"""GroupCoOp: the objective and its gradient by OpenAI's modules, its limits, its state, and the bases it goes over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.coop import ContextLearner
from oodprompt.trainers.group_coop import GroupPrompts
from torch import Tensor, nn

from oodprompt.backbones import CLIP
from oodprompt.config.keys import check_values, get_cfg_default, set_key
from oodprompt.engine import checkpoint
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.methods.contracts import Alignment, Step
from oodprompt.methods.groups import Groups
from oodprompt.methods.prompts import ContextPrompts
from tests.helpers.contexts import without_names
from tests.helpers.resampling import assert_resumes
from tests.helpers.runs import Arguments, Build, weights
from tests.helpers.towers import NAMES, Towers, assert_close, hand_written, make_learner, plain_text

Run = Callable[..., dict[str, Any]]
METRICS = ("accuracy", "macro_f1", "worst_group_accuracy", "gap", "groups", "classes")
GROUPS = [0, 0, 0, 1, 3, 5, 5, 7]  # of the training images; groups 2, 4 and 6 have none
SECTION = "TRAINER.GROUPCOOP"


def debiaser(clip: CLIP, groups: Sequence[int] = GROUPS, values: int = 2, **keys: Any) -> GroupPrompts:
    """Prompts of ``NAMES`` and so many attribute values, over training images of these groups."""
    cfg = get_cfg_default()
    for key, value in keys.items():
        set_key(cfg, key if "." in key else f"{SECTION}.{key}", value, "test")
    check_values(cfg)
    names = tuple(f"{c} / {a}" for c in NAMES for a in range(values))
    context = SimpleNamespace(
        clip=clip,
        data=SimpleNamespace(classnames=NAMES, train=None),
        attributes=SimpleNamespace(
            may_be_fewer=False,
            num_groups=lambda: len(names),
            groups=lambda split: Groups(torch.tensor(groups), names),
        ),
        autocast=contextlib.nullcontext,
    )
    torch.manual_seed(1)
    ours = GroupPrompts(cfg, context)
    ours.before_train()
    return ours


def some_step(ours: GroupPrompts, index: Sequence[int] = (0, 3, 4, 6, 7, 1), seed: int = 0) -> Step:
    g = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(len(index), 96, generator=g), dim=1)
    alignment = Alignment(z, F.normalize(torch.randn(4, 96, generator=g), dim=1), torch.tensor(6.0))
    i = torch.tensor(index)
    return Step(alignment, ours.predict(alignment), ours.g[i] // ours.A, torch.full_like(i, -1), i)


def objective(ours: GroupPrompts, step: Step) -> Tensor:
    """The engine's: mean(weight * (CE(prediction, y) + loss of the sample))."""
    parts = ours.contribute(step)
    return (
        parts.sample_weights * (F.cross_entropy(step.logits, step.label, reduction="none") + parts.per_sample_loss)
    ).mean()


def plain_group_logits(theirs: nn.Module, words: str, ctx: Tensor, step: Step, values: int = 2) -> Tensor:
    """s <z, t_{c,a}>, [B, C A], one prompt at a time."""
    prompts = [plain_text(theirs, words, NAMES[k // values], ctx[k]) for k in range(len(ctx))]
    return step.alignment.logit_scale * step.alignment.image_features @ torch.stack(prompts).T


@pytest.mark.parametrize("aggregate", ["sum", "max"])
@pytest.mark.parametrize("balance", [True, False])
def test_objective_and_gradient_are_the_weighted_cross_entropy_over_groups(
    towers: Towers, aggregate: str, balance: bool
) -> None:
    ours = debiaser(towers[0], AGGREGATE=aggregate, BALANCE=balance, NOISE=0.3)
    step = some_step(ours)
    ctx = ours.ctx.detach().clone().requires_grad_()
    logits = plain_group_logits(towers[1], "a photo of a", ctx, step)
    w = torch.tensor([1 / GROUPS.count(GROUPS[i]) if balance else 1.0 for i in step.index])
    w = w * (8 / 5 if balance else 1)  # 8 images, 5 groups that have some
    p = logits.softmax(dim=1)
    expected = sum(-w[i] * p[i, GROUPS[k]].log() for i, k in enumerate(step.index)) / len(step.index)
    loss = objective(ours, step)
    assert_close(loss, expected, "objective")
    (theirs,) = torch.autograd.grad(expected, ctx)
    (gradient,) = torch.autograd.grad(loss, ours.ctx)
    assert gradient.abs().amax(dim=(1, 2)).min() > 0, "prompts of groups without images are pushed away too"
    assert_close(gradient, theirs, "gradient of the contexts", 1e-4)


def test_the_loss_beside_the_cross_entropy_is_that_of_the_attribute_given_the_class(towers: Towers) -> None:
    ours = debiaser(towers[0], NOISE=0.3)
    step = some_step(ours)
    l = ours.group_logits(step.alignment)
    a = torch.tensor(GROUPS)[step.index] % 2
    own = l[torch.arange(6), step.label]  # [B, A], the prompts of the own class
    contribution = ours.contribute(step)
    expected = F.cross_entropy(own, a, reduction="none")
    torch.testing.assert_close(contribution.per_sample_loss, expected, rtol=1e-4, atol=1e-5)
    L_g = F.cross_entropy(l.flatten(1), torch.tensor(GROUPS)[step.index])
    torch.testing.assert_close(contribution.log["L_g"], L_g)


def test_class_prediction_sums_or_takes_the_largest(towers: Towers) -> None:
    ours, largest = (debiaser(towers[0], AGGREGATE=choice, NOISE=0.5) for choice in ("sum", "max"))
    alignment = some_step(ours).alignment
    l = plain_group_logits(towers[1], "a photo of a", ours.ctx.detach(), some_step(ours))
    p = l.softmax(dim=1)
    expected = torch.stack([p[:, 2 * c] + p[:, 2 * c + 1] for c in range(4)], dim=1)
    torch.testing.assert_close(ours.predict(alignment).softmax(dim=1), expected, rtol=1e-4, atol=1e-6)
    expected = torch.stack([torch.maximum(l[:, 2 * c], l[:, 2 * c + 1]) for c in range(4)], dim=1)
    torch.testing.assert_close(largest.predict(alignment), expected, rtol=1e-4, atol=1e-5)


def test_groups_of_the_training_set_share_the_loss_evenly(towers: Towers) -> None:
    ours = debiaser(towers[0])
    weight = ours.w[ours.g]
    share = torch.bincount(ours.g, weight, minlength=8)
    torch.testing.assert_close(share[[0, 1, 3, 5, 7]], torch.full((5,), 8 / 5))
    assert share[[2, 4, 6]].sum() == 0 and torch.isfinite(ours.w).all() and abs(weight.mean() - 1) < 1e-6


@pytest.mark.parametrize("values", [1, 3])
def test_one_prompt_per_class_is_coop_with_class_specific_contexts(towers: Towers, values: int) -> None:
    """With one attribute value, and with several whose prompts are the same."""
    coop = make_learner(
        ContextLearner, towers[0], {"TRAINER.COOP.CSC": True, "TRAINER.COOP.N_CTX": 3, "TRAINER.COOP.CTX_INIT": ""}
    )
    ours = debiaser(towers[0], [values * c for c in (0, 0, 1, 2, 3, 3)], values, CTX_INIT="", N_CTX=3, BALANCE=False)
    with torch.no_grad():
        ours.ctx.copy_(coop.ctx.repeat_interleave(values, dim=0))
    step = some_step(ours, (0, 2, 3, 5))
    logits = coop(step.alignment.image_features).logits * (6.0 / towers[0].logit_scale.exp())
    torch.testing.assert_close(step.logits.log_softmax(1), logits.log_softmax(1), rtol=1e-4, atol=1e-5)
    expected = F.cross_entropy(logits, step.label) + torch.tensor(float(values)).log()
    torch.testing.assert_close(objective(ours, step), expected, rtol=1e-5, atol=1e-5)


def test_words_noise_and_random_starts(towers: Towers) -> None:
    even = debiaser(towers[0], NOISE=0.0, CTX_INIT="a_drawing_of_one")
    assert even.ctx.shape == (8, 4, 64)
    expected = hand_written(towers[1], "a drawing of one {}.").repeat_interleave(2, dim=0)
    torch.testing.assert_close(even.prompts.text_features(), expected, rtol=1e-5, atol=1e-5)
    loss = objective(even, some_step(even))
    (gradient,) = torch.autograd.grad(loss, even.ctx)
    assert (gradient[0::2] - gradient[1::2]).abs().amax(dim=(1, 2)).min() > 1e-5  # they part by themselves
    noisy = debiaser(towers[0], NOISE=0.5, CTX_INIT="a_drawing_of_one")
    noise = (noisy.ctx - even.ctx).detach()
    assert 0.45 < noise.std() < 0.55 and not torch.equal(noise[0], noise[1])
    drawn = debiaser(towers[0], CTX_INIT="", N_CTX=5)
    assert drawn.ctx.shape == (8, 5, 64) and 0.019 < drawn.ctx.std() < 0.021
    assert torch.unique(drawn.ctx, dim=0).shape == drawn.ctx.shape  # every prompt has numbers of its own
    assert debiaser(towers[0]).ctx.shape == (8, 4, 64)


def test_one_pass_through_the_text_tower_per_step_and_none_of_an_older_step(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, calls, encode = debiaser(towers[0]), [], ContextPrompts.text_features
    monkeypatch.setattr(ContextPrompts, "text_features", lambda self: calls.append(1) or encode(self))
    step = some_step(ours)
    first = objective(ours, step)
    assert len(calls) == 1
    with torch.no_grad():
        ours.ctx += torch.randn_like(ours.ctx)
    assert abs(objective(ours, step) - first) > 1e-3 and len(calls) == 2  # the contexts have moved since
    other = some_step(ours, seed=1)
    some_step(ours)  # predicts for another alignment in between
    torch.testing.assert_close(objective(ours, other), objective(ours, some_step(ours, seed=1)))


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"AGGREGATE": "mean"}, "AGGREGATE"),
        ({"NOISE": -0.1}, "NOISE"),
        ({"CTX_INIT": "", "N_CTX": 0}, "N_CTX"),
        ({"CTX_INIT": True}, "CTX_INIT"),
    ],
)
def test_impossible_keys_are_refused(towers: Towers, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"{SECTION}.{named}: "):
        debiaser(towers[0], **keys)


# --- with the engine -------------------------------------------------------------------------------------------


def test_engine_adds_up_to_the_group_cross_entropy(build: Build) -> None:
    trainer = build("GroupCoOp")
    ours, batch = trainer.debiasers[0], next(iter(trainer.encoder.batches("train")))
    ours.before_train()
    count, a_hat = torch.zeros(4), trainer.attributes.pseudo.of(trainer.encoder.split("train"))
    for datum, a in zip(trainer.dataset.train_x, a_hat, strict=True):
        count[2 * datum.label + a] += 1
    g = torch.tensor([2 * trainer.dataset.train_x[i].label + a_hat[i] for i in batch["index"]])
    logits = trainer.clip.logit_scale.exp() * batch["image_features"] @ ours.prompts.text_features().T
    expected = (80 / (4 * count[g]) * F.cross_entropy(logits, g, reduction="none")).mean()
    alignment = trainer.encoder.align(batch)
    loss, log = trainer.objective(alignment, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert "L_g" in log and count.min() > 0 and count.max() > 2 * count.min()
    blind, _ = trainer.objective(alignment, {**batch, "attribute": torch.full_like(batch["attribute"], -1)})
    assert loss == blind  # groups are pseudo-groups: labels of the attribute are not read


def test_true_groups_are_those_of_the_labels(build: Build) -> None:
    trainer = build("GroupCoOp", "TRAINER.GROUPS", "true", "DATASET.SHAPES.SCENES", "('water', 'land', 'snow')")
    ours = trainer.debiasers[0]
    assert ours.A == 3 and ours.ctx.shape == (6, 4, 128)
    ours.before_train()
    assert ours.g.tolist() == [3 * datum.label + datum.attribute for datum in trainer.dataset.train_x]
    context = trainer.context
    context.data.train.attribute[3] = -1
    with pytest.raises(UserError, match="TRAINER.GROUPS true: 1 of 80 images"):
        GroupPrompts(trainer.cfg, context)


def test_pseudo_groups_need_names_and_no_features_before_training(build: Build, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "frozen_features_of", lambda *_: pytest.fail("features are asked for too early"))
        trainer = build("GroupCoOp", "DATASET.SHAPES.SCENES", "('water', 'land', 'snow')")
    assert trainer.debiasers[0].A == 3
    with pytest.raises(UserError, match="ATTRIBUTE_NAMES"):
        GroupPrompts(trainer.cfg, without_names(trainer))


def test_its_own_learning_rate(build: Build) -> None:
    trainer = build("GroupCoOp", f"{SECTION}.LR", 0.125, "OPTIM.LR", 0.5, "OPTIM.WARMUP_EPOCH", -1)
    assert [group["lr"] for group in trainer._optims["groupcoop"].param_groups] == [0.125]
    assert trainer._optims["prompt_learner"] is None
    names = [name for name, _ in trainer.debiasers[0].named_parameters()]
    assert names == ["ctx"]


@pytest.mark.parametrize("base", ["CoOp", "ProGrad"])
def test_prompts_of_the_base_take_no_part(build: Build, base: str) -> None:
    """They find a gradient of zero: ProGrad looks at it, and a loss scaler refuses an optimiser without any."""
    trainer = build("GroupCoOp", "--base", base, "OPTIM.WEIGHT_DECAY", 0, "OPTIM.WARMUP_EPOCH", -1)
    trainer.trained.scaler = torch.amp.GradScaler("cpu", enabled=True)
    loader = trainer.encoder.batches("train")
    trainer.debiasers[0].before_train()
    trainer.num_batches, trainer.batch_idx, before = len(loader), 0, trainer.learner.ctx.detach().clone()
    own = trainer.debiasers[0].ctx.detach().clone()
    trainer.forward_backward(next(iter(loader)))
    assert trainer.learner.ctx.grad.abs().max() == 0 and torch.equal(trainer.learner.ctx, before)
    assert (trainer.debiasers[0].ctx - own).abs().amax(dim=(1, 2)).min() > 0


@pytest.mark.parametrize("base", ["ZeroshotCLIP", "CoOp", "CoCoOp", "MaPLe"])
def test_goes_over_every_kind_of_base(base: str, run: Run, tmp_path: Path) -> None:
    over = [] if base == "ZeroshotCLIP" else ["--base", base]
    results = run("GroupCoOp", "over", *over, "OPTIM.MAX_EPOCH", 1)
    assert results["base"] == base and 0 < results["accuracy"] <= 1
    state = checkpoint.load(checkpoint.file_of(tmp_path / "over", "groupcoop", 1))["state_dict"]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes == {"ctx": (4, 4, 128), "token_prefix": (4, 1, 128), "token_suffix": (4, 72, 128)}


def test_it_learns(build: Build) -> None:
    trainer = build("GroupCoOp", "OPTIM.MAX_EPOCH", 15, f"{SECTION}.LR", 0.02, "TEST.NO_TEST", True)
    trainer.train()
    first, last = (trainer.history[i]["L_g"] for i in (0, -1))
    assert last < 0.8 * first


def test_stacks_with_weights_of_another(build: Build) -> None:
    trainer = build("GroupCoOp", "TRAINER.STACK", "('DebiasedPT',)", f"{SECTION}.BALANCE", False)
    ours, weighting = trainer.debiasers
    batch = next(iter(trainer.encoder.batches("train")))
    for each in trainer.debiasers:
        each.before_train()
    alignment = trainer.encoder.align(batch)
    loss, _ = trainer.objective(alignment, batch)
    g = ours.g[batch["index"]]
    per_sample = F.cross_entropy(ours.group_logits(alignment).flatten(1), g, reduction="none")
    torch.testing.assert_close(loss, (weighting.w.float()[g] * per_sample).mean(), rtol=1e-5, atol=1e-5)


def test_two_predictions_do_not_stack(build: Build) -> None:
    with pytest.raises(UserError, match="GroupCoOp and CoOpOOD each replace the prediction"):
        build("GroupCoOp", "TRAINER.STACK", "('CoOpOOD',)")


def test_interrupted_and_resumed_equals_never_stopped(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["OPTIM.WARMUP_EPOCH", -1, f"{SECTION}.LR", 0.02, f"{SECTION}.CTX_INIT", "", f"{SECTION}.N_CTX", 2]
    assert_resumes(arguments, tmp_path, monkeypatch, "GroupCoOp", *keys)
    assert any(key.startswith("groupcoop.") for key in weights(tmp_path / "broken", 3))


def test_evaluation_of_a_trained_run_repeats_it(run: Run, tmp_path: Path) -> None:
    keys = [f"{SECTION}.LR", 0.1, f"{SECTION}.CTX_INIT", ""]
    trained = run("GroupCoOp", "trained", *keys)
    again = run("GroupCoOp", "again", *keys, "--eval-only", "--model-dir", tmp_path / "trained")
    assert {key: again[key] for key in METRICS} == {key: trained[key] for key in METRICS}
    untrained = run("GroupCoOp", "untrained", *keys, "--eval-only")
    assert untrained["groups"] != trained["groups"]
