"""Whether a word's presence in images goes with their labels, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from torch import Tensor

from oodprompt.log import progress

LEVEL = 0.05  # of all tests of an audit together
STRONG = 0.45  # lower end of the interval of V from which a word is a strong suspect; chosen as docs/audit.md says
_FEWEST = 5  # images with and without a word, below which nothing is said of it
_BINS = 512
_AT_ONCE = 64

Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Split2:
    """Where a score is cut in two. ``clarity`` is the share of its variance that lies between the halves, in [0, 1]."""

    threshold: float
    clarity: float


def otsu(values: Numbers) -> Split2:
    """The threshold that leaves the least variance within the two halves (Otsu 1979), over 512 bins of the range."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return Split2(high, 0.0)
    count, edges = np.histogram(values, bins=_BINS, range=(low, high))
    centre, weight = (edges[:-1] + edges[1:]) / 2, count / count.sum()
    below, sums = np.cumsum(weight)[:-1], np.cumsum(weight * centre)[:-1]
    mean = float(weight @ centre)
    between = np.divide(
        (mean * below - sums) ** 2, below * (1 - below), out=np.zeros(_BINS - 1), where=below < 1 - 1e-12
    )
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    place = best[len(best) // 2]  # the middle of a gap
    return Split2(float(edges[place + 1]), float(between[place] / (weight @ (centre - mean) ** 2)))


def table_of(label: NDArray[np.integer], present: Flags, classes: int) -> Counts:
    """Images of every class without and with the word, [C, 2]."""
    return np.bincount(2 * label.astype(np.int64) + present, minlength=2 * classes).reshape(classes, 2)


def chi_squared(table: NDArray[np.integer]) -> tuple[float, int]:
    """(chi^2, degrees of freedom) of a table of counts [R, S]; rows and columns without images are left out.

    Both are 0 where one row or column is left, which says nothing of an association.
    """
    counts = np.asarray(table, dtype=np.float64)
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(counts.shape) < 2:
        return 0.0, 0
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    return float(((counts - expected) ** 2 / expected).sum()), (counts.shape[0] - 1) * (counts.shape[1] - 1)


def corrected_v(table: NDArray[np.integer]) -> float:
    """Cramer's V without its bias, in [0, 1].

    V = sqrt(max(0, chi^2 / n - (R - 1)(S - 1) / (n - 1)) / min(R' - 1, S' - 1)),  R' = R - (R - 1)^2 / (n - 1).

    Source: Bergsma, "A bias-correction for Cramer's V and Tschuprow's T", J. Korean Stat. Soc. 2013.
    """
    counts = np.asarray(table, dtype=np.float64)
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    n = int(counts.sum())
    if min(counts.shape) < 2 or n < 3:
        return 0.0
    rows, columns = counts.shape
    phi2 = max(0.0, chi_squared(counts)[0] / n - (rows - 1) * (columns - 1) / (n - 1))
    least = min(rows - (rows - 1) ** 2 / (n - 1), columns - (columns - 1) ** 2 / (n - 1)) - 1
    return float(min(1.0, np.sqrt(phi2 / least))) if least > 0 else 0.0


def v_interval(tables: Sequence[NDArray[np.integer]], level: float) -> tuple[float, float]:
    """Limits of Cramer's V that hold with probability 1 - ``level``, from the noncentral chi^2 distribution.

    ``tables`` [R, 2] are those of parts of the images, whose chi^2 and degrees of freedom add up; usually one. Parts that
    say nothing (``chi_squared``) are left out. The limits of the noncentrality l are those at which the observed chi^2
    is the level / 2 quantile from either side. V = sqrt(l / n) for the n images of the other parts. The limits of V are
    0 and 1 where no part says anything. Source: Smithson, "Confidence Intervals", Sage 2003, chapter 4.
    """
    tests = [(*chi_squared(table), int(np.sum(table))) for table in tables]
    telling = [test for test in tests if test[1]]
    value, freedom, scale = (sum(column) for column in zip(*telling, strict=True)) if telling else (0.0, 0, 0)
    if value <= 0:
        return 0.0, 1.0

    def limit(probability: float) -> float:
        if stats.chi2.cdf(value, freedom) <= probability:
            return 0.0
        root = optimize.brentq(lambda l: _cdf(value, freedom, l) - probability, 0.0, 4 * value + 100, rtol=1e-6)
        return min(1.0, float(np.sqrt(root / scale)))

    return limit(1 - level / 2), limit(level / 2)


def _cdf(value: float, freedom: int, noncentrality: float) -> float:
    """That of the noncentral chi^2; by Sankaran's normal approximation where series would be long."""
    if noncentrality < 500:
        return float(stats.ncx2.cdf(value, freedom, max(noncentrality, 1e-12)))
    total = freedom + noncentrality
    h = 1 - 2 * total * (freedom + 3 * noncentrality) / (3 * (freedom + 2 * noncentrality) ** 2)
    p = (freedom + 2 * noncentrality) / total**2
    m = (h - 1) * (1 - 3 * h)
    mean = 1 + h * p * (h - 1 - 0.5 * (2 - h) * m * p)
    return float(stats.norm.cdf(((value / total) ** h - mean) / (h * np.sqrt(2 * p) * (1 + 0.5 * m * p))))


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for all tests together (Holm 1979)."""
    order, adjusted, largest = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class Association:
    """How a word goes with the label of the training images.

    ``raw`` is Cramer's V of presence and label. ``v`` is what is left of it without the evidence for the class itself. It
    is never more than ``raw``; its limits are ``low`` and ``high``. ``p`` is adjusted for the whole vocabulary.
    ``adjusted``: whether ``v`` is the smaller one. ``strong``: ``p`` is below ``LEVEL`` and ``low`` at least ``STRONG``.
    ``split`` cuts the word's score; ``table`` [C, 2] counts the images of every class without and with it.
    """

    word: int
    v: float
    low: float
    high: float
    raw: float
    p: float
    strong: bool
    adjusted: bool
    split: Split2
    table: Counts

    @property
    def share(self) -> float:
        """Share of the training images that have the word."""
        return float(self.table[:, 1].sum() / self.table.sum())

    @property
    def lift(self) -> Numbers:
        """By how much the share of images with the word differs from the mean over classes, [C]; 0 of empty classes."""
        total = self.table.sum(axis=1)
        share = np.divide(self.table[:, 1], total, out=np.zeros(len(total)), where=total > 0)
        return np.where(total > 0, share - share[total > 0].mean(), 0.0)


def associations(
    features: Tensor, label: NDArray[np.integer], direction: Tensor, classes: Tensor, show: bool = True
) -> list[Association]:
    """The association of every word with the label, in the order of words; words that are too rare are left out.

    ``features`` [N, d] and ``label`` [N] are those of the training images, ``direction`` [W, d] those of the words.
    ``classes`` [C, d] are text features. All are on the CPU. The score of word w in image i is s = <z_i, direction_w>.
    The word is present where s is above the threshold of ``otsu``. The evidence for the class is
    e = sum_c b_c <z_i, t_c>. Here b_c is the mean of s over class c minus the mean of these. Classes without images are
    left out. Within classes, s moves with e at the slope k (least squares, 0 at least). A second V is that of s - k e
    in place of s; the smaller V counts. It is small for a word that only follows the evidence for the class, as "hoop"
    for the class ring.
    """
    number = len(classes)
    inside = Within(features, label, classes)
    raw: list[tuple[int, Split2, Counts, Counts]] = []
    parts = progress.over(list(_parts(len(direction))), "Associations", "part", show=show)
    for start, stop in parts:
        score, rest = inside.scores(direction[start:stop])
        for i in range(stop - start):
            split = otsu(score[:, i])
            table = table_of(label, score[:, i] > split.threshold, number)
            if table.sum(axis=0).min() >= _FEWEST:
                own = rest[:, i]
                raw.append((start + i, split, table, table_of(label, own > otsu(own).threshold, number)))
    ways = [left if corrected_v(left) < corrected_v(table) else table for _, _, table, left in raw]
    tests = [chi_squared(way) for way in ways]
    adjusted = holm([float(stats.chi2.sf(value, freedom)) if freedom else 1.0 for value, freedom in tests])
    found = []
    for (word, split, table, left), way, p in zip(raw, ways, adjusted, strict=True):
        v, whole, is_left = corrected_v(way), corrected_v(table), way is left
        low, high = v_interval([way], LEVEL / len(raw))
        found.append(Association(word, v, low, high, whole, p, p < LEVEL and low >= STRONG, is_left, split, table))
    return found


def _parts(number: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _AT_ONCE, number)) for start in range(0, number, _AT_ONCE))


class Within:
    """Scores of words, and what is left of them without the evidence for classes (``associations``)."""

    def __init__(self, features: Tensor, label: NDArray[np.integer], classes: Tensor) -> None:
        self.features, self.label = features, torch.from_numpy(np.asarray(label, dtype=np.int64))
        count = torch.bincount(self.label, minlength=len(classes)).unsqueeze(1)
        self.count, self.has_images = count.clamp(min=1), count > 0
        self.evidence = features @ classes.T
        self.centred = self.evidence - self._means(self.evidence)[self.label]

    def present(self, direction: Tensor, split: Split2, adjusted: bool) -> Flags:
        """Whether a word is present [N]; ``adjusted``: in what is left without the evidence for classes."""
        score, rest = self.scores(direction.unsqueeze(0))
        return rest[:, 0] > otsu(rest[:, 0]).threshold if adjusted else score[:, 0] > split.threshold

    def _means(self, values: Tensor) -> Tensor:
        sums = torch.zeros(len(self.count), values.shape[1]).index_add(0, self.label, values)
        return sums / self.count

    def scores(self, direction: Tensor) -> tuple[Numbers, Numbers]:
        """(scores, scores without the evidence), both [N, w]."""
        score = self.features @ direction.T
        means = self._means(score)
        weight = torch.where(self.has_images, means - means[self.has_images[:, 0]].mean(dim=0), 0)
        inside, along = score - means[self.label], self.centred @ weight
        slope = ((inside * along).sum(dim=0) / (along**2).sum(dim=0).clamp(min=1e-20)).clamp(min=0)
        rest = score - slope * (self.evidence @ weight)
        return score.double().numpy(), rest.double().numpy()
