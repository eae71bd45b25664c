"""Batches of features are those of images: order, labels, views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oodprompt.data.loading import DataManager
from oodprompt.errors import UserError
from oodprompt.features.views import FeatureLoader, extract, train_views, views_to_cache
from tests.helpers.small_data import RANDOM, MakeCfg


@pytest.fixture(scope="module")
def encode() -> Callable[[Tensor], Tensor]:
    """Any function of each image alone."""
    weight = torch.randn(3 * 48 * 48, 6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return lambda images: images.flatten(1).double() @ weight


@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(("transforms", "views"), [(("normalize",), 1), (RANDOM, 2)])
def test_feature_batches_are_the_encoded_image_batches(
    make_cfg: MakeCfg,
    encode: Callable[[Tensor], Tensor],
    rank: int,
    processes: int,
    transforms: tuple[str, ...],
    views: int,
) -> None:
    cfg = make_cfg(INPUT__TRANSFORMS=transforms)
    images = DataManager(cfg, rank, processes).train_loader_x
    features = train_views(DataManager(cfg), encode, views, show=False)
    assert features.shape == (views, 22, 6)
    cached = FeatureLoader(features, images.dataset.data_source, images.batches)
    for epoch in range(4):
        images.set_epoch(epoch)
        expected = list(images)
        cached.set_epoch(epoch)
        batches = list(cached)
        assert len(cached) == len(batches) == len(expected)
        pixels = DataManager(cfg).train_loader_x
        pixels.set_epoch(epoch % views)
        for got, want in zip(batches, expected, strict=True):
            assert got["impath"] == want["impath"]
            with pytest.raises(KeyError):
                got["img"]
            assert all(torch.equal(got[key], want[key]) for key in ("index", "label", "domain", "attribute"))
            if epoch < views:  # later epochs take these views again
                torch.testing.assert_close(got["image_features"], encode(want["img"]))
            assert torch.equal(got["image_features"], features[epoch % views][got["index"]])


def test_views_differ_and_one_view_of_a_random_transform_is_the_test_transform(
    make_cfg: MakeCfg, encode: Callable[[Tensor], Tensor]
) -> None:
    data = DataManager(make_cfg(INPUT__TRANSFORMS=RANDOM))
    two = train_views(data, encode, 2, show=False)
    assert not torch.equal(two[0], two[1])
    plain = extract(encode, data.loader(data.dataset.train_x), "", show=False)
    assert torch.equal(train_views(data, encode, 1, show=False)[0], plain)


def test_empty_slices(make_cfg: MakeCfg, encode: Callable[[Tensor], Tensor]) -> None:
    cfg = make_cfg(DATALOADER__TEST__BATCH_SIZE=1)
    images = DataManager(cfg, 2, 3).val_loader
    features = extract(encode, DataManager(cfg).val_loader, "", show=False)[None]
    batches = list(FeatureLoader(features, images.dataset.data_source, images.batches))
    assert [(b["image_features"].shape, b["label"].shape) for b in batches] == [((1, 6), (1,)), ((0, 6), (0,))]
    assert extract(encode, images, "", show=False).count_nonzero() == 6  # the other processes' rows are zero


@pytest.mark.parametrize(
    ("choice", "views", "transforms", "trains_tower", "expected"),
    [
        ("auto", 0, ("normalize",), False, 1),
        ("auto", 0, RANDOM, False, 0),
        ("auto", 3, RANDOM, False, 3),
        ("auto", 3, RANDOM, True, 0),
        ("off", 3, ("normalize",), False, 0),
        ("memory", 0, ("normalize",), False, 1),
        ("memory", 2, RANDOM, False, 2),
        ("memory", 0, RANDOM, False, "INPUT.VIEWS"),
        ("memory", 1, ("normalize",), True, "memory: this prompt learner trains the image tower"),
        ("disk", 0, ("normalize",), False, 1),
        ("disk", 2, RANDOM, False, 2),
        ("disk", 0, RANDOM, False, "disk: INPUT.TRANSFORMS are random; say with INPUT.VIEWS"),
        ("disk", 1, ("normalize",), True, "disk: this prompt learner trains the image tower"),
    ],
)
def test_views_to_cache(
    make_cfg: MakeCfg, choice: str, views: int, transforms: tuple[str, ...], trains_tower: bool, expected: int | str
) -> None:
    cfg = make_cfg(DATALOADER__FEATURE_CACHE=choice, INPUT__VIEWS=views, INPUT__TRANSFORMS=transforms)
    if isinstance(expected, int):
        assert views_to_cache(cfg, trains_tower) == expected
    else:
        with pytest.raises(UserError, match=expected):
            views_to_cache(cfg, trains_tower)
