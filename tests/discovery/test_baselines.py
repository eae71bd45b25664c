"""Discovery baselines: what each formula says, what each finds, and what changes nothing."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import silhouette_samples

from oodprompt.discovery.result import Clustering
from oodprompt.errors import UserError
from oodprompt.studies import baselines
from oodprompt.studies.baselines import BASELINE_VARIANTS, DISCOVERY_BASELINES, ErrorAwareMixture

CLASSES = 3
EVERY = [(name, variant) for name in DISCOVERY_BASELINES for variant in BASELINE_VARIANTS[name]]
IDS = ["-".join(map(str, [name, *variant.values()])) for name, variant in EVERY]
OF_SAMPLES = ("Distilling Failures", "George", "Domino")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def one_hot(classes: np.ndarray, count: int = CLASSES) -> np.ndarray:
    return np.eye(count)[classes]


def soft(classes: np.ndarray, count: int = CLASSES) -> np.ndarray:
    return 0.8 * one_hot(classes, count) + 0.2 / count


def planted(seed: int = 0, images: int = 90) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images of an item, an empty region, and in half of them a rectangle, which nine times in ten says class 0.

    Class 0 without a rectangle is wrong every second time. By itself a rectangle looks like class 0, an empty
    region like its image's class, and an item like its class. Returns the inputs and which regions are rectangles.
    """
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(CLASSES + 2, 12)))
    label = np.arange(images) % CLASSES
    has = rng.random(images) < 0.5
    u = rng.random(images)
    predicted = np.where(has & (u < 0.9), 0, np.where((label == 0) & ~has & (u < 0.5), 1, label))
    owner, what, looks = [], [], []
    for i in range(images):
        for centre, look in [(label[i], label[i]), (CLASSES, label[i])] + [(CLASSES + 1, 0)] * int(has[i]):
            owner.append(i), what.append(centre), looks.append(look)
    features = unit(centres[what] + 0.08 * rng.normal(size=(len(what), 12)))
    inputs = {
        "region_features": features.astype(np.float32),
        "owner": np.array(owner),
        "region_scores": soft(np.array(looks)),
        "image_scores": soft(predicted),
        "label": label,
    }
    return inputs, np.array(what) == CLASSES + 1


def without_errors(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    label, owner = inputs["label"], inputs["owner"]
    return inputs | {"image_scores": soft(label), "region_scores": soft(label[owner])}


# --- what all of them do


def test_first_variant_is_the_default() -> None:
    assert list(BASELINE_VARIANTS) == list(DISCOVERY_BASELINES)
    for name, variants in BASELINE_VARIANTS.items():
        defaults = {key: p.default for key, p in inspect.signature(DISCOVERY_BASELINES[name]).parameters.items()}
        assert variants[0] == {key: defaults[key] for key in variants[0]}


# Not Domino by images: all regions of an image that went wrong are equally wrong, and any may make the first slice.
@pytest.mark.parametrize(
    ("name", "kwargs"), [(n, kw) for n, kw in EVERY[1:] if n != "Domino" or kw["prediction"] == "region"]
)
def test_finds_a_planted_feature(name: str, kwargs: dict[str, Any]) -> None:
    inputs, rectangle = planted()
    if name == "Domino":
        kwargs = kwargs | {"components": CLASSES + 2}
    ranked = DISCOVERY_BASELINES[name](**inputs, **kwargs)
    assert len(ranked) >= 10
    assert rectangle[ranked[:10]].all()


@pytest.mark.parametrize(("name", "kwargs"), EVERY, ids=IDS)
def test_seed_fixes_everything_and_order_and_type_change_nothing(name: str, kwargs: dict[str, Any]) -> None:
    inputs, _ = planted(images=90 if name == "Spurious-Aware Detection" else 45)
    before = {key: value.copy() for key, value in inputs.items()}
    ranked = DISCOVERY_BASELINES[name](**inputs, seed=3, **kwargs)
    assert ranked.dtype == np.int64
    assert 0 < len(set(ranked)) == len(ranked)
    order = np.random.default_rng(5).permutation(len(inputs["owner"]))
    moved = inputs | {key: inputs[key][order] for key in ("region_features", "owner", "region_scores")}
    tensors = {key: torch.as_tensor(value) for key, value in moved.items()}
    np.testing.assert_array_equal(order[DISCOVERY_BASELINES[name](**tensors, seed=3, **kwargs)], ranked)
    for key, value in inputs.items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize(("name", "kwargs"), EVERY[1:], ids=IDS[1:])
def test_nothing_wrong_is_nothing_found(name: str, kwargs: dict[str, Any]) -> None:
    ranked = DISCOVERY_BASELINES[name](**without_errors(planted()[0]), **kwargs)
    assert ranked.shape == (0,)
    assert ranked.dtype == np.int64


@pytest.mark.parametrize(("name", "kwargs"), EVERY, ids=IDS)
def test_no_regions_at_all(name: str, kwargs: dict[str, Any]) -> None:
    none = np.zeros((0, CLASSES))
    empty = np.zeros(0, dtype=np.int64)
    assert DISCOVERY_BASELINES[name](np.zeros((0, 4)), empty, none, none, empty, **kwargs).shape == (0,)


@pytest.mark.parametrize(("name", "kwargs"), EVERY, ids=IDS)
@pytest.mark.parametrize("wrong", [[0], [0, 3], list(range(0, 45, 3))], ids=["one", "two", "all of class 0"])
def test_classes_without_errors_and_without_successes(name: str, kwargs: dict[str, Any], wrong: list[int]) -> None:
    inputs = without_errors(planted(images=45)[0])
    for scores, index in (("image_scores", wrong), ("region_scores", np.flatnonzero(np.isin(inputs["owner"], wrong)))):
        inputs[scores][index] = soft(np.array([2]))
    ranked = DISCOVERY_BASELINES[name](**inputs, **kwargs)
    assert len(set(ranked)) == len(ranked)
    if name in ("Distilling Failures", "George"):
        assert set(inputs["label"][inputs["owner"][ranked]]) <= {0}


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_whose_prediction_is_read(name: str) -> None:
    inputs, _ = planted(images=24)
    quiet = without_errors(inputs)
    image_only = inputs | {"region_scores": quiet["region_scores"]}
    region_only = inputs | {"image_scores": quiet["image_scores"]}
    find = DISCOVERY_BASELINES[name]
    assert len(find(**image_only)) and not len(find(**image_only, prediction="region"))
    assert len(find(**region_only, prediction="region")) and not len(find(**region_only, prediction="image"))


def test_random_order_is_a_permutation_of_the_seed() -> None:
    inputs, rectangle = planted()
    orders = [baselines.random_order(**inputs, seed=seed) for seed in range(200)]
    for order in orders[:5]:
        np.testing.assert_array_equal(np.sort(order), np.arange(len(rectangle)))
    assert not np.array_equal(orders[0], orders[1])
    found = np.mean([rectangle[order[:10]].mean() for order in orders])
    assert found == pytest.approx(rectangle.mean(), abs=0.04)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"owner": np.full(200, -1)}, "owners"),
        ({"label": np.zeros(3, dtype=int)}, "3 labels"),
        ({"label": np.full(45, 3)}, "label .* from 0 to 2"),
        ({"label": np.zeros(45)}, "label .* integers"),
        ({"image_scores": np.ones(45)}, "image scores .* shape"),
        ({"image_scores": np.ones((45, 4))}, "3 classes, images for 4"),
        ({"region_features": np.full((2, 2), np.nan)}, "features .* not finite"),
    ],
)
@pytest.mark.parametrize("name", DISCOVERY_BASELINES)
def test_inputs_that_do_not_fit_are_refused(name: str, change: dict[str, np.ndarray], words: str) -> None:
    inputs = planted(images=45)[0] | change
    with pytest.raises(UserError, match=words):
        DISCOVERY_BASELINES[name](**inputs)


def test_owner_out_of_range_is_refused() -> None:
    inputs, _ = planted(images=45)
    inputs["owner"][-1] = 45
    with pytest.raises(UserError, match="owner .* from 0 to 44"):
        baselines.random_order(**inputs)


def test_unknown_choices_are_refused() -> None:
    inputs, _ = planted(images=45)
    with pytest.raises(UserError, match="did you mean 'region'"):
        baselines.george(**inputs, prediction="regions")
    with pytest.raises(UserError, match="did you mean 'kmeans'"):
        baselines.domino(**inputs, start="k-means")


# --- Distilling Failures


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


# --- George


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
        silhouettes = silhouette_samples(points, clusters)
        by_cluster[k] = np.mean([silhouettes[clusters == c].mean() for c in range(k)])
        by_sample[k] = silhouettes.mean()
    best = max(by_cluster, key=by_cluster.get)
    assert best != max(by_sample, key=by_sample.get)
    np.testing.assert_array_equal(baselines._best_mixture(points, 0, largest=5), tried[best])


def test_few_or_equal_points_are_one_cluster() -> None:
    for points in (np.zeros((1, 2)), np.arange(4.0).reshape(2, 2)):
        np.testing.assert_array_equal(baselines._best_mixture(points, 0), np.zeros(len(points)))
    assert not baselines._silhouettes(np.arange(6.0).reshape(3, 2), np.arange(3)).any()


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


# --- Domino


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


# --- Spurious-aware detection


def attribute_case(
    present: dict[tuple[int, int], tuple[int, int]], absent: dict[int, tuple[int, int]]
) -> tuple[dict[str, np.ndarray], Clustering]:
    """(class, cluster) -> (images with it, right ones), class -> (images with cluster 0 only, right ones).

    Every image has a region of cluster 0 as well.
    """
    rng = np.random.default_rng(0)
    label, right, owner, assignment = [], [], [], []
    rows = [(y, c, k, n) for (y, c), (n, k) in present.items()] + [(y, 0, k, n) for y, (n, k) in absent.items()]
    for y, c, k, n in rows:
        for i in range(n):
            for cluster in {0, c}:
                owner.append(len(label))
                assignment.append(cluster)
            label.append(y)
            right.append(i < k)
    label, assignment = np.array(label), np.array(assignment)
    features = unit(np.eye(5)[assignment] + 0.1 * rng.normal(size=(len(owner), 5)))
    scores = soft(np.where(right, label, (label + 1) % CLASSES))
    medoids = np.array([np.flatnonzero(assignment == c)[0] for c in range(assignment.max() + 1)])
    inputs = {
        "region_features": features,
        "owner": np.array(owner),
        "region_scores": soft(label[owner]),
        "image_scores": scores,
        "label": label,
    }
    return inputs, Clustering(assignment, medoids, 0.0, 0.0, {})


def found_cluster(inputs: dict[str, np.ndarray], clustering: Clustering, **kwargs: object) -> int | None:
    ranked = baselines.spurious_aware_detection(**inputs, clustering=clustering, **kwargs)
    clusters = set(clustering.assignment[ranked])
    assert len(clusters) < 2
    if clusters:
        assert len(ranked) == (clustering.assignment == min(clusters)).sum()
    return int(min(clusters)) if clusters else None


def test_largest_fall_without_the_feature() -> None:
    """Class 0: cluster 1 has .9 - .5, class 1: cluster 2 has 1 - .4; in class 2 cluster 3 hurts by .8."""
    case = attribute_case(
        {(0, 1): (20, 18), (1, 2): (10, 10), (2, 3): (20, 4), (2, 1): (10, 10)},
        {0: (20, 10), 1: (20, 8), 2: (20, 20)},
    )
    assert found_cluster(*case) == 2
    assert found_cluster(*case, min_images=11) == 1
    assert found_cluster(*case, absolute=True) == 3


def test_a_feature_that_only_hurts_is_found_by_size_alone() -> None:
    case = attribute_case({(0, 1): (20, 2)}, {0: (20, 20)})
    assert found_cluster(*case) is None
    assert found_cluster(*case, absolute=True) == 1


@pytest.mark.filterwarnings("error")
def test_a_feature_of_all_images_of_the_class_is_passed_over() -> None:
    case = attribute_case({(0, 1): (20, 10)}, {1: (20, 20)})
    assert found_cluster(*case) is None
    assert found_cluster(*case, absolute=True) is None


def test_each_class_keeps_what_says_most_about_its_errors() -> None:
    """Cluster 1 makes the larger difference, cluster 2 is in more images and says more about the errors."""
    case = attribute_case({(0, 1): (10, 10), (0, 2): (60, 42)}, {0: (60, 12)})
    assert found_cluster(*case) == 1
    assert found_cluster(*case, per_class=1) == 2
    present = np.zeros((130, 3), dtype=bool)
    present[:10, 1] = present[10:70, 2] = present[:, 0] = True
    correct = np.concatenate([np.ones(10), np.arange(60) < 42, np.arange(60) < 12]).astype(bool)
    informative = baselines._informative(present, correct, 10, 5)
    assert [c for _, c in informative] == [2, 1]
    assert informative[0][0] == pytest.approx(42 / 60 - 22 / 70)
    assert informative[1][0] == pytest.approx(1 - 54 / 120)
    assert [c for _, c in baselines._informative(present, correct, 10, 1)] == [2]
    assert [c for _, c in baselines._informative(present, correct, 11, 5)] == [2]
    assert baselines._informative(present, np.ones(130, dtype=bool), 1, 5) == []


def test_regions_of_the_cluster_nearest_to_its_medoid_first() -> None:
    inputs, clustering = attribute_case({(0, 1): (20, 18), (1, 1): (15, 15)}, {0: (20, 2), 1: (20, 20)})
    ranked = baselines.spurious_aware_detection(**inputs, clustering=clustering)
    features = inputs["region_features"]
    inside = np.flatnonzero(clustering.assignment == 1)
    similarity = features[inside] @ features[clustering.medoids[1]]
    np.testing.assert_array_equal(ranked, inside[np.argsort(-similarity)])
    assert ranked[0] == clustering.medoids[1]


def test_regions_of_the_clusters_that_ravl_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, rectangle = planted()
    asked = []
    make = baselines.cluster_regions
    monkeypatch.setattr(baselines, "cluster_regions", lambda f, ks, seed: asked.append((ks, seed)) or make(f, ks, seed))
    ranked = baselines.spurious_aware_detection(**inputs, seed=4)
    assert asked == [(range(6, 15), 4)]
    assert rectangle[ranked].all()


def test_a_clustering_of_other_regions_is_refused() -> None:
    inputs, clustering = attribute_case({(0, 1): (20, 2)}, {0: (20, 20)})
    other = Clustering(clustering.assignment[:-1], clustering.medoids, 0.0, 0.0, {})
    with pytest.raises(UserError, match="clustering has 59 regions, the features 60"):
        baselines.spurious_aware_detection(**inputs, clustering=other)
