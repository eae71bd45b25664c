"""Tables of images with a wanted Cramer's V."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats.contingency import association

from oodprompt.errors import UserError
from oodprompt.studies.planting import apportion, class_counts, contingency, cramers_v


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("shape", [(2, 2), (10, 2), (3, 5), (2, 7)])
def test_cramers_v_is_scipys(shape: tuple[int, int]) -> None:
    for seed in range(5):
        table = rng(seed).integers(1, 50, shape)
        assert cramers_v(table) == pytest.approx(association(table, method="cramer"), abs=1e-12)


def test_cramers_v_by_hand() -> None:
    assert cramers_v([[10, 0], [0, 10]]) == pytest.approx(1)
    assert cramers_v([[10, 20], [30, 60]]) == pytest.approx(0)
    # E = [[6, 4], [6, 4]], chi^2 = 4 / 6 + 4 / 4 + 4 / 6 + 4 / 4 = 10 / 3, N = 20
    assert cramers_v([[8, 2], [4, 6]]) == pytest.approx((10 / 3 / 20) ** 0.5)


def test_cramers_v_leaves_out_what_has_no_counts() -> None:
    assert cramers_v([[8, 2, 0], [0, 0, 0], [4, 6, 0]]) == pytest.approx(cramers_v([[8, 2], [4, 6]]))
    assert cramers_v([[8, 0], [4, 0]]) == cramers_v([[8, 4], [0, 0]]) == cramers_v([[0, 0], [0, 0]]) == 0


def test_apportion() -> None:
    assert apportion(10, [1, 1, 1]).tolist() == [4, 3, 3]
    assert apportion(7, [5, 3, 2]).tolist() == [4, 2, 1]  # 3.5, 2.1, 1.4
    assert apportion(0, [1, 2]).tolist() == [0, 0]
    assert apportion(6, [0.1, 0.2, 0.3]).tolist() == [1, 2, 3]
    for seed in range(5):
        weights, total = rng(seed).random(9), 1003 + seed
        parts = apportion(total, weights)
        assert parts.sum() == total and np.abs(parts - total * weights / weights.sum()).max() < 1


def test_class_counts_lie_within_2_percent_and_fill_the_set() -> None:
    for seed in range(20):
        counts = class_counts(10_000, 10, rng(seed))
        assert counts.sum() == 10_000 and 979 <= counts.min() < 995 and 1005 < counts.max() <= 1021
    assert (class_counts(10_000, 10, rng(1)) == class_counts(10_000, 10, rng(1))).all()
    assert class_counts(10, 10, rng()).tolist() == [1] * 10


@pytest.mark.parametrize("V", [0.0, 0.3, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("counts", [[100] * 10, [500, 300, 200], [980, 1020, 1007, 993]])
def test_v_is_met_in_the_family_of_tables(V: float, counts: list[int]) -> None:
    target = len(counts) - 1
    table = contingency(counts, target, V, rng())
    assert table.dtype == np.int64 and table.sum(axis=1).tolist() == counts and table.min() >= 0
    assert cramers_v(table) == pytest.approx(V, abs=0.005)
    moved = table[:, 1].copy()
    moved[target] = table[target, 0]
    share = moved.sum() / sum(counts)
    assert (np.abs(moved - share * np.array(counts)) < 1).all()  # every class moved alike
    assert moved.sum() <= sum(counts) // 2


def test_the_paper_s_settings_are_met_closely() -> None:
    for V in (0.7, 0.8, 0.9, 0.95, 0.99):
        counts = class_counts(10_000, 10, rng(3))
        table = contingency(counts, 4, V, rng(3))
        assert cramers_v(table) == pytest.approx(V, abs=0.0005)
        others = [c for c in range(10) if c != 4]
        assert (table[others, 1] < table[others, 0]).all() and table[4, 1] > table[4, 0]


@pytest.mark.parametrize("V", [0.0, 0.2, 0.55, 0.85, 1.0])
def test_no_table_of_the_family_is_nearer(V: float) -> None:
    counts, target, seed = [7, 12, 9], 1, 5
    turn = rng(seed).permutation(3)
    moves = sorted(((k + (turn[c] + 0.5) / 3) / n, c) for c, n in enumerate(counts) for k in range(n))
    table = np.array([[7, 0], [0, 12], [9, 0]])
    tables = [table.copy()]
    for _, c in moves[: sum(counts) // 2]:
        table[c] += [1, -1] if c == target else [-1, 1]
        tables.append(table.copy())
    found = contingency(counts, target, V, rng(seed))
    assert abs(cramers_v(found) - V) == pytest.approx(min(abs(cramers_v(t) - V) for t in tables))
    assert any((found == t).all() for t in tables)


def test_random_numbers_decide_who_moves_first_only() -> None:
    tables = {contingency([50] * 4, 0, 0.83, rng(seed)).tobytes() for seed in range(12)}
    assert len(tables) > 1
    assert (contingency([50] * 4, 0, 0.83, rng(2)) == contingency([50] * 4, 0, 0.83, rng(2))).all()


def test_as_few_images_as_can_be() -> None:
    assert contingency([1, 1], 0, 1.0, rng()).tolist() == [[0, 1], [1, 0]]
    table = contingency([1, 1], 0, 0.1, rng())
    assert table.sum(axis=1).tolist() == [1, 1] and cramers_v(table) == 0


@pytest.mark.parametrize(
    ("counts", "target", "V", "message"),
    [
        ([5, 5], 0, 1.1, "between 0 and 1, and 1.1"),
        ([5, 5], 0, -0.1, "between 0 and 1, and -0.1"),
        ([5, 5], 0, float("nan"), "between 0 and 1, and nan"),
        ([5], 0, 0.5, "two or more classes"),
        ([5, 0], 0, 0.5, "two or more classes"),
        ([5, 5], 2, 0.5, "number from 0 to 1, not 2"),
        ([5, 5], -1, 0.5, "number from 0 to 1, not -1"),
    ],
)
def test_what_cannot_be(counts: list[int], target: int, V: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        contingency(counts, target, V, rng())
