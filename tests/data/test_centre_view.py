"""The geometry of test images, which pixels and boxes share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

from oodprompt.data.transforms import CentreView

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


def test_window_by_hand() -> None:
    """200 x 100 -> 96 x 48 -> columns 24 to 72 and, of 32 rows, rows 8 to 40."""
    assert CentreView((48, 48)).window(200, 100) == (50, 0, 150, 100)
    assert CentreView((32, 48)).window(200, 100) == pytest.approx((50, 100 / 6, 150, 100 / 6 + 200 / 3))
    assert CentreView((48, 48)).window(100, 200) == (0, 50, 100, 150)


@pytest.mark.parametrize("view", [(48, 48), (48, 33), (32, 49)], ids=str)
@pytest.mark.parametrize("size", [(101, 237), (48, 48), (333, 100)], ids=str)
def test_window_is_what_the_pixels_show(size: tuple[int, int], view: tuple[int, int]) -> None:
    """An image whose brightness is its own column (row) shows at both edges where the window begins and ends."""
    width, height = size
    window = CentreView(view).window(width, height)
    for axis, edge, low, high in ((1, width, window[0], window[2]), (0, height, window[1], window[3])):
        ramp = np.arange(edge, dtype=np.float32) + 0.5
        ramp = np.broadcast_to(ramp if axis else ramp[:, None], (height, width))
        seen = np.asarray(CentreView(view)(Image.fromarray(ramp.copy())))
        line = seen[view[0] // 2] if axis else seen[:, view[1] // 2]
        step = (high - low) / len(line)
        middle = line[3:-3]  # smoothing bends the ramp at the image's own edges
        assert middle == pytest.approx(low + (np.arange(3, len(line) - 3) + 0.5) * step, abs=0.05)
