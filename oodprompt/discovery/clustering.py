"""K-medoids of regions by cosine distance, for a sweep of K from which the silhouette chooses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from oodprompt.discovery.result import Clustering
from oodprompt.errors import UserError
from oodprompt.log import progress

START_SAMPLE = 1000  # regions, or ten per cluster where that is more, on which the first medoids are found
CANDIDATES = 32  # regions of each of two kinds that are tried as a new medoid in one step
BLOCK = 1_000_000  # entries of a matrix that are worked on at a time (4 MB)
COINCIDE = 1e-6  # cosine distance below which two regions are the same up to rounding


def cluster_regions(
    features: np.ndarray, ks: Sequence[int], seed: int = 0, max_exact: int = 20_000, show: bool = False
) -> Clustering:
    """K-medoids of L2-normalised ``features`` [r, d] for every K in ``ks``; the one of best mean silhouette (ties: smallest).

    The distance is D = clip(1 - E E^T, 0, 1) with a zero diagonal; K-medoids lowers the sum over regions of the distance
    to the nearest medoid. :func:`sweep` says how; ``seed`` fixes everything.

    Above ``max_exact`` regions, whose matrix takes 4 r^2 bytes, the sweep sees ``max_exact`` of them, drawn without
    replacement, and all regions are assigned to the medoids found (as CLARA does with one sample, Kaufman and Rousseeuw
    1990). ``silhouette`` and ``silhouettes`` are then those of the sample, ``objective`` is that of all regions.

    A K that the regions cannot fill (K >= r, or fewer than K distinct regions) is left out of ``silhouettes``.

    Raises ``UserError`` where features are not finite or not normalised, where ``ks`` is empty or holds a K below 2, and
    where no K can be filled.
    """
    features = checked_features(features)
    ks = _checked_ks(ks)
    r = len(features)
    sample = np.arange(r)
    if r > max_exact:
        sample = np.sort(np.random.default_rng(seed).choice(r, max_exact, replace=False))
    best: Swept | None = None
    silhouettes: dict[int, float] = {}
    for found in sweep(distances(features[sample]), ks, seed, show):
        silhouettes[found.k] = found.silhouette
        if best is None or found.silhouette > best.silhouette:
            best = found
    assert best is not None, "there is a K to try"
    medoids = sample[best.medoids]
    if len(sample) == r:
        return Clustering(best.assignment, medoids, best.objective, best.silhouette, silhouettes)
    assignment, distance = nearest_medoids(features, features[medoids])
    return Clustering(assignment, medoids, float(distance.sum(dtype=np.float64)), best.silhouette, silhouettes)


def distances(features: np.ndarray) -> np.ndarray:
    """L2-normalised features [r, d] -> cosine distances clip(1 - E E^T, 0, 1) [r, r], float32, zero on the diagonal."""
    d = features @ features.T
    np.subtract(1, d, out=d)
    np.clip(d, 0, 1, out=d)
    np.fill_diagonal(d, 0)
    return d


def assign(features: np.ndarray, medoid_features: np.ndarray) -> np.ndarray:
    """The nearest medoid by cosine of each region: L2-normalised [m, d] and [K, d] -> [m] of 0..K-1 (ties: smallest)."""
    return nearest_medoids(checked_features(features), checked_features(medoid_features))[0]


def nearest_medoids(features: np.ndarray, medoid_features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`assign` with the distance [m] to the nearest medoid; regions in blocks."""
    m, k = len(features), len(medoid_features)
    assignment, distance = np.empty(m, dtype=np.int64), np.empty(m, dtype=np.float32)
    for rows in _blocks(m, k):
        similarity = features[rows] @ medoid_features.T
        assignment[rows] = similarity.argmax(axis=1)
        distance[rows] = np.clip(1 - similarity.max(axis=1), 0, 1)
    return assignment, distance


def silhouette(d: np.ndarray, assignment: np.ndarray) -> float:
    """Mean silhouette of clusters 0..K-1, none empty, from distances [r, r] with a zero diagonal.

    With a_i the mean distance of i to the other regions of its cluster and b_i the least of its mean distances to
    another cluster: mean of (b_i - a_i) / max(a_i, b_i); 0 for the one region of a cluster (Rousseeuw 1987, and
    ``sklearn.metrics.silhouette_score`` with ``metric="precomputed"``).
    """
    totals = _Totals(d, int(assignment.max()) + 1)
    totals.update(assignment)
    return totals.silhouette()


@dataclass(frozen=True)
class Swept:
    """K-medoids for one K: ``medoids`` [k], ``assignment`` [r], sum of distances to the own medoid, mean silhouette."""

    k: int
    medoids: np.ndarray
    assignment: np.ndarray
    objective: float
    silhouette: float


def sweep(d: np.ndarray, ks: Sequence[int], seed: int = 0, show: bool = False) -> list[Swept]:
    """K-medoids on symmetric distances [r, r] for every K of ``ks`` (ascending) that can be filled.

    FasterPAM (Schubert and Rousseeuw 2021) on a sample of the regions gives the medoids of the smallest K. From K to
    K + 1 the region is added as a medoid that lowers the objective most. At each K two moves are taken in turns until
    neither lowers the objective: every cluster's medoid becomes the region of least summed distance to the cluster, and
    the best swap of a medoid for one of some promising regions is made. When leaving out one of K + 1 medoids gives an
    objective lower by a thousandth than was found for K, K is taken up again from there.

    What the objective would gain by each region, and the summed distance of each region to every cluster, are kept, and
    updated with those rows of the matrix alone that a move changes: some hundred per K, where one pass of FasterPAM
    reads them all. The silhouettes come from the same sums.
    """
    r, wanted = len(d), {k for k in ks if k < len(d)}
    if not wanted:
        raise UserError(f"{r} regions cannot make {min(ks)} clusters or more: give more regions, or a smaller K")
    state = _Search(d, _start(d, min(wanted), seed), max(wanted))
    found: dict[int, Swept] = {}
    best: dict[int, float] = {}
    with progress(len(wanted), "K-medoids", "K", show) as bar:
        while True:
            state.improve()
            loss = state.removal_loss()
            if (loss <= COINCIDE * np.maximum(np.bincount(state.near, minlength=state.k), 1)).any():
                break  # two medoids coincide: there are no K distinct regions
            k, objective = state.k, state.objective
            if objective < best.get(k, np.inf):
                best[k] = objective
                if k in wanted:
                    bar.update(k not in found)
                    found[k] = Swept(k, state.medoids.copy(), state.near.copy(), objective, state.totals.silhouette())
            if objective + loss.min() < best.get(k - 1, -np.inf) * (1 - 1e-3):
                state.drop(int(loss.argmin()))
            elif k == max(wanted):
                break
            else:
                state.add(int(state.gains().argmax()))
    if not found:
        raise UserError(
            f"the {r} regions have fewer than {min(wanted)} distinct features: look at what made the regions, "
            "or give a smaller K"
        )
    return [found[k] for k in sorted(found)]


def _start(d: np.ndarray, k: int, seed: int) -> np.ndarray:
    """``k`` medoids by FasterPAM on a sample."""
    size = min(len(d), max(START_SAMPLE, 10 * k))
    sample = np.sort(np.random.default_rng(seed).choice(len(d), size, replace=False))
    import kmedoids  # here: it takes scikit-learn, which takes more than a second

    found = kmedoids.fasterpam(d[sample[:, None], sample], k, random_state=seed, n_cpu=1)
    return sample[found.medoids.astype(np.int64)]


class _Totals:
    """Summed distances [K, r] of each region to the regions of each cluster, in float64, updated as regions move."""

    def __init__(self, d: np.ndarray, k_max: int) -> None:
        self._d, self._sums = d, np.zeros((k_max, len(d)))
        self.assignment = np.full(len(d), -1)  # -1: in no cluster so far

    @property
    def sizes(self) -> np.ndarray:
        return np.bincount(self.assignment)

    def update(self, assignment: np.ndarray) -> None:
        moved = np.flatnonzero(assignment != self.assignment)
        # 512 regions or more at a time, as each time whole rows of sums are added to
        for block in _blocks(len(moved), min(len(self._d), max(1, BLOCK // 512))):
            regions = moved[block]
            sign = np.zeros((len(self._sums) + 1, len(regions)), dtype=np.float32)  # the last row is that of -1
            sign[assignment[regions], np.arange(len(regions))] = 1
            sign[self.assignment[regions], np.arange(len(regions))] = -1
            touched = np.flatnonzero(sign[:-1].any(axis=1))
            self._sums[touched] += sign[touched] @ self._d[regions]
        self.assignment = assignment.copy()

    def drop(self, cluster: int, last: int) -> None:
        """Cluster ``last`` takes the place of ``cluster``, whose regions are in none."""
        self._sums[cluster], self._sums[last] = self._sums[last], 0
        self.assignment = _renamed(self.assignment, cluster, last)

    def within(self) -> np.ndarray:
        """[r] summed distance to the own cluster."""
        return self._sums[self.assignment, np.arange(len(self.assignment))]

    def silhouette(self) -> float:
        sizes = self.sizes
        sums = self._sums[: len(sizes)]
        total = 0.0
        for block in _blocks(len(self.assignment), len(sizes)):
            own, column = self.assignment[block], np.arange(block.stop - block.start)
            means = sums[:, block] / sizes[:, None]
            a = sums[:, block][own, column] / np.maximum(sizes[own] - 1, 1)
            means[own, column] = np.inf
            b = means.min(axis=0)
            larger = np.maximum(a, b)
            total += ((b - a) / np.where(larger > 0, larger, 1))[sizes[own] > 1].sum()
        return float(total / len(self.assignment))


class _Search:
    """Medoids with each region's nearest and second nearest, and moves that change them."""

    def __init__(self, d: np.ndarray, medoids: np.ndarray, k_max: int) -> None:
        r = len(d)
        self._d, self.medoids, self.totals = d, medoids, _Totals(d, k_max)
        self.near, self._second = np.zeros(r, dtype=np.int64), np.zeros(r, dtype=np.int64)
        self._near_d, self._second_d = np.zeros(r, dtype=np.float32), np.zeros(r, dtype=np.float32)
        # sum_i min(D_ij, distance of i to its medoid) of every j, for the distances of when it was last asked for
        self._capped, self._caps = np.zeros(r), np.zeros(r, dtype=np.float32)
        self._reassign(np.arange(r))

    @property
    def k(self) -> int:
        return len(self.medoids)

    @property
    def objective(self) -> float:
        return float(self._near_d.sum(dtype=np.float64))

    def removal_loss(self) -> np.ndarray:
        """[K] what the objective rises by without each medoid."""
        return np.bincount(self.near, self._second_d - self._near_d, minlength=self.k)

    def gains(self) -> np.ndarray:
        """[r] what the objective falls by with region j as one more medoid: sum_i max(d_i - D_ij, 0)."""
        changed = np.flatnonzero(self._caps != self._near_d)
        before, after = self._caps[changed], self._near_d[changed]
        low, high, sign = np.minimum(before, after), np.maximum(before, after), np.sign(after - before)
        for block in _blocks(len(changed), len(self._d)):
            rows = self._d[changed[block]]
            np.clip(rows, low[block, None], high[block, None], out=rows)  # min(D, high) - min(D, low) + low
            self._capped += sign[block] @ rows
        self._capped -= sign @ low
        self._caps = self._near_d.copy()
        return self.objective - self._capped

    def improve(self) -> None:
        """Recentres and swaps until neither lowers the objective."""
        self._recentre()
        objective = np.inf
        while self.objective < objective * (1 - 1e-6):
            objective = self.objective
            if self._swap():
                self._recentre()

    def add(self, region: int) -> None:
        self.medoids = np.append(self.medoids, region)
        self._reassign(np.flatnonzero(self._d[region] < self._second_d))

    def drop(self, slot: int) -> None:
        """Leaves out a medoid; the last one takes its number."""
        last = self.k - 1
        bereft = np.flatnonzero((self.near == slot) | (self._second == slot))
        self.totals.drop(slot, last)
        self.near, self._second = _renamed(self.near, slot, last), _renamed(self._second, slot, last)
        self.medoids[slot] = self.medoids[last]
        self.medoids = self.medoids[:-1]
        self._reassign(bereft)

    def _replace(self, slot: int, region: int) -> None:
        self.medoids[slot] = region
        nearer = self._d[region] < self._second_d
        self._reassign(np.flatnonzero(nearer | (self.near == slot) | (self._second == slot)))

    def _reassign(self, regions: np.ndarray) -> None:
        """The two nearest medoids of ``regions``, anew."""
        to_medoids, column = self._d[self.medoids[:, None], regions], np.arange(len(regions))
        for index, distance in ((self.near, self._near_d), (self._second, self._second_d)):
            index[regions] = slots = to_medoids.argmin(axis=0)
            distance[regions] = to_medoids[slots, column]
            to_medoids[slots, column] = np.inf

    def _recentre(self) -> None:
        """Every cluster's medoid becomes the region of least summed distance to its cluster, until none changes."""
        objective = np.inf
        while True:
            self.totals.update(self.near)
            if not self.objective < objective * (1 - 1e-7):
                return
            objective, within = self.objective, self.totals.within()
            best = self._best_of_each(-within)
            for slot in np.flatnonzero(within[best] < within[self.medoids] * (1 - 1e-7)):
                self._replace(int(slot), best[slot])

    def _swap(self) -> bool:
        """Makes the best swap of any medoid for a candidate; whether there was one that lowers the objective.

        A swap of medoid m for region j changes the objective by -gain_j + sum_{i of m} (min(D_ij, second_i) - min(D_ij,
        near_i)). Candidates are, of every cluster, the region of highest gain (best where m is far from j), and that of
        highest gain less its summed distance to the cluster (best where m is the cluster's own); of both kinds the
        ``CANDIDATES`` of most promise.
        """
        gains, within = self.gains(), self.totals.within()
        far, own = self._best_of_each(gains), self._best_of_each(gains - within)
        candidates = np.concatenate(
            [_highest(far, gains[far]), _highest(own, gains[own] - within[own] + within[self.medoids])]
        )
        rows, r = self._d[candidates], len(self._d)
        member = np.zeros((r, self.k), dtype=np.float32)
        member[np.arange(r), self.near] = 1
        nearer = np.minimum(rows, self._near_d)
        change = (np.minimum(rows, self._second_d) - nearer) @ member
        change -= (self._near_d - nearer).sum(axis=1, keepdims=True)  # the gains anew: kept ones carry rounding errors
        candidate, slot = np.unravel_index(change.argmin(), change.shape)
        if change[candidate, slot] > -1e-6 * self.objective:
            return False
        self._replace(int(slot), int(candidates[candidate]))
        return True

    def _best_of_each(self, value: np.ndarray) -> np.ndarray:
        """[K] the region of highest value in each cluster (ties: the first; a cluster without regions: its medoid)."""
        highest = np.full(self.k, -np.inf)
        np.maximum.at(highest, self.near, value)
        reached = np.flatnonzero(value == highest[self.near])[::-1]
        best = self.medoids.copy()
        best[self.near[reached]] = reached
        return best


def _highest(regions: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The ``CANDIDATES`` regions of highest value."""
    return regions[np.argsort(-value, kind="stable")[:CANDIDATES]]


def _renamed(slots: np.ndarray, dropped: int, last: int) -> np.ndarray:
    """Slots with -1 for ``dropped``, whose number ``last`` takes."""
    return np.where(slots == dropped, -1, np.where(slots == last, dropped, slots))


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of ``rows`` rows with about ``BLOCK`` entries each."""
    step = max(1, BLOCK // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def checked_features(features: np.ndarray) -> np.ndarray:
    """Features as contiguous float32 [r, d]; ``UserError`` unless there are some, finite and normalised."""
    features = np.ascontiguousarray(features, dtype=np.float32)
    if features.ndim != 2 or not len(features):
        raise UserError(f"region features have the shape {list(features.shape)}: expected [regions, d], one or more")
    norms = np.linalg.norm(features, axis=1)
    broken = np.flatnonzero(~np.isfinite(norms))
    if len(broken):
        raise UserError(
            f"the features of {len(broken)} of {len(features)} regions are not finite (first: region {broken[0]}): "
            "leave these regions out, or encode them in fp32"
        )
    off = np.abs(norms - 1)
    if off.max() > 1e-2:
        raise UserError(
            f"region features are not L2-normalised (region {off.argmax()} has length {norms[off.argmax()]:.3g}): "
            "divide each by its length"
        )
    return features


def _checked_ks(ks: Sequence[int]) -> list[int]:
    ordered = sorted({int(k) for k in ks})
    if not ordered or ordered[0] < 2:
        what = f"holds {ordered[0]}" if ordered else "is empty"
        raise UserError(f"the range of K {what}: give numbers of clusters of 2 or more")
    return ordered
