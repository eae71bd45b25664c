"""RaVL's discovery: which cluster of regions a model has wrongly learned to go by (Varma et al., NeurIPS 2024).

Regions of labelled images are clustered; a cluster is suspected where its presence changes accuracy and where errors can be
laid to its regions. Section 3.1 of the paper; where the authors' code differs from it or says more, the code is
followed and it is said so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from oodprompt.discovery.clustering import assign, checked_features, cluster_regions
from oodprompt.discovery.result import Cluster, Clustering, Discovery, Gap
from oodprompt.errors import UserError

__all__ = ["assign", "decisive_regions", "discover", "influence_score", "performance_gaps", "scores"]

Array = np.ndarray | Tensor


def scores(features: Array, text: Array, temperature: float = 0.07) -> np.ndarray:
    """softmax(<features, text> / temperature) over classes: L2-normalised [.., d] and [C, d] -> [.., C], float32.

    The temperature is that of the authors' code.
    """
    if not temperature > 0:
        raise UserError(f"the temperature of the scores is {temperature:g}: give one above 0")
    logits = _array(features).astype(np.float32) @ _array(text).astype(np.float32).T / np.float32(temperature)
    exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def performance_gaps(present: Array, label: Array, predicted: Array) -> tuple[Gap, ...]:
    """What a cluster does to each class, by ``Gap``: images' ``present`` [n] (bool), ``label`` [n], ``predicted`` [n].

    Classes in ascending order; those without an image inside, or without one outside the cluster, are left out.
    """
    present, label = _array(present).astype(bool), _array(label)
    correct = _array(predicted) == label
    classes = int(label.max(initial=-1)) + 1
    images, hits = (
        [np.bincount(label[chosen & part], minlength=classes) for part in (present, ~present)]
        for chosen in (np.ones_like(present), correct)
    )
    return tuple(
        Gap(
            label=int(y),
            p_in=float(hits[0][y] / images[0][y]),
            n_in=int(images[0][y]),
            p_out=float(hits[1][y] / images[1][y]),
            n_out=int(images[1][y]),
        )
        for y in np.flatnonzero((images[0] > 0) & (images[1] > 0))
    )


def decisive_regions(owner: Array, region_scores: Array, predicted: Array) -> np.ndarray:
    """The region of each image with the highest score for the class that the image is predicted to be (ties: the first).

    ``owner`` [r] image of each region, ``region_scores`` [r, C], ``predicted`` [n] -> [n] regions; -1 for images with
    fewer than two regions, of which the authors' code takes no account.
    """
    owner, predicted = _array(owner), _array(predicted)
    score = _array(region_scores)[np.arange(len(owner)), predicted[owner]]
    order = np.lexsort((-np.arange(len(owner)), score, owner))
    decisive = np.full(len(predicted), -1)
    decisive[owner[order]] = order  # of the entries for one image the last one, its highest score, stays
    decisive[np.bincount(owner, minlength=len(predicted)) < 2] = -1
    return decisive


def influence_score(
    gaps: Sequence[Gap], present: Array, label: Array, predicted: Array, decisive_in_cluster: Array
) -> float:
    """H_c, the largest share over classes of errors that the cluster's regions decide.

    Of each class y with G_c^y < 0: the share of its mispredicted images with a region of the cluster (``present`` [n])
    and at least two regions whose decisive region (:func:`decisive_regions`) lies in the cluster.
    ``decisive_in_cluster`` [n] says so by 1 (yes), 0 (no), -1 (fewer than two regions). -inf without any such image.
    """
    label, decisive = _array(label), _array(decisive_in_cluster)
    hurt = [gap.label for gap in gaps if gap.gap < 0]
    chosen = _array(present).astype(bool) & (_array(predicted) != label) & (decisive >= 0) & np.isin(label, hurt)
    if not chosen.any():
        return -np.inf
    images, decided = np.bincount(label[chosen]), np.bincount(label[chosen], decisive[chosen])
    return float((decided[images > 0] / images[images > 0]).max())


def discover(
    region_features: Array,
    owner: Array,
    region_scores: Array,
    image_scores: Array,
    label: Array,
    *,
    ks: Sequence[int] | None = None,
    threshold: float = 0.25,
    both_signs: bool = True,
    seed: int = 0,
    clustering: Clustering | None = None,
    show: bool = False,
) -> Discovery:
    """RaVL's first stage, on images that are free of the correlation looked for.

    ``region_features`` [r, d], L2-normalised; ``owner`` [r] the image of each region (images may differ in how many they
    have, and have none); ``region_scores`` [r, C] and ``image_scores`` [n, C] of the classes, of which an image's highest
    is its prediction; ``label`` [n] the true classes. All may be arrays or tensors.

    Regions are clustered (:func:`cluster_regions`) for the numbers of clusters ``ks`` (default 2C to 5C - 1, as the
    authors' code), unless ``clustering`` gives the clusters. A cluster c survives where its influence H_c is at least
    ``threshold`` and, with ``both_signs`` (in the authors' code, not in the paper), where it raises the accuracy
    of one class and lowers that of another. Clusters are ranked by G_c = sum_y |G_c^y|, survivors first.

    Raises ``UserError`` where shapes or values do not go together, and as :func:`cluster_regions` does.
    """
    features = checked_features(_array(region_features))
    owner, region_scores, image_scores, label = map(_array, (owner, region_scores, image_scores, label))
    _check(features, owner, region_scores, image_scores, label)
    classes = image_scores.shape[1]
    predicted = image_scores.argmax(axis=1)
    if clustering is None:
        clustering = cluster_regions(features, range(2 * classes, 5 * classes) if ks is None else ks, seed, show=show)
    elif len(clustering.assignment) != len(features):
        raise UserError(
            f"the clustering is of {len(clustering.assignment)} regions, the features are of {len(features)}: "
            "cluster these regions anew"
        )
    decisive = decisive_regions(owner, region_scores, predicted)
    decisive_cluster = np.where(decisive < 0, -1, clustering.assignment[decisive])
    clusters = []
    for index, medoid in enumerate(clustering.medoids.tolist()):
        members = np.flatnonzero(clustering.assignment == index)
        present = np.zeros(len(label), dtype=bool)
        present[owner[members]] = True
        gaps = performance_gaps(present, label, predicted)
        in_cluster = np.where(decisive_cluster < 0, -1, decisive_cluster == index)
        influence = influence_score(gaps, present, label, predicted, in_cluster)
        similarity = features[members] @ features[medoid]
        nearest = np.argsort(-similarity, kind="stable")
        reason = _reason(gaps, influence, threshold, both_signs)
        clusters.append(
            Cluster(index, medoid, members[nearest], similarity[nearest], gaps, influence, not reason, reason)
        )
    clusters.sort(key=lambda cluster: (not cluster.survives, -cluster.score, cluster.index))
    return Discovery(clustering, tuple(clusters))


def _reason(gaps: Sequence[Gap], influence: float, threshold: float, both_signs: bool) -> str:
    """Why a cluster is dropped; empty for one that survives."""
    if influence >= threshold and not both_signs:
        return ""
    if not gaps:
        return "no class has images both with and without it"
    if not any(gap.gap < 0 for gap in gaps):
        return "no class is less accurate where it is present"
    if both_signs and not any(gap.gap > 0 for gap in gaps):
        return "no class is more accurate where it is present"
    if influence == -np.inf and threshold > -np.inf:
        return "none of its images is mispredicted, of a class that it hurts and made of two or more regions"
    return f"influence {influence:.3g} is below {threshold:g}" if influence < threshold else ""


def _array(values: Array) -> np.ndarray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _check(
    features: np.ndarray, owner: np.ndarray, region_scores: np.ndarray, image_scores: np.ndarray, label: np.ndarray
) -> None:
    if image_scores.ndim != 2 or not image_scores.size:
        raise UserError(
            f"image scores have the shape {list(image_scores.shape)}: expected [images, classes], not empty"
        )
    n, classes = image_scores.shape
    expected = {
        "owners of regions": (owner, (len(features),)),
        "region scores": (region_scores, (len(features), classes)),
        "labels": (label, (n,)),
    }
    for what, (values, shape) in expected.items():
        if values.shape != shape:
            raise UserError(
                f"{what} have the shape {list(values.shape)}: expected {list(shape)} for {len(features)} regions, "
                f"{n} images and {classes} classes"
            )
    for what, values, limit in (("an owner of a region", owner, n), ("a label", label, classes)):
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= limit:
            raise UserError(f"{what} is no whole number from 0 to {limit - 1}: look at where it comes from")
    for what, values in (("image", image_scores), ("region", region_scores)):
        if not np.isfinite(values).all():
            raise UserError(f"{what} scores are not all finite: compute them in fp32")
