"""OrthCal: the projection by numpy, what it minimises, and that it trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.orth_cal import ProjectedText, calibrated
from torch import Tensor

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods import attributes
from oodprompt.methods.attributes import span
from oodprompt.methods.contracts import Alignment
from tests.helpers.contexts import without_names
from tests.helpers.runs import Build
from tests.helpers.towers import text_of

Run = Callable[..., dict[str, Any]]
PLAIN = ["TRAINER.ORTHCAL.CALIBRATE", "False"]
THREE = ["DATASET.SHAPES.SCENES", "('water', 'land', 'snow')"]
METRICS = ("accuracy", "worst_group_accuracy", "gap", "groups", "classes")


def attribute_text(trainer: PromptTrainer) -> np.ndarray:
    return text_of(trainer, [prompt for prompts in trainer.dataset.attribute_prompts for prompt in prompts])


def by_numpy(trainer: PromptTrainer, lists: Sequence[Sequence[str]], strength: float) -> np.ndarray:
    """P of the paper, term by term."""
    t = attribute_text(trainer)
    q, _ = np.linalg.qr(t.T)
    p_0 = np.eye(t.shape[1]) - q @ q.T
    terms = []
    for prompts in lists:
        z = text_of(trainer, prompts)
        for i in range(len(z)):
            for j in range(i):
                terms.append(np.outer(z[i], z[i]) + np.outer(z[j], z[j]) - np.outer(z[i], z[j]) - np.outer(z[j], z[i]))
    return p_0 @ np.linalg.inv(np.eye(len(p_0)) + strength * sum(terms) / max(len(terms), 1))


def some_alignment(trainer: PromptTrainer, by_image: bool) -> Alignment:
    torch.manual_seed(0)
    shape = (5, 3, 128) if by_image else (3, 128)
    return Alignment(
        F.normalize(torch.randn(5, 128), dim=-1), F.normalize(torch.randn(shape), dim=-1), torch.tensor(7.0)
    )


@pytest.mark.parametrize("scenes", [[], THREE])
def test_projection_is_the_closed_form(build: Build, scenes: list[str]) -> None:
    names = ["water", "land", *(["snow"] if scenes else [])]
    lists = [[f"a photo of a {c} with {a}." for a in names] for c in ("circle", "diamond")]
    trainer = build("OrthCal", *scenes)
    expected = by_numpy(trainer, lists, 1000.0)
    assert np.abs(trainer.debiasers[0].P.double().numpy() - expected).max() < 1e-5
    assert np.abs(expected - by_numpy(trainer, [], 0.0)).max() > 0.02  # what calibration changes


def test_keys_of_the_pairs_and_of_their_weight(build: Build) -> None:
    keys = ["TRAINER.ORTHCAL.PAIR_TEMPLATE", "{attribute} behind {class}", "TRAINER.ORTHCAL.LAMBDA", 3]
    trainer = build("OrthCal", *keys)
    lists = [[f"{a} behind {c}" for a in ("water", "land")] for c in ("circle", "diamond")]
    assert np.abs(trainer.debiasers[0].P.double().numpy() - by_numpy(trainer, lists, 3.0)).max() < 1e-5
    given = build("OrthCal", *keys, "TRAINER.ORTHCAL.PAIRS", "('a lake | the sea|grass', 'snow|ice')")
    expected = by_numpy(trainer, [["a lake", "the sea", "grass"], ["snow", "ice"]], 3.0)
    assert np.abs(given.debiasers[0].P.double().numpy() - expected).max() < 1e-5


def test_calibration_minimises_the_papers_objective() -> None:
    g = torch.Generator().manual_seed(0)
    z_i, z_j = (F.normalize(torch.randn(6, 12, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    V = span(torch.randn(4, 12, generator=g, dtype=torch.float64))
    P_0 = torch.eye(12, dtype=torch.float64) - V @ V.T

    def objective(P: Tensor) -> Tensor:
        return ((P - P_0) ** 2).sum() + 50 / 6 * ((z_i @ P.T - z_j @ P.T) ** 2).sum()

    P = calibrated(P_0, z_i - z_j, 50.0).requires_grad_()
    value = objective(P)
    (gradient,) = torch.autograd.grad(value, P)
    assert gradient.abs().max() < 1e-10 and value < objective(P_0)
    for _ in range(5):
        assert objective(P + 0.01 * torch.randn(12, 12, generator=g, dtype=torch.float64)) > value


@pytest.mark.parametrize("keys", [PLAIN, []])
def test_projected_text_says_nothing_of_the_attribute(build: Build, keys: list[str]) -> None:
    trainer = build("OrthCal", *keys)
    debiaser, prompts = trainer.debiasers[0], torch.from_numpy(attribute_text(trainer)).float()
    text = trainer.learner(torch.zeros(1, 128)).text_features
    along = F.normalize(text @ debiaser.P.T, dim=-1) @ prompts.T
    assert (text @ prompts.T).abs().max() > 0.1 and along.abs().max() < 1e-5
    if keys:
        assert (debiaser.P @ debiaser.P - debiaser.P).abs().max() < 1e-5 and torch.equal(debiaser.P, debiaser.P.T)
        assert torch.linalg.matrix_rank(debiaser.P, atol=1e-3) == 128 - 8
        assert np.abs(debiaser.P.double().numpy() - by_numpy(trainer, [], 0.0)).max() < 1e-5


def test_calibration_draws_pairs_together(build: Build) -> None:
    trainer = build("OrthCal")
    z = torch.from_numpy(
        text_of(trainer, ["a photo of a circle with water.", "a photo of a circle with land."])
    ).float()
    plain = build("OrthCal", *PLAIN).debiasers[0].P
    before, after = (((z @ P.T).diff(dim=0)).norm() for P in (plain, trainer.debiasers[0].P))
    assert after < 0.1 * before


@pytest.mark.parametrize("by_image", [False, True])
def test_prediction_of_shared_and_of_image_conditioned_text(build: Build, by_image: bool) -> None:
    trainer = build("OrthCal")
    alignment, P = some_alignment(trainer, by_image), trainer.debiasers[0].P
    rows = []
    for i, z in enumerate(alignment.image_features):
        text = alignment.text_features[i] if by_image else alignment.text_features
        rows.append(torch.stack([7 * z @ (P @ w) / (P @ w).norm() for w in text]))
    torch.testing.assert_close(trainer.objective.predict(alignment), torch.stack(rows), rtol=1e-4, atol=1e-5)
    others = trainer.debiasers[0].other_predictions(alignment)
    assert others.keys() == {"without projection"} and torch.equal(others["without projection"], alignment.logits)


def test_gradients_pass_through_the_projection(build: Build) -> None:
    trainer = build("OrthCal", "--base", "CoOp")
    batch = next(iter(trainer.encoder.batches("train")))
    alignment = trainer.encoder.align(batch)
    w, P = alignment.text_features, trainer.debiasers[0].P
    projected = torch.stack([P @ w_c / (P @ w_c).norm() for w_c in w])
    logits = alignment.logit_scale * alignment.image_features @ projected.T
    expected = F.cross_entropy(logits, batch["label"])
    loss, _ = trainer.objective(alignment, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(x, trainer.learner.ctx, retain_graph=True)[0] for x in (loss, expected))
    assert theirs.abs().max() > 1e-3 and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert not list(trainer.debiasers[0].parameters())


def test_alone_it_trains_nothing_and_writes_results(run: Run, tmp_path: Path) -> None:
    results, raw = run("OrthCal", "alone"), run("ZeroshotCLIP", "raw")
    assert (results["base"], results["time"]["train_s"]) == ("ZeroshotCLIP", 0.0)
    folder = tmp_path / "alone"
    assert (folder / "results.md").is_file() and not (folder / "orthcal").exists()
    assert "epoch [" not in (folder / "log.txt").read_text()
    others = results["other_predictions"]["without projection"]
    assert others == {key: raw[key] for key in ("accuracy", "worst_group_accuracy", "gap")}


@pytest.mark.parametrize("base", ["CoCoOp", "MaPLe"])
def test_goes_over_other_bases(base: str, run: Run) -> None:
    results = run("OrthCal", "over", "--base", base, "OPTIM.MAX_EPOCH", 1)
    assert results["base"] == base and results["time"]["train_s"] > 0


def test_evaluation_of_a_trained_base_repeats_it(run: Run, tmp_path: Path) -> None:
    trained = run("OrthCal", "trained", "--base", "CoOp", "OPTIM.LR", 0.05)
    flags = ["--base", "CoOp", "--eval-only", "--model-dir", tmp_path / "trained"]
    again = run("OrthCal", "again", *flags)
    assert {key: again[key] for key in METRICS} == {key: trained[key] for key in METRICS}
    resumed = run("OrthCal", "trained", "--base", "CoOp", "OPTIM.LR", 0.05)
    assert resumed["groups"] == trained["groups"]
    assert run("OrthCal", "start", "--base", "CoOp", "--eval-only")["groups"] != trained["groups"]


def test_dependent_prompts_count_once() -> None:
    g = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(3, 10, generator=g), dim=1).double()
    noisy = torch.cat([rows, rows[:1] + 1e-8 * torch.randn(1, 10, generator=g), rows[1:2] - rows[2:]])
    V, W = span(rows), span(noisy)
    assert V.shape == W.shape == (10, 3)
    torch.testing.assert_close(V.T @ V, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(V @ V.T, W @ W.T, atol=1e-7, rtol=0)
    assert span(rows + 1e-3 * torch.eye(10)[:3]).shape == (10, 3) and span(torch.zeros(2, 10)).shape == (10, 0)
    assert span(torch.stack([rows[0], rows[0] + 1e-3 * rows[1]])).shape == (10, 2)  # small, but no rounding


def test_needs_names(build: Build) -> None:
    trainer = build("OrthCal")
    with pytest.raises(UserError, match="ATTRIBUTE_NAMES"):
        ProjectedText(trainer.cfg, without_names(trainer))


def test_prompts_that_leave_nothing_are_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attributes, "span", lambda vectors: torch.eye(128, dtype=torch.float64))
    with pytest.raises(UserError, match="ATTRIBUTE_PROMPTS: the prompts span all 128 dimensions"):
        build("OrthCal")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("LAMBDA", -1),
        ("PAIR_TEMPLATE", "a photo of a {class}."),
        ("PAIR_TEMPLATE", "{attribute}"),
        ("PAIRS", "a photo"),
        ("PAIRS", "a photo|"),
        ("PAIRS", "a lake|grass|a lake"),
    ],
)
def test_impossible_keys_are_refused(build: Build, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"TRAINER.ORTHCAL.{key}: "):
        build("OrthCal", f"TRAINER.ORTHCAL.{key}", value)


@pytest.mark.parametrize("other", ["DFR", "GroupCoOp"])
def test_text_of_its_own_does_not_stack(build: Build, other: str) -> None:
    with pytest.raises(
        UserError, match=f"OrthCal changes the text features of the base, and {other} compares with its own"
    ):
        build("OrthCal", "TRAINER.STACK", f"('{other}',)")


def test_goes_with_weights_of_groups(build: Build) -> None:
    trainer = build("DebiasedPT", "--base", "CoOp", "TRAINER.STACK", "('OrthCal',)")
    batch = next(iter(trainer.encoder.batches("train")))
    trainer.debiasers[0].before_train()
    alignment = trainer.encoder.align(batch)
    loss, _ = trainer.objective(alignment, batch)
    weights = trainer.debiasers[0].w[trainer.debiasers[0].g[batch["index"]]].float()
    text = F.normalize(alignment.text_features @ trainer.debiasers[1].P.T, dim=-1)
    logits = replace(alignment, text_features=text).logits
    expected = (weights * F.cross_entropy(logits, batch["label"], reduction="none")).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_it_changes_the_text_that_a_stacked_debiaser_compares_with(build: Build) -> None:
    stack = ["--base", "CoOp", "TRAINER.STACK", "['CoOpOOD']", "TRAINER.COOPOOD.PHASES", "joint"]
    keys = ["TRAINER.COOPOOD.ALPHA", 0, "TRAINER.COOPOOD.L_C", "contrast", "TRAINER.COOPOOD.BETA", 1]
    trainer = build("OrthCal", *stack, *keys)
    projected, projections = trainer.debiasers
    batch = next(iter(trainer.encoder.batches("train")))
    alignment, y = trainer.encoder.align(batch), batch["label"]
    w = F.normalize(alignment.text_features @ projected.P.T, dim=-1)
    u, v = (
        alignment.logit_scale * F.normalize(h(alignment.image_features), dim=-1) @ w.T
        for h in (projections.h_u, projections.h_s)
    )
    torch.testing.assert_close(trainer.objective.predict(alignment), u, rtol=1e-5, atol=1e-5)
    gap = (v - u)[torch.arange(len(y)), y]
    loss, _ = trainer.objective(alignment, batch)
    torch.testing.assert_close(loss, F.cross_entropy(u, y) + F.softplus(gap).mean(), rtol=1e-5, atol=1e-6)
    found = trainer.objective.predictions(alignment)
    torch.testing.assert_close(found["without projection"], alignment.logits)
    torch.testing.assert_close(found["through raw z"], replace(alignment, text_features=w).logits)
