"""DFR: the head is scikit-learn's, fitted once on the right images; until then it is the base learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers import dfr
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.contracts import Alignment
from tests.helpers.resampling import OVER, assert_resumes, assert_runs_over, without_labels
from tests.helpers.runs import Arguments, Build, Run

KEYS = ["TRAINER.GROUPS", "true", "DATASET.SHAPES.NUM_VAL", 64, "TRAINER.DFR.NUM_RETRAINS", 2]
LAST = 2  # the last of the epochs 0, 1, 2


def plain(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, solver="liblinear", max_iter=1000, tol=1e-6, **dfr.l1_penalty())


def fitted(build: Build, *keys: Any) -> PromptTrainer:
    """A trainer with its head fitted, on a base that was not trained."""
    trainer = build("DFR", *KEYS, *keys)
    trainer.debiasers[0].before_train()
    trainer.debiasers[0].after_epoch(LAST)
    for model in trainer.models():
        model.eval()
    return trainer


def features_of(trainer: PromptTrainer, split: str) -> tuple[np.ndarray, np.ndarray]:
    own = trainer.encoder.split(split)
    return own.features().double().numpy(), own.label.numpy()


def test_prediction_is_that_of_a_plain_pipeline_on_raw_features(build: Build) -> None:
    """Validation groups are equal here, so that every balanced subset is all of them."""
    trainer = fitted(build, "TRAINER.DFR.C", "(0.5,)")
    (train, _), (val, y), (test, _) = (features_of(trainer, split) for split in ("train", "val", "test"))
    scaler = StandardScaler().fit(train)
    model = plain(0.5).fit(scaler.transform(val), y)
    pipeline = make_pipeline(scaler, model)
    alignment = Alignment(torch.from_numpy(test).float(), torch.zeros(2, test.shape[1]), torch.tensor(1.0))
    logits = trainer.objective.predict(alignment).detach()
    expected = torch.from_numpy(pipeline.decision_function(test)).float()
    assert expected.std() > 0.5
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, rtol=0.02, atol=0.02)
    p = F.softmax(logits, dim=1).numpy()
    np.testing.assert_allclose(p, pipeline.predict_proba(test), atol=0.01)
    clear = expected.abs() > 0.05
    assert clear.sum() > 15
    assert np.array_equal(logits.argmax(1)[clear].numpy(), pipeline.predict(test)[clear.numpy()])
    torch.testing.assert_close(logits[:, 1], -logits[:, 0])


def test_the_head_is_the_mean_over_balanced_subsets(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("DFR", *KEYS, "TRAINER.DFR.C", "(0.3,)", "TRAINER.DFR.NUM_RETRAINS", 3)
    debiaser = trainer.debiasers[0]
    debiaser.before_train()
    debiaser.g = np.array([0] * 30 + [1] * 20 + [2] * 9 + [3] * 5)
    debiaser.context.data.val.label.copy_(torch.tensor([0] * 50 + [1] * 14))
    subsets, draw = [], dfr.balanced_subset

    def recorded(g: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        subsets.append(draw(g, rng))
        return subsets[-1]

    monkeypatch.setattr(dfr, "balanced_subset", recorded)
    debiaser.after_epoch(LAST)
    assert len(subsets) == 4  # one to choose c, on half of the images, then three
    for subset in subsets[1:]:
        assert np.bincount(debiaser.g[subset]).tolist() == [5] * 4
    assert len({tuple(sorted(subset)) for subset in subsets[1:]}) == 3
    train, z = features_of(trainer, "train")[0], features_of(trainer, "val")[0]
    scaler, y = StandardScaler().fit(train), debiaser.context.data.val.label.numpy()
    z = scaler.transform(z)
    models = [plain(0.3).fit(z[subset], y[subset]) for subset in subsets[1:]]
    a = np.mean([model.coef_[0] for model in models], axis=0) / scaler.scale_
    b = np.mean([model.intercept_[0] for model in models]) - a @ scaler.mean_
    np.testing.assert_allclose(2 * debiaser.weight[1].detach(), a, atol=0.02 * np.abs(a).max())
    np.testing.assert_allclose(2 * debiaser.bias[1].item(), b, rtol=0.02, atol=0.02)
    assert np.abs(a).max() > 1


def test_more_classes_are_one_against_the_rest() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = rng.normal(size=(90, 6)) + 2 * np.eye(6)[y]
    a, b = dfr.logistic(x, y, 0.5, rng)
    model = OneVsRestClassifier(plain(0.5)).fit(x, y)
    assert a.shape == (3, 6) and b.shape == (3,)
    np.testing.assert_allclose(x @ a.T + b, model.decision_function(x), atol=0.02)
    assert (a == 0).any()  # L1


def test_halves_share_every_group() -> None:
    g = np.array([0] * 7 + [2] * 4 + [3])
    first, second = dfr.halves(g, np.random.default_rng(0))
    assert np.bincount(g[first]).tolist() == [4, 0, 2, 1] and np.bincount(g[second]).tolist() == [3, 0, 2]
    assert sorted([*first, *second]) == list(range(12))
    assert first[:4].tolist() != [0, 1, 2, 3]


def test_c_is_chosen_by_the_worst_group_of_images_that_are_not_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are given: one is right on most images, one on more of the worst group."""
    g = np.array([0] * 80 + [1] * 20)
    y = np.array([0] * 60 + [1] * 20 + [1] * 20)
    rows = np.arange(100)
    # x [n, 3]: column j is +1 where the head of the j-th c is right.
    right = np.stack([g == 0, (rows % 4 != 0), (rows % 2 == 0)], axis=1)
    x = np.where(right, 1.0, -1.0) * np.where(y == 1, 1, -1)[:, None]
    fitted_on = []

    def given(x_fit: np.ndarray, y_fit: np.ndarray, c: float, rng: np.random.Generator) -> Any:
        fitted_on.append((x_fit, y_fit))
        a = np.zeros((2, 3))
        a[1, int(c) - 1] = 1
        return a, np.zeros(2)

    monkeypatch.setattr(dfr, "logistic", given)
    c, worst = dfr.choose_c(x, y, g, (1.0, 2.0, 3.0), np.random.default_rng(0))
    assert c == 2.0 and 0.5 < worst < 0.95
    assert dfr.choose_c(x, y, g, (3.0, 1.0), np.random.default_rng(0))[0] == 3.0
    assert dfr.choose_c(np.zeros((100, 3)), y, g, (3.0, 1.0), np.random.default_rng(0))[0] == 3.0  # the first of equals
    assert all(len(x_fit) == 20 for x_fit, _ in fitted_on)  # ten of each group: half of the smaller one


def test_fitted_images_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that are pure noise: a head that sees what it is judged on would be right on all of them."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 120)), rng.integers(0, 2, 80)
    _, worst = dfr.choose_c(x, y, y, (100.0,), rng)
    assert worst < 0.8


def test_until_the_last_epoch_it_is_the_base_learner(build: Build) -> None:
    trainer, coop = build("DFR", *KEYS), build("CoOp", *KEYS)
    debiaser = trainer.debiasers[0]
    debiaser.before_train()
    batch = next(iter(trainer.encoder.batches("train")))
    expected = coop.encoder.align(batch)
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    torch.testing.assert_close(loss, F.cross_entropy(expected.logits, batch["label"]), rtol=1e-6, atol=0)
    for mode in (True, False):
        debiaser.train(mode)
        debiaser.after_epoch(LAST - 1)
        assert not debiaser.fitted
        assert torch.equal(trainer.objective.predict(expected), expected.logits)
    debiaser.after_epoch(LAST)
    assert debiaser.fitted and not torch.allclose(trainer.objective.predict(expected), expected.logits, atol=1)
    assert torch.equal(debiaser.other_predictions(expected)["base learner"], expected.logits)


def test_training_does_not_move_the_head(run: Run, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, step = [], PromptTrainer.forward_backward

    def watched(self: PromptTrainer, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        result = step(self, batch)
        steps.append(self.debiasers[0].weight.abs().max().item())
        return result

    monkeypatch.setattr(PromptTrainer, "forward_backward", watched)
    results = run("DFR", "out", *KEYS)
    assert steps == [0.0] * 15
    assert set(results["other_predictions"]) == {"base learner"}


def test_the_same_seed_gives_the_same_head_another_one_not(build: Build) -> None:
    # More images than a subset takes, so that the subsets differ.
    def head(seed: int) -> torch.Tensor:
        trainer = build("DFR", *KEYS, "SEED", seed, "TRAINER.DFR.C", "(0.3,)")
        debiaser = trainer.debiasers[0]
        debiaser.before_train()
        debiaser.g = np.array([0] * 40 + [1] * 24)
        debiaser.context.data.val.label.copy_(torch.arange(64) % 2)
        debiaser.after_epoch(LAST)
        return debiaser.weight.detach()

    assert torch.equal(head(1), head(1)) and not torch.equal(head(1), head(2))


def test_needs_validation_images_of_every_class(build: Build) -> None:
    debiaser = build("DFR", *KEYS).debiasers[0]
    debiaser.context.data.val.label[:] = 0
    with pytest.raises(UserError, match="no image of 'diamond'"):
        debiaser.check()
    debiaser.context.data.val = None
    with pytest.raises(UserError, match="validation data, and the data set has none"):
        debiaser.check()
    with pytest.raises(UserError, match="TEST.FINAL_MODEL best_val"):
        build("DFR", *KEYS, "TEST.FINAL_MODEL", "best_val").before_train()


def test_attribute_labels_that_are_missing_are_named(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    without_labels(monkeypatch)
    build("DFR", *KEYS, "TRAINER.GROUPS", "pseudo").debiasers[0].before_train()
    with pytest.raises(UserError, match="64 of 64 images of the val split have no attribute label"):
        build("DFR", *KEYS).before_train()


def test_it_is_fitted_on_the_images_whose_attribute_is_known(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_labels(monkeypatch, "val", slice(3, 5))
    whole, seen = build("DFR", *KEYS).encoder.split("val"), []
    monkeypatch.setattr(dfr, "choose_c", lambda x, y, g, choices, rng: seen.append((y, g)) or (1.0, 1.0))
    trainer = fitted(build)
    kept = [i for i in range(64) if i not in (3, 4)]
    (y, g), label, attribute = seen[0], whole.label.numpy(), whole.attribute.numpy()
    assert y.tolist() == label[kept].tolist() and g.tolist() == (2 * label + attribute)[kept].tolist()
    assert (
        "Note: 2 of 64 validation images have no attribute label; DFR is fitted on the others"
        in capsys.readouterr().out
    )
    assert trainer.debiasers[0].fitted
    without_labels(monkeypatch, "val", np.flatnonzero(label == 1))
    with pytest.raises(UserError, match="no image of 'diamond' with an attribute label"):
        build("DFR", *KEYS).debiasers[0].check()


@pytest.mark.parametrize(("key", "value"), [("C", "(0.1, 0)"), ("C", "()"), ("C", "('a',)"), ("NUM_RETRAINS", 0)])
def test_values_that_cannot_be_are_refused(build: Build, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"TRAINER.DFR.{key}"):
        build("DFR", *KEYS, f"TRAINER.DFR.{key}", value)


@pytest.mark.parametrize(("base", "groups"), OVER)
def test_runs_over(run: Run, base: str, groups: str) -> None:
    results = assert_runs_over(run, "DFR", base, groups)
    assert set(results["other_predictions"]) == {"base learner"}


def test_runs_over_fixed_prompts_and_with_three_classes(run: Run) -> None:
    three = [
        "DATASET.SHAPES.CLASSES",
        "('circle', 'diamond', 'star')",
        "DATASET.SHAPES.SCENES",
        "('water', 'land', 'sky')",
    ]
    results = run("DFR", "out", "--base", "ZeroshotCLIP", *three, "DATASET.SHAPES.NUM_VAL", 54)
    assert len(results["classes"]) == 3 and results["base"] == "ZeroshotCLIP"


def test_the_head_is_in_the_checkpoint(run: Run, build: Build, tmp_path: Path) -> None:
    first = run("DFR", "first", *KEYS)
    again = run("DFR", "again", *KEYS, "--eval-only", "--model-dir", tmp_path / "first")
    assert {key: first[key] for key in ("accuracy", "groups")} == {key: again[key] for key in ("accuracy", "groups")}
    loaded = build("DFR", *KEYS)
    loaded.load_model(tmp_path / "first")
    assert loaded.debiasers[0].fitted
    for model in loaded.models():
        model.eval()
    alignment = loaded.encoder.align(next(iter(loaded.encoder.batches("test"))))
    assert not torch.allclose(loaded.objective.predict(alignment), alignment.logits, atol=1)


@pytest.mark.filterwarnings("error")
def test_scikit_learn_does_not_warn() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 128))
    for classes in (2, 3):
        for c in (1.0, 0.01):
            dfr.logistic(x, np.arange(60) % classes, c, rng)


def test_resumed_equals_never_stopped(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumes(arguments, tmp_path, monkeypatch, "DFR")
