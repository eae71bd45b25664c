"""What the controlled evaluation measures: discovery, validity of a setting, and accuracy of images and regions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Prompts whose text features are averaged for zero-shot classification; RaVL, appendix B.
ZERO_SHOT_PROMPTS = {
    "mnist": ("a photo of the number {}", "the digit {}", "an image of a {}", "{}"),
    "fashion": ("a photo of a {}", "the {}", "an image of a {}", "{}"),
    "coco": ("there is a {}", "a photo of the {}", "a photo of a {}", "{}"),
}
TAU_EVAL = (0.10, 0.20, 0.30, 0.40)  # the paper's thresholds of validity, as fractions; the first is the usual one


class Validity(NamedTuple):
    """``eps1`` and ``eps2`` of one model, differences of accuracies in [-1, 1]; nan without images to compare."""

    eps1: float
    eps2: float


class Group(NamedTuple):
    """Accuracy and number of the images of a label with (or without) the feature, or of the regions of a label."""

    label: int
    present: bool | None  # None for regions
    number: int
    accuracy: float


class Accuracies(NamedTuple):
    """Accuracy over all, that of the worst group, and that of every group; nan without any."""

    overall: float
    worst_group: float
    groups: tuple[Group, ...]


def validity(predicted: ArrayLike, label: ArrayLike, present: ArrayLike, target: int) -> Validity:
    """Whether a model has learned the planted correlation; all arrays [N], of images without the correlation.

    eps1 = acc(y = target, with the feature) - acc(y = target, without),
    eps2 = max over y != target of  acc(y, without) - acc(y, with).
    Labels that lack images of one side are left out. RaVL, section 3.2.
    """
    accuracy = {(g.label, g.present): g.accuracy for g in image_metrics(predicted, label, present).groups}
    nan = float("nan")
    labels = {y for y, _ in accuracy}
    gain = {y: accuracy.get((y, True), nan) - accuracy.get((y, False), nan) for y in labels}
    drops = [-gain[y] for y in gain if y != target and not np.isnan(gain[y])]
    return Validity(gain.get(target, nan), max(drops, default=nan))


def is_valid(eps: Iterable[tuple[float, float]], tau: float = TAU_EVAL[0]) -> bool:
    """Whether eps1 and eps2 both exceed ``tau`` for every seed; False for none, as nothing has been shown."""
    values = list(eps)
    return bool(values) and all(eps1 > tau and eps2 > tau for eps1, eps2 in values)


def image_metrics(predicted: ArrayLike, label: ArrayLike, present: ArrayLike) -> Accuracies:
    """Accuracy of images [N], overall and by group (label, feature present or not) that has images."""
    label, present = np.asarray(label, dtype=np.int64), np.asarray(present, dtype=bool)
    correct = np.asarray(predicted) == label
    groups = [
        _group(int(y), bool(a), correct[(label == y) & (present == a)])
        for y, a in np.unique(np.stack([label, present]), axis=1).T
    ]
    return _accuracies(correct, groups)


def region_metrics(predicted: ArrayLike, label: ArrayLike) -> Accuracies:
    """Zero-shot accuracy of regions [r] that show a class, overall and by label, the worst label as the worst group.

    ``predicted`` are the classes nearest to the regions' features, ``label`` the class a region shows, -1 for one that
    shows none (the feature, an empty quadrant, another category), which does not count.

    The paper compares zero-shot classes of regions with their labels and says no more; which regions count and what
    the groups are is our definition.
    """
    label = np.asarray(label, dtype=np.int64)
    shown = label >= 0
    correct, label = (np.asarray(predicted) == label)[shown], label[shown]
    return _accuracies(correct, [_group(int(y), None, correct[label == y]) for y in np.unique(label)])


def _group(label: int, present: bool | None, correct: np.ndarray) -> Group:
    return Group(label, present, len(correct), float(correct.mean()))


def _accuracies(correct: np.ndarray, groups: Sequence[Group]) -> Accuracies:
    overall = float(correct.mean()) if len(correct) else float("nan")
    return Accuracies(overall, min((g.accuracy for g in groups), default=float("nan")), tuple(groups))
