"""Spurious-aware detection: which cluster it takes, and the order of its regions."""

from __future__ import annotations

import numpy as np
import pytest

from oodprompt.discovery.result import Clustering
from oodprompt.errors import UserError
from oodprompt.studies import baselines
from tests.helpers.planted import CLASSES, planted, soft, unit


def attribute_case(
    present: dict[tuple[int, int], tuple[int, int]], absent: dict[int, tuple[int, int]]
) -> tuple[dict[str, np.ndarray], Clustering]:
    """(class, cluster) -> (images with it, right ones), class -> (images with cluster 0 only, right ones).

    Every image has a region of cluster 0 as well.
    """
    rng = np.random.default_rng(0)
    label, right, owner, assignment = [], [], [], []
    rows = [(y, c, k, n) for (y, c), (n, k) in present.items()] + [(y, 0, k, n) for y, (n, k) in absent.items()]
    for y, c, k, n in rows:
        for i in range(n):
            for cluster in {0, c}:
                owner.append(len(label))
                assignment.append(cluster)
            label.append(y)
            right.append(i < k)
    label, assignment = np.array(label), np.array(assignment)
    features = unit(np.eye(5)[assignment] + 0.1 * rng.normal(size=(len(owner), 5)))
    scores = soft(np.where(right, label, (label + 1) % CLASSES))
    medoids = np.array([np.flatnonzero(assignment == c)[0] for c in range(assignment.max() + 1)])
    inputs = {
        "region_features": features,
        "owner": np.array(owner),
        "region_scores": soft(label[owner]),
        "image_scores": scores,
        "label": label,
    }
    return inputs, Clustering(assignment, medoids, 0.0, 0.0, {})


def found_cluster(inputs: dict[str, np.ndarray], clustering: Clustering, **kwargs: object) -> int | None:
    ranked = baselines.spurious_aware_detection(**inputs, clustering=clustering, **kwargs)
    clusters = set(clustering.assignment[ranked])
    assert len(clusters) < 2
    if clusters:
        assert len(ranked) == (clustering.assignment == min(clusters)).sum()
    return int(min(clusters)) if clusters else None


def test_largest_fall_without_the_feature() -> None:
    """Class 0: cluster 1 has .9 - .5, class 1: cluster 2 has 1 - .4; in class 2 cluster 3 hurts by .8."""
    case = attribute_case(
        {(0, 1): (20, 18), (1, 2): (10, 10), (2, 3): (20, 4), (2, 1): (10, 10)},
        {0: (20, 10), 1: (20, 8), 2: (20, 20)},
    )
    assert found_cluster(*case) == 2
    assert found_cluster(*case, min_images=11) == 1
    assert found_cluster(*case, absolute=True) == 3


def test_a_feature_that_only_hurts_is_found_by_size_alone() -> None:
    case = attribute_case({(0, 1): (20, 2)}, {0: (20, 20)})
    assert found_cluster(*case) is None
    assert found_cluster(*case, absolute=True) == 1


@pytest.mark.filterwarnings("error")
def test_a_feature_of_all_images_of_the_class_is_passed_over() -> None:
    case = attribute_case({(0, 1): (20, 10)}, {1: (20, 20)})
    assert found_cluster(*case) is None
    assert found_cluster(*case, absolute=True) is None


def test_each_class_keeps_what_says_most_about_its_errors() -> None:
    """Cluster 1 makes the larger difference, cluster 2 is in more images and says more about the errors."""
    case = attribute_case({(0, 1): (10, 10), (0, 2): (60, 42)}, {0: (60, 12)})
    assert found_cluster(*case) == 1
    assert found_cluster(*case, per_class=1) == 2
    present = np.zeros((130, 3), dtype=bool)
    present[:10, 1] = present[10:70, 2] = present[:, 0] = True
    correct = np.concatenate([np.ones(10), np.arange(60) < 42, np.arange(60) < 12]).astype(bool)
    informative = baselines._informative(present, correct, 10, 5)
    assert [c for _, c in informative] == [2, 1]
    assert informative[0][0] == pytest.approx(42 / 60 - 22 / 70)
    assert informative[1][0] == pytest.approx(1 - 54 / 120)
    assert [c for _, c in baselines._informative(present, correct, 10, 1)] == [2]
    assert [c for _, c in baselines._informative(present, correct, 11, 5)] == [2]
    assert baselines._informative(present, np.ones(130, dtype=bool), 1, 5) == []


def test_regions_of_the_cluster_nearest_to_its_medoid_first() -> None:
    inputs, clustering = attribute_case({(0, 1): (20, 18), (1, 1): (15, 15)}, {0: (20, 2), 1: (20, 20)})
    ranked = baselines.spurious_aware_detection(**inputs, clustering=clustering)
    features = inputs["region_features"]
    inside = np.flatnonzero(clustering.assignment == 1)
    similarity = features[inside] @ features[clustering.medoids[1]]
    np.testing.assert_array_equal(ranked, inside[np.argsort(-similarity)])
    assert ranked[0] == clustering.medoids[1]


def test_regions_of_the_clusters_that_ravl_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, rectangle = planted()
    asked = []
    make = baselines.cluster_regions
    monkeypatch.setattr(baselines, "cluster_regions", lambda f, ks, seed: asked.append((ks, seed)) or make(f, ks, seed))
    ranked = baselines.spurious_aware_detection(**inputs, seed=4)
    assert asked == [(range(6, 15), 4)]
    assert rectangle[ranked].all()


def test_a_clustering_of_other_regions_is_refused() -> None:
    inputs, clustering = attribute_case({(0, 1): (20, 2)}, {0: (20, 20)})
    other = Clustering(clustering.assignment[:-1], clustering.medoids, 0.0, 0.0, {})
    with pytest.raises(UserError, match="clustering has 59 regions, the features 60"):
        baselines.spurious_aware_detection(**inputs, clustering=other)
