"""K-medoids and its silhouette, against scikit-learn, a plain PAM and the alternating K-medoids of the published code."""

from __future__ import annotations

import itertools
from typing import Any

import kmedoids
import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from oodprompt.discovery import clustering as module
from oodprompt.discovery.clustering import (
    assign,
    cluster_regions,
    distances,
    nearest_medoids,
    silhouette,
    sweep,
)
from oodprompt.errors import UserError


def regions(r: int = 240, d: int = 24, centres: int = 12, noise: float = 0.8, seed: int = 0) -> np.ndarray:
    """L2-normalised features in clusters of unequal sizes that have a direction in common, as those of CLIP."""
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal(d) + rng.standard_normal((centres, d))
    which = rng.choice(centres, r, p=rng.dirichlet(np.full(centres, 3.0)))
    features = middle[which] + noise * rng.standard_normal((r, d))
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def slow_distances(features: np.ndarray) -> np.ndarray:
    d = np.array([[min(max(1 - float(a @ b), 0), 1) for b in features] for a in features])
    np.fill_diagonal(d, 0)
    return d


def objective(d: np.ndarray, medoids: np.ndarray) -> float:
    return float(d[medoids].min(axis=0).sum(dtype=np.float64))


def alternate(d: np.ndarray, k: int, seed: int) -> float:
    """Objective of K-medoids by turns of assignment and of each cluster's best medoid, from k-means++ medoids."""
    rng = np.random.default_rng(seed)
    medoids = [int(rng.integers(len(d)))]
    while len(medoids) < k:
        weight = d[medoids].min(axis=0).astype(np.float64) ** 2
        medoids.append(int(rng.choice(len(d), p=weight / weight.sum())))
    for _ in range(300):
        near = d[medoids].argmin(axis=0)
        members = [np.flatnonzero(near == c) for c in range(k)]
        new = [int(m[d[np.ix_(m, m)].sum(axis=0).argmin()]) for m in members]
        if new == medoids:
            break
        medoids = new
    return objective(d, np.array(medoids))


def test_distances_by_hand() -> None:
    features = np.array([[1, 0], [0.6, 0.8], [-1, 0], [0, 1]], dtype=np.float32)
    d = distances(features)
    expected = [[0, 0.4, 1, 1], [0.4, 0, 1, 0.2], [1, 1, 0, 1], [1, 0.2, 1, 0]]
    assert d.dtype == np.float32 and np.allclose(d, expected, atol=1e-6) and (np.diag(d) == 0).all()
    assert np.allclose(distances(x := regions(50)), slow_distances(x), atol=1e-6)


@pytest.mark.parametrize("block", [50, 10**6])
def test_silhouette_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    rng = np.random.default_rng(0)
    d = distances(regions(150))
    for k in (2, 7, 40):
        assignment = np.concatenate([np.arange(k), rng.integers(0, max(1, k // 2), 150 - k)])  # half have one region
        expected = silhouette_score(d, assignment, metric="precomputed")
        assert silhouette(d, assignment) == pytest.approx(expected, abs=1e-6)


def test_silhouette_of_coinciding_regions() -> None:
    d = 1 - np.kron(np.eye(2), np.ones((3, 3)))
    assert silhouette(d, np.array([0, 0, 0, 1, 1, 1])) == 1
    assert silhouette(np.zeros((4, 4)), np.array([0, 0, 1, 1])) == 0


@pytest.mark.parametrize("block", [777, 10**6])
@pytest.mark.parametrize("noise", [0.4, 0.8, 1.5])
def test_every_k_of_a_sweep_is_what_it_says(monkeypatch: pytest.MonkeyPatch, noise: float, block: int) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "START_SAMPLE", 60)
    d = distances(regions(noise=noise))
    found = sweep(d, range(4, 20))
    assert [f.k for f in found] == list(range(4, 20))
    for f in found:
        assert len(set(f.medoids.tolist())) == f.k and (f.assignment[f.medoids] == np.arange(f.k)).all()
        assert (f.assignment == d[f.medoids].argmin(axis=0)).all()
        assert f.objective == pytest.approx(objective(d, f.medoids), rel=1e-6)
        assert f.silhouette == pytest.approx(silhouette_score(d, f.assignment, metric="precomputed"), abs=1e-6)
    assert (np.diff([f.objective for f in found]) < 0).all()


@pytest.mark.parametrize("noise", [0.4, 0.8, 1.5])
def test_no_k_is_worse_than_alternate_and_none_far_from_fasterpam(noise: float) -> None:
    for seed in range(3):
        d = distances(regions(r=400, noise=noise, seed=seed))
        for f in sweep(d, range(6, 24)):
            assert f.objective <= min(alternate(d, f.k, s) for s in range(2)) * (1 + 1e-6)
            many = [kmedoids.fasterpam(d, f.k, random_state=s, n_cpu=1).loss for s in range(5)]
            assert f.objective <= min(many) * 1.01


def test_fewest_regions_reach_the_optimum() -> None:
    d = distances(regions(r=11, centres=3, seed=5))
    for f in sweep(d, range(2, 5)):
        best = min(objective(d, np.array(medoids)) for medoids in itertools.combinations(range(11), f.k))
        assert f.objective == pytest.approx(best, rel=1e-6)


def state_of(d: np.ndarray, k: int = 5) -> module._Search:
    return module._Search(d, np.arange(0, 10 * k, 10), 12)


def check_state(state: module._Search, d: np.ndarray) -> None:
    """All that is kept, against its definition."""
    to_medoids = d[state.medoids]
    nearest = np.sort(to_medoids, axis=0)[:2].astype(np.float64)
    assert (state.near == to_medoids.argmin(axis=0)).all() and state.objective == pytest.approx(nearest[0].sum())
    gains = np.maximum(nearest[0][:, None] - d, 0).sum(axis=0)
    assert np.allclose(state.gains(), gains, atol=2e-4)
    loss = [objective(d, np.delete(state.medoids, slot)) - state.objective for slot in range(state.k)]
    assert np.allclose(state.removal_loss(), loss, atol=1e-4)
    state.totals.update(state.near)
    within = [d[i, state.near == state.near[i]].sum() for i in range(len(d))]
    assert np.allclose(state.totals.within(), within, atol=1e-4)
    assert state.totals.sizes.tolist() == [(state.near == slot).sum() for slot in range(state.k)]
    mean = silhouette_score(d, state.near, metric="precomputed")
    assert state.totals.silhouette() == pytest.approx(mean, abs=1e-6)


def test_what_is_kept_stays_right_through_all_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 1000)
    d = distances(regions(120, noise=1.0))
    state, rng = state_of(d), np.random.default_rng(0)
    check_state(state, d)
    for _ in range(12):
        move, others = rng.integers(3), np.setdiff1d(np.arange(120), state.medoids)
        if move == 0 and state.k < 12:
            state.add(int(rng.choice(others)))
        elif move == 1 and state.k > 2:
            state.drop(int(rng.integers(state.k)))
        else:
            state._replace(int(rng.integers(state.k)), int(rng.choice(others)))
        check_state(state, d)
    for slot in (state.k - 1, 0):
        state.drop(slot)
        check_state(state, d)


def test_a_swap_is_the_best_of_its_candidates() -> None:
    """With every region in a cluster of its own kind tried, one swap lowers the objective by the most that any can."""
    d = distances(regions(60, noise=1.0))
    state = state_of(d)
    swaps = [
        objective(d, np.concatenate([np.delete(state.medoids, slot), [region]]))
        for slot in range(5)
        for region in range(60)
    ]
    assert state._swap() and min(swaps) <= state.objective <= np.sort(swaps)[5] + 1e-4
    state.improve()
    assert not state._swap()
    check_state(state, d)


def test_a_better_smaller_k_is_taken_up_again() -> None:
    """From every K + 1, leaving out one medoid gives no objective lower by a thousandth than what K has."""
    for seed in range(4):
        d = distances(regions(300, centres=15, noise=0.5, seed=seed))
        found = sweep(d, range(5, 16), seed)
        for smaller, larger in itertools.pairwise(found):
            without = min(objective(d, np.delete(larger.medoids, slot)) for slot in range(larger.k))
            assert smaller.objective <= without * (1 + 2e-3)


def test_a_sweep_adds_the_best_region_and_leaves_out_the_least_medoid(monkeypatch: pytest.MonkeyPatch) -> None:
    d, moves = distances(regions(300, centres=15, noise=0.5)), {"add": 0, "drop": 0}
    add, drop = module._Search.add, module._Search.drop

    def checked_add(state: module._Search, region: int) -> None:
        with_each = np.minimum(d[state.medoids].min(axis=0), d).sum(axis=1, dtype=np.float64)
        add(state, region)
        assert state.objective == pytest.approx(with_each.min(), rel=1e-5)
        moves["add"] += 1

    def checked_drop(state: module._Search, slot: int) -> None:
        without = min(objective(d, np.delete(state.medoids, each)) for each in range(state.k))
        drop(state, slot)
        assert state.objective == pytest.approx(without, rel=1e-5)
        moves["drop"] += 1

    monkeypatch.setattr(module._Search, "add", checked_add)
    monkeypatch.setattr(module._Search, "drop", checked_drop)
    monkeypatch.setattr(module, "_start", lambda d, k, seed: np.arange(k))
    for _ in range(4):
        sweep(d, range(3, 16))
        d = distances(regions(300, centres=15, noise=0.5, seed=moves["add"]))
    assert moves["add"] >= 48 and moves["drop"] > 0


def test_a_swap_takes_a_medoid_to_a_far_cluster() -> None:
    """Two medoids in one place, one for two others: a medoid goes to the smaller of these."""
    rng = np.random.default_rng(0)
    centres = np.eye(3, 20)
    centres[2] = [0, 0.6, 0.8, *[0] * 17]
    features = np.repeat(centres, [20, 20, 6], axis=0) + 0.05 * rng.standard_normal((46, 20))
    d = distances((features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32))
    middle = int(d[20:40, 20:40].sum(axis=1).argmin()) + 20
    state = module._Search(d, np.array([0, 1, middle]), 3)
    state.totals.update(state.near)
    assert state._swap() and sorted(np.digitize(state.medoids, [20, 40])) == [0, 1, 2]


def test_the_best_of_each_cluster_is_its_first() -> None:
    state = state_of(distances(regions(60)))
    value = np.random.default_rng(0).integers(0, 3, 60)
    best = [
        next(i for i in range(60) if state.near[i] == c and value[i] == value[state.near == c].max()) for c in range(5)
    ]
    assert state._best_of_each(value).tolist() == best


def test_the_start_is_of_a_drawn_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    d = distances(regions(noise=1.5))
    whole = {tuple(sorted(module._start(d, 12, seed))) for seed in range(8)}
    assert len(whole) > 1 and all(len(set(medoids)) == 12 for medoids in whole)
    monkeypatch.setattr(module, "START_SAMPLE", 60)
    sampled = [module._start(d, 3, seed) for seed in range(4)]
    assert max(map(max, sampled)) >= 60 and {tuple(m) for m in sampled} == {
        tuple(module._start(d, 3, s)) for s in range(4)
    }
    sizes = []
    monkeypatch.setattr(kmedoids, "fasterpam", lambda x, k, **_: sizes.append(x.shape) or object())
    for k in (3, 12, 50):
        with pytest.raises(AttributeError):
            module._start(d, k, 0)
    assert sizes == [(60, 60), (120, 120), (240, 240)]


def test_the_best_silhouette_wins_and_the_smallest_of_equals() -> None:
    found = cluster_regions(regions(noise=0.3), range(5, 20))
    assert found.silhouette == max(found.silhouettes.values()) and len(found.medoids) == 12
    corners = np.repeat(np.eye(4, dtype=np.float32), 5, axis=0)
    assert len(cluster_regions(corners, [4, 2, 3]).medoids) == 4
    square = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float32)
    found = cluster_regions(square, [2, 3])  # all silhouettes are 0
    assert found.silhouettes == {2: 0, 3: 0} and len(found.medoids) == 2


def test_gaps_between_ks_and_repeated_ks() -> None:
    found = cluster_regions(regions(), [15, 5, 15, 9])
    assert list(found.silhouettes) == [5, 9, 15]
    every = cluster_regions(regions(), range(5, 16))
    assert found.silhouettes[15] == pytest.approx(every.silhouettes[15])


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def test_seed_fixes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "START_SAMPLE", 60)
    features = regions(noise=1.5)
    first = [cluster_regions(features, range(6, 9), seed=seed, max_exact=200) for seed in range(5)]
    again = [cluster_regions(features, range(6, 9), seed=seed, max_exact=200) for seed in range(5)]
    assert all(map(same, first, again)) and not all(same(first[0], other) for other in first)


def test_layout_and_type_of_features_do_not_matter() -> None:
    features = regions()
    found = cluster_regions(features, [6, 7])
    assert same(found, cluster_regions(np.asfortranarray(features), [6, 7]))
    assert same(found, cluster_regions(features.astype(np.float64), [6, 7]))


def test_a_sample_of_many_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    features = regions(r=900, centres=6, noise=0.3)
    monkeypatch.setattr(module, "BLOCK", 1000)
    sizes = []
    monkeypatch.setattr(module, "distances", lambda x: sizes.append(len(x)) or distances(x))
    found, exact = cluster_regions(features, range(3, 10), max_exact=200), cluster_regions(features, range(3, 10))
    assert sizes == [200, 900]
    d = distances(features)
    assert (found.assignment == d[found.medoids].argmin(axis=0)).all()
    assert found.objective == pytest.approx(objective(d, found.medoids), rel=1e-4)
    assert exact.objective <= found.objective < 1.05 * exact.objective
    assert len(found.medoids) == 6 and found.silhouette == pytest.approx(exact.silhouette, abs=0.03)
    assert found.silhouettes.keys() == exact.silhouettes.keys()


def test_as_many_regions_as_max_exact_are_all_seen() -> None:
    features = regions()
    assert same(cluster_regions(features, [6], max_exact=240), cluster_regions(features, [6]))


def test_nearest_medoids_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 40)
    features, medoids = regions(100), regions(7, seed=1)
    near, distance = nearest_medoids(features, medoids)
    expected = 1 - features @ medoids.T
    assert near.tolist() == expected.argmin(axis=1).tolist() == assign(features, medoids).tolist()
    assert np.allclose(distance, expected.min(axis=1).clip(0, 1), atol=1e-6)
    assert assign(medoids[:1], np.repeat(medoids[:1], 3, axis=0)).tolist() == [0]


def test_ks_that_cannot_be_filled_are_left_out() -> None:
    assert list(cluster_regions(regions(8, centres=4), range(5, 30)).silhouettes) == [5, 6, 7]
    with pytest.raises(UserError, match="5 regions cannot make 5 clusters"):
        cluster_regions(regions(5), range(5, 30))


def test_distinct_regions_set_the_limit() -> None:
    rng = np.random.default_rng(0)
    four = regions(4, d=300, seed=2)[np.repeat(np.arange(4), 30)]
    found = cluster_regions(four, range(2, 12))
    assert list(found.silhouettes) == [2, 3, 4] and found.silhouette == pytest.approx(1, abs=1e-3)
    nearly = four + 1e-8 * rng.standard_normal(four.shape).astype(np.float32)
    assert list(cluster_regions(nearly, range(2, 12)).silhouettes) == [2, 3, 4]
    for wanted in (range(5, 9), [50]):
        with pytest.raises(UserError, match="fewer than .* distinct"):
            cluster_regions(four, wanted)
    with pytest.raises(UserError, match="fewer than 2 distinct"):
        cluster_regions(np.tile(four[:1], (40, 1)), range(2, 5))


def test_two_regions_far_from_many_equal_ones() -> None:
    features = np.eye(3, dtype=np.float32)[[0] * 30 + [1, 2]]
    found = cluster_regions(features, range(2, 6))
    assert found.silhouettes == {2: 30 / 32, 3: 30 / 32} and len(found.medoids) == 2 and found.objective == 1


@pytest.mark.parametrize(
    "features, ks, message",
    [
        (np.zeros((0, 4)), [2], r"shape \[0, 4\]"),
        (np.ones(4), [2], r"shape \[4\]"),
        (regions(9) * np.where(np.arange(9) == 4, np.nan, 1)[:, None], [2], "1 of 9 regions are not finite.*region 4"),
        (regions(9) * np.where(np.arange(9) == 3, np.inf, 1)[:, None], [2], "not finite"),
        (regions(9) * np.where(np.arange(9) == 3, 2, 1)[:, None], [2], "not L2-normalised .region 3 has length 2"),
        (regions(9) * np.where(np.arange(9) == 3, 0, 1)[:, None], [2], "not L2-normalised"),
        (regions(9), [], "range of K is empty"),
        (regions(9), [3, 1], "range of K holds 1"),
    ],
)
def test_bad_input_is_one_line(features: np.ndarray, ks: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        cluster_regions(features, ks)
    assert "\n" not in str(error.value)


def test_half_precision_is_near_enough_to_normalised() -> None:
    features = regions()
    assert cluster_regions(features.astype(np.float16), [6]).objective == pytest.approx(
        cluster_regions(features, [6]).objective, rel=1e-2
    )


def test_progress_is_hidden_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    cluster_regions(regions(60), [3])
    assert capsys.readouterr().err == ""
