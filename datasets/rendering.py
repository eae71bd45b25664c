"""Draws coloured shapes on scene textures: the images of ShapesOnScenes and of the tiny CLIP's training.

An image is a *scene* (a procedural texture that fills the frame) with one *shape* of one *colour* on it. All
randomness comes from the generator that is passed in, so the same generator state gives the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (240, 136, 32),
    "yellow": (244, 220, 60),
    "green": (44, 150, 62),
    "blue": (44, 84, 210),
    "purple": (130, 56, 178),
    "pink": (244, 132, 186),
    "brown": (122, 76, 40),
    "white": (245, 245, 245),
    "black": (24, 24, 24),
}
SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "diamond",
    "crescent",
    "arrow",
)
SCENES: tuple[str, ...] = ("water", "land", "sky", "sand", "snow", "night", "forest", "brick")

_OVERSAMPLE = 4


@dataclass(frozen=True)
class Difficulty:
    """How hard a shape is to see.

    ``radius``: range of the shape's radius as a share of the image side; ``opacity``: range of how much of the
    shape's colour covers the scene (1 = all); ``noise``: standard deviation of pixel noise, in grey levels of 255;
    ``rotation``: largest turn in degrees, either way; ``occlusion``: the chance that a strip of the scene covers
    part of the shape.
    """

    radius: tuple[float, float] = (0.17, 0.36)
    opacity: tuple[float, float] = (0.75, 1.0)
    noise: float = 6.0
    rotation: float = 14.0
    occlusion: float = 0.0


def render(
    rng: np.random.Generator,
    shape: str,
    colour: str,
    scene: str,
    size: int = 48,
    difficulty: Difficulty = Difficulty(),
) -> np.ndarray:
    """One image, uint8 [size, size, 3], of ``shape`` in ``colour`` on ``scene``."""
    background = _SCENES[scene](rng, size)
    mask = _mask(rng, shape, size, difficulty)[..., None]
    paint = np.asarray(COLOURS[colour], np.float32) + rng.normal(0, 10, 3).astype(np.float32)
    shade = 1 + 0.12 * (_smooth(rng, size, 3)[..., None] - 0.5)
    alpha = mask * rng.uniform(*difficulty.opacity)
    image = background * (1 - alpha) + paint * shade * alpha
    image += rng.normal(0, difficulty.noise, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise in about [0, 1], [size, size]: a random grid of ``cells`` by ``cells``, enlarged."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    return rows, columns


def _blend(low: tuple[int, int, int], high: tuple[int, int, int], t: np.ndarray) -> np.ndarray:
    """Colours between ``low`` (t = 0) and ``high`` (t = 1), [size, size, 3] in 0..255."""
    t = np.clip(t, 0, 1)[..., None].astype(np.float32)
    return np.asarray(low, np.float32) * (1 - t) + np.asarray(high, np.float32) * t


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    waves = np.sin(
        2 * np.pi * (rng.uniform(6, 10) * y + 0.5 * np.sin(2 * np.pi * rng.uniform(1, 2) * x) + rng.random())
    )
    return _blend((10, 70, 120), (90, 180, 205), 0.45 + 0.25 * waves + 0.4 * (_smooth(rng, size, 4) - 0.5))


def _land(rng: np.random.Generator, size: int) -> np.ndarray:
    blades = rng.random((size, size), dtype=np.float32)
    grass = _blend((40, 100, 30), (130, 180, 70), 0.5 * blades + 0.6 * _smooth(rng, size, 5) - 0.05)
    earth = np.clip(3 * (_smooth(rng, size, 4) - 0.65), 0, 1)[..., None]
    return grass * (1 - earth) + np.asarray((120, 90, 55), np.float32) * earth


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    y, _ = _grid(size)
    air = _blend((80, 150, 235), (170, 210, 245), y + 0.2 * rng.random())
    cloud = np.clip(2.2 * (0.7 * _smooth(rng, size, 4) + 0.3 * _smooth(rng, size, 9) - 0.5), 0, 1)[..., None]
    return air * (1 - cloud) + 250 * cloud


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    slant, bend = rng.uniform(-0.6, 0.6), _smooth(rng, size, 3)
    ripples = np.sin(2 * np.pi * (rng.uniform(4, 7) * (y + slant * x) + bend))
    return _blend((190, 150, 90), (240, 212, 150), 0.5 + 0.25 * ripples + 0.3 * (bend - 0.5))


def _snow(rng: np.random.Generator, size: int) -> np.ndarray:
    drift = _blend((200, 212, 232), (250, 252, 255), 0.2 + 0.9 * _smooth(rng, size, 3))
    flakes = (rng.random((size, size, 1)) < 0.03) * 30.0
    return np.clip(drift + flakes, 0, 255).astype(np.float32)


def _night(rng: np.random.Generator, size: int) -> np.ndarray:
    y, _ = _grid(size)
    dark = _blend((6, 8, 30), (34, 30, 74), 0.7 * y + 0.5 * (_smooth(rng, size, 4) - 0.3))
    stars = (rng.random((size, size, 1), dtype=np.float32) < 0.012) * rng.uniform(120, 220)
    return np.clip(dark + stars, 0, 255)


def _forest(rng: np.random.Generator, size: int) -> np.ndarray:
    _, x = _grid(size)
    leaves = _blend((10, 45, 20), (50, 95, 45), 0.5 * rng.random((size, size)) + 0.6 * _smooth(rng, size, 8) - 0.1)
    trunks = np.sin(2 * np.pi * (rng.uniform(3, 6) * x + 0.4 * _smooth(rng, size, 3) + rng.random())) > 0.75
    return np.where(trunks[..., None], np.asarray((70, 48, 32), np.float32), leaves)


def _brick(rng: np.random.Generator, size: int) -> np.ndarray:
    y, x = _grid(size)
    rows, columns = rng.integers(6, 9), rng.integers(3, 5)
    row = np.floor(y * rows + rng.random())
    joint = ((y * rows + rng.random()) % 1 < 0.16) | ((x * columns + 0.5 * (row % 2)) % 1 < 0.09)
    wall = _blend((140, 60, 45), (190, 100, 75), 0.8 * _smooth(rng, size, 10))
    return np.where(joint[..., None], np.asarray((190, 182, 172), np.float32), wall)


_SCENES = {
    "water": _water,
    "land": _land,
    "sky": _sky,
    "sand": _sand,
    "snow": _snow,
    "night": _night,
    "forest": _forest,
    "brick": _brick,
}


def _star_points(spikes: int, inner: float) -> np.ndarray:
    angle = np.arange(2 * spikes) * np.pi / spikes - np.pi / 2
    length = np.where(np.arange(2 * spikes) % 2 == 0, 1.0, inner)
    return np.stack([length * np.cos(angle), length * np.sin(angle)], axis=1)


def _circle_points(radius: float = 1.0) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _heart_points() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 17, -(y + 2.5) / 17], axis=1)


# Outlines in the unit circle, y downwards. A second outline is cut out of the first.
_OUTLINES: dict[str, list[np.ndarray]] = {
    "circle": [_circle_points(0.92)],
    "square": [np.array([(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)])],
    "triangle": [np.array([(0, -1), (0.95, 0.75), (-0.95, 0.75)])],
    "star": [_star_points(5, 0.42)],
    "cross": [
        0.95
        * np.array(
            [
                (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
                (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
            ]
        )
    ],
    "ring": [_circle_points(0.95), _circle_points(0.55)],
    "heart": [_heart_points()],
    "diamond": [np.array([(0, -1.0), (0.68, 0), (0, 1.0), (-0.68, 0)])],
    "crescent": [_circle_points(0.95), _circle_points(0.80) + np.array([0.45, 0])],
    "arrow": [
        np.array([(-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28)])
    ],
}  # fmt: skip


def _mask(rng: np.random.Generator, shape: str, size: int, difficulty: Difficulty) -> np.ndarray:
    """How much of each pixel the shape covers, [size, size] in 0..1."""
    radius = rng.uniform(*difficulty.radius)
    centre = rng.uniform(radius + 0.02, 0.98 - radius, 2)
    turn = np.deg2rad(rng.uniform(-difficulty.rotation, difficulty.rotation))
    rotate = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    stretch = np.array([rng.uniform(0.88, 1.0), rng.uniform(0.88, 1.0)])
    canvas = Image.new("L", (size * _OVERSAMPLE, size * _OVERSAMPLE), 0)
    draw = ImageDraw.Draw(canvas)
    for ink, outline in zip((255, 0), _OUTLINES[shape], strict=False):
        points = (centre + radius * (outline * stretch) @ rotate) * size * _OVERSAMPLE
        draw.polygon([tuple(p) for p in points], fill=ink)
    if rng.random() < difficulty.occlusion:
        width = radius * rng.uniform(0.3, 0.6)
        left = (centre[0] + radius * rng.uniform(-1, 1) - width / 2) * size * _OVERSAMPLE
        draw.rectangle((left, 0, left + width * size * _OVERSAMPLE, canvas.height), fill=0)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


# A colour that can hardly be told from the scene it lies on.
_CAMOUFLAGE: dict[str, frozenset[str]] = {
    "water": frozenset({"blue"}),
    "land": frozenset({"green"}),
    "sky": frozenset({"white", "blue"}),
    "sand": frozenset({"yellow", "orange"}),
    "snow": frozenset({"white"}),
    "night": frozenset({"black"}),
    "forest": frozenset({"green", "brown", "black"}),
    "brick": frozenset({"red", "brown"}),
}


def visible_colours(scenes: tuple[str, ...]) -> list[str]:
    """The colours that stand out on every one of ``scenes``."""
    return [colour for colour in COLOURS if not any(colour in _CAMOUFLAGE[scene] for scene in scenes)]
