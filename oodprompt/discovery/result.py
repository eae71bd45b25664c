"""What discovery finds: clusters of regions, what each does to every class, and which survive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Gap:
    """What the presence of a cluster does to the images of one class ``label``.

    p_in, n_in: accuracy and number of the class's images with a region of the cluster; p_out, n_out: without.
    w = 2 min(n_in, n_out) / (n_in + n_out);  gap G_c^y = w (p_in - p_out).
    """

    label: int
    p_in: float
    n_in: int
    p_out: float
    n_out: int

    @property
    def weight(self) -> float:
        return 2 * min(self.n_in, self.n_out) / (self.n_in + self.n_out)

    @property
    def gap(self) -> float:
        return self.weight * (self.p_in - self.p_out)


@dataclass(frozen=True)
class Cluster:
    """One cluster of regions.

    ``index`` in the clustering; ``medoid`` the region in its middle; ``regions`` [m] its regions, nearest to the medoid
    first, with their cosine ``similarity`` [m] to it; ``gaps`` of the classes that have images both with and without
    it; ``influence`` H_c (-inf where no error can be laid to it); ``survives`` the filters, else ``reason`` says why not.
    """

    index: int
    medoid: int
    regions: np.ndarray
    similarity: np.ndarray
    gaps: tuple[Gap, ...]
    influence: float
    survives: bool
    reason: str = ""

    @property
    def score(self) -> float:
        """G_c = sum over classes of |G_c^y|."""
        return sum(abs(gap.gap) for gap in self.gaps)

    @property
    def helps(self) -> int | None:
        """The class whose accuracy falls most where the cluster is absent: argmax_y G_c^y; None without one above 0."""
        best = max(self.gaps, key=lambda gap: gap.gap, default=None)
        return best.label if best is not None and best.gap > 0 else None

    @property
    def hurts(self) -> tuple[int, ...]:
        """The classes with G_c^y < 0, the most hurt first."""
        return tuple(g.label for g in sorted(self.gaps, key=lambda gap: gap.gap) if g.gap < 0)


@dataclass(frozen=True)
class Clustering:
    """``assignment`` [r] of each region to a cluster 0..K-1, ``medoids`` [K] (regions), ``objective`` the sum of distances
    to the own medoid, ``silhouette`` its mean silhouette, ``silhouettes`` that of every K tried.
    """

    assignment: np.ndarray
    medoids: np.ndarray
    objective: float
    silhouette: float
    silhouettes: dict[int, float]


@dataclass(frozen=True)
class Discovery:
    """The clustering and all clusters: survivors first, each part by falling ``score``."""

    clustering: Clustering
    clusters: tuple[Cluster, ...]

    @property
    def survivors(self) -> tuple[Cluster, ...]:
        return tuple(cluster for cluster in self.clusters if cluster.survives)

    @property
    def top(self) -> Cluster | None:
        """The cluster that discovery returns; None when nothing survives, which is a normal outcome."""
        return self.clusters[0] if self.clusters and self.clusters[0].survives else None


def precision_at(ranked: Sequence[int] | ArrayLike, truth: ArrayLike, k: int = 10) -> float:
    """Share of the first ``k`` of the ``ranked`` regions that hold the planted feature: hits among them / k.

    ``ranked`` holds indices of regions, best first; ``truth`` [r] says of every region whether it holds the feature.
    Fewer than ``k`` regions are still divided by ``k``, as one that is not returned is a miss, so nothing found gives
    0. The paper does not say what it does there.
    """
    if k < 1:
        raise ValueError(f"k is 1 or more, not {k}")
    first = np.asarray(ranked, dtype=np.int64)[:k]
    return float(np.asarray(truth, dtype=bool)[first].sum() / k)
