"""RaVL's discovery: gaps as published, influence by hand, filters, planted clusters, a slow reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from oodprompt.discovery import ravl
from oodprompt.discovery.ravl import assign, decisive_regions, discover, influence_score, performance_gaps, scores
from oodprompt.discovery.result import Clustering, Discovery, Gap
from oodprompt.errors import UserError

# The table that the authors' demonstration prints: digit -> accuracy and images with, and without the top cluster.
PUBLISHED = {
    9: (1.0, 54, 0.041, 49),
    1: (0.0, 56, 1.0, 65),
    3: (1.0, 37, 1.0, 59),
    2: (0.694, 36, 1.0, 62),
    7: (0.69, 58, 0.98, 50),
    0: (0.981, 52, 1.0, 41),
    8: (0.023, 43, 0.964, 55),
    5: (0.684, 38, 1.0, 42),
    6: (0.782, 55, 1.0, 50),
    4: (0.644, 45, 1.0, 53),
}
PUBLISHED_GAPS = {
    **{9: 0.912, 1: -0.926, 8: -0.826, 4: -0.327, 5: -0.300, 7: -0.269, 2: -0.225, 6: -0.208, 0: -0.017, 3: 0.0}
}


def published_images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """present, label, predicted with the published counts."""
    parts = []
    for y, (p_in, n_in, p_out, n_out) in PUBLISHED.items():
        for present, p, n in ((True, p_in, n_in), (False, p_out, n_out)):
            right = round(p * n)
            parts += [(present, y, y)] * right + [(present, y, (y + 1) % 10)] * (n - right)
    present, label, predicted = (np.array(column) for column in zip(*parts, strict=True))
    return present, label, predicted


def clustering_of(assignment: Any, medoids: Any) -> Clustering:
    return Clustering(np.asarray(assignment), np.asarray(medoids), 0.0, 0.0, {})


def one_hot_scores(classes: Any, num: int = 3) -> np.ndarray:
    return np.eye(num, dtype=np.float32)[np.asarray(classes)]


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def summary(found: Discovery) -> list[Any]:
    return [
        (c.index, c.medoid, c.regions.tolist(), c.gaps, c.influence, c.survives, c.reason, c.similarity.tolist())
        for c in found.clusters
    ]


def random_case(seed: int, n: int = 60, classes: int = 3, k: int = 5) -> dict[str, Any]:
    """Images with 0 to 4 regions, some classes seldom right, region scores that go along with the cluster."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, n)
    owner = np.repeat(np.arange(n), counts)
    centres = unit(rng.standard_normal((k, 8)))
    kind = rng.integers(0, k, len(owner))
    features = unit(centres[kind] + 0.2 * rng.standard_normal((len(owner), 8)))
    label = rng.integers(0, classes, n)
    image_scores = rng.dirichlet(np.ones(classes), n) + 0.5 * np.eye(classes)[label]
    region_scores = rng.dirichlet(np.ones(classes), len(owner)) + np.eye(classes)[kind % classes] * rng.random()
    _, first = np.unique(kind, return_index=True)
    return {
        **{"region_features": features, "owner": owner, "region_scores": region_scores, "image_scores": image_scores},
        **{"label": label, "clustering": clustering_of(kind, first)},
    }


def slow_discover(case: dict[str, Any], threshold: float, both_signs: bool) -> list[tuple[Any, ...]]:
    """Survivors (cluster, G, H, gaps) by falling G, region by region from the formulas."""
    owner, label = case["owner"].tolist(), case["label"].tolist()
    image_scores, region_scores = case["image_scores"], case["region_scores"]
    kind = case["clustering"].assignment.tolist()
    n, found = len(label), []
    predicted = [max(range(len(row)), key=lambda y: row[y]) for row in image_scores.tolist()]  # noqa: B023
    regions_of = [[r for r in range(len(owner)) if owner[r] == i] for i in range(n)]
    for c in sorted(set(kind)):
        inside = {i for i in range(n) if any(kind[r] == c for r in regions_of[i])}
        gaps, shares = {}, {}
        for y in {label[i] for i in inside}:
            a = [i for i in range(n) if label[i] == y and i in inside]
            b = [i for i in range(n) if label[i] == y and i not in inside]
            if a and b:
                p_in, p_out = (sum(predicted[i] == y for i in part) / len(part) for part in (a, b))
                gaps[y] = 2 * min(len(a), len(b)) / (len(a) + len(b)) * (p_in - p_out)
        for i in sorted(inside):
            if len(regions_of[i]) > 1 and predicted[i] != label[i] and gaps.get(label[i], 0) < 0:
                best = max(regions_of[i], key=lambda r: region_scores[r, predicted[i]])  # noqa: B023
                shares.setdefault(label[i], []).append(kind[best] == c)
        influence = max((sum(hits) / len(hits) for hits in shares.values()), default=-float("inf"))
        signs = any(g > 0 for g in gaps.values()) and any(g < 0 for g in gaps.values())
        if influence >= threshold and (signs or not both_signs):
            found.append((c, sum(map(abs, gaps.values())), influence, gaps))
    return sorted(found, key=lambda item: -item[1])


def test_published_gaps() -> None:
    gaps = performance_gaps(*published_images())
    assert [gap.label for gap in gaps] == sorted(PUBLISHED)
    for gap in gaps:
        p_in, n_in, p_out, n_out = PUBLISHED[gap.label]
        assert (gap.n_in, gap.n_out) == (n_in, n_out)
        assert (gap.p_in, gap.p_out) == (pytest.approx(p_in, abs=5e-4), pytest.approx(p_out, abs=5e-4))
        assert gap.gap == pytest.approx(PUBLISHED_GAPS[gap.label], abs=1e-3)
    assert sum(abs(gap.gap) for gap in gaps) == pytest.approx(4.009, abs=5e-3)


def test_published_cluster_survives_and_names_nine() -> None:
    present, label, predicted = published_images()
    n = len(label)
    owner = np.concatenate([np.arange(n), np.arange(n)])
    kind = np.concatenate([np.where(present, 0, 1), np.ones(n, dtype=int)])  # every image also has a region of another
    features = np.eye(2, dtype=np.float32)[kind]
    region_scores = np.concatenate([one_hot_scores(predicted, 10), np.zeros((n, 10), dtype=np.float32)])
    found = discover(
        *(features, owner, region_scores, one_hot_scores(predicted, 10), label),
        clustering=clustering_of(kind, [int(np.argmax(kind == 0)), n]),
    )
    assert found.top is not None and (found.top.index, found.top.helps, found.top.hurts[:3]) == (0, 9, (1, 8, 4))
    assert found.top.influence == 1 and found.top.score == pytest.approx(4.009, abs=5e-3)


def test_classes_on_one_side_only_have_no_gap() -> None:
    gaps = performance_gaps([True, True, False, True, False], [0, 1, 1, 2, 3], [0, 0, 1, 2, 3])
    assert gaps == (Gap(1, 0.0, 1, 1.0, 1),) and gaps[0].gap == -1
    assert performance_gaps([], np.array([], dtype=int), []) == ()


def test_decisive_regions_by_hand() -> None:
    owner = np.array([2, 0, 0, 2, 3, 2])  # image 1 has none, image 3 one
    region_scores = np.array([[0.1, 0.9], [0.3, 0.7], [0.6, 0.4], [0.8, 0.2], [0.5, 0.5], [0.8, 0.2]])
    assert decisive_regions(owner, region_scores, np.array([1, 0, 0, 0])).tolist() == [1, -1, 3, -1]
    assert decisive_regions(owner, region_scores, np.array([0, 0, 1, 1])).tolist() == [2, -1, 0, -1]


def test_influence_by_hand() -> None:
    gaps = [Gap(0, 0.0, 4, 1.0, 4), Gap(1, 0.2, 5, 1.0, 5), Gap(2, 1.0, 3, 0.0, 3)]
    label = np.array([0, 0, 0, 0, 1, 1, 1, 2, 0])
    predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0, 1])  # the fourth is right
    present = np.array([1, 1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)  # the last is outside
    decided = np.array([1, 0, -1, 1, 1, 0, 0, 1, 1])  # the third has one region; class 2 is helped
    assert influence_score(gaps, present, label, predicted, decided) == 0.5  # class 0: 1 of 2; class 1: 1 of 3
    assert influence_score(gaps[1:], present, label, predicted, decided) == pytest.approx(1 / 3)
    assert influence_score(gaps[2:], present, label, predicted, decided) == -np.inf
    assert influence_score(gaps, present, label, label, decided) == -np.inf
    assert influence_score([Gap(0, 0.5, 4, 0.5, 4)], present, label, predicted, decided) == -np.inf


@pytest.mark.parametrize("both_signs", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_as_the_slow_reference(seed: int, both_signs: bool) -> None:
    case = random_case(seed)
    found = discover(**case, threshold=0.4, both_signs=both_signs)
    expected = slow_discover(case, 0.4, both_signs)
    assert [c.index for c in found.survivors] == [e[0] for e in expected]
    for cluster, (_, score, influence, gaps) in zip(found.survivors, expected, strict=True):
        assert (cluster.score, cluster.influence) == (pytest.approx(score), pytest.approx(influence))
        assert {gap.label: pytest.approx(gap.gap) for gap in cluster.gaps} == gaps
    assert [c.survives for c in found.clusters] == sorted((c.survives for c in found.clusters), reverse=True)
    dropped = [c.score for c in found.clusters if not c.survives]
    assert dropped == sorted(dropped, reverse=True) and len(found.clusters) == 5
    assert all(bool(c.reason) != c.survives for c in found.clusters)


def test_the_reference_cases_tell_the_rules_apart() -> None:
    """So that the comparison above means something."""
    cases = [random_case(seed) for seed in range(8)]
    both, either, all_of_them = (
        [[c[0] for c in slow_discover(case, threshold, signs)] for case in cases]
        for threshold, signs in ((0.4, True), (0.4, False), (0.0, False))
    )
    assert both != either and either != all_of_them and max(map(len, both)) > 1


def test_regions_nearest_to_the_medoid_come_first() -> None:
    case = random_case(3)
    for cluster in discover(**case).clusters:
        members = np.flatnonzero(case["clustering"].assignment == cluster.index)
        similarity = case["region_features"] @ case["region_features"][cluster.medoid]
        assert sorted(cluster.regions) == members.tolist() and cluster.regions[0] == cluster.medoid
        assert np.allclose(cluster.similarity, similarity[cluster.regions])
        assert (np.diff(cluster.similarity) <= 0).all()


def filtered(
    predicted: list[int], label: list[int], kinds: list[list[int]], threshold: float = 0.25, both_signs: bool = True
) -> tuple[bool, str]:
    """Whether cluster 0 survives, and why not; ``kinds`` the clusters of each image's regions, the first decisive."""
    kind = np.array(sum(kinds, []))
    owner = np.repeat(np.arange(len(kinds)), [len(own) for own in kinds])
    is_first = np.concatenate([[1.0] + [0.0] * (len(own) - 1) for own in kinds if own])
    region_scores = np.repeat(is_first[:, None], 3, axis=1).astype(np.float32)
    found = discover(
        *(np.eye(2, dtype=np.float32)[kind], owner, region_scores, one_hot_scores(predicted), np.array(label)),
        **{"threshold": threshold, "both_signs": both_signs},
        clustering=clustering_of(kind, [int(np.argmax(kind == 0)), int(np.argmax(kind == 1))]),
    )
    (cluster,) = (c for c in found.clusters if c.index == 0)
    return cluster.survives, cluster.reason


WITH, LATE, ALONE, WITHOUT, NONE = [0, 1], [1, 0], [0], [1, 1], []


@pytest.mark.parametrize(
    "predicted, label, kinds, more, reason",
    [
        ([0, 1, 0, 1], [0, 0, 1, 1], [WITH, WITHOUT, WITH, WITHOUT], {}, ""),
        ([0, 1, 0, 1], [0, 0, 1, 1], [WITH, NONE, WITH, NONE, [1]][:4], {}, ""),
        ([0, 0, 0, 1], [0, 0, 1, 1], [WITH, WITHOUT, WITH, WITHOUT], {}, "no class is more accurate"),
        ([0, 0, 0, 1], [0, 0, 1, 1], [WITH, WITHOUT, WITH, WITHOUT], {"both_signs": False}, ""),
        ([0, 1, 1, 1], [0, 0, 1, 1], [WITH, WITHOUT, WITH, WITHOUT], {}, "no class is less accurate"),
        (
            [0, 1, 1, 1],
            [0, 0, 1, 1],
            [WITH, WITHOUT, WITH, WITHOUT],
            {"both_signs": False},
            "no class is less accurate",
        ),
        ([0, 0, 1, 1], [0, 0, 1, 1], [WITH, WITH, WITHOUT, WITHOUT], {}, "both with and without"),
        ([0, 1, 0, 1], [0, 0, 1, 1], [WITH, WITHOUT, LATE, WITHOUT], {}, "influence 0 is below 0.25"),
        ([0, 1, 0, 1], [0, 0, 1, 1], [WITH, WITHOUT, LATE, WITHOUT], {"threshold": 0.0}, ""),
        ([0, 1, 0, 1], [0, 0, 1, 1], [WITH, WITHOUT, ALONE, WITHOUT], {}, "two or more regions"),
        ([0, 1, 0, 0, 1], [0, 0, 1, 1, 1], [WITH, WITHOUT, LATE, WITH, WITHOUT], {"threshold": 0.5}, ""),
        ([0, 1, 0, 0, 1], [0, 0, 1, 1, 1], [WITH, WITHOUT, LATE, WITH, WITHOUT], {"threshold": 0.51}, "influence 0.5 "),
    ],
)
def test_filters(
    predicted: list[int], label: list[int], kinds: list[list[int]], more: dict[str, Any], reason: str
) -> None:
    if not any(1 in own for own in kinds):
        kinds = [*kinds[:-1], WITHOUT]
    survives, why = filtered(predicted, label, kinds, **more)
    assert survives == (reason == "") and reason in why and bool(why) != survives


def planted(seed: int = 0, n: int = 200) -> tuple[dict[str, Any], np.ndarray]:
    """Four quadrants: the class's own region, a planted one in half the images, the others empty.

    Where the planted region is, class 2 is predicted; without it, class 2 is mistaken for class 0.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n)
    has = rng.random(n) < 0.5
    predicted = np.where(has, 2, np.where(label == 2, 0, label))
    centres = np.eye(6, 16)  # 0-2 the classes', 3 planted, 4 and 5 empty ones
    kinds = np.stack([label, np.where(has, 3, 4), np.full(n, 4), np.full(n, 5)], axis=1)
    features = unit(centres[kinds] + 0.05 * rng.standard_normal((n, 4, 16))).reshape(-1, 16)
    region_scores = np.full((n, 4, 3), 0.3)
    region_scores[np.arange(n), 0, label] = 0.8
    region_scores[:, 1, 2] = np.where(has, 0.9, 0.2)
    case = {
        **{"region_features": features, "owner": np.repeat(np.arange(n), 4), "label": label},
        **{"region_scores": region_scores.reshape(-1, 3), "image_scores": np.eye(3)[predicted] + 0.1},
    }
    return case, (kinds == 3).ravel()


def test_planted_cluster_is_on_top() -> None:
    case, is_planted = planted()
    found = discover(**case)
    assert found.top is not None and found.top.helps == 2 and found.top.hurts in {(0, 1), (1, 0)}
    assert is_planted[found.top.regions[:10]].mean() == 1
    assert list(found.clustering.silhouettes) == list(range(6, 15))


def test_nothing_survives_where_nothing_is_wrong() -> None:
    case, _ = planted()
    found = discover(**case | {"image_scores": np.eye(3)[case["label"]]})
    assert found.top is None and found.survivors == () and len(found.clusters) >= 6


def test_same_seed_same_result_and_tensors_do_as_arrays() -> None:
    case, _ = planted(1)
    found = summary(discover(**case, seed=3))
    assert found == summary(discover(**case, seed=3))
    assert found == summary(discover(**{key: torch.as_tensor(value) for key, value in case.items()}, seed=3))


def test_settings_of_the_clustering_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = planted(1, n=40)
    assert list(discover(**case, ks=[3, 9]).clustering.silhouettes) == [3, 9]
    asked = []

    def cluster_regions(features: np.ndarray, ks: Any, seed: int, *, show: bool) -> Clustering:
        asked.append((list(ks), seed, show))
        return clustering_of(np.zeros(len(features), dtype=int), [0])

    monkeypatch.setattr(ravl, "cluster_regions", cluster_regions)
    discover(**case, seed=7, show=True)
    discover(**case, ks=[4])
    assert asked == [(list(range(6, 15)), 7, True), ([4], 0, False)]


@pytest.mark.parametrize("regions_too", [False, True])
def test_order_of_images_does_not_matter(regions_too: bool) -> None:
    case, _ = planted(2)
    n = len(case["label"])
    order = np.random.default_rng(0).permutation(n)
    regions = (4 * order[:, None] + np.arange(4)).ravel() if regions_too else np.arange(4 * n)
    new_index = np.argsort(order)
    moved = {
        **{key: case[key][regions] for key in ("region_features", "region_scores")},
        **{key: case[key][order] for key in ("image_scores", "label")},
        "owner": new_index[case["owner"][regions]],
    }
    before, after = discover(**case), discover(**moved)
    for ours, theirs in zip(before.survivors, after.survivors, strict=True):
        assert sorted(ours.regions) == sorted(regions[theirs.regions])
        assert (ours.gaps, ours.influence) == (theirs.gaps, theirs.influence)


def test_scores() -> None:
    rng = np.random.default_rng(0)
    features, text = unit(rng.standard_normal((2, 5, 7))), unit(rng.standard_normal((3, 7)))
    expected = torch.softmax(torch.from_numpy(features) @ torch.from_numpy(text).T / 0.07, dim=-1)
    assert scores(features, text).dtype == np.float32
    assert np.allclose(scores(features, text), expected, atol=1e-6)
    assert np.allclose(scores(torch.from_numpy(features), torch.from_numpy(text), 0.5).sum(-1), 1)
    assert np.isfinite(scores(np.ones((1, 1)), np.array([[1.0], [-1.0]]), 1e-4)).all()
    with pytest.raises(UserError, match="temperature"):
        scores(features, text, 0.0)


def test_assign_is_of_the_nearest_medoid() -> None:
    rng = np.random.default_rng(0)
    features, medoids = unit(rng.standard_normal((50, 4))), unit(rng.standard_normal((6, 4)))
    assert assign(features, medoids).tolist() == (1 - features @ medoids.T).argmin(1).tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: {"owner": c["owner"][1:]}, "owners of regions have the shape"),
        (lambda c: {"region_scores": c["region_scores"][:, :2]}, "region scores have the shape"),
        (lambda c: {"label": c["label"][1:]}, "labels have the shape"),
        (lambda c: {"label": c["label"] - 1}, "a label is no whole number from 0 to 2"),
        (lambda c: {"label": c["label"] + 0.5}, "a label is no"),
        (lambda c: {"owner": c["owner"] + 1}, "an owner of a region is no whole number from 0 to 59"),
        (lambda c: {"image_scores": c["image_scores"] * np.nan}, "image scores are not all finite"),
        (lambda c: {"region_scores": c["region_scores"] * np.inf}, "region scores are not all finite"),
        (lambda c: {"image_scores": c["label"]}, "image scores have the shape"),
        (lambda c: {"region_features": 2 * c["region_features"]}, "not L2-normalised"),
        (lambda c: {"clustering": clustering_of([0, 1], [0, 1])}, "clustering is of 2 regions"),
    ],
)
def test_what_does_not_go_together(change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    case = random_case(0)
    with pytest.raises(UserError, match=message):
        discover(**case | change(case))
