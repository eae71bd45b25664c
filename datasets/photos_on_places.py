"""PhotosOnPlaces: real photographs of animals or vehicles before photographs of places, in Waterbirds' form.

The class is the animal, the spurious attribute the place behind it. Both are photographs of Tiny ImageNet. The animal
is cut softly out of its photograph and laid onto the place. In ``train``, the share CORRELATION of class i is on place
i. The rest is spread evenly over the other places. ``val`` and ``test`` have equally many images of every group.
Files: ``<ROOT>/photos_on_places/<key>/{metadata.csv, images/*.png}``. ``metadata.csv`` has Waterbirds' columns and
names the two photographs of each image. ``<key>`` names the settings that made the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from oodprompt.datasets.building import SPLITS, built_once, check_groups, planned_groups, write_list
from oodprompt.datasets.cutting import Cut, compose, cut_out
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
from oodprompt.data.dataset import DatasetBase
from oodprompt.data.images import PixelRules, read_image
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
    "land": ("a photo of land.", "a photo of a mountain.", "a photo of a barn.", "land background"),
    "water": ("a photo of water.", "a photo of a lake.", "a photo of the sea.", "water background"),
    "reef": ("a photo of a coral reef.", "the bottom of the sea", "coral reef background"),
    "mountain": ("a photo of a mountain.", "a photo of a snowy mountain.", "mountain background"),
    "farm": ("a photo of a farm.", "a photo of a barn.", "farm background"),
}
_UNKNOWN = "{key}: there is no {value!r}: {known}"
_RULES = PixelRules()  # of photographs of 8 bits, whatever images the run reads
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
            (0.5, 0.75),
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

# Photographs that are left out. Nobody would recognise the animal; or people, animals or words hide the place; or both
# land and water are shown. They were chosen by eye, without a model.
LEFT_OUT: dict[str, tuple[int, ...]] = {  # numbers of training photographs
    "n02085620": (426, 433, 435, 439, 467, 482, 496),
    "n02094433": (402, 404, 445, 474, 478, 479),
    "n02099601": (405, 406, 430, 480, 485),
    "n02099712": (412, 417, 420, 438, 457, 458, 478, 480, 493),
    "n02106662": (409, 413, 424, 439, 441),
    "n02113799": (405, 447, 457, 465, 477, 480, 487, 493),
    "n02123045": (402, 423, 427, 434, 437, 452, 456, 475, 482),
    "n02123394": (407, 411, 419, 421, 422, 459, 468, 477, 478, 494, 499),
    "n02124075": (402, 439, 445, 481),
    "n02793495": (403, 425, 428, 435, 436, 482),
    "n09193705": (403, 407, 410, 420, 422, 432, 458, 464, 469, 472, 480, 483, 484, 488, 493, 496),
    "n09332890": (401, 407, 408, 421, 447, 454, 455, 480, 482, 488, 492, 494),
    "n09428293": (408, 426, 439, 463, 464, 467, 494, 495),
}
LEFT_OUT_OF_TEST = frozenset(  # numbers of validation photographs
    (
        *(97, 602, 823, 2890, 3724, 3922, 4262, 5552, 5634, 5694, 6050, 6222),  # of dogs
        *(6264, 6508, 6702, 6778, 7640, 7707, 8243, 8256, 8548, 8553, 8619, 9844),
        *(96, 179, 547, 1338, 2063, 4335, 5347, 5438, 5875, 6344, 7187, 8154, 8728),  # of cats
        *(206, 6744, 7684, 9738, 425, 548, 1277, 3840, 7889, 8160, 8561, 9304),  # of land
        *(617, 843, 1019, 5557, 5686, 6006, 6149, 6880, 7366, 7584, 7835, 7856, 8471),  # of water
        *(8627, 8630, 9942, 1003, 1252, 1411, 2251, 3654, 7547, 7962, 9239, 9310),
    )
)
_TRAIN_SHARE = 0.7  # of the held-out training photographs, by their numbers; the others are for validation
_LEAST = (20, 32)  # pixels of the shorter and the longer side of the box of an object that can be recognised

Shown = Mapping[str, Sequence[str]]  # name -> ids of the classes that show it
Photos = Mapping[str, Sequence[Photograph]]  # by the name of what they show


@DATASET_REGISTRY.register()
class PhotosOnPlaces(DatasetBase):
    """Animals or vehicles (class) on places (spurious attribute): photographs of Tiny ImageNet, joined on first use.

    Training and validation images are made from the photographs of Tiny ImageNet's training folders from number 400 on.
    The two splits have no photograph in common. Test images are made from its validation photographs. The embedded CLIP
    of photographs has seen none of them.
    """

    dataset_dir = "photos_on_places"
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
            lambda folder: _build(folder, found_or_downloaded(root), keys),
            "PhotosOnPlaces",
            "build",
        )
        super().__init__(cfg, *read_metadata(folder / "metadata.csv", folder, tuple(keys.CLASSES)))


# --- the photographs -------------------------------------------------------------------------------------------------


def photographs(source: Path, objects: Shown, places: Shown) -> dict[str, tuple[Photos, Photos]]:
    """For each split, the photographs of the named ``objects`` and ``places``, from Tiny ImageNet's folder ``source``.

    How many are used, and left out, is logged. Raises ``UserError`` for a name without a photograph in a split.
    """
    by_wnid = _of_classes(
        source, dict.fromkeys(wnid for shown in (objects, places) for ids in shown.values() for wnid in ids)
    )
    found: dict[str, tuple[Photos, Photos]] = {}
    small = 0
    for split in SPLITS:
        everything, behind = (
            {name: [p for wnid in ids for p in by_wnid[split][wnid]] for name, ids in shown.items()}
            for shown in (objects, places)
        )
        in_front = {name: [p for p in mine if _is_large(p)] for name, mine in everything.items()}
        small += sum(map(len, everything.values())) - sum(map(len, in_front.values()))
        found[split] = in_front, behind
        for name in (name for photos in found[split] for name, mine in photos.items() if not mine):
            where = "val/images" if split == "test" else f"train/<id>/images from number {HELD_OUT_FROM} on"
            raise UserError(
                f"PhotosOnPlaces: {source} has no photograph of {name!r} for the {split} split ({where}, of "
                f"{', '.join({**objects, **places}[name])}); fetch Tiny ImageNet again"
            )
    of_objects, of_places = (sum(len(mine) for photos in found.values() for mine in photos[i].values()) for i in (0, 1))
    logger.info(
        f"PhotosOnPlaces is made from {of_objects:,} photographs of {' and '.join(objects)} and {of_places:,} of "
        f"{' and '.join(places)}; in {small:,} others the {' or '.join(objects)} is too small"
    )
    return found


def _of_classes(source: Path, wnids: Iterable[str]) -> dict[str, dict[str, list[Photograph]]]:
    """For each split and class the photographs that are not left out by their numbers."""
    found: dict[str, dict[str, list[Photograph]]] = {split: {} for split in SPLITS}
    tests = validation_photographs(source, wnids)
    for wnid, test in tests.items():
        known = training_photographs(source, wnid)
        numbers = [number for number in known if number >= HELD_OUT_FROM]
        cut = round(_TRAIN_SHARE * len(numbers))
        out = LEFT_OUT.get(wnid, ())
        found["train"][wnid] = [known[number] for number in numbers[:cut] if number not in out]
        found["val"][wnid] = [known[number] for number in numbers[cut:] if number not in out]
        found["test"][wnid] = [photograph for number, photograph in test.items() if number not in LEFT_OUT_OF_TEST]
    return found


def _is_large(photograph: Photograph) -> bool:
    left, top, right, bottom = photograph.box
    sides = sorted((right - left + 1, bottom - top + 1))
    return all(side >= least for side, least in zip(sides, _LEAST, strict=True))


# --- the images ------------------------------------------------------------------------------------------------------


def _build(folder: Path, source: Path, keys: CfgNode) -> None:
    (folder / "images").mkdir()
    found = photographs(source, {n: OBJECTS[n] for n in keys.CLASSES}, {n: PLACES[n] for n in keys.PLACES})
    total = {"train": keys.NUM_TRAIN, "val": keys.NUM_VAL, "test": keys.NUM_TEST}
    shape = len(keys.CLASSES), len(keys.PLACES), keys.CORRELATION
    images = [(split, *pair) for split in SPLITS for pair in planned_groups(split, total[split], *shape)]
    turns = _Turns(np.random.default_rng([keys.BUILD_SEED, 1]))
    cuts, opened = dict[Path, Cut](), dict[Path, Image.Image]()
    rows: list[tuple[object, ...]] = []
    for i, (split, y, a) in enumerate(progress.over(images, "Building PhotosOnPlaces", "image")):
        group, (objects, places) = (split, y, a), found[split]
        one = turns.next(("object", *group), objects[keys.CLASSES[y]])
        other = turns.next(("place", *group), places[keys.PLACES[a]])
        if one.path not in cuts:
            cuts[one.path] = cut_out(read_image(str(one.path), _RULES), one.box)
        if other.path not in opened:
            opened[other.path] = read_image(str(other.path), _RULES)
        rng = np.random.default_rng([keys.BUILD_SEED, 0, i])
        pixels = compose(rng, cuts[one.path], opened[other.path], keys.SIZE, tuple(keys.SCALE))
        name = f"images/{split}_{i:06d}_{keys.CLASSES[y]}_{keys.PLACES[a]}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)
        rows.append((i, name, y, SPLITS.index(split), a, one.path.name, other.path.name))
    write_list(folder, rows, more=("object_filename", "place_filename"))


class _Turns:
    """Photographs in turns: each group gets every photograph before it gets one again, in a new order each time."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._left: dict[tuple[str, str, int, int], list[Photograph]] = {}

    def next(self, group: tuple[str, str, int, int], all_of_it: Sequence[Photograph]) -> Photograph:
        left = self._left.setdefault(group, [])
        if not left:
            left += [all_of_it[i] for i in self._rng.permutation(len(all_of_it))]
        return left.pop()
