"""Cuts the object of a photograph softly out of it, and lays it onto another photograph.

All randomness comes from the generator that is passed in, so the same generator state gives the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import binary_fill_holes, gaussian_filter, label

Box = tuple[int, int, int, int]

_ROUNDNESS = 2.6  # exponent of the outline: 2 is an ellipse, larger is nearer to the box
_REACH = 1.06  # half axes of the outline as a share of the box's
_SOFTNESS = 0.16  # width of the ellipse's soft edge, either side of the outline, as a share of the half axes
_FADE = 3  # pixels at the photograph's edges in which an object fades
_FARTHEST = 1.22  # distance from which on nothing belongs to the object
_BINS = 20  # of each axis of a histogram of colours
_ROUNDS = 3
_FEWEST = 150  # pixels that a histogram is made of
_LEAST_SHARE = 0.6  # of the ellipse that the colours leave; with less, they have misled

# Brightness, red against green, blue against yellow; the last two are stretched, since photographs hold little of them.
_AXES = np.array([(0.30, 0.59, 0.11), (0.80, -0.672, -0.128), (-0.272, -0.528, 0.80)]).T
_ZERO = np.array([0.0, 0.5, 0.5])


@dataclass(frozen=True)
class Cut:
    """An object cut out: its RGB pixels, how much of each is the object's (0..255), and the longer side of its box."""

    pixels: Image.Image
    mask: Image.Image
    length: int


def cut_out(photo: Image.Image, box: Box) -> Cut:
    """The object in ``box`` (left, top, right and bottom pixel, the last two within the box) of an RGB photograph."""
    mask = Image.fromarray(np.rint(255 * soft_mask(np.asarray(photo), box)).astype(np.uint8))
    left, top, right, bottom = box
    width, height = right - left + 1, bottom - top + 1
    margins = [round((_REACH * _FARTHEST - 1) * side / 2) for side in (width, height)]
    frame = (left - margins[0], top - margins[1], right + 1 + margins[0], bottom + 1 + margins[1])
    return Cut(photo.crop(frame), mask.crop(frame), max(width, height))  # beyond the photograph the mask is 0


def compose(
    rng: np.random.Generator, cut: Cut, place: Image.Image, size: int, scale: tuple[float, float]
) -> np.ndarray:
    """One image, uint8 [size, size, 3]: the object ``cut`` on the RGB photograph ``place``.

    The longer side of the object's box becomes a share of ``size`` that is drawn from ``scale``. The object stands in
    the lower part of the image, near its middle line. Both photographs are mirrored at random.
    """
    background = _maybe_mirrored(rng, place.resize((size, size), Image.Resampling.BICUBIC))[0]
    factor = size * rng.uniform(*scale) / cut.length
    shape = (max(1, round(factor * cut.pixels.width)), max(1, round(factor * cut.pixels.height)))
    pixels, mask = (image.resize(shape, Image.Resampling.BICUBIC) for image in (cut.pixels, cut.mask))
    pixels, mask = _maybe_mirrored(rng, pixels, mask)
    middle, foot = rng.uniform(0.38, 0.62), rng.uniform(0.93, 1.05)
    background.paste(pixels, (round(middle * size - shape[0] / 2), round(foot * size - shape[1])), mask)
    return np.asarray(background)


def _maybe_mirrored(rng: np.random.Generator, *images: Image.Image) -> list[Image.Image]:
    if rng.random() < 0.5:
        return [image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in images]
    return list(images)


# --- the mask --------------------------------------------------------------------------------------------------------


def soft_mask(pixels: np.ndarray, box: Box) -> np.ndarray:
    """How much of each pixel belongs to the object in ``box``, [height, width] in 0..1; ``pixels``: uint8 [h, w, 3].

    The outline is an ellipse, somewhat squared, in the box. Histograms of the colours inside and outside then move it
    towards the object's outline. The smoothed log of their ratio is added to the log odds of the distance from the
    middle. The histograms are then made anew from the outcome. This is as in GrabCut (Rother et al., SIGGRAPH 2004),
    with smoothing in place of the graph cut. The ellipse stays where a box fills its photograph, and where colours
    leave little of it.
    """
    distance = _distance(box, pixels.shape[:2])
    ellipse = _step(distance, 1 + _SOFTNESS, 1 - _SOFTNESS) * _edges(pixels.shape[:2])
    likely = _by_colours(pixels, distance)
    if likely is None:
        return ellipse
    mask = _step(gaussian_filter(likely, 0.7), 0.2, 0.8) * _step(distance, _FARTHEST, _FARTHEST - 0.2)
    mask = np.maximum(mask, _step(distance, 0.7, 0.45)) * _edges(pixels.shape[:2])
    parts, _ = label(mask > 0.2)
    middle = np.unravel_index(np.argmin(distance), distance.shape)
    mask = np.where((parts == parts[middle]) | (parts == 0), mask, 0)
    mask = np.where(binary_fill_holes(mask > 0.5), np.maximum(mask, ellipse), mask)
    return mask if (mask * ellipse).sum() >= _LEAST_SHARE * ellipse.sum() else ellipse


def _distance(box: Box, shape: tuple[int, ...]) -> np.ndarray:
    """Distance of each pixel from the middle of ``box``, [height, width]; 1 on the outline.

    ``(|x| ** p + |y| ** p) ** (1 / p)`` for x and y in half axes.
    """
    left, top, right, bottom = box
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float64)
    x = (columns - (left + right) / 2) / (_REACH * (right - left + 1) / 2)
    y = (rows - (top + bottom) / 2) / (_REACH * (bottom - top + 1) / 2)
    return (np.abs(x) ** _ROUNDNESS + np.abs(y) ** _ROUNDNESS) ** (1 / _ROUNDNESS)


def _edges(shape: tuple[int, ...]) -> np.ndarray:
    """1, but falling to 0 at the photograph's own edges, where an object may be cut off; [height, width]."""
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    nearest = np.minimum.reduce([rows, shape[0] - 1 - rows, columns, shape[1] - 1 - columns])
    return _step(nearest, -1, _FADE)


def _step(values: np.ndarray, zero: float, one: float) -> np.ndarray:
    """0 where ``values`` are at ``zero`` or beyond, 1 at ``one`` or beyond, and smooth between them."""
    t = np.clip((values - zero) / (one - zero), 0, 1)
    return t * t * (3 - 2 * t)


def _by_colours(pixels: np.ndarray, distance: np.ndarray) -> np.ndarray | None:
    """The chance of each pixel to belong to the object, [height, width]; None with too few pixels in or out of it."""
    colours = pixels.astype(np.float64) / 255 @ _AXES + _ZERO
    bins = tuple(np.clip(colours * _BINS, 0, _BINS - 1).astype(np.int64).transpose(2, 0, 1))
    by_place = np.clip(4 * (1 - distance), -3, 3)
    inside, outside = _step(distance, 0.75, 0.45), _step(distance, 0.95, 1.15)
    likely = None
    for _ in range(_ROUNDS):
        if min(inside.sum(), outside.sum()) < _FEWEST:
            return None
        ratio = gaussian_filter(np.log(_density(bins, inside) / _density(bins, outside)), 1.3)
        likely = 1 / (1 + np.exp(-(0.9 * ratio + by_place)))
        inside = np.where((distance < 0.95) & (likely > 0.7), likely, 0)
        seen = np.where((distance > 0.4) & (likely < 0.3), 1 - likely, 0)
        outside = np.maximum(_step(distance, 1.05, 1.25), seen)
    return likely


def _density(bins: tuple[np.ndarray, ...], weights: np.ndarray) -> np.ndarray:
    """How frequent the colour of each pixel is among the pixels, which count by ``weights``."""
    histogram = np.zeros((_BINS,) * 3)
    np.add.at(histogram, bins, weights)
    return gaussian_filter(histogram / weights.sum(), 1.5, mode="constant", truncate=3)[bins] + 1e-5
