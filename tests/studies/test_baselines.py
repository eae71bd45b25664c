"""Discovery baselines: what each formula says, what each finds, and what changes nothing."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from oodprompt.errors import UserError
from oodprompt.studies import baselines
from oodprompt.studies.baselines import BASELINE_VARIANTS, DISCOVERY_BASELINES
from tests.helpers.planted import CLASSES, EVERY, IDS, OF_SAMPLES, planted, soft, without_errors


def test_first_variant_is_the_default() -> None:
    assert list(BASELINE_VARIANTS) == list(DISCOVERY_BASELINES)
    for name, variants in BASELINE_VARIANTS.items():
        defaults = {key: p.default for key, p in inspect.signature(DISCOVERY_BASELINES[name]).parameters.items()}
        assert variants[0] == {key: defaults[key] for key in variants[0]}


# Not Domino by images: all regions of an image that went wrong are equally wrong, and any may make the first slice.
@pytest.mark.parametrize(
    ("name", "kwargs"), [(n, kw) for n, kw in EVERY[1:] if n != "Domino" or kw["prediction"] == "region"]
)
def test_finds_a_planted_feature(name: str, kwargs: dict[str, Any]) -> None:
    inputs, rectangle = planted()
    if name == "Domino":
        kwargs = kwargs | {"components": CLASSES + 2}
    ranked = DISCOVERY_BASELINES[name](**inputs, **kwargs)
    assert len(ranked) >= 10
    assert rectangle[ranked[:10]].all()


@pytest.mark.parametrize(("name", "kwargs"), EVERY, ids=IDS)
@pytest.mark.usefixtures("few_mixtures")
def test_seed_fixes_everything_and_order_and_type_change_nothing(name: str, kwargs: dict[str, Any]) -> None:
    inputs, _ = planted(images=90 if name == "Spurious-Aware Detection" else 45)
    before = {key: value.copy() for key, value in inputs.items()}
    ranked = DISCOVERY_BASELINES[name](**inputs, seed=3, **kwargs)
    assert ranked.dtype == np.int64
    assert 0 < len(set(ranked)) == len(ranked)
    order = np.random.default_rng(5).permutation(len(inputs["owner"]))
    moved = inputs | {key: inputs[key][order] for key in ("region_features", "owner", "region_scores")}
    tensors = {key: torch.as_tensor(value) for key, value in moved.items()}
    np.testing.assert_array_equal(order[DISCOVERY_BASELINES[name](**tensors, seed=3, **kwargs)], ranked)
    for key, value in inputs.items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.parametrize(("name", "kwargs"), EVERY[1:], ids=IDS[1:])
def test_nothing_wrong_is_nothing_found(name: str, kwargs: dict[str, Any]) -> None:
    ranked = DISCOVERY_BASELINES[name](**without_errors(planted()[0]), **kwargs)
    assert ranked.shape == (0,)
    assert ranked.dtype == np.int64


@pytest.mark.parametrize(("name", "kwargs"), EVERY, ids=IDS)
def test_no_regions_at_all(name: str, kwargs: dict[str, Any]) -> None:
    none = np.zeros((0, CLASSES))
    empty = np.zeros(0, dtype=np.int64)
    assert DISCOVERY_BASELINES[name](np.zeros((0, 4)), empty, none, none, empty, **kwargs).shape == (0,)


@pytest.mark.parametrize(("name", "kwargs"), EVERY, ids=IDS)
@pytest.mark.parametrize("wrong", [[0], [0, 3], list(range(0, 45, 3))], ids=["one", "two", "all of class 0"])
@pytest.mark.usefixtures("few_mixtures")
def test_classes_without_errors_and_without_successes(name: str, kwargs: dict[str, Any], wrong: list[int]) -> None:
    inputs = without_errors(planted(images=45)[0])
    for scores, index in (("image_scores", wrong), ("region_scores", np.flatnonzero(np.isin(inputs["owner"], wrong)))):
        inputs[scores][index] = soft(np.array([2]))
    ranked = DISCOVERY_BASELINES[name](**inputs, **kwargs)
    assert len(set(ranked)) == len(ranked)
    if name in ("Distilling Failures", "George"):
        assert set(inputs["label"][inputs["owner"][ranked]]) <= {0}


@pytest.mark.parametrize("name", OF_SAMPLES)
@pytest.mark.usefixtures("few_mixtures")
def test_whose_prediction_is_read(name: str) -> None:
    inputs, _ = planted(images=24)
    quiet = without_errors(inputs)
    image_only = inputs | {"region_scores": quiet["region_scores"]}
    region_only = inputs | {"image_scores": quiet["image_scores"]}
    find = DISCOVERY_BASELINES[name]
    assert len(find(**image_only)) and not len(find(**image_only, prediction="region"))
    assert len(find(**region_only, prediction="region")) and not len(find(**region_only, prediction="image"))


def test_random_order_is_a_permutation_of_the_seed() -> None:
    inputs, rectangle = planted()
    orders = [baselines.random_order(**inputs, seed=seed) for seed in range(200)]
    for order in orders[:5]:
        np.testing.assert_array_equal(np.sort(order), np.arange(len(rectangle)))
    assert not np.array_equal(orders[0], orders[1])
    found = np.mean([rectangle[order[:10]].mean() for order in orders])
    assert found == pytest.approx(rectangle.mean(), abs=0.04)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"owner": np.full(200, -1)}, "owners"),
        ({"label": np.zeros(3, dtype=int)}, "3 labels"),
        ({"label": np.full(45, 3)}, "label .* from 0 to 2"),
        ({"label": np.zeros(45)}, "label .* integers"),
        ({"image_scores": np.ones(45)}, "image scores .* shape"),
        ({"image_scores": np.ones((45, 4))}, "3 classes, images for 4"),
        ({"region_features": np.full((2, 2), np.nan)}, "features .* not finite"),
    ],
)
@pytest.mark.parametrize("name", DISCOVERY_BASELINES)
def test_inputs_that_do_not_fit_are_refused(name: str, change: dict[str, np.ndarray], words: str) -> None:
    inputs = planted(images=45)[0] | change
    with pytest.raises(UserError, match=words):
        DISCOVERY_BASELINES[name](**inputs)


def test_owner_out_of_range_is_refused() -> None:
    inputs, _ = planted(images=45)
    inputs["owner"][-1] = 45
    with pytest.raises(UserError, match="owner .* from 0 to 44"):
        baselines.random_order(**inputs)


def test_unknown_choices_are_refused() -> None:
    inputs, _ = planted(images=45)
    with pytest.raises(UserError, match="did you mean 'region'"):
        baselines.george(**inputs, prediction="regions")
    with pytest.raises(UserError, match="did you mean 'kmeans'"):
        baselines.domino(**inputs, start="k-means")
