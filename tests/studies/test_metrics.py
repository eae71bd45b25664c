"""What the controlled evaluation measures, against hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from oodprompt.discovery.result import precision_at
from oodprompt.studies.coco import LABEL_SET_SIZES
from oodprompt.studies.digits import KINDS
from oodprompt.studies.metrics import TAU_EVAL, ZERO_SHOT_PROMPTS, image_metrics, is_valid, region_metrics, validity

# Accuracy with the rectangle (images), without it, of a model that takes it for a nine: the demo of RaVL's authors.
DEMO = {
    0: (0.981, 52, 1.0, 41), 1: (0.0, 56, 1.0, 65), 2: (0.694, 36, 1.0, 62), 3: (1.0, 37, 1.0, 59),
    4: (0.644, 45, 1.0, 53), 5: (0.684, 38, 1.0, 42), 6: (0.782, 55, 1.0, 50), 7: (0.690, 58, 0.980, 50),
    8: (0.023, 43, 0.964, 55), 9: (1.0, 54, 0.041, 49),
}  # fmt: skip


def demo() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, label, present) with those accuracies."""
    rows = []
    for y, (p_in, n_in, p_out, n_out) in DEMO.items():
        for present, p, n in ((True, p_in, n_in), (False, p_out, n_out)):
            rows += [(y if i < round(p * n) else (y + 1) % 10, y, present) for i in range(n)]
    predicted, label, present = zip(*rows, strict=True)
    return np.array(predicted), np.array(label), np.array(present)


def test_precision() -> None:
    truth = [True, False, True, True, False]
    assert precision_at([0, 2, 3], truth, k=3) == 1
    assert precision_at([1, 0, 4, 2], truth, k=2) == 0.5  # the third and fourth do not count
    assert precision_at([0, 2, 3], truth) == pytest.approx(0.3)  # seven are not returned
    assert precision_at([], truth) == 0
    assert precision_at(np.array([4, 1]), np.array(truth), k=2) == 0
    with pytest.raises(ValueError, match="k is 1 or more"):
        precision_at([0], truth, k=0)


def test_validity_of_the_demo() -> None:
    eps1, eps2 = validity(*demo(), target=9)
    assert eps1 == pytest.approx(1 - 2 / 49) and eps2 == pytest.approx(1)  # of the ones
    assert is_valid([(eps1, eps2)] * 3, tau=0.9)
    other = validity(*demo(), target=0)
    assert other.eps1 < 0 and not is_valid([other])  # no nine, no correlation


def test_validity_by_hand() -> None:
    label = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    present = [1, 1, 0, 0, 1, 1, 0, 0, 1, 0]
    predicted = [0, 0, 0, 2, 1, 0, 1, 1, 2, 2]
    assert validity(predicted, label, present, target=0) == (0.5, 0.5)  # 1 - 1/2; 1 - 1/2 of label 1, 0 of label 2
    assert validity(predicted, label, present, target=1) == (-0.5, 0.0)
    assert validity(predicted, label, present, target=2) == (0.0, 0.5)


def test_labels_without_both_sides_are_left_out() -> None:
    eps = validity([0, 1, 2, 0], [0, 0, 1, 2], [True, False, True, True], target=0)
    assert eps.eps1 == 1 and math.isnan(eps.eps2) and not is_valid([eps])
    eps = validity([0, 1, 0], [0, 1, 1], [True, False, True], target=0)
    assert math.isnan(eps.eps1) and eps.eps2 == 1 and not is_valid([eps])
    assert all(map(math.isnan, validity([0], [0], [True], target=3)))
    eps = validity([0, 0, 1, 2, 0], [0, 0, 1, 2, 2], [True, False, True, False, True], target=0)
    assert eps == (0, 1)  # label 1 is never without the feature


def test_every_seed_must_show_both() -> None:
    assert TAU_EVAL == (0.10, 0.20, 0.30, 0.40)
    assert is_valid([(0.11, 0.3), (0.2, 0.12)])
    assert not is_valid([(0.11, 0.3), (0.2, 0.09)]) and not is_valid([(0.09, 0.3), (0.2, 0.2)])
    assert not is_valid([(0.1, 0.3)])  # exceeds, not reaches
    assert not is_valid([(0.25, 0.3)], tau=0.3) and not is_valid([])


def test_image_metrics() -> None:
    metrics = image_metrics(*demo())
    predicted, label, present = demo()
    assert metrics.overall == pytest.approx(np.mean(predicted == label)) and metrics.worst_group == 0
    assert len(metrics.groups) == 20
    for group in metrics.groups:
        p, n = DEMO[group.label][:2] if group.present else DEMO[group.label][2:]
        assert group.number == n and group.accuracy == pytest.approx(round(p * n) / n)
    metrics = image_metrics([1, 0, 1], [1, 1, 1], [False, False, True])  # nothing of label 0
    assert metrics.worst_group == 0.5
    assert [tuple(group) for group in metrics.groups] == [(1, False, 2, 0.5), (1, True, 1, 1.0)]


def test_region_metrics() -> None:
    metrics = region_metrics([0, 1, 1, 1, 2, 0, -1], [0, 0, 1, 1, -1, -1, -1])
    assert (metrics.overall, metrics.worst_group) == (0.75, 0.5)  # regions that show no class do not count
    assert [tuple(group) for group in metrics.groups] == [(0, None, 2, 0.5), (1, None, 2, 1.0)]
    nothing = region_metrics([0, 1], [-1, -1])
    assert math.isnan(nothing.overall) and math.isnan(nothing.worst_group) and nothing.groups == ()


def test_prompts() -> None:
    assert ZERO_SHOT_PROMPTS.keys() == {*KINDS, "coco"} and LABEL_SET_SIZES == (2, 5)
    assert all(len(prompts) == 4 and "{}" in prompts for prompts in ZERO_SHOT_PROMPTS.values())
    assert [prompt.format("nine") for prompt in ZERO_SHOT_PROMPTS["mnist"]] == [
        "a photo of the number nine", "the digit nine", "an image of a nine", "nine",
    ]  # fmt: skip
