"""What a word does to the accuracy, and keywords of errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oodprompt.shortcuts.effects import PRIOR, effect_of
from oodprompt.shortcuts.keywords import keywords
from oodprompt.shortcuts.words import Words


def images(*cells: tuple[int, bool, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(present, label, right) of cells (class, present, number, how many are right)."""
    present, label, right = [], [], []
    for of_class, has, number, correct in cells:
        present += [has] * number
        label += [of_class] * number
        right += [True] * correct + [False] * (number - correct)
    return np.array(present), np.array(label), np.array(right)


def test_cells_and_gap_are_those_by_hand() -> None:
    present, label, right = images((0, True, 40, 20), (0, False, 60, 60), (1, True, 50, 50), (1, False, 50, 25))
    effect = effect_of(present, label, right, np.array([-0.4, 0.4]))
    shrunk = {
        (0, 1): (20 + PRIOR * 0.8) / 50,
        (0, 0): (60 + PRIOR * 0.8) / 70,
        (1, 1): (50 + PRIOR * 0.75) / 60,
        (1, 0): (25 + PRIOR * 0.75) / 60,
    }
    for (number, value), accuracy in shrunk.items():
        assert effect.cells[number][value].accuracy == pytest.approx(accuracy)
    weights = np.array([1 / (1 / 40 + 1 / 60), 25])
    gaps = np.array([shrunk[0, 0] - shrunk[0, 1], shrunk[1, 1] - shrunk[1, 0]])
    assert effect.gap == pytest.approx(weights @ gaps / weights.sum())
    assert effect.relies and effect.low < effect.gap < effect.high


def test_more_tests_widen_the_limits_and_few_images_shrink_the_gap() -> None:
    present, label, right = images((0, True, 4, 0), (0, False, 4, 4), (1, True, 4, 4), (1, False, 4, 0))
    few = effect_of(present, label, right, np.array([-0.4, 0.4]))
    assert few.gap < 0.35
    many = effect_of(present, label, right, np.array([-0.4, 0.4]), tests=50)
    assert many.high - many.low > few.high - few.low


def test_without_images_of_both_kinds_there_is_no_gap() -> None:
    present, label, right = images((0, False, 9, 9), (1, True, 9, 3))
    effect = effect_of(present, label, right, np.array([-1.0, 1.0]))
    assert effect.gap is None and not effect.relies and effect.cells[0][1].accuracy is None


def test_keywords_are_words_that_fit_the_errors() -> None:
    axes = torch.eye(3)
    words = Words(("barn", "sea", "sky"), ("",) * 3, axes, axes)
    label, right = np.array([0] * 20 + [1] * 8), np.array([True] * 10 + [False] * 10 + [True] * 8)
    features = torch.cat([axes[:1].repeat(10, 1), axes[1:2].repeat(10, 1), axes[2:].repeat(8, 1)])
    first, second = keywords(words, features, label, right, 2)
    assert [(k.word, k.score) for k in first] == [("sea", 1.0)] and second == []
    captions = ["a barn"] * 10 + ["sky above the sea"] * 10 + [""] * 8
    assert [k.word for k in keywords(words, features, label, right, 2, captions)[0]] == ["sea"]
    assert keywords(words, features, label, right, 2, ["sky"] * 28)[0] == []
