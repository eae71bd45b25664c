"""The methods that RaVL's discovery is compared with, each re-implemented from its paper and fed regions of images.

Every one is a function of the same inputs and returns the indices of regions, the most suspicious first; it returns no
index when it finds nothing. Four of them were made for whole images. Here a *region is a sample*: its features are the
region's, its true class is that of its image. Whose prediction it carries the RaVL paper leaves open ("regions and
zero-shot classification scores as input"), so those that read predictions take

    ``prediction="image"``   scores of its image: a region is wrong where its image is;
    ``prediction="region"``  its own scores: a region is wrong when it does not look like the class of its image.

Inputs: ``region_features`` [r, d] L2-normalised; ``owner`` [r] the image of each region; ``region_scores`` [r, C] and
``image_scores`` [n, C] softmax scores; ``label`` [n] true classes; ``seed`` fixes everything. The order of the regions
changes nothing but the order among regions that tie. Inputs that do not fit together raise ``UserError``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import cross_val_score
from sklearn.svm import SVC

from oodprompt.discovery.clustering import cluster_regions
from oodprompt.discovery.result import Clustering
from oodprompt.errors import UserError, nearest
from oodprompt.methods.clusters import best_clusters, silhouettes

Prediction = Literal["image", "region"]
Start = Literal["confusion", "kmeans"]

# A slice should fill what Precision@10 reads; a smaller one is chosen only when there is no other.
FULL_SLICE = 10


@dataclass(frozen=True)
class _Samples:
    """Regions in an order that depends on what they are and on the seed, not on the order they came in.

    ``index`` [r] is their place in the input; ``label`` [r] the class of their image, ``scores`` [r, C] the prediction.
    """

    index: np.ndarray
    features: np.ndarray
    owner: np.ndarray
    label: np.ndarray
    scores: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        return self.scores.argmax(axis=1) != self.label

    @property
    def loss(self) -> np.ndarray:
        """Cross-entropy of the prediction, -log score of the true class."""
        return -np.log(np.maximum(self.scores[np.arange(len(self.label)), self.label], np.finfo(float).tiny))

    def rows_by_class(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.label == y) for y in np.unique(self.label)]


def random_order(
    region_features: ArrayLike,
    owner: ArrayLike,
    region_scores: ArrayLike,
    image_scores: ArrayLike,
    label: ArrayLike,
    seed: int = 0,
) -> np.ndarray:
    """All regions in random order: what a method must beat. Inputs as the module says; returns [r]."""
    return _samples(region_features, owner, region_scores, image_scores, label, seed, "image").index


def distilling_failures(
    region_features: ArrayLike,
    owner: ArrayLike,
    region_scores: ArrayLike,
    image_scores: ArrayLike,
    label: ArrayLike,
    seed: int = 0,
    prediction: Prediction = "image",
) -> np.ndarray:
    """Distilling Failures: the direction in feature space in which a class fails.

    Features are standardised (mean and deviation of all regions) and L2-normalised. Per class a linear SVM with
    balanced class weights tells right from wrong samples; C in 10^-6 ... 1 by the balanced accuracy of 2-fold
    cross-validation. That accuracy also says how well the failure is captured, so the class where it is highest is
    taken, and its regions are ranked by their decision value, the most wrong first. Classes with fewer than two
    right or two wrong samples are passed over; without any other there is nothing to find.

    Source: Jain, Lawrence, Moitra, Madry, "Distilling Model Failures as Directions in Latent Space", ICLR 2023, and the
    authors' code; taking one class of all is ours, as a ranking of regions of one feature needs it.
    """
    samples = _samples(region_features, owner, region_scores, image_scores, label, seed, prediction)
    if not samples.wrong.any():
        return _NOTHING.copy()
    latents = _standardise(samples.features)
    best_score, ranked = -np.inf, _NOTHING
    for rows in samples.rows_by_class():
        correct = ~samples.wrong[rows]
        if min(correct.sum(), (~correct).sum()) < 2:
            continue
        svm, score = _failure_svm(latents[rows], correct)
        if score > best_score:
            best_score = score
            ranked = rows[np.argsort(svm.decision_function(latents[rows]), kind="stable")]
    return samples.index[ranked]


def george(
    region_features: ArrayLike,
    owner: ArrayLike,
    region_scores: ArrayLike,
    image_scores: ArrayLike,
    label: ArrayLike,
    seed: int = 0,
    prediction: Prediction = "image",
    components: int = 2,
) -> np.ndarray:
    """George: clusters within each class; the one with the highest mean loss.

    The features of a class are reduced to ``components`` dimensions and clustered by a Gaussian mixture; K in 2 ... 10
    by the mean over clusters of their mean silhouette. Every cluster is then split in five, and a part stands on its
    own when its silhouette rises above both its old one and 0, its mean loss is not below its cluster's, and it has at
    least max(25, 0.5 %) samples. Of all classes' clusters that with the highest mean cross-entropy is returned, nearest
    to its mean first. Nothing wrong: nothing to find.

    Source: Sohoni et al., "No Subclass Left Behind", NeurIPS 2020, and the authors' code. The original reduces with
    UMAP; here it is PCA, which keeps clusters apart less well.
    """
    samples = _samples(region_features, owner, region_scores, image_scores, label, seed, prediction)
    if not samples.wrong.any():
        return _NOTHING.copy()
    loss = samples.loss
    best, ranked = (False, -np.inf), _NOTHING
    for rows in samples.rows_by_class():
        reduced = _reduce(samples.features[rows], components)
        clusters = _split_further(reduced, _best_mixture(reduced, seed), loss[rows], seed)
        for c in np.unique(clusters):
            inside = np.flatnonzero(clusters == c)
            worth = (len(inside) >= FULL_SLICE, float(loss[rows[inside]].mean()))
            if worth > best:
                distance = np.linalg.norm(reduced[inside] - reduced[inside].mean(axis=0), axis=1)
                best, ranked = worth, rows[inside[np.argsort(distance, kind="stable")]]
    return samples.index[ranked]


def domino(
    region_features: ArrayLike,
    owner: ArrayLike,
    region_scores: ArrayLike,
    image_scores: ArrayLike,
    label: ArrayLike,
    seed: int = 0,
    prediction: Prediction = "image",
    components: int = 25,
    gamma: float = 10.0,
    start: Start = "confusion",
) -> np.ndarray:
    """Domino: slices of an error-aware mixture model, which sees features, true class and prediction.

    ``ErrorAwareMixture`` with ``components`` slices is fitted on the first 128 principal components. With
    ``start="confusion"`` slice s begins in one cell (y, y_hat) of the confusion matrix, cells being dealt out in turn,
    and there is at least a slice for each of the C^2; with ``"kmeans"``, and where that leaves fewer than ten regions
    per slice, slices begin as the clusters of K-means. The slice with the largest
    max_c (P(y_hat = c | s) - P(y = c | s)) is taken, and all regions are ranked by their posterior
    P(s | z, y, y_hat), ties by P(s, z, y, y_hat). Nothing wrong: nothing to find.

    Source: Eyuboglu et al., "Domino: Discovering Systematic Errors with Cross-Modal Embeddings", ICLR 2022, and the
    authors' code. gamma = 10 and the first start are the paper's, gamma = 1 and K-means what their last version does by
    default. Ours: slices that fewer than ten regions most likely belong to are taken only when there is no other.
    """
    _check_choice("start", start, Start)
    samples = _samples(region_features, owner, region_scores, image_scores, label, seed, prediction)
    if not samples.wrong.any():
        return _NOTHING.copy()
    reduced = _reduce(samples.features, 128)
    truth = np.eye(samples.scores.shape[1])[samples.label]
    if start == "confusion" and max(components, truth.shape[1] ** 2) * FULL_SLICE <= len(truth):
        responsibilities = _start_in_confusion_cells(truth, samples.scores, components, seed)
    else:
        clusters = KMeans(min(components, len(reduced)), n_init=1, random_state=seed).fit_predict(reduced)
        responsibilities = np.eye(clusters.max() + 1)[clusters]
    mixture = ErrorAwareMixture.fit(reduced, truth, samples.scores, responsibilities, gamma)
    joint = mixture.log_joint(reduced, truth, samples.scores)
    posterior = (joint - logsumexp(joint, axis=1, keepdims=True)).round(9)  # ties up to rounding are ties
    size = np.bincount(joint.argmax(axis=1), minlength=joint.shape[1])
    discrepancy = (mixture.predictions - mixture.labels).max(axis=1)
    chosen = max(np.flatnonzero(size), key=lambda s: (size[s] >= FULL_SLICE, discrepancy[s]))
    return samples.index[np.lexsort((-joint[:, chosen], -posterior[:, chosen]))]


@dataclass(frozen=True)
class ErrorAwareMixture:
    """Domino's mixture over features z [n, m], true class y and prediction y_hat [n, C], one-hot or soft.

    l = mean_i log sum_s P(s) N(z_i; mu_s, diag sigma_s^2) (y_i . p_s)^gamma (y_hat_i . q_s)^gamma

    ``log_weights`` [k] are log P(s), ``means`` and ``variances`` [k, m] those of the Gaussians, ``labels`` and
    ``predictions`` [k, C] are p_s and q_s; ``trace`` holds l before each update. EM raises l when y_hat is one-hot;
    for soft scores the authors' update q_s = sum_i Q_is y_hat_i / sum_i Q_is is no exact maximiser, and l may fall.
    """

    log_weights: np.ndarray
    means: np.ndarray
    variances: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    gamma: float
    trace: tuple[float, ...] = ()

    @classmethod
    def fit(
        cls,
        z: np.ndarray,
        y: np.ndarray,
        y_hat: np.ndarray,
        responsibilities: np.ndarray,
        gamma: float,
        max_iterations: int = 100,
        tolerance: float = 1e-3,
    ) -> ErrorAwareMixture:
        """EM from ``responsibilities`` [n, k], until l changes by less than ``tolerance``."""
        trace: list[float] = []
        mixture = cls.maximise(z, y, y_hat, responsibilities, gamma)
        for _ in range(max_iterations):
            responsibilities, likelihood = mixture.posterior(z, y, y_hat)
            trace.append(likelihood)
            mixture = cls.maximise(z, y, y_hat, responsibilities, gamma, tuple(trace))
            if len(trace) > 1 and abs(trace[-1] - trace[-2]) < tolerance:
                break
        return mixture

    @classmethod
    def maximise(
        cls,
        z: np.ndarray,
        y: np.ndarray,
        y_hat: np.ndarray,
        responsibilities: np.ndarray,
        gamma: float,
        trace: tuple[float, ...] = (),
    ) -> ErrorAwareMixture:
        """M-step. Variances are kept at 10^-6 or more."""
        mass = responsibilities.sum(axis=0) + 10 * _EPS
        share = responsibilities.T / mass[:, None]
        means = share @ z
        variances = np.maximum(share @ z**2 - means**2, 1e-6)
        log_weights = np.log(mass / mass.sum())
        return cls(log_weights, means, variances, share @ y, share @ y_hat, gamma, trace)

    def posterior(self, z: np.ndarray, y: np.ndarray, y_hat: np.ndarray) -> tuple[np.ndarray, float]:
        """E-step: responsibilities [n, k], whose rows sum to 1, and l."""
        joint = self.log_joint(z, y, y_hat)
        total = logsumexp(joint, axis=1, keepdims=True)
        return np.exp(joint - total), float(total.mean())

    def log_joint(self, z: np.ndarray, y: np.ndarray, y_hat: np.ndarray) -> np.ndarray:
        """The logarithm of the summands of l, [n, k]."""
        precision = 1 / self.variances
        square = z**2 @ precision.T - 2 * z @ (self.means * precision).T + (self.means**2 * precision).sum(axis=1)
        gaussian = -0.5 * (square + np.log(2 * np.pi * self.variances).sum(axis=1))
        classes = np.log(y @ self.labels.T + _EPS) + np.log(y_hat @ self.predictions.T + _EPS)
        return self.log_weights + gaussian + self.gamma * classes


def spurious_aware_detection(
    region_features: ArrayLike,
    owner: ArrayLike,
    region_scores: ArrayLike,
    image_scores: ArrayLike,
    label: ArrayLike,
    seed: int = 0,
    clustering: Clustering | None = None,
    min_images: int = 10,
    per_class: int = 5,
    absolute: bool = False,
) -> np.ndarray:
    """Spurious-aware detection: the feature without which the accuracy of a class falls most.

    A cluster of regions stands for an attribute that an object detector names. For class y and cluster c, over the
    images of y with a region of c and those without:  delta = acc(with) - acc(without).  Clusters in fewer than
    ``min_images`` images of the class, or in all of them, are passed over; of the rest each class keeps the
    ``per_class`` that share most information with its errors, and the pair (c, y) with the largest delta > 0 is taken:
    the regions of c, nearest to its medoid first. With ``absolute`` it is |delta|, so that a feature that pulls other
    classes' images away counts as well. Correctness is that of images, so there is no ``prediction``.

    ``clustering`` of the regions, in their order; by default that of RaVL, ``cluster_regions`` with K in 2C ... 5C - 1.

    Source: Yang, Nushi, Palangi, Mirzasoleiman, "Mitigating Spurious Correlations in Multi-modal Models during
    Fine-tuning", ICML 2023, and the authors' code, which also passes over attributes named like a class; ``absolute``
    is ours.
    """
    samples = _samples(region_features, owner, region_scores, image_scores, label, seed, "image")
    if not samples.wrong.any():
        return _NOTHING.copy()
    assignment, medoids = _clusters(samples, clustering, seed)
    image_label = np.asarray(label)
    correct = np.asarray(image_scores).argmax(axis=1) == image_label
    present = np.zeros((len(image_label), len(medoids)), dtype=bool)
    present[samples.owner, assignment] = True
    pairs = [
        pair
        for y in np.unique(samples.label)
        for pair in _informative(present[image_label == y], correct[image_label == y], min_images, per_class)
    ]
    if absolute:
        pairs = [(abs(delta), c) for delta, c in pairs]
    delta, chosen = max(pairs, default=(0.0, -1), key=lambda pair: pair[0])
    if delta <= 0:
        return _NOTHING.copy()
    inside = np.flatnonzero(assignment == chosen)
    similarity = samples.features[inside] @ samples.features[medoids[chosen]]
    return samples.index[inside[np.argsort(-similarity, kind="stable")]]


# By the names of the RaVL paper's comparison.
DISCOVERY_BASELINES: dict[str, Callable[..., np.ndarray]] = {
    "Random": random_order,
    "Distilling Failures": distilling_failures,
    "George": george,
    "Domino": domino,
    "Spurious-Aware Detection": spurious_aware_detection,
}

_WHOSE: tuple[dict[str, Any], ...] = ({"prediction": "image"}, {"prediction": "region"})

# The settings that the papers leave open, the default first; a fair comparison takes the best of each method.
BASELINE_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "Random": ({},),
    "Distilling Failures": _WHOSE,
    "George": _WHOSE,
    "Domino": tuple(
        whose | how
        for how in ({"start": "confusion", "gamma": 10.0}, {"start": "kmeans", "gamma": 1.0})
        for whose in _WHOSE
    ),
    "Spurious-Aware Detection": ({"absolute": False}, {"absolute": True}),
}

_NOTHING = np.empty(0, dtype=np.int64)
_EPS = np.finfo(float).eps


def _samples(
    region_features: ArrayLike,
    owner: ArrayLike,
    region_scores: ArrayLike,
    image_scores: ArrayLike,
    label: ArrayLike,
    seed: int,
    prediction: str,
) -> _Samples:
    _check_choice("prediction", prediction, Prediction)
    features, region_scores, image_scores = (
        np.asarray(a, dtype=np.float64) for a in (region_features, region_scores, image_scores)
    )
    owner, label = np.asarray(owner), np.asarray(label)
    _check(features, owner, region_scores, image_scores, label)
    scores = image_scores[owner] if prediction == "image" else region_scores
    by_content = np.lexsort((owner, *scores.T, *features.T))
    index = by_content[np.random.default_rng(seed).permutation(len(owner))]
    return _Samples(index, features[index], owner[index], label[owner][index], scores[index])


def _check(
    features: np.ndarray, owner: np.ndarray, region_scores: np.ndarray, image_scores: np.ndarray, label: np.ndarray
) -> None:
    for name, array in (("features", features), ("region scores", region_scores), ("image scores", image_scores)):
        if array.ndim != 2:
            raise UserError(f"{name} of a discovery baseline have shape {array.shape}; give one row each")
        if not np.isfinite(array).all():
            raise UserError(f"{name} of a discovery baseline hold values that are not finite; mend what made them")
    if not len(features) == len(owner) == len(region_scores) or len(image_scores) != len(label):
        raise UserError(
            f"a discovery baseline got {len(features)} region features, {len(owner)} owners, "
            f"{len(region_scores)} region scores, {len(image_scores)} image scores and {len(label)} labels; "
            "give all of the same regions and images"
        )
    classes = image_scores.shape[1]
    if region_scores.shape[1] != classes:
        raise UserError(f"regions are scored for {region_scores.shape[1]} classes, images for {classes}; use the same")
    for name, array, bound in (("owner", owner, len(label)), ("label", label, classes)):
        if len(array) and not (np.issubdtype(array.dtype, np.integer) and 0 <= array.min() <= array.max() < bound):
            raise UserError(f"{name} of a discovery baseline must hold integers from 0 to {bound - 1}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name} {value!r} of a discovery baseline: {nearest(value, get_args(choices))}")


def _standardise(features: np.ndarray) -> np.ndarray:
    deviation = features.std(axis=0)
    latents = (features - features.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    return latents / np.maximum(np.linalg.norm(latents, axis=1, keepdims=True), _EPS)


def _failure_svm(latents: np.ndarray, correct: np.ndarray) -> tuple[SVC, float]:
    """The SVM of the C that does best, fitted on all, and its cross-validated balanced accuracy."""
    machines = [SVC(kernel="linear", C=c, class_weight="balanced") for c in np.logspace(-6, 0, 7)]
    scores = [cross_val_score(m, latents, correct, cv=2, scoring="balanced_accuracy").mean() for m in machines]
    best = int(np.argmax(scores))
    return machines[best].fit(latents, correct), float(scores[best])


def _reduce(features: np.ndarray, components: int) -> np.ndarray:
    return PCA(min(components, *features.shape), svd_solver="full").fit_transform(features)


def _start_in_confusion_cells(y: np.ndarray, y_hat: np.ndarray, components: int, seed: int) -> np.ndarray:
    """Responsibilities [n, max(components, C^2)]: y_i(a) y_hat_i(b) for cell (a, b), cells in turn, and noise."""
    cells = (y[:, :, None] * y_hat[:, None, :]).reshape(len(y), -1)
    slices = max(components, cells.shape[1])
    dealt = cells[:, np.arange(slices) % cells.shape[1]]
    noise = 1e-3 * np.random.default_rng(seed).random(dealt.shape)
    dealt = dealt / dealt.sum(axis=1, keepdims=True) + noise
    return dealt / dealt.sum(axis=1, keepdims=True)


def _mixture_clusters(reduced: np.ndarray, k: int, seed: int) -> np.ndarray:
    return GaussianMixture(k, n_init=3, random_state=seed).fit_predict(reduced)


def _best_mixture(reduced: np.ndarray, seed: int, largest: int = 10) -> np.ndarray:
    """Clusters [n] of the K with the highest mean over clusters of their mean silhouette; one where none can be had."""
    best = best_clusters(reduced, lambda k: (_mixture_clusters(reduced, k, seed), None), largest)
    return np.zeros(len(reduced), dtype=np.int64) if best is None else best[0]


def _split_further(
    reduced: np.ndarray, clusters: np.ndarray, loss: np.ndarray, seed: int, parts: int = 5
) -> np.ndarray:
    """``clusters`` [n] with those parts of each split off that stand on their own, see ``george``."""
    split = np.zeros_like(clusters)
    for c in np.unique(clusters):
        inside = clusters == c
        k = min(parts, int(inside.sum()))
        split[inside] = c * parts + (_mixture_clusters(reduced[inside], k, seed) if k > 1 else 0)
    before, after = silhouettes(reduced, clusters), silhouettes(reduced, split)
    result, free = clusters.copy(), int(clusters.max()) + 1
    for part in np.unique(split):
        inside = split == part
        tighter = after[inside].mean() > max(before[inside].mean(), 0)
        harder = loss[inside].mean() >= loss[clusters == part // parts].mean()
        if tighter and harder and inside.sum() >= max(25, 0.005 * len(loss)):
            result[inside] = free
            free += 1
    return result


def _clusters(samples: _Samples, clustering: Clustering | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster [r] of each sample, and the medoids [K] as samples."""
    if clustering is None:
        classes = samples.scores.shape[1]
        found = cluster_regions(samples.features, range(2 * classes, 5 * classes), seed=seed)
        return found.assignment, found.medoids
    if len(clustering.assignment) != len(samples.index):
        raise UserError(f"the clustering has {len(clustering.assignment)} regions, the features {len(samples.index)}")
    place = np.argsort(samples.index)
    return clustering.assignment[samples.index], place[clustering.medoids]


def _informative(present: np.ndarray, correct: np.ndarray, min_images: int, per_class: int) -> list[tuple[float, int]]:
    """(delta, cluster) of the clusters that tell most about the errors of one class's images."""
    found = []
    for c in np.flatnonzero((present.sum(axis=0) >= min_images) & ~present.all(axis=0)):
        information = mutual_info_score(present[:, c], correct)
        delta = correct[present[:, c]].mean() - correct[~present[:, c]].mean()
        found.append((information, float(delta), int(c)))
    found.sort(key=lambda row: -row[0])
    return [(delta, c) for information, delta, c in found[:per_class] if information > 0]
