"""Distilling Failures and George, formula by formula."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from oodprompt.methods.clusters import silhouettes
from oodprompt.studies import baselines
from tests.helpers.planted import one_hot, soft, unit


def test_standardised_latents() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(7, 3)) * [1, 5, 0] + [2, 0, 4]
    latents = baselines._standardise(features)
    for row, latent in zip(features, latents, strict=True):
        z = [(row[j] - features[:, j].mean()) / features[:, j].std() for j in range(2)] + [0.0]
        np.testing.assert_allclose(latent, z / np.sqrt(np.square(z).sum()), atol=1e-12)


@pytest.mark.parametrize("apart", [0.0, 5.0], ids=["one C is best", "several are equally good"])
def test_svm_of_the_best_regularisation_and_its_score(apart: float) -> None:
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.svm import SVC

    rng = np.random.default_rng(0)
    latents = unit(rng.normal(size=(60, 4)))
    correct = latents[:, 0] + 0.4 * rng.normal(size=60) > -0.4
    latents[correct, 1] += apart
    expected = {}
    for c in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        folds = []
        for train, test in StratifiedKFold(2).split(latents, correct):
            weights = {v: len(train) / 2 / (correct[train] == v).sum() for v in (False, True)}
            machine = SVC(kernel="linear", C=c, class_weight=weights).fit(latents[train], correct[train])
            folds.append(balanced_accuracy_score(correct[test], machine.predict(latents[test])))
        expected[c] = np.mean(folds)
    machine, score = baselines._failure_svm(latents, correct)
    assert (list(expected.values()).count(max(expected.values())) > 1) == (apart > 0)
    assert score == pytest.approx(max(expected.values()))
    assert min(c for c in expected if expected[c] == max(expected.values())) == machine.C
    assert machine.decision_function(latents)[correct].mean() > machine.decision_function(latents)[~correct].mean()


def test_distilling_failures_takes_the_class_that_an_svm_tells_best() -> None:
    """Classes 0 and 3 fail at random, in class 1 failure is the first coordinate, in class 2 nothing fails."""
    rng = np.random.default_rng(0)
    n = 400
    label = np.arange(n) % 4
    features = unit(rng.normal(size=(n, 6)))
    wrong = np.where(label % 3 == 0, rng.random(n) < 0.5, (label == 1) & (features[:, 0] > 0.2))
    scores = soft(np.where(wrong, (label + 1) % 4, label), 4)
    ranked = baselines.distilling_failures(features, np.arange(n), scores, scores, label)
    assert set(ranked) == set(np.flatnonzero(label == 1))
    assert wrong[ranked[:20]].mean() >= 0.9 and wrong[ranked[-20:]].mean() <= 0.1
    assert np.corrcoef(features[ranked, 0], np.arange(len(ranked)))[0, 1] < -0.8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("wrong", "found"), [(1, 0), (2, 20), (18, 20), (19, 0)])
def test_distilling_failures_needs_two_of_each(wrong: int, found: int) -> None:
    features = unit(np.random.default_rng(0).normal(size=(40, 4)))
    label = np.arange(40) % 2
    scores = soft(np.where((label == 0) & (np.arange(40) < 2 * wrong), 1, label), 2)
    assert len(baselines.distilling_failures(features, np.arange(40), scores, scores, label)) == found


def blobs(sizes: list[int], spread: float = 0.05, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [3, 0], [0, 3], [3, 3], [6, 0]])[: len(sizes)]
    which = np.repeat(np.arange(len(sizes)), sizes)
    return centres[which] + spread * rng.normal(size=(len(which), 2)), which


@pytest.mark.parametrize("sizes", [[30, 30], [40, 20, 30], [25, 25, 25, 25], [20, 30, 20, 30, 20]])
def test_number_of_clusters_by_silhouette(sizes: list[int]) -> None:
    points, which = blobs(sizes)
    clusters = baselines._best_mixture(points, seed=0)
    pairs = {(a, b) for a, b in zip(clusters, which, strict=True)}
    assert len(pairs) == len(sizes) == len(np.unique(clusters))


def test_silhouette_of_clusters_counts_each_cluster_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting a large blob in two costs its samples, but leaves small tight clusters their share of the mean."""
    points = np.concatenate([blobs([60], 0.5)[0], blobs([0, 3, 3, 3], 0.01)[0]])
    halves = (points[:60, 0] > 0).astype(int)
    tried = {2: np.repeat([0, 1], [60, 9]), 3: np.concatenate([halves, np.full(9, 2)])}
    tried[4] = np.concatenate([halves, [2] * 3, [3] * 6])
    tried[5] = np.concatenate([halves, [2] * 3, [3] * 3, [4] * 3])
    monkeypatch.setattr(baselines, "_mixture_clusters", lambda points, k, seed: tried[k])
    by_cluster, by_sample = {}, {}
    for k, clusters in tried.items():
        values = silhouette_samples(points, clusters)
        by_cluster[k] = np.mean([values[clusters == c].mean() for c in range(k)])
        by_sample[k] = values.mean()
    best = max(by_cluster, key=by_cluster.get)
    assert best != max(by_sample, key=by_sample.get)
    np.testing.assert_array_equal(baselines._best_mixture(points, 0, largest=5), tried[best])


def test_few_or_equal_points_are_one_cluster() -> None:
    for points in (np.zeros((1, 2)), np.arange(4.0).reshape(2, 2)):
        np.testing.assert_array_equal(baselines._best_mixture(points, 0), np.zeros(len(points)))
    assert not silhouettes(np.arange(6.0).reshape(3, 2), np.arange(3)).any()


@pytest.mark.parametrize(
    ("small", "hard_loss", "is_split"),
    [(30, 2.0, True), (24, 2.0, False), (30, 0.5, False), (25, 2.0, True)],
    ids=["tight, hard and large", "too small", "easier", "just large enough"],
)
def test_parts_that_stand_on_their_own(
    monkeypatch: pytest.MonkeyPatch, small: int, hard_loss: float, is_split: bool
) -> None:
    points, which = blobs([60, 60, small])
    clusters = np.where(which == 0, 0, 1)
    loss = np.where(which == 2, hard_loss, 1.0)
    monkeypatch.setattr(baselines, "_mixture_clusters", lambda p, k, seed: np.where(p[:, 1] > 1.5, 3, 0))
    split = baselines._split_further(points, clusters, loss, seed=0)
    assert (split[which == 0] == 0).all()
    assert (split[which == 2] == (2 if is_split else 1)).all()
    assert (split[which == 1] == (2 if hard_loss < 1 else 1)).all()  # a hard rest of 60 is itself split off


def test_a_part_that_is_not_tighter_stays() -> None:
    """One round blob: its parts have lower silhouettes than it had, whatever their loss."""
    points, which = blobs([100, 100], spread=0.3)
    split = baselines._split_further(points, which, np.arange(200.0), seed=0)
    np.testing.assert_array_equal(split, which)


def george_case(sizes: dict[tuple[int, int], int], right: dict[tuple[int, int], float]) -> dict[str, np.ndarray]:
    """Images of one region: (class, blob) -> how many, and the score of the true class."""
    rng = np.random.default_rng(0)
    keys = [key for key, count in sizes.items() for _ in range(count)]
    points = np.array([[[0, 1, 0], [1, 0, 0], [0, 0, 1]][blob] for _, blob in keys])
    label = np.array([y for y, _ in keys])
    score = np.array([right[key] for key in keys])
    scores = np.where(one_hot(label, 2) == 1, score[:, None], 1 - score[:, None])
    features = unit(points + 0.03 * rng.normal(size=points.shape))
    return {
        "region_features": features,
        "owner": np.arange(len(keys)),
        "region_scores": scores,
        "image_scores": scores,
        "label": label,
    }


def test_george_returns_the_cluster_of_highest_mean_loss_nearest_first() -> None:
    sizes = {(0, 0): 40, (0, 1): 30, (1, 1): 30, (1, 2): 40}
    inputs = george_case(sizes, {(0, 0): 0.9, (0, 1): 0.3, (1, 1): 0.1, (1, 2): 0.8})
    ranked = baselines.george(**inputs)
    np.testing.assert_array_equal(np.sort(ranked), np.arange(70, 100))
    rows = np.arange(70, 140)
    centred = inputs["region_features"][rows] - inputs["region_features"][rows].mean(axis=0)
    reduced = centred @ np.linalg.svd(centred)[2][:2].T
    distance = np.linalg.norm(reduced[:30] - reduced[:30].mean(axis=0), axis=1)
    np.testing.assert_array_equal(ranked, 70 + np.argsort(distance))


def test_george_splits_its_clusters_further(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = george_case({(0, 0): 60, (0, 1): 30, (1, 2): 40}, {(0, 0): 0.9, (0, 1): 0.1, (1, 2): 0.8})
    monkeypatch.setattr(baselines, "_best_mixture", lambda points, seed: np.zeros(len(points), dtype=np.int64))
    monkeypatch.setattr(baselines, "_mixture_clusters", lambda p, k, seed: (p[:, 0] > p[:, 0].mean()).astype(int))
    np.testing.assert_array_equal(np.sort(baselines.george(**inputs)), np.arange(60, 90))


def test_george_prefers_a_cluster_that_fills_what_is_read() -> None:
    sizes = {(0, 0): 40, (0, 1): 12, (1, 1): 5, (1, 2): 40}
    inputs = george_case(sizes, {(0, 0): 0.9, (0, 1): 0.3, (1, 1): 0.1, (1, 2): 0.8})
    np.testing.assert_array_equal(np.sort(baselines.george(**inputs)), np.arange(40, 52))
