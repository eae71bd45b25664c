"""How many clusters points have: the silhouette chooses, as George and SPARE have it choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

Fitted = TypeVar("Fitted")


def best_clusters(
    points: np.ndarray,
    fit: Callable[[int], tuple[np.ndarray, Fitted]],
    largest: int = 10,
    by_cluster: bool = True,
    judged: np.ndarray | None = None,
) -> tuple[np.ndarray, Fitted] | None:
    """Of the clusterings ``fit(K)`` of points [n, m], K in 2 ... ``largest``, the one with the highest mean silhouette.

    ``fit`` returns the cluster of every point [n], and what it fitted. ``by_cluster``: the mean over clusters of their
    means (George), else over points (SPARE). Of equals the larger K counts. ``judged``: indices of the points that
    silhouettes are taken of (None: all). Returns None where no K gives two clusters.
    """
    judged = np.arange(len(points)) if judged is None else judged
    best_score, best = -np.inf, None
    for k in range(2, min(largest, len(points) - 1) + 1):
        labels, fitted = fit(k)
        shown = labels[judged]
        if len(np.unique(shown)) < 2:
            continue
        values = silhouettes(points[judged], shown)
        score = _cluster_means(values, shown).mean() if by_cluster else values.mean()
        if score >= best_score:
            best_score, best = score, (labels, fitted)
    return best


def silhouettes(points: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Silhouette of every point [n]; 0 where there is one cluster, or as many as points."""
    if not 2 <= len(np.unique(clusters)) < len(points):
        return np.zeros(len(points))
    from sklearn.metrics import silhouette_samples  # here: it takes more than a second

    return silhouette_samples(points, clusters)


def _cluster_means(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Mean value of each cluster that has points, [K]."""
    return np.array([values[clusters == c].mean() for c in np.unique(clusters)])
