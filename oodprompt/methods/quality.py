"""How far the groups that a source makes are those of the attribute labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class GroupQuality:
    """Agreement of the values of a source with attribute labels, over the images that have both.

    ``agreement``: share of images whose value is the attribute's under the best one-to-one matching of values with
    attributes, for each class by itself. ``groups``: the same by true group: (class, attribute, images, agreement).
    ``adjusted_mutual_information``: of value and attribute within each class, in the mean over images; 0 is chance, 1 the
    same groups. It is None where every class has one attribute. ``num_groups``: groups of the source that have images.
    """

    num_samples: int
    num_groups: int
    agreement: float
    adjusted_mutual_information: float | None
    groups: tuple[tuple[int, int, int, float], ...]

    @property
    def worst_group_agreement(self) -> float:
        """The least agreement of a true group: 0 for a source that calls all images of a class the same."""
        return min(agreement for *_, agreement in self.groups)


def group_quality(value: Tensor, label: Tensor, attribute: Tensor) -> GroupQuality | None:
    """The quality of values [N] (-1: none) of images of classes [N] with attributes [N] (-1: unknown).

    None where no image has an attribute label and a value.
    """
    a, y, v = (x.cpu().numpy() for x in (attribute, label, value))
    known = (a >= 0) & (v >= 0)
    if not known.any():
        return None
    a, y, v = a[known], y[known], v[known]
    right, information, weight, groups = 0.0, 0.0, 0, []
    for c in np.unique(y).tolist():
        inside = y == c
        table = _contingency(v[inside], a[inside])
        matched = _matched(table)
        right += matched.sum()
        groups += [(c, i, int(n), float(matched[i] / n)) for i, n in enumerate(table.sum(axis=0).tolist()) if n]
        if len(np.unique(a[inside])) > 1:
            from sklearn.metrics import adjusted_mutual_info_score  # here: it takes more than a second

            n = int(inside.sum())
            information, weight = information + n * adjusted_mutual_info_score(a[inside], v[inside]), weight + n
    return GroupQuality(
        len(y),
        len(np.unique(y * (v.max() + 1) + v)),
        float(right / len(y)),
        information / weight if weight else None,
        tuple(groups),
    )


def _contingency(value: np.ndarray, attribute: np.ndarray) -> np.ndarray:
    """[K, A] number of images of each value and attribute."""
    table = np.zeros((value.max() + 1, attribute.max() + 1))
    np.add.at(table, (value, attribute), 1)
    return table


def _matched(table: np.ndarray) -> np.ndarray:
    """[A] images of each attribute that have the value matched with it."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(-table)
    matched = np.zeros(table.shape[1])
    matched[columns] = table[rows, columns]
    return matched
