"""Worker processes that last for a training: the same batches, and none is left."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from oodprompt.data.kept_images import KeptImages
from oodprompt.data.loading import DataManager, Loader
from oodprompt.errors import UserError
from tests.helpers.small_data import RANDOM, MakeCfg


def process_of(image: Image.Image) -> Tensor:
    return torch.tensor([os.getpid()])


def epoch_of(loader: Loader, epoch: int) -> list[dict[str, Any]]:
    loader.set_epoch(epoch)
    return list(loader)


def processes(loader: Loader, epoch: int) -> set[int]:
    return {pid for batch in epoch_of(loader, epoch) for pid in batch["img"].flatten().tolist()}


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    return len(one) == len(other) and all(
        a["impath"] == b["impath"] and all(torch.equal(a[key], b[key]) for key in a if key != "impath")
        for a, b in zip(one, other, strict=True)
    )


def test_workers_last_over_epochs_and_end_with_the_context(make_cfg: MakeCfg) -> None:
    data = DataManager(make_cfg(DATALOADER__NUM_WORKERS=2))
    loader = data.loader(data.dataset.train_x, is_train=True, transform=process_of)
    assert not processes(loader, 0) & processes(loader, 1)
    with loader.lasting_workers():
        assert not multiprocessing.active_children()  # they start with the first epoch
        assert len(first := processes(loader, 0)) == 2
        assert processes(loader, 1) == processes(loader, 2) == first
    assert not multiprocessing.active_children()
    assert not processes(loader, 3) & first


def test_every_epoch_has_its_own_order_and_draws(make_cfg: MakeCfg) -> None:
    plain, lasting = (
        DataManager(make_cfg(INPUT__TRANSFORMS=RANDOM, DATALOADER__NUM_WORKERS=n)).train_loader_x for n in (0, 2)
    )
    with lasting.lasting_workers():
        for epoch in (4, 0, 1, 0):
            assert same(epoch_of(plain, epoch), epoch_of(lasting, epoch))
        plain.batches.order = lasting.batches.order = lambda epoch, rng: rng.permutation(7) + epoch
        assert same(epoch_of(plain, 5), epoch_of(lasting, 5))


def test_an_epoch_that_is_left_early_spoils_no_other(make_cfg: MakeCfg) -> None:
    plain, lasting = (DataManager(make_cfg(DATALOADER__NUM_WORKERS=n)).train_loader_x for n in (0, 2))
    with lasting.lasting_workers():
        epoch_of(lasting, 0)
        for _ in lasting:
            break
        assert not multiprocessing.active_children()
        assert same(epoch_of(plain, 1), epoch_of(lasting, 1))


def test_an_epoch_may_be_read_within_another(make_cfg: MakeCfg) -> None:
    loader = DataManager(make_cfg(DATALOADER__NUM_WORKERS=1)).train_loader_x
    expected = epoch_of(loader, 0)
    with loader.lasting_workers():
        outer = []
        for batch in loader:
            outer.append(batch)
            if len(outer) == 2:
                assert same(list(loader), expected)
        assert same(outer, expected) and same(list(loader), expected)
    assert not multiprocessing.active_children()


def test_no_worker_is_left_after_an_error(make_cfg: MakeCfg) -> None:
    data = DataManager(make_cfg(DATALOADER__NUM_WORKERS=2))
    with pytest.raises(KeyError), data.train_loader_x.lasting_workers():
        for number, _ in enumerate(data.train_loader_x):
            if number:
                raise KeyError
    assert not multiprocessing.active_children()
    data.dataset.train_x.paths.prefix = b"/nowhere/"
    with pytest.raises(UserError, match="cannot read the image /nowhere/"), data.train_loader_x.lasting_workers():
        epoch_of(data.train_loader_x, 0)
    assert not multiprocessing.active_children()


def test_numpys_draws_too_depend_on_the_epoch_and_the_image_alone(make_cfg: MakeCfg) -> None:
    batches = []
    for workers in (0, 1, 2):
        data = DataManager(make_cfg(DATALOADER__NUM_WORKERS=workers))
        loader = data.loader(data.dataset.train_x, True, lambda image: torch.from_numpy(np.random.random_sample(3)))
        with loader.lasting_workers():
            epoch_of(loader, 0)
            batches.append(epoch_of(loader, 1))
    assert same(batches[0], batches[1]) and same(batches[0], batches[2])
    assert not same(batches[0], epoch_of(loader, 2))


def test_pickled_kept_images_are_empty() -> None:
    kept = KeptImages(3, (2,), torch.uint8, room=4)
    kept.put(0, torch.tensor([1, 2], dtype=torch.uint8))
    kept.put(2, torch.tensor([1, 2], dtype=torch.uint8))
    kept.put(1, torch.tensor([1.0, 2.0]))
    assert kept.get(0).tolist() == [1, 2] and kept.get(1) is kept.get(2) is None
    construct, arguments = kept.__reduce__()
    assert construct(*arguments).get(0) is None


def test_too_little_memory_is_a_users_error() -> None:
    with pytest.raises(UserError, match=r"cannot reserve .* MiB for images .*; lower DATALOADER.IMAGE_CACHE_MIB"):
        KeptImages(2**40, (2**20,), torch.uint8, room=2**60)
