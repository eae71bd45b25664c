"""RoboShot: the paper's loop over directions by numpy, what is left of a feature, and that nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers import roboshot
from oodprompt.trainers.roboshot import RobustFeatures
from torch import Tensor

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.contracts import Alignment
from tests.helpers.contexts import without_names
from tests.helpers.runs import Build
from tests.helpers.towers import text_of

Run = Callable[..., dict[str, Any]]
HARMFUL = [("a photo of water.", "a photo of land."), ("the sea", "grass"), ("snow", "a desert")]
HELPFUL = [("a photo of a circle.", "a photo of a diamond."), ("a star", "a square")]


def key(name: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"TRAINER.ROBOSHOT.{name}", str(tuple("|".join(pair) for pair in pairs))]


def differences(trainer: PromptTrainer, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    return text_of(trainer, [one for one, _ in pairs]) - text_of(trainer, [other for _, other in pairs])


def features() -> Tensor:
    return F.normalize(torch.randn(6, 128, generator=torch.Generator().manual_seed(0)), dim=1)


def by_the_paper(z: Tensor, reject: np.ndarray, boost: np.ndarray | None = None) -> np.ndarray:
    """Direction by direction along a QR basis, normalised after each."""
    x = z.double().numpy()
    for rows, sign in ((reject, -1), (boost, 1)):
        for v in np.linalg.qr(rows.T)[0].T if rows is not None else ():
            x = x + sign * (x @ v)[:, None] * v
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x


def off(value: Tensor, expected: np.ndarray) -> float:
    return np.abs(value.double().numpy() - expected).max()


def test_features_are_those_of_the_papers_loop(build: Build) -> None:
    trainer = build("RoboShot", *key("HARMFUL", HARMFUL), *key("HELPFUL", HELPFUL))
    debiaser, z = trainer.debiasers[0], features()
    reject, boost = differences(trainer, HARMFUL), differences(trainer, HELPFUL)
    expected = by_the_paper(z, reject, boost)
    assert debiaser.V.shape == (128, 3) and debiaser.U.shape == (128, 2)
    assert off(debiaser.robust(z), expected) < 1e-5
    assert np.abs(expected - by_the_paper(z, reject)).max() > 1e-3  # boosting and its place are no small thing
    assert np.abs(expected - by_the_paper(z, boost, reject)).max() > 1e-3
    alone = build("RoboShot", *key("HARMFUL", HARMFUL)).debiasers[0]
    assert off(alone.robust(z), by_the_paper(z, reject)) < 1e-5 and alone.U.shape == (128, 0)


def test_nothing_is_left_along_any_difference_of_the_attributes_prompts(build: Build) -> None:
    trainer = build("RoboShot")
    water, land = trainer.dataset.attribute_prompts
    rows = differences(trainer, [(one, other) for one in water for other in land])
    # Features that are full of the harmful directions.
    z = F.normalize(features() + torch.from_numpy(rows[:6]).float(), dim=1)
    robust = trainer.debiasers[0].robust(z).double().numpy()
    assert np.abs(z.double().numpy() @ rows.T).max() > 0.1 and np.abs(robust @ rows.T).max() < 1e-6
    assert np.allclose(np.linalg.norm(robust, axis=1), 1, atol=1e-6)
    # and no more is taken away than those differences span
    projector = rows.T @ np.linalg.pinv(rows.T, rcond=1e-5)
    rest = z.double().numpy() @ (np.eye(128) - projector)
    assert np.abs(robust - rest / np.linalg.norm(rest, axis=1, keepdims=True)).max() < 1e-5
    assert trainer.debiasers[0].V.shape == (128, 7)


def test_three_values_are_all_set_against_each_other(build: Build) -> None:
    trainer = build("RoboShot", "DATASET.SHAPES.SCENES", "('water', 'land', 'snow')")
    prompts = trainer.dataset.attribute_prompts
    ends = text_of(trainer, [prompts[0][0], prompts[1][0], prompts[2][-1]])
    V = trainer.debiasers[0].V.double().numpy()
    for i, j in ((0, 1), (0, 2), (1, 2)):
        d = ends[i] - ends[j]
        assert np.abs(d - V @ (V.T @ d)).max() < 1e-5 < np.abs(d).max()


def test_order_sign_and_repetition_of_pairs_change_nothing(build: Build) -> None:
    z = features()
    first = build("RoboShot", *key("HARMFUL", HARMFUL), *key("HELPFUL", HELPFUL)).debiasers[0].robust(z)
    turned = [pair[::-1] for pair in HARMFUL[::-1]]
    chained = [("a photo of water.", "the sea"), ("the sea", "a lake"), ("a lake", "a photo of water.")]
    other = build("RoboShot", *key("HARMFUL", turned), *key("HELPFUL", [*HELPFUL[::-1], HELPFUL[0]]))
    torch.testing.assert_close(other.debiasers[0].robust(z), first, rtol=1e-5, atol=1e-6)
    assert build("RoboShot", *key("HARMFUL", chained)).debiasers[0].V.shape == (128, 2)  # the third is the other two's


@pytest.mark.parametrize("by_image", [False, True])
def test_prediction_compares_the_robust_feature(build: Build, by_image: bool) -> None:
    trainer = build("RoboShot", *key("HELPFUL", HELPFUL))
    shape = (6, 3, 128) if by_image else (3, 128)
    w = F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(1)), dim=-1)
    alignment = Alignment(features(), w, torch.tensor(7.0))
    z = trainer.debiasers[0].robust(features())
    expected = torch.stack([7 * (w[i] if by_image else w) @ z[i] for i in range(6)])
    torch.testing.assert_close(trainer.objective.predict(alignment), expected, rtol=1e-4, atol=1e-5)
    assert (expected - alignment.logits).abs().max() > 1e-2
    others = trainer.debiasers[0].other_predictions(alignment)
    assert others.keys() == {"through raw z"} and torch.equal(others["through raw z"], alignment.logits)


def test_a_trained_base_learns_on_the_robust_feature(build: Build) -> None:
    trainer = build("RoboShot", "--base", "CoOp")
    batch = next(iter(trainer.encoder.batches("train")))
    alignment = trainer.encoder.align(batch)
    z = trainer.debiasers[0].robust(batch["image_features"])
    expected = F.cross_entropy(alignment.logit_scale * z @ alignment.text_features.T, batch["label"])
    loss, _ = trainer.objective(alignment, batch)
    ours, theirs = (torch.autograd.grad(x, trainer.learner.ctx, retain_graph=True)[0] for x in (loss, expected))
    assert theirs.abs().max() > 1e-3 and (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert not list(trainer.debiasers[0].parameters())


def test_alone_it_trains_nothing_and_writes_results(run: Run, tmp_path: Path) -> None:
    results, raw = run("RoboShot", "alone"), run("ZeroshotCLIP", "raw")
    assert (results["base"], results["time"]["train_s"]) == ("ZeroshotCLIP", 0.0)
    folder = tmp_path / "alone"
    assert (folder / "results.md").is_file() and not (folder / "roboshot").exists()
    assert "epoch [" not in (folder / "log.txt").read_text()
    others = results["other_predictions"]["through raw z"]
    assert others == {key: raw[key] for key in ("accuracy", "worst_group_accuracy", "gap")}


@pytest.mark.parametrize("base", ["CoCoOp", "MaPLe"])
def test_goes_over_other_bases(base: str, run: Run) -> None:
    results = run("RoboShot", "over", "--base", base, "OPTIM.MAX_EPOCH", 1)
    assert results["base"] == base and results["time"]["train_s"] > 0


def test_evaluation_of_a_trained_base_repeats_it(run: Run, tmp_path: Path) -> None:
    trained = run("RoboShot", "trained", "--base", "CoOp", "OPTIM.LR", 0.05)
    again = run("RoboShot", "again", "--base", "CoOp", "--eval-only", "--model-dir", tmp_path / "trained")
    for name in ("accuracy", "worst_group_accuracy", "groups", "classes"):
        assert again[name] == trained[name]


def test_names_are_needed_only_without_harmful_insights(build: Build) -> None:
    for keys in ([], key("HARMFUL", HARMFUL)):
        trainer = build("RoboShot", *keys)
        context = without_names(trainer)
        if keys:
            assert RobustFeatures(trainer.cfg, context).V.shape == (128, 3)
        else:
            with pytest.raises(UserError, match="ATTRIBUTE_NAMES"):
                RobustFeatures(trainer.cfg, context)


def test_pairs_that_leave_nothing_are_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roboshot, "span", lambda vectors: torch.eye(128, dtype=torch.float64))
    with pytest.raises(UserError, match="HARMFUL: the pairs span all 128 dimensions"):
        build("RoboShot")


@pytest.mark.parametrize("name", ["HARMFUL", "HELPFUL"])
@pytest.mark.parametrize("entry", ["a lake", "a lake|", "a lake|a lake", "a lake|grass|snow"])
def test_what_is_no_pair_is_refused(build: Build, name: str, entry: str) -> None:
    with pytest.raises(UserError, match=f"TRAINER.ROBOSHOT.{name}: '{entry}'".replace("|", r"\|")):
        build("RoboShot", f"TRAINER.ROBOSHOT.{name}", entry)


def test_two_predictions_do_not_stack(build: Build) -> None:
    with pytest.raises(UserError, match="RoboShot and CoOpOOD each replace the prediction"):
        build("RoboShot", "TRAINER.STACK", "('CoOpOOD',)")
