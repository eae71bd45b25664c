"""Domino: the mixture against loops, its start, and the slice it returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from oodprompt.studies import baselines
from oodprompt.studies.baselines import BASELINE_VARIANTS, ErrorAwareMixture
from tests.helpers.planted import one_hot, planted, soft, unit


def mixture_data(seed: int, n: int = 150, m: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    which = rng.integers(0, 4, n)
    z = rng.normal(size=(4, m))[which] + 0.5 * rng.normal(size=(n, m))
    y = one_hot(rng.integers(0, 3, n))
    y_hat = one_hot(np.where(which == 0, 0, rng.integers(0, 3, n)))
    responsibilities = rng.dirichlet(np.ones(5), n)
    return z, y, y_hat, responsibilities


def test_update_of_the_mixture_against_loops() -> None:
    z, y, y_hat, q = mixture_data(0, n=20)
    mixture = ErrorAwareMixture.maximise(z, y, y_hat, q, gamma=10)
    for s in range(5):
        mass = sum(q[i, s] for i in range(20))
        mean = sum(q[i, s] * z[i] for i in range(20)) / mass
        np.testing.assert_allclose(np.exp(mixture.log_weights[s]), mass / 20)
        np.testing.assert_allclose(mixture.means[s], mean)
        np.testing.assert_allclose(
            mixture.variances[s], sum(q[i, s] * (z[i] - mean) ** 2 for i in range(20)) / mass, rtol=1e-9
        )
        np.testing.assert_allclose(mixture.labels[s], sum(q[i, s] * y[i] for i in range(20)) / mass)
        np.testing.assert_allclose(mixture.predictions[s], sum(q[i, s] * y_hat[i] for i in range(20)) / mass)


def test_joint_and_posterior_against_loops() -> None:
    z, y, _, q = mixture_data(0, n=20)
    y_hat = np.random.default_rng(1).dirichlet(np.ones(3), 20)
    mixture = ErrorAwareMixture.maximise(z, y, y_hat, q, gamma=3)
    joint = np.array(
        [
            [
                np.exp(mixture.log_weights[s])
                * np.prod(norm.pdf(z[i], mixture.means[s], np.sqrt(mixture.variances[s])))
                * (y[i] @ mixture.labels[s]) ** 3
                * (y_hat[i] @ mixture.predictions[s]) ** 3
                for s in range(5)
            ]
            for i in range(20)
        ]
    )
    np.testing.assert_allclose(mixture.log_joint(z, y, y_hat), np.log(joint), rtol=1e-9)
    posterior, likelihood = mixture.posterior(z, y, y_hat)
    np.testing.assert_allclose(posterior, joint / joint.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(posterior.sum(axis=1), 1)
    assert likelihood == pytest.approx(np.log(joint.sum(axis=1)).mean())


@pytest.mark.parametrize("gamma", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_weighted_likelihood_does_not_fall(gamma: float, seed: int) -> None:
    z, y, y_hat, q = mixture_data(seed)
    z[:20] = z[0]
    mixture = ErrorAwareMixture.fit(z, y, y_hat, q, gamma, tolerance=0)
    assert len(mixture.trace) > 5
    assert np.diff(mixture.trace).min() > -1e-9
    assert mixture.trace[-1] > mixture.trace[0] + 0.1
    assert mixture.posterior(z, y, y_hat)[1] >= mixture.trace[-1] - 1e-9


def test_fitting_stops_when_little_changes() -> None:
    z, y, y_hat, q = mixture_data(0)
    trace = ErrorAwareMixture.fit(z, y, y_hat, q, 1.0).trace
    assert 2 < len(trace) < 100
    assert abs(trace[-1] - trace[-2]) < 1e-3 <= abs(trace[-2] - trace[-3])
    assert len(ErrorAwareMixture.fit(z, y, y_hat, q, 1.0, max_iterations=4, tolerance=0).trace) == 4


def test_equal_regions_keep_a_variance() -> None:
    mixture = ErrorAwareMixture.maximise(np.ones((6, 2)), np.eye(6), np.eye(6), np.full((6, 2), 0.5), 10)
    np.testing.assert_array_equal(mixture.variances, np.full((2, 2), 1e-6))


def test_start_in_confusion_cells() -> None:
    rng = np.random.default_rng(0)
    y, y_hat = one_hot(rng.integers(0, 2, 12), 2), rng.dirichlet(np.ones(2), 12)
    start = baselines._start_in_confusion_cells(y, y_hat, components=6, seed=0)
    np.testing.assert_allclose(start.sum(axis=1), 1)
    for i in range(12):
        dealt = [y[i, a] * y_hat[i, b] for a, b in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1)]]
        np.testing.assert_allclose(start[i], dealt / np.sum(dealt), atol=4e-3)
    assert not np.array_equal(start[:, 0], start[:, 4])
    assert baselines._start_in_confusion_cells(y, y_hat, components=1, seed=0).shape == (12, 4)


@pytest.mark.parametrize(
    ("images", "components", "confusion"), [(90, 4, True), (89, 4, False), (250, 25, True), (249, 25, False)]
)
def test_domino_starts_in_confusion_cells_where_regions_fill_them(
    monkeypatch: pytest.MonkeyPatch, images: int, components: int, confusion: bool
) -> None:
    called = []
    start = baselines._start_in_confusion_cells
    monkeypatch.setattr(baselines, "_start_in_confusion_cells", lambda *a: called.append(a) or start(*a))
    rng = np.random.default_rng(0)
    scores = soft(rng.integers(0, 3, images))
    case = (unit(rng.normal(size=(images, 5))), np.arange(images), scores, scores, np.arange(images) % 3)
    baselines.domino(*case, components=components)
    assert bool(called) is confusion
    baselines.domino(*case, start="kmeans", components=components)
    assert len(called) == confusion


@pytest.mark.parametrize(
    "variant", BASELINE_VARIANTS["Domino"], ids=lambda variant: "-".join(map(str, variant.values()))
)
def test_domino_returns_the_slice_of_largest_discrepancy(variant: dict[str, Any]) -> None:
    """Blob 1 of class 0 is always called 1, blob 2 of class 1 three times in ten called 2; all else is right."""
    rng = np.random.default_rng(0)
    label, blob = np.repeat([0, 0, 1, 1, 2], 40), np.repeat(np.arange(5), 40)
    predicted = np.where(blob == 1, 1, np.where((blob == 2) & (np.arange(200) % 10 < 3), 2, label))
    features = unit(np.eye(6)[blob] + 0.05 * rng.normal(size=(200, 6)))
    scores = one_hot(predicted)
    ranked = baselines.domino(features, np.arange(200), scores, scores, label, components=5, **variant)
    assert set(ranked[:10]) <= set(np.flatnonzero(blob == 1))
    assert len(ranked) == 200


def fitted_as(monkeypatch: pytest.MonkeyPatch, joint: np.ndarray, labels: list, predictions: list) -> None:
    """Let Domino find these slices and log P(s, z, y, y_hat), and keep the order of the regions."""
    k = joint.shape[1]
    ones = np.ones((k, 1))
    mixture = ErrorAwareMixture(np.zeros(k), ones, ones, np.array(labels), np.array(predictions), 10.0)
    monkeypatch.setattr(ErrorAwareMixture, "fit", lambda *a: mixture)
    monkeypatch.setattr(ErrorAwareMixture, "log_joint", lambda *a: joint)
    monkeypatch.setattr(baselines, "_samples", lambda *a, keep=baselines._samples: _in_given_order(keep(*a)))


def test_domino_ranks_by_posterior_then_by_joint(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, _ = planted(images=45)
    r = len(inputs["owner"])
    first = np.random.default_rng(0).permutation(r).astype(float)
    gap = np.where(np.arange(r) % 2 == 0, 1.0, 900.0)  # a posterior of 0.73 or of 1
    fitted_as(monkeypatch, np.stack([first, first - gap], axis=1), [[1, 0, 0], [1, 0, 0]], [[0, 1, 0], [1, 0, 0]])
    odd, even = np.arange(1, r, 2), np.arange(0, r, 2)
    expected = [*odd[np.argsort(-first[odd])], *even[np.argsort(-first[even])]]
    np.testing.assert_array_equal(baselines.domino(**inputs), expected)


@pytest.mark.parametrize(
    ("images", "owned", "expected"),
    [(45, (40, 30, 10, 0), 2), (45, (40, 30, 9, 0), 1), (45, (40, 3, 3, 0), 0), (3, (3, 2, 1, 0), 2)],
)
def test_domino_chooses_by_what_is_predicted_too_often(
    monkeypatch: pytest.MonkeyPatch, images: int, owned: tuple[int, ...], expected: int
) -> None:
    """Discrepancies 0.5 (though class 0 is missed always), 0.7, 0.8 and, of a slice that owns nothing, 1."""
    inputs, _ = planted(images=images)
    owner = np.resize(np.repeat(np.arange(4), owned), len(inputs["owner"]))
    owner[sum(owned) :] = 0
    labels = [[1, 0, 0], [0, 0.3, 0.7], [0, 0.2, 0.8], [1, 0, 0]]
    predictions = [[0, 0.5, 0.5], [0.7, 0.3, 0], [0.8, 0.2, 0], [0, 1, 0]]
    fitted_as(monkeypatch, 100 * one_hot(owner, 4), labels, predictions)
    ranked = baselines.domino(**inputs)
    count = (owner == expected).sum()
    np.testing.assert_array_equal(owner[ranked[:count]], expected)


def _in_given_order(samples: baselines._Samples) -> baselines._Samples:
    back = np.argsort(samples.index)
    return baselines._Samples(*(getattr(samples, f)[back] for f in samples.__dataclass_fields__))
