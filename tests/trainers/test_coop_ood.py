"""CoOpOOD: every loss by hand, what each of them moves, and the limits in which the method is CoOp."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.coop_ood import uniformity_loss
from torch import Tensor

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.contracts import Alignment, Step
from oodprompt.methods.dependence import (
    Club,
    RunningShare,
    cross_covariance,
    eraser,
    explained_share,
    hsic,
    mutual_information,
    standardise_within,
    within_class_moments,
    within_classes,
)

Build = Callable[..., PromptTrainer]
JOINT = ["TRAINER.COOPOOD.PHASES", "joint"]


def first_batch(trainer: PromptTrainer) -> dict[str, Any]:
    loader = trainer.encoder.batches("train")
    for debiaser in trainer.debiasers:
        debiaser.before_train()
    return next(iter(loader))


def gradients(trainer: PromptTrainer) -> dict[str, float]:
    """Largest gradient of the context and of each projection (0 without one)."""
    debiaser = trainer.debiasers[0]
    named = {"ctx": trainer.learner.ctx, "h_u": debiaser.h_u.weight, "h_s": debiaser.h_s.weight}
    return {name: 0.0 if p.grad is None else p.grad.abs().max().item() for name, p in named.items()}


def test_without_extra_losses_and_with_identity_it_is_coop(build: Build) -> None:
    coop = build("CoOp")
    ours = build("CoOpOOD", "TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 0, "TRAINER.COOPOOD.INIT_NOISE", 0)
    batch = first_batch(coop)
    expected = coop.encoder.align(batch)
    alignment = ours.encoder.align(batch)
    torch.testing.assert_close(ours.objective.predict(alignment), expected.logits, rtol=1e-5, atol=1e-5)
    loss, _ = ours.objective(alignment, batch)
    torch.testing.assert_close(loss, F.cross_entropy(expected.logits, batch["label"]), rtol=1e-5, atol=1e-6)


def test_total_loss_is_the_formula(build: Build) -> None:
    keys = ["TRAINER.COOPOOD.ALPHA", 0.7, "TRAINER.COOPOOD.BETA", 0.3, "TRAINER.COOPOOD.L_C", "xcov"]
    keys += ["TRAINER.COOPOOD.L_S", "uniform"]
    trainer = build("CoOpOOD", *JOINT, *keys)
    batch = first_batch(trainer)
    z, y, w, s = batch["image_features"], batch["label"], *_text(trainer)
    h_u, h_s = trainer.debiasers[0].h_u, trainer.debiasers[0].h_s
    z_u, z_s = F.normalize(h_u(z), dim=1), F.normalize(h_s(z), dim=1)
    L_ce = F.cross_entropy(s * z_u @ w.T, y)
    p_s = F.softmax(s * z_s @ w.T, dim=1)
    L_s = (0.5 * (0.5 / p_s).log()).sum(1).mean()  # KL(U || p_s), two classes
    L_c = []
    for c in (0, 1):
        a, b = z_u[y == c], z_s[y == c]
        L_c.append((((a - a.mean(0)).T @ (b - b.mean(0)) / len(a)) ** 2).sum())
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    torch.testing.assert_close(loss, L_ce + 0.7 * L_s + 0.3 * torch.stack(L_c).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["contrast", "contrast_rows", "mi_rows", "hsic_rows"])
def test_coupling_of_rows_is_its_formula(build: Build, name: str) -> None:
    keys = ["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", name]
    trainer = build("CoOpOOD", *JOINT, *keys)
    batch = first_batch(trainer)
    z, y, w, s = batch["image_features"], batch["label"], *_text(trainer)
    u, v = (s * F.normalize(h(z), dim=1) @ w.T for h in (trainer.debiasers[0].h_u, trainer.debiasers[0].h_s))
    image = torch.arange(len(y))
    if name == "contrast":
        expected = -F.logsigmoid(u[image, y] - v[image, y]).mean()
    elif name == "contrast_rows":
        expected = -(u[image, y].exp() / (u.exp().sum(1) + v.exp().sum(1))).log().mean()
    elif name == "hsic_rows":
        expected = torch.stack([hsic(u[y == c], v[y == c]) for c in (0, 1)]).mean()
    else:
        each = []
        for c in (0, 1):
            P = F.softmax(u[y == c], 1).T @ F.softmax(v[y == c], 1) / (y == c).sum()
            each.append(sum(P[a, b] * (P[a, b] / (P[a].sum() * P[:, b].sum())).log() for a in (0, 1) for b in (0, 1)))
        expected = torch.stack(each).mean()
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    torch.testing.assert_close(loss - F.cross_entropy(u, y), expected, rtol=1e-4, atol=1e-6)


def test_repelling_is_its_formula(build: Build) -> None:
    keys = ["TRAINER.COOPOOD.ALPHA", 1, "TRAINER.COOPOOD.BETA", 0, "TRAINER.COOPOOD.L_S", "repel"]
    trainer = build("CoOpOOD", *JOINT, *keys)
    batch = first_batch(trainer)
    z, y, w, s = batch["image_features"], batch["label"], *_text(trainer)
    u, v = (s * F.normalize(h(z), dim=1) @ w.T for h in (trainer.debiasers[0].h_u, trainer.debiasers[0].h_s))
    expected = F.cross_entropy(u, y) + (1 + v[torch.arange(len(y)), y].exp()).log().mean()
    torch.testing.assert_close(
        trainer.objective(trainer.encoder.align(batch), batch)[0], expected, rtol=1e-5, atol=1e-6
    )


def test_mutual_information_is_zero_for_independent_labels_and_entropy_for_equal_ones() -> None:
    sides = F.one_hot(torch.arange(16) % 4, 4).float()
    assert math.isclose(mutual_information(sides, sides).item(), math.log(4), rel_tol=1e-5)
    others = F.one_hot(torch.arange(16) // 4, 4).float()
    assert abs(mutual_information(sides, others).item()) < 1e-6
    label = torch.tensor([0] * 16 + [1] * 3 + [2] * 16)  # class 1 has too few images
    value = within_classes(
        mutual_information, torch.cat([sides, sides[:3], sides]), torch.cat([sides, sides[:3], others]), label
    )
    assert math.isclose(value.item(), math.log(4) / 2, rel_tol=1e-5)


def _text(trainer: PromptTrainer) -> tuple[Tensor, Tensor]:
    alignment = trainer.learner(torch.zeros(1, trainer.clip.shape.embed_dim))
    return alignment.text_features, alignment.logit_scale


def test_uniformity_loss_is_kl_from_uniform_with_minimum_zero() -> None:
    logits = torch.randn(6, 5)
    expected = F.kl_div(F.log_softmax(logits, 1), torch.full((6, 5), 0.2), reduction="none").sum(1)
    torch.testing.assert_close(uniformity_loss(logits), expected)
    assert uniformity_loss(torch.full((2, 5), 3.0)).abs().max() < 1e-6
    cross_entropy_to_uniform = -F.log_softmax(torch.zeros(1, 5), 1).mean()
    assert math.isclose(cross_entropy_to_uniform.item(), math.log(5), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("keys", "moves"),
    [
        (["TRAINER.COOPOOD.ALPHA", 1, "TRAINER.COOPOOD.BETA", 0, "TRAINER.COOPOOD.L_S", "uniform"], {"ctx", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 1, "TRAINER.COOPOOD.BETA", 0, "TRAINER.COOPOOD.DETACH_HS", True], {"ctx"}),
        (["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", "hsic"], {"h_u", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", "xcov"], {"h_u", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", "club"], {"h_u", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", "contrast"], {"ctx", "h_u", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", "contrast_rows"], {"ctx", "h_u", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", "mi_rows"], {"ctx", "h_u", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.BETA", 1, "TRAINER.COOPOOD.L_C", "hsic_rows"], {"ctx", "h_u", "h_s"}),
        (["TRAINER.COOPOOD.ALPHA", 1, "TRAINER.COOPOOD.BETA", 0, "TRAINER.COOPOOD.L_S", "repel"], {"ctx", "h_s"}),
        (["TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_ALPHA", 1,
          "TRAINER.COOPOOD.ANCHOR_BETA", 0, "TRAINER.COOPOOD.ANCHOR_GAMMA", 0], {"ctx"}),
        (["TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_ALPHA", 0,
          "TRAINER.COOPOOD.ANCHOR_BETA", 1, "TRAINER.COOPOOD.ANCHOR_GAMMA", 0], {"h_u"}),
        (["TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_ALPHA", 0,
          "TRAINER.COOPOOD.ANCHOR_BETA", 0, "TRAINER.COOPOOD.ANCHOR_GAMMA", 1], {"h_s"}),
    ],
)  # fmt: skip
def test_each_term_moves_what_the_method_says(build: Build, keys: list[Any], moves: set[str]) -> None:
    trainer = build("CoOpOOD", *JOINT, *keys)
    batch = first_batch(trainer)
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    cross_entropy = F.cross_entropy(trainer.objective.predict(trainer.encoder.align(batch)), batch["label"])
    (loss - cross_entropy).backward()
    moved = {name for name, size in gradients(trainer).items() if size > 1e-6}
    assert moved == moves


def test_alternating_phases_train_one_branch_at_a_time(build: Build) -> None:
    keys = ["TRAINER.COOPOOD.PHASES", "alternating", "TRAINER.COOPOOD.ALPHA", 1, "TRAINER.COOPOOD.BETA", 0.5]
    trainer = build("CoOpOOD", *keys)
    batch = first_batch(trainer)
    for moves in ({"ctx", "h_u"}, {"ctx", "h_s"}, {"ctx", "h_u"}):
        for model in trainer._models.values():
            model.zero_grad(set_to_none=True)
        loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
        loss.backward()
        assert {name for name, size in gradients(trainer).items() if size > 1e-7} == moves
        idle = trainer.debiasers[0].h_s if "h_u" in moves else trainer.debiasers[0].h_u
        assert idle.weight.grad is None  # a zero gradient would still move it by momentum and weight decay


def test_dependence_is_small_for_independent_and_large_for_dependent_features() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(400, 6), torch.randn(400, 6)
    for measure in (hsic, cross_covariance):
        assert measure(x, x + 0.1 * noise) > 10 * measure(x, noise)
    assert hsic(x[:, :1], x[:, :1] ** 2) > 10 * hsic(
        x[:, :1], noise[:, :1] ** 2
    )  # RBF kernels see more than covariance
    assert hsic(x, noise) < 0.01


def test_hsic_is_the_trace_formula() -> None:
    x, y = torch.randn(12, 3), torch.randn(12, 2)

    def kernel(v: Tensor) -> Tensor:
        d = torch.cdist(v, v) ** 2
        return torch.exp(-d / d[~torch.eye(12, dtype=torch.bool)].median())

    h = torch.eye(12) - torch.ones(12, 12) / 12
    expected = torch.trace(kernel(x) @ h @ kernel(y) @ h) / 144
    torch.testing.assert_close(hsic(x, y), expected, rtol=1e-4, atol=1e-6)


def test_small_classes_are_left_out() -> None:
    x, y = torch.randn(10, 3), torch.randn(10, 3)
    label = torch.tensor([0] * 7 + [1] * 3)
    torch.testing.assert_close(within_classes(cross_covariance, x, y, label), cross_covariance(x[:7], y[:7]))
    assert within_classes(cross_covariance, x[7:], y[7:], label[7:]) == 0


def test_club_bounds_are_higher_for_dependent_features() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(256, 4), torch.randn(256, 4)

    def bound(y: Tensor) -> float:
        net = Club(4)
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            value = net(x, y)
            value.backward()
            optimizer.step()
        return value.item()

    assert bound(x) > bound(noise) + 0.5


def test_explained_share_is_one_for_the_attribute_zero_without_it_and_free_of_scale() -> None:
    torch.manual_seed(0)
    label = torch.arange(400) % 2
    attribute = (torch.arange(400) // 2 % 4 == 0).float()
    posterior = torch.stack([attribute, 1 - attribute], dim=1)
    q = standardise_within(posterior, label)
    torch.testing.assert_close(q[label == 0].mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(q[label == 1].std(0, correction=0), torch.ones(2))
    only = attribute[:, None] * torch.randn(1, 5)
    assert math.isclose(explained_share(*within_class_moments(only, q, label)).item(), 1.0, rel_tol=1e-4)
    mixed = torch.randn(400, 5) + only
    share = explained_share(*within_class_moments(mixed, q, label)).item()
    assert 0.02 < share < 0.9
    assert explained_share(*within_class_moments(torch.randn(400, 5), q, label)) < 0.02
    assert math.isclose(explained_share(*within_class_moments(1e-2 * mixed, q, label)).item(), share, rel_tol=1e-4)
    shifted = mixed + 10 * label[:, None]  # what tells the classes apart is not the attribute's
    assert math.isclose(explained_share(*within_class_moments(shifted, q, label)).item(), share, rel_tol=1e-4)


def draw(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [n, 3] and a standardised attribute [n, 1] that know nothing of each other, and labels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(images) % 2
    q = standardise_within(torch.randn(images, 1, generator=generator), label)
    return torch.randn(images, 3, generator=generator), q, label


def test_running_share_of_one_batch_is_the_share_of_that_batch() -> None:
    x, q, label = draw(40, seed=0)
    expected_x, running_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = explained_share(*within_class_moments(expected_x, q, label))
    for momentum, batches in ((0.0, 1), (0.9, 200)):  # the same batch again and again has the batch's own share
        running = RunningShare(2, 3, 1, momentum)
        for _ in range(batches):
            value = running(running_x, q, label)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(value, running_x)[0],
            torch.autograd.grad(expected, expected_x, retain_graph=True)[0],
            rtol=1e-3,
            atol=1e-6,
        )


def test_running_share_of_small_batches_is_not_inflated_by_chance() -> None:
    x, q, label = draw(4000, seed=1)
    whole = explained_share(*within_class_moments(x, q, label)).item()
    running, alone = RunningShare(2, 3, 1, 0.99), []
    for batch in torch.arange(4000).split(20):
        value = running(x[batch], q[batch], label[batch]).item()
        alone.append(explained_share(*within_class_moments(x[batch], q[batch], label[batch])).item())
    assert sum(alone) / len(alone) > 0.04  # 1 / n of 20 images, where the truth is 0
    assert whole < 0.002 and value < 0.004


def test_running_share_rests_in_evaluation_and_keeps_classes_that_a_batch_lacks() -> None:
    x, q, label = draw(40, seed=2)
    running = RunningShare(2, 3, 1, 0.5)
    running(x, q, label)
    state = {key: value.clone() for key, value in running.state_dict().items()}
    running.eval()(x, q, label)
    assert all(torch.equal(value, state[key]) for key, value in running.state_dict().items())
    running.train()(x[:1], q[:1], label[:1])  # class 0 alone
    torch.testing.assert_close(running.cross[1] / running.count[1], state["cross"][1] / state["count"][1])


def test_moments_of_the_training_set_equal_those_of_the_projected_features() -> None:
    torch.manual_seed(0)
    x, label = torch.randn(50, 6), torch.arange(50) % 3
    q = standardise_within(torch.rand(50, 2), label)
    weight = torch.randn(6, 6)
    direct = explained_share(*within_class_moments(x @ weight.T, q, label))
    torch.testing.assert_close(explained_share(*within_class_moments(x, q, label), weight), direct)


def test_constant_attribute_within_a_class_adds_nothing() -> None:
    label = torch.tensor([0, 0, 0, 1, 1, 1])
    q = standardise_within(torch.tensor([[0.2], [0.4], [0.9], [1.0], [1.0], [1.0]]), label)
    assert torch.equal(q[3:], torch.zeros(3, 1))


def test_eraser_leaves_no_linear_trace_and_moves_features_least() -> None:
    torch.manual_seed(0)
    label = torch.arange(600) % 3
    q = torch.randn(600, 1) * torch.tensor([1.0, -1.0])  # a posterior and its complement
    x = torch.randn(600, 8) @ torch.randn(8, 8) + 3 * torch.randn(3, 8)[label] + q[:, :1] * torch.randn(8)
    q = standardise_within(q, label)
    moments, W = within_class_moments(x, q, label), eraser(x, q, label)
    assert explained_share(*moments) > 0.01
    assert explained_share(*moments, W) < 1e-8
    torch.testing.assert_close(W @ W, W, rtol=1e-4, atol=1e-4)  # a projection

    def moved(M: Tensor) -> Tensor:
        """E |z - M z|^2 within classes."""
        D = torch.eye(8) - M
        return (D @ moments[1] @ D.T).diagonal().sum()

    basis = torch.linalg.svd(moments[0].permute(1, 0, 2).flatten(1))[0][
        :, : torch.linalg.matrix_rank(moments[0].permute(1, 0, 2).flatten(1))
    ]
    orthogonal = torch.eye(8) - basis @ basis.T
    assert explained_share(*moments, orthogonal) < 1e-8
    assert 1.001 * moved(W) < moved(orthogonal)
    for _ in range(20):  # every other map that erases moves more: W + N with N cross = 0
        other = W + 0.05 * torch.randn(8, 8) @ orthogonal
        assert moved(W) < moved(other)
    torch.testing.assert_close(eraser(x, torch.zeros(600, 2), label), torch.eye(8))
    same = torch.ones(6, 8)
    assert torch.equal(eraser(same, q[:6], label[:6]), torch.eye(8))
    few = eraser(x[:6], q[:6], label[:6])  # fewer images than features
    assert few.isfinite().all() and explained_share(*within_class_moments(x[:6], q[:6], label[:6]), few) < 1e-6


def test_eraser_does_not_take_most_dimensions() -> None:
    torch.manual_seed(0)
    label, x, q = torch.arange(400) % 5, torch.randn(400, 8), torch.randn(400, 1)
    with pytest.raises(UserError, match="would take 5 of 8 dimensions"):
        eraser(x, standardise_within(q, label), label)


@pytest.mark.parametrize("bias", [True, False])
def test_erased_start(bias: bool, build: Build) -> None:
    """h_u starts as the eraser, which with a bias keeps the mean; the share is 0 and stays where it is after a resume."""
    keys = ["TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_START", "erased"]
    trainer = build("CoOpOOD", *keys, "TRAINER.COOPOOD.BIAS", bias)
    batch = first_batch(trainer)
    debiaser, z = trainer.debiasers[0], trainer.encoder.frozen_features_of("train")
    assert debiaser.contribute(_step(trainer, batch)).log["L_c"] < 1e-6
    W = eraser(z, debiaser.posterior, trainer.encoder.split("train").label)
    torch.testing.assert_close(debiaser.h_u.weight, W)
    kept = debiaser.h_u(z).mean(0)
    torch.testing.assert_close(kept, z.mean(0) if bias else (z @ W.T).mean(0), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        debiaser.h_u.weight.zero_()
    debiaser.before_train()  # as after a resume: a step has been taken
    assert debiaser.h_u.weight.abs().max() == 0


def _step(trainer: PromptTrainer, batch: dict[str, Any]) -> Step:
    alignment = trainer.encoder.align(batch)
    return Step(alignment, alignment.logits, batch["label"], batch["attribute"], batch["index"])


def test_anchor_needs_names(build: Build) -> None:
    pseudo = build("CoOpOOD").attributes.pseudo
    pseudo._prompts = []
    with pytest.raises(UserError, match="ATTRIBUTE_NAMES"):
        _ = pseudo.text


def test_pseudo_attributes_need_no_labels(build: Build) -> None:
    """On the embedded CLIP the scene is seen without labels, and true attributes are never read."""
    trainer = build("CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes")
    batch = first_batch(trainer)
    truth = torch.tensor([datum.attribute for datum in trainer.dataset.train_x])
    assert (trainer.debiasers[0].pseudo_attribute == truth).float().mean() > 0.95
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    blind, _ = trainer.objective(
        trainer.encoder.align(batch), {**batch, "attribute": torch.full_like(batch["attribute"], -1)}
    )
    assert loss == blind


def test_both_predictions_are_reported(run: Callable[..., dict[str, Any]]) -> None:
    results = run("CoOpOOD", "invariant")
    assert set(results["other_predictions"]) == {"through raw z"}
    results = run("CoOpOOD", "raw", "TRAINER.COOPOOD.INFERENCE", "raw")
    assert set(results["other_predictions"]) == {"through z_u"}


def test_goes_over_zero_shot_prompts_too(run: Callable[..., dict[str, Any]]) -> None:
    results = run("CoOpOOD", "fixed", "--base", "ZeroshotCLIP", "TRAINER.COOPOOD.ANCHOR", "attributes")
    assert results["base"] == "ZeroshotCLIP" and 0 <= results["worst_group_accuracy"] <= results["accuracy"] <= 1


def test_compare_handles_image_conditioned_text() -> None:
    z, w = F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(4, 3, 8), dim=2)
    alignment = Alignment(z, w, torch.tensor(7.0))
    torch.testing.assert_close(alignment.logits, torch.stack([7 * w[i] @ z[i] for i in range(4)]))


@pytest.mark.parametrize(
    "key", ["L_C", "INIT", "PHASES", "INFERENCE", "ANCHOR", "ANCHOR_L_C", "ANCHOR_STATISTICS", "ANCHOR_START"]
)
def test_unknown_choices_are_refused(build: Build, key: str) -> None:
    with pytest.raises(UserError, match=f"TRAINER.COOPOOD.{key}"):
        build("CoOpOOD", f"TRAINER.COOPOOD.{key}", "nonsense")


@pytest.mark.parametrize("rest", [["TRAINER.COOPOOD.L_C", "none"], ["TRAINER.COOPOOD.BETA", "0"]])
def test_a_layer_that_nothing_trains_is_refused(build: Build, rest: list[str]) -> None:
    with pytest.raises(UserError, match="nothing trains h_s"):
        build("CoOpOOD", "TRAINER.COOPOOD.DETACH_HS", "True", *rest)
