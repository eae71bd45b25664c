"""How many images of each class have the spurious feature, for a wanted Cramer's V between feature and class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oodprompt.errors import UserError

Table = NDArray[np.int64]
CLASS_SPREAD = 0.02  # class counts of a fine-tuning set: 1,000 +- 20 of 10,000 images in 10 classes


def cramers_v(table: ArrayLike) -> float:
    """Cramer's V of a table of counts [R, S], in [0, 1].

    V = sqrt(chi^2 / (N (min(R, S) - 1))),  chi^2 = sum (O - E)^2 / E,  E = row sum x column sum / N.  Rows and columns
    without any count are left out; V is 0 where fewer than two of either are left, as nothing can go together there.
    """
    counts = np.asarray(table, dtype=np.float64)
    counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
    if min(counts.shape) < 2:
        return 0.0
    expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    return float(np.sqrt(chi_squared / (counts.sum() * (min(counts.shape) - 1))))


def apportion(total: int, weights: ArrayLike) -> Table:
    """``total`` in whole parts near the proportions of ``weights`` [n], by largest remainder, first ones first."""
    weights = np.asarray(weights, dtype=np.float64)
    shares = total * weights / weights.sum()
    parts = np.floor(shares).astype(np.int64)
    order = np.argsort(parts - shares, kind="stable")
    parts[order[: total - parts.sum()]] += 1
    return parts


def class_counts(total: int, classes: int, rng: np.random.Generator, spread: float = CLASS_SPREAD) -> Table:
    """``total`` images over ``classes``, each total / classes up to the share ``spread`` of it; [C], sums to ``total``.

    RaVL's builder draws 1,000 +- 20 for every class and takes the sum as it falls.
    """
    offset = rng.uniform(-1, 1, classes)
    offset -= offset.mean()
    return apportion(total, 1 + spread * offset / max(1.0, np.abs(offset).max()))


def contingency(counts_per_class: Sequence[int] | Table, target: int, V: float, rng: np.random.Generator) -> Table:
    """Images of every class without and with the feature, [C, 2], whose Cramer's V is the nearest to ``V``.

    The tables looked through: at first all images of class ``target`` have the feature and no other image has, V = 1;
    then images are moved one at a time, of the target class to "without" and of the others to "with", so that all
    classes have moved the same share of their images, but for less than one image; up to half of all, where V is about
    0. ``rng`` draws which class goes first where several are due. Adding one image changes V by about 0.0005 at 10,000
    images, so V is met well within 0.005 for a thousand or more.

    RaVL's builder starts from the same table and moves 1 to 3 images per class and round, at random, until V has
    fallen below the wanted value; this walks in steps of one image and takes the nearest table.

    Raises ``UserError`` unless 0 <= V <= 1, there are two or more classes with images, and ``target`` is one of them.
    """
    counts = np.asarray(counts_per_class, dtype=np.int64)
    check_v(V)
    if len(counts) < 2 or counts.min() < 1:
        raise UserError(f"a correlation needs two or more classes with images each, not {counts.tolist()}")
    if not 0 <= target < len(counts):
        raise UserError(f"the target class is a number from 0 to {len(counts) - 1}, not {target}")
    tables = _family(counts, target, rng)
    return tables[int(np.argmin(np.abs(_cramers_v_of_all(tables) - V)))]


def check_v(V: float) -> None:
    """``UserError`` for a Cramer's V outside [0, 1]."""
    if not 0 <= V <= 1:
        raise UserError(f"Cramer's V lies between 0 and 1, and {V:g} is asked for; give a value in that range")


def _family(counts: Table, target: int, rng: np.random.Generator) -> Table:
    """All tables of ``contingency`` in the order of their images moved, [1 + N // 2, C, 2]."""
    turn = (rng.permutation(len(counts)) + 0.5) / len(counts)
    when = np.concatenate([(np.arange(n) + t) / n for n, t in zip(counts, turn, strict=True)])
    mover = np.repeat(np.arange(len(counts)), counts)[np.argsort(when, kind="stable")][: counts.sum() // 2]
    moved = np.zeros((len(mover) + 1, len(counts)), dtype=np.int64)
    np.cumsum(mover[:, None] == np.arange(len(counts)), axis=0, out=moved[1:])
    moved[:, target] = counts[target] - moved[:, target]
    return np.stack([counts - moved, moved], axis=-1)


def _cramers_v_of_all(tables: Table) -> NDArray[np.float64]:
    """Cramer's V of tables [T, C, 2] that share their class counts: V^2 = sum_c n_c (p_c - p)^2 / (N p (1 - p)).

    0 where p is 0 or 1, as in ``cramers_v``.
    """
    counts = tables[0].sum(axis=1)
    share, overall = tables[:, :, 1] / counts, tables[:, :, 1].sum(axis=1) / counts.sum()
    between = ((share - overall[:, None]) ** 2 * counts).sum(axis=1)
    scale = counts.sum() * overall * (1 - overall)
    return np.sqrt(np.divide(between, scale, out=np.zeros_like(between), where=scale > 0))
