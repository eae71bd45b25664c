"""Cuts the object of a photograph softly out of it and lays it onto another photograph.

All randomness comes from the generator that is passed in, so the same generator state gives the same pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]

_ROUNDNESS = 2.6  # exponent of the mask's outline: 2 is an ellipse, larger is nearer to the box
_REACH = 1.06  # half axes of the outline as a share of the box's
_SOFTNESS = 0.16  # width of the soft edge, either side of the outline, as a share of the half axes


def soft_ellipse(box: Box, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel belongs to the object in ``box``, [height, width] in 0..1, for a photograph of ``size``.

    With d the distance from the middle of the box in half axes, ``(|x| ** p + |y| ** p) ** (1 / p)``, the mask falls
    smoothly from 1 to 0 where d goes from ``1 - softness`` to ``1 + softness``. ``box``: left, top, right and bottom
    pixel, the last two within the box; ``size``: (width, height) in pixels.
    """
    left, top, right, bottom = box
    rows, columns = np.mgrid[0 : size[1], 0 : size[0]].astype(np.float64)
    x = (columns - (left + right) / 2) / (_REACH * (right - left + 1) / 2)
    y = (rows - (top + bottom) / 2) / (_REACH * (bottom - top + 1) / 2)
    distance = (np.abs(x) ** _ROUNDNESS + np.abs(y) ** _ROUNDNESS) ** (1 / _ROUNDNESS)
    t = np.clip((1 + _SOFTNESS - distance) / (2 * _SOFTNESS), 0, 1)
    return t * t * (3 - 2 * t)


def compose(
    rng: np.random.Generator, photo: Image.Image, box: Box, place: Image.Image, size: int, scale: tuple[float, float]
) -> np.ndarray:
    """One image, uint8 [size, size, 3]: the object in ``box`` of ``photo`` on the photograph ``place``.

    The longer side of the box becomes a share of ``size`` that is drawn from ``scale``. The object stands in the lower
    part of the image, left, right or in the middle. Both photographs are mirrored at random.
    """
    background = place.resize((size, size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        background = background.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mask = Image.fromarray(np.rint(255 * soft_ellipse(box, photo.size)).astype(np.uint8))
    left, top, right, bottom = box
    width, height = right - left + 1, bottom - top + 1
    margin = [round(_REACH * (1 + _SOFTNESS) * side / 2 - side / 2) for side in (width, height)]
    frame = (left - margin[0], top - margin[1], right + 1 + margin[0], bottom + 1 + margin[1])
    factor = size * rng.uniform(*scale) / max(width, height)
    shape = tuple(max(1, round(factor * side)) for side in (frame[2] - frame[0], frame[3] - frame[1]))
    # The parts of the frame beyond the photograph are black in both, and so not there.
    cut, alpha = (image.crop(frame).resize(shape, Image.Resampling.BICUBIC) for image in (photo, mask))
    if rng.random() < 0.5:
        cut, alpha = (image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in (cut, alpha))
    x = rng.uniform(0.38, 0.62) * size - shape[0] / 2
    y = rng.uniform(0.88, 1.0) * size - shape[1]
    background.paste(cut, (round(x), round(y)), alpha)
    return np.asarray(background)
