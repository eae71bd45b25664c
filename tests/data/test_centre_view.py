"""The geometry of test images, which pixels and boxes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from oodprompt.config.keys import get_cfg_default
from oodprompt.data.transforms import RESIZE_MODES, CentreView, build_transform

SIZES = [(1, 1), (7, 300), (101, 237), (224, 224), (225, 224), (333, 100)]  # width and height of images


@pytest.mark.parametrize("mode", [InterpolationMode.BICUBIC, InterpolationMode.BILINEAR, InterpolationMode.NEAREST])
@pytest.mark.parametrize("view", [(48, 48), (48, 33), (33, 48), (32, 49), (1, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_resize_and_center_crop(
    size: tuple[int, int], view: tuple[int, int], mode: InterpolationMode
) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    torchvisions = T.Compose([T.Resize(max(view), interpolation=mode), T.CenterCrop(view)])
    ours, theirs = CentreView(view, mode)(image), torchvisions(image)
    assert ours.size == view[::-1] and ours.tobytes() == theirs.tobytes()


def transform(**keys: Any) -> Callable[[Image.Image], Tensor]:
    """That of test images with these keys of INPUT."""
    cfg = get_cfg_default()
    cfg.INPUT.update(keys)
    return build_transform(cfg, is_train=False)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", RESIZE_MODES)
@pytest.mark.parametrize("size", [*SIZES, (7, 2000)], ids=str)
def test_pixels_are_those_of_open_clip(size: tuple[int, int], resize: str, mode: str) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    keys = {"PIXEL_MEAN": mean, "PIXEL_STD": std, "TRANSFORMS": ("normalize",)}
    ours = transform(SIZE=(48, 48), INTERPOLATION=mode, RESIZE=resize, **keys)
    if resize == "longest" and max(size) > 96 * min(size):  # there the short edge becomes 0, an error in open_clip
        assert (ours(noise(*size))[0] != (0 - 0.1) / 0.4).any(dim=1).all()
        return
    theirs = image_transform(48, is_train=False, mean=mean, std=std, resize_mode=resize, interpolation=mode)
    assert torch.equal(ours(noise(*size)), theirs(noise(*size)))


@pytest.mark.parametrize("resize", ["squash", "longest"])
def test_pixels_of_other_shapes_are_those_of_open_clip(resize: str) -> None:
    for view in ((48, 33), (32, 49)):
        theirs = image_transform(view, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize)
        ours = transform(SIZE=view, INTERPOLATION="bicubic", RESIZE=resize)
        for size in SIZES:
            assert torch.equal(ours(noise(*size)), theirs(noise(*size))), (view, size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("resize", "processor"),
    [
        ("squash", SiglipImageProcessorPil(size={"height": 48, "width": 48})),
        ("shortest", CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})),
    ],
    ids=["siglip", "clip"],
)
def test_pixels_are_those_of_transformers(resize: str, processor: Any, size: tuple[int, int]) -> None:
    keys = {"PIXEL_MEAN": list(processor.image_mean), "PIXEL_STD": list(processor.image_std)}
    ours = transform_of = transform(
        SIZE=(48, 48), INTERPOLATION="bicubic", RESIZE=resize, TRANSFORMS=("normalize",), **keys
    )
    theirs = processor(noise(*size), return_tensors="pt").pixel_values[0]
    if resize == "shortest" and size == (333, 100):  # 159 columns: the odd one they leave out is the other one
        theirs, ours = theirs[..., 1:], lambda image: transform_of(image)[..., :-1]
    assert (ours(noise(*size)) - theirs).abs().max() < 1e-5


def test_training_images_are_padded_as_test_images_unless_a_crop_is_drawn() -> None:
    """So that features of training images that are not drawn are of the same kind as those of test images."""
    cfg, image = get_cfg_default(), noise(200, 100)
    for resize, same in (("longest", True), ("squash", True), ("shortest", False)):
        cfg.INPUT.update({"SIZE": (48, 48), "RESIZE": resize})
        train, test = (build_transform(cfg, is_train)(image) for is_train in (True, False))
        assert torch.equal(train, test) == same
    cfg.INPUT.TRANSFORMS = ("random_resized_crop",)
    kinds = [type(step).__name__ for step in build_transform(cfg).transforms]
    assert kinds == ["RandomResizedCrop", "ToTensor"]


def test_window_by_hand() -> None:
    """200 x 100 -> 96 x 48 -> columns 24 to 72 and, of 32 rows, rows 8 to 40."""
    assert CentreView((48, 48)).window(200, 100) == (50, 0, 150, 100)
    assert CentreView((32, 48)).window(200, 100) == pytest.approx((50, 100 / 6, 150, 100 / 6 + 200 / 3))
    assert CentreView((48, 48)).window(100, 200) == (0, 50, 100, 150)
    assert CentreView((48, 48), resize="squash").window(200, 100) == (0, 0, 200, 100)
    assert CentreView((48, 48), resize="longest").window(200, 100) == (0, -50, 200, 150)


@pytest.mark.parametrize("resize", RESIZE_MODES)
@pytest.mark.parametrize("view", [(48, 48), (48, 33), (32, 49)], ids=str)
@pytest.mark.parametrize("size", [(101, 237), (48, 48), (333, 100)], ids=str)
def test_window_is_what_the_pixels_show(size: tuple[int, int], view: tuple[int, int], resize: str) -> None:
    """An image whose brightness is its own column (row) shows at both edges where the window begins and ends."""
    width, height = size
    window = CentreView(view, resize=resize).window(width, height)
    for axis, edge, low, high in ((1, width, window[0], window[2]), (0, height, window[1], window[3])):
        ramp = np.arange(edge, dtype=np.float32) + 0.5
        ramp = np.broadcast_to(ramp if axis else ramp[:, None], (height, width))
        seen = np.asarray(CentreView(view, resize=resize)(Image.fromarray(ramp.copy())))
        line = seen[view[0] // 2] if axis else seen[:, view[1] // 2]
        step = (high - low) / len(line)
        place = low + (np.arange(len(line)) + 0.5) * step
        # Smoothing bends the ramp at the image's own edges. Outside it is black.
        inside, outside = (place > 3 * step) & (place < edge - 3 * step), (place < -step) | (place > edge + step)
        assert inside.sum() > 3 and line[inside] == pytest.approx(place[inside], abs=0.05) and not line[outside].any()
