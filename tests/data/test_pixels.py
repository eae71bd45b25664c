"""Pixels that are carried in bytes and normalised by batch: the same numbers, bit for bit, as image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from oodprompt.data import seeding
from oodprompt.data.images import read_image
from oodprompt.data.loading import DataManager, _random_numbers_from
from oodprompt.data.transforms import Pixels, Transform, build_transform
from tests.helpers.small_data import MakeCfg

CPU = torch.device("cpu")
MEANS = ([0.48145466, 0.4578275, 0.40821073], [0.485, 0.456, 0.406], [0, 0, 0], [0.5])
STDS = ([0.26862954, 0.26130258, 0.27577711], [0.229, 0.224, 0.225], [1, 1, 1], [0.5])
IN_BYTES = [
    (),
    ("normalize",),
    ("cutout",),
    ("cutout", "normalize"),
    ("center_crop", "normalize"),
    ("random_crop", "random_flip", "normalize"),
    ("random_resized_crop", "random_flip", "colorjitter", "randomgrayscale", "gaussian_blur", "cutout", "normalize"),
    ("imagenet_policy", "normalize"),
    ("cifar10_policy", "svhn_policy", "normalize"),
    ("randaugment", "normalize"),
]
IN_FLOATS = [
    ("gaussian_noise",),
    ("normalize", "gaussian_noise"),
    ("instance_norm",),
    ("random_resized_crop", "cutout", "normalize", "gaussian_noise", "instance_norm"),
]


@pytest.mark.parametrize(("mean", "std"), zip(MEANS, STDS, strict=True))
def test_every_byte_becomes_what_torchvision_makes_of_it(mean: list[float], std: list[float]) -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    both = np.stack([every, every[::-1]])
    expected = torch.stack([T.Compose([T.ToTensor(), T.Normalize(mean, std)])(Image.fromarray(one)) for one in both])
    images = torch.from_numpy(both.transpose(0, 3, 1, 2).copy())
    assert torch.equal(Pixels(CPU, mean, std)(images), expected)
    assert torch.equal(Pixels(CPU)(images), torch.stack([T.ToTensor()(Image.fromarray(one)) for one in both]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("names", IN_BYTES + IN_FLOATS)
def test_batches_are_what_the_transform_makes_of_each_image(
    make_cfg: MakeCfg, names: tuple[str, ...], workers: int
) -> None:
    cfg = make_cfg(INPUT__TRANSFORMS=names, DATALOADER__NUM_WORKERS=workers, INPUT__SIZE=(40, 32))
    data = DataManager(cfg)
    for loader, is_train in ((data.train_loader_x, True), (data.test_loader, False)):
        transform = build_transform(cfg, is_train)
        loader.set_epoch(2)
        for batch in loader:
            assert batch["img"].dtype == torch.float32 and batch["img"].is_contiguous()
            for path, index, image in zip(batch["impath"], batch["index"].tolist(), batch["img"], strict=True):
                with _random_numbers_from(seeding.derive_seed(cfg.SEED, seeding.AUGMENT, 2, index)):
                    assert torch.equal(image, transform(read_image(path)))


@pytest.mark.parametrize("names", IN_BYTES + IN_FLOATS)
def test_bytes_are_carried_where_nothing_behind_them_needs_floats(make_cfg: MakeCfg, names: tuple[str, ...]) -> None:
    data = DataManager(make_cfg(INPUT__TRANSFORMS=names))
    assert (data.train_loader_x.dataset[0, 0]["img"].dtype == torch.uint8) == (names in IN_BYTES)
    assert (data.test_loader.dataset[0, 0]["img"].dtype == torch.uint8) == ("instance_norm" not in names)


def test_without_transforms_nothing_is_normalised(make_cfg: MakeCfg) -> None:
    cfg = make_cfg(INPUT__TRANSFORMS=("normalize", "instance_norm"), INPUT__NO_TRANSFORM=True)
    data = DataManager(cfg)
    assert data.train_loader_x.dataset[0, 0]["img"].dtype == torch.uint8
    batch = next(iter(data.train_loader_x))
    assert torch.equal(batch["img"][0], T.ToTensor()(T.Resize((48, 48))(read_image(batch["impath"][0]))))


def test_other_transforms_give_batches_what_they_give(make_cfg: MakeCfg) -> None:
    data = DataManager(make_cfg())
    (batch, *_) = data.loader(data.dataset.val, transform=lambda image: torch.tensor(image.size) + 300)
    assert batch["img"].tolist() == [[300 + n for n in read_image(path).size] for path in batch["impath"]]


def test_the_whole_transform_stays_what_it_was(make_cfg: MakeCfg) -> None:
    transform = Transform(make_cfg(), is_train=True)
    assert [type(step).__name__ for step in transform.compose().transforms] == ["Resize", "ToTensor", "Normalize"]
    first, _ = transform.in_two(CPU)
    assert [type(step).__name__ for step in first.compose().transforms] == ["Resize", "_ToBytes"]
