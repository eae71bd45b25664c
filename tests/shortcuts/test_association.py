"""Association of words with labels: against textbooks' and SciPy's values, and on made-up features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from oodprompt.shortcuts.association import (
    associations,
    chi_squared,
    corrected_v,
    holm,
    otsu,
    table_of,
    v_interval,
)


def test_chi_squared_is_scipys_and_leaves_out_empty_rows() -> None:
    table = np.array([[10, 20], [30, 5], [0, 0]])
    expected = stats.chi2_contingency(table[:2], correction=False)
    assert chi_squared(table) == (pytest.approx(expected.statistic), expected.dof)
    assert chi_squared(np.array([[4, 0], [7, 0]])) == (0.0, 0)


def test_v_is_one_for_a_perfect_and_unbiased_for_no_association() -> None:
    assert corrected_v(np.array([[50, 0], [0, 50]])) == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    raw, corrected = [], []
    for _ in range(300):
        label, present = rng.integers(0, 5, 60), rng.random(60) < 0.4
        table = table_of(label, present, 5)
        raw.append(chi_squared(table)[0] / 60)
        corrected.append(corrected_v(table) ** 2)
    assert np.mean(raw) > 2 * np.mean(corrected)


def test_limits_of_v_hold_as_often_as_they_say() -> None:
    rng, p, hits = np.random.default_rng(1), 0.8, 0
    true = 2 * p - 1  # V of two halves, one with the word at 0.8 and one at 0.2
    for _ in range(200):
        label = np.repeat([0, 1], 150)
        present = rng.random(300) < np.where(label == 1, p, 1 - p)
        low, high = v_interval([table_of(label, present, 2)], 0.1)
        assert low <= high
        hits += low <= true <= high
    assert 0.85 <= hits / 200 <= 1.0


def test_limits_of_large_tables_are_those_of_the_exact_distribution() -> None:
    """From a noncentrality of 500 on, an approximation takes the place of SciPy's series."""
    table = np.array([[400, 40], [40, 400]])
    value, freedom = chi_squared(table)
    for limit, probability in zip(v_interval([table], 0.05), (0.975, 0.025), strict=True):
        assert stats.ncx2.cdf(value, freedom, limit**2 * table.sum()) == pytest.approx(probability, abs=1e-3)


def test_parts_in_which_a_word_cannot_differ_say_nothing_of_its_v() -> None:
    """Of one class alone, or with the word everywhere."""
    table = np.array([[40, 10], [15, 35]])
    of_one_class, everywhere = np.array([[30, 50], [0, 0]]), np.array([[0, 60], [0, 20]])
    assert v_interval([table, of_one_class, everywhere], 0.05) == v_interval([table], 0.05)
    assert v_interval([of_one_class], 0.05) == (0.0, 1.0)


def test_otsu_cuts_in_the_gap() -> None:
    values = np.concatenate([np.linspace(0, 1, 50), np.linspace(9, 10, 20)])
    split = otsu(values)
    assert 1 < split.threshold < 9 and split.clarity > 0.95
    assert otsu(np.ones(5)).clarity == 0.0


def test_holm_adjusts_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def made_up(strength: float, n: int = 600) -> tuple[torch.Tensor, np.ndarray, torch.Tensor, torch.Tensor]:
    """Features of two classes along axis 0, a scene along axis 1 that goes with the class at ``strength``.

    Words: the scene, one that is the class again, and noise.
    """
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], n // 2)
    scene = np.where(rng.random(n) < strength, label, 1 - label)
    z = rng.normal(0, 0.3, (n, 6))
    z[:, 0] += (2 * label - 1) * rng.uniform(0.2, 1.2, n)
    z[:, 1] += 2 * scene - 1
    features = F.normalize(torch.from_numpy(z).float(), dim=-1)
    axes = torch.eye(6)
    direction = torch.stack([axes[1], axes[0] + 0.1 * axes[3], axes[2]])
    classes = torch.stack([-axes[0], axes[0]])
    return features, label, direction, classes


def test_a_scene_is_strong_and_the_class_itself_is_not() -> None:
    scene, itself, noise = associations(*made_up(0.95), show=False)
    assert scene.strong and scene.v > 0.8 and scene.low < scene.v < scene.high
    assert itself.raw > 0.7 and itself.v < 0.3 and itself.adjusted and not itself.strong
    assert not noise.strong and noise.v < 0.2
    assert scene.lift[1] > 0 > scene.lift[0] and scene.table.sum() == 600


def test_classes_without_images_change_nothing() -> None:
    features, label, direction, classes = made_up(0.95)
    more = torch.cat([classes, torch.eye(6)[4:5], torch.eye(6)[5:]])
    fewer = associations(features, label, direction, classes, show=False)
    found = associations(features, label, direction, more, show=False)
    for key in ("v", "low", "high"):
        assert [getattr(a, key) for a in found] == pytest.approx([getattr(a, key) for a in fewer])


def test_nothing_is_strong_without_a_correlation() -> None:
    assert not any(a.strong for a in associations(*made_up(0.5), show=False))


def test_words_in_fewer_than_five_images_are_left_out() -> None:
    features, label, direction, classes = made_up(0.95)
    features[:4] = F.normalize(torch.tensor([0.0, 0, 0, 0, 0, 30.0]), dim=0)
    features[4:, 5] = 0
    found = associations(features, label, torch.cat([direction, torch.eye(6)[5:]]), classes, show=False)
    assert [a.word for a in found] == [0, 1, 2]
