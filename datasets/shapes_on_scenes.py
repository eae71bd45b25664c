"""ShapesOnScenes: a spurious-correlation benchmark that renders itself, in Waterbirds' form.

The class is a shape, the spurious attribute the scene behind it. In ``train`` class i lies on scene i with
probability CORRELATION (else on another scene, evenly); ``val`` and ``test`` have equally many images of every group.
Files: ``<ROOT>/shapes_on_scenes/<key>/{metadata.csv, images/*.png}`` with Waterbirds' columns (img_id, img_filename,
y, split, place); ``<key>`` names the settings that made them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from oodprompt.datasets.building import SPLITS, built_once, check_groups, planned_groups, write_list
from oodprompt.datasets.metadata import read_metadata
from oodprompt.datasets.rendering import SCENES, SHAPES, Difficulty, render, visible_colours
from PIL import Image
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import DatasetBase
from oodprompt.log import progress

_UNKNOWN = "{key}: there is no {value!r}: {known}"
_NO_RANGE = "{{key}} is a range (low, high) above 0 and up to {}, not {{value}}"


def _is_range(bounds: tuple[float, ...]) -> bool:
    return len(bounds) == 2 and bounds[0] <= bounds[1]


declare(
    "DATASET.SHAPES",
    {
        "CORRELATION": Key(
            0.95,
            "Share of training images of a class that lie on the scene of that class.",
            at_least=0,
            at_most=1,
            error="{key} is a share between 0 and 1, not {value}",
        ),
        "CLASSES": Key(
            ("circle", "diamond"), "Shapes to tell apart, two or more.", choices=tuple(SHAPES), error=_UNKNOWN
        ),
        "SCENES": Key(("water", "land"), "Scenes, as many as classes or more.", choices=tuple(SCENES), error=_UNKNOWN),
        "NUM_TRAIN": Key(2000, "Training images, at least as many as groups.", at_least=1),
        "NUM_VAL": Key(800, "Validation images, the same number of each group.", at_least=1),
        "NUM_TEST": Key(2000, "Test images, the same number of each group.", at_least=1),
        "RADIUS": Key(
            (0.11, 0.22),
            "Range of the shape's radius as a share of the image side.",
            above=0,
            at_most=0.48,
            test=_is_range,
            error=_NO_RANGE.format(0.48),
        ),
        "OPACITY": Key(
            (0.35, 0.85),
            "Range of how much the shape covers the scene.",
            above=0,
            at_most=1,
            test=_is_range,
            error=_NO_RANGE.format(1),
        ),
        "NOISE": Key(
            13.0,
            "Standard deviation of pixel noise, in grey levels.",
            at_least=0,
            error="{key} cannot be negative: {value}",
        ),
        "OCCLUSION": Key(0.2, "Chance that a strip of scene covers part of the shape.", at_least=0, at_most=1),
        "RENDER_SEED": Key(
            0,
            "Seed of the images; SEED of the run does not change them.",
            at_least=0,
            error="{key} cannot be negative: {value}",
        ),
    },
)

_SIZE = 48
_PROMPTS = {
    "water": ("a photo of water.", "a lake", "the sea", "water background"),
    "land": ("a photo of land.", "a field", "grass", "land background"),
    "sky": ("a photo of the sky.", "clouds", "sky background"),
    "sand": ("a photo of sand.", "a desert", "a beach", "sand background"),
    "snow": ("a photo of snow.", "ice", "snow background"),
    "night": ("a photo of night.", "the night sky", "darkness"),
    "forest": ("a photo of a forest.", "the woods", "trees", "forest background"),
    "brick": ("a photo of a brick wall.", "bricks", "brick background"),
}


@DATASET_REGISTRY.register()
class ShapesOnScenes(DatasetBase):
    """Shapes (class) on scenes (spurious attribute), rendered on first use; no download."""

    dataset_dir = "shapes_on_scenes"

    def __init__(self, cfg: CfgNode) -> None:
        keys = cfg.DATASET.SHAPES
        check_groups("DATASET.SHAPES", keys, "SCENES")
        self.attribute_names = tuple(keys.SCENES)
        self.attribute_prompts = [_PROMPTS[scene] for scene in keys.SCENES]
        root = Path(cfg.DATASET.ROOT or "data").expanduser()
        folder = render_once(root / self.dataset_dir, keys)
        super().__init__(cfg, *read_metadata(folder / "metadata.csv", folder, tuple(keys.CLASSES)))


def render_once(parent: Path, keys: CfgNode) -> Path:
    """The folder of the images that ``keys`` describe; rendered when missing."""
    return built_once(parent, keys, lambda folder: _render_all(folder, keys), "ShapesOnScenes", "render")


def groups_of(split: str, keys: CfgNode) -> list[tuple[int, int]]:
    """(class, scene) of every image of a split, in file order."""
    total = {"train": keys.NUM_TRAIN, "val": keys.NUM_VAL, "test": keys.NUM_TEST}[split]
    return planned_groups(split, total, len(keys.CLASSES), len(keys.SCENES), keys.CORRELATION)


def _render_all(folder: Path, keys: CfgNode) -> None:
    (folder / "images").mkdir()
    difficulty = Difficulty(
        tuple(keys.RADIUS), tuple(keys.OPACITY), keys.NOISE, rotation=20.0, occlusion=keys.OCCLUSION
    )
    colours = visible_colours(tuple(keys.SCENES))  # the same for all scenes: colour tells nothing of class or scene
    images = [(split, *pair) for split in SPLITS for pair in groups_of(split, keys)]
    rows = []
    for i, (split, y, a) in enumerate(progress.over(images, "Rendering ShapesOnScenes", "image")):
        rng = np.random.default_rng([keys.RENDER_SEED, i])
        pixels = render(rng, keys.CLASSES[y], str(rng.choice(colours)), keys.SCENES[a], _SIZE, difficulty)
        name = f"images/{split}_{i:06d}_{keys.CLASSES[y]}_{keys.SCENES[a]}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)
        rows.append((i, name, y, SPLITS.index(split), a))
    write_list(folder, rows)
