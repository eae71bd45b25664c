"""PhotosOnPlaces: real photographs of animals or vehicles before photographs of places, in Waterbirds' form.

The class is the animal, the spurious attribute the place behind it. Both are photographs of Tiny ImageNet: the animal is
cut softly out of its own and laid onto the place. In ``train`` class i is on place i with probability CORRELATION (else
on another place, evenly); ``val`` and ``test`` have equally many images of every group.
Files: ``<ROOT>/photos_on_places/<key>/{metadata.csv, images/*.png}`` with Waterbirds' columns and the two photographs of
each image; ``<key>`` names the settings that made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from oodprompt.datasets.building import SPLITS, built_once, check_groups, planned_groups, write_list
from oodprompt.datasets.cutting import compose
from oodprompt.datasets.file_lists import FilesDataset
from oodprompt.datasets.metadata import read_metadata
from oodprompt.datasets.tiny_imagenet import (
    ADDRESS,
    HELD_OUT_FROM,
    TREE,
    Photograph,
    found_or_downloaded,
    training_photographs,
    validation_photographs,
)
from PIL import Image
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.images import read_image
from oodprompt.errors import UserError
from oodprompt.log import logger, progress

# What can be told apart: the classes of Tiny ImageNet that show it.
OBJECTS: dict[str, tuple[str, ...]] = {
    "dog": ("n02085620", "n02094433", "n02099601", "n02099712", "n02106662", "n02113799"),
    "cat": ("n02123045", "n02123394", "n02124075"),
    "car": ("n02814533", "n03100240", "n03670208", "n04285008"),
    "bus": ("n04146614", "n04487081"),
}
# What lies behind it.
PLACES: dict[str, tuple[str, ...]] = {
    "land": ("n02793495", "n09193705"),
    "water": ("n09332890", "n09428293"),
    "reef": ("n09256479",),
    "mountain": ("n09193705",),
    "farm": ("n02793495",),
}
_PROMPTS = {
    "land": ("a photo of land.", "a mountain", "a field", "land background"),
    "water": ("a photo of water.", "a lake", "the sea", "water background"),
    "reef": ("a photo of a coral reef.", "corals", "reef background"),
    "mountain": ("a photo of a mountain.", "the alps", "mountain background"),
    "farm": ("a photo of a farm.", "a barn", "a field", "farm background"),
}
_UNKNOWN = "{key}: there is no {value!r}: {known}"
_RECIPE = 1  # to be raised when the same keys give other pixels

declare(
    "DATASET.PHOTOS",
    {
        "CORRELATION": Key(
            0.95,
            "Share of training images of a class that are on the place of that class.",
            at_least=0,
            at_most=1,
            error="{key} is a share between 0 and 1, not {value}",
        ),
        "CLASSES": Key(
            ("dog", "cat"), "Animals or vehicles to tell apart, two or more.", choices=tuple(OBJECTS), error=_UNKNOWN
        ),
        "PLACES": Key(("land", "water"), "Places, as many as classes or more.", choices=tuple(PLACES), error=_UNKNOWN),
        "NUM_TRAIN": Key(1600, "Training images, at least as many as groups.", at_least=1),
        "NUM_VAL": Key(400, "Validation images, the same number of each group.", at_least=1),
        "NUM_TEST": Key(800, "Test images, the same number of each group.", at_least=1),
        "SIZE": Key(64, "Pixels of the side of an image.", choices=(64, 96)),
        "SCALE": Key(
            (0.6, 0.85),
            "Range of the longer side of the animal as a share of the image side.",
            above=0,
            at_most=1,
            test=lambda bounds: len(bounds) == 2 and bounds[0] <= bounds[1],
            error="{key} is a range (low, high) above 0 and up to 1, not {value}",
        ),
        "BUILD_SEED": Key(
            0,
            "Seed of the images; SEED of the run does not change them.",
            at_least=0,
            error="{key} cannot be negative: {value}",
        ),
    },
)

_TRAIN_SHARE = 0.7  # of the held-out training photographs, by their numbers; the others are for validation
_LEAST = 20  # pixels of the shorter side of the box of an animal that can be recognised

Photos = Mapping[str, Sequence[Photograph]]  # by the name of what they show


@DATASET_REGISTRY.register()
class PhotosOnPlaces(FilesDataset):
    """Animals or vehicles (class) on places (spurious attribute): Tiny ImageNet's photographs, put together on first use.

    Training and validation images are made from the photographs of Tiny ImageNet's training folders from number 400 on,
    without a photograph in common; test images from its validation photographs. The embedded CLIP of photographs has
    seen none of them.
    """

    dataset_dir = "photos_on_places"
    places = (".",)
    tree = TREE
    address = ADDRESS

    def __init__(self, cfg: CfgNode) -> None:
        keys, root = cfg.DATASET.PHOTOS, self.root(cfg)
        check_groups("DATASET.PHOTOS", keys, "PLACES")
        self.attribute_names = tuple(keys.PLACES)
        self.attribute_prompts = [_PROMPTS[place] for place in keys.PLACES]
        folder = built_once(
            root / self.dataset_dir,
            {**keys, "RECIPE": _RECIPE},
            lambda folder: _build(folder, found_or_downloaded(type(self), root), keys),
            "PhotosOnPlaces",
            "build",
        )
        super().__init__(cfg, *read_metadata(folder / "metadata.csv", folder, tuple(keys.CLASSES)))


def photographs(source: Path, shown: Mapping[str, Sequence[str]], least: int = 0) -> dict[str, Photos]:
    """For each split the photographs of what ``shown`` names, from Tiny ImageNet's folder ``source``.

    ``shown``: name -> ids of the classes that show it. Photographs whose box has a side under ``least`` pixels are left
    out. Raises ``UserError`` for a split that has no photograph of a name.
    """
    found: dict[str, dict[str, list[Photograph]]] = {split: {name: [] for name in shown} for split in SPLITS}
    wnids = dict.fromkeys(wnid for ids in shown.values() for wnid in ids)
    tests = validation_photographs(source, wnids)
    for name, ids in shown.items():
        for wnid in ids:
            held_out = [p for n, p in training_photographs(source, wnid).items() if n >= HELD_OUT_FROM]
            cut = round(_TRAIN_SHARE * len(held_out))
            for split, mine in zip(SPLITS, (held_out[:cut], held_out[cut:], tests[wnid]), strict=True):
                found[split][name] += [photograph for photograph in mine if _is_large(photograph, least)]
    for split in SPLITS:
        for name, mine in found[split].items():
            if not mine:
                where = "val/" if split == "test" else f"train/, from number {HELD_OUT_FROM} on"
                raise UserError(
                    f"PhotosOnPlaces: {source} has no photograph of {name!r} for the split {split} "
                    f"({where}; classes {', '.join(shown[name])}); fetch the archive again"
                )
    return dict(found)


def _is_large(photograph: Photograph, least: int) -> bool:
    left, top, right, bottom = photograph.box
    return min(right - left, bottom - top) + 1 >= least


def _build(folder: Path, source: Path, keys: CfgNode) -> None:
    (folder / "images").mkdir()
    objects = photographs(source, {name: OBJECTS[name] for name in keys.CLASSES}, _LEAST)
    places = photographs(source, {name: PLACES[name] for name in keys.PLACES})
    total = {"train": keys.NUM_TRAIN, "val": keys.NUM_VAL, "test": keys.NUM_TEST}
    groups = {
        split: planned_groups(split, total[split], len(keys.CLASSES), len(keys.PLACES), keys.CORRELATION)
        for split in SPLITS
    }
    rows: list[tuple[object, ...]] = []
    with progress(sum(map(len, groups.values())), "Building PhotosOnPlaces", "image") as bar:
        for number, split in enumerate(SPLITS):
            turns = _Turns(np.random.default_rng([keys.BUILD_SEED, 1, number]))
            for y, a in groups[split]:
                i, names = len(rows), (keys.CLASSES[y], keys.PLACES[a])
                one = turns.next("object", names, objects[split][names[0]])
                other = turns.next("place", names, places[split][names[1]])
                pixels = compose(
                    np.random.default_rng([keys.BUILD_SEED, 0, i]),
                    read_image(str(one.path)),
                    one.box,
                    read_image(str(other.path)),
                    keys.SIZE,
                    tuple(keys.SCALE),
                )
                file = f"images/{split}_{i:06d}_{names[0]}_{names[1]}.png"
                Image.fromarray(pixels).save(folder / file, compress_level=1)
                rows.append((i, file, y, number, a, one.path.name, other.path.name))
                bar.update()
    write_list(folder, rows, more=("object_filename", "place_filename"))
    used = {split: len({row[5] for row in rows if row[3] == number}) for number, split in enumerate(SPLITS)}
    logger.info("PhotosOnPlaces: photographs of objects: " + ", ".join(f"{n:,} {split}" for split, n in used.items()))


class _Turns:
    """Photographs in turns: each group gets every photograph before it gets one again, in a new order each time."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left: dict[tuple[str, tuple[str, str]], list[Photograph]] = {}

    def next(self, kind: str, group: tuple[str, str], all_of_it: Sequence[Photograph]) -> Photograph:
        left = self._left.setdefault((kind, group), [])
        if not left:
            left += [all_of_it[i] for i in self._rng.permutation(len(all_of_it))]
        return left.pop()
