"""NICO++: 60 classes in six contexts (Zhang et al., CVPR 2023), in SubpopBench's split."""

from __future__ import annotations

import json
import random
from pathlib import Path

from oodprompt.datasets.file_lists import FilesDataset, Splits
from oodprompt.datasets.metadata import SUBPOPBENCH, read_metadata
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import image_names
from oodprompt.errors import UserError

_CLASSES_FILE = "dg_label_id_mapping.json"
_IMAGES = "public_dg_0416"
_CONTEXTS = ("autumn", "dim", "grass", "outdoor", "rock", "water")
_SEED, _HELD_OUT = 666, 75  # of each group: a third of these for validation, the rest for testing


@DATASET_REGISTRY.register()
class NICOpp(FilesDataset):
    """60 everyday classes (class) in six contexts (spurious attribute).

    SubpopBench takes the training images of the domain-generalisation track and holds out up to 75 of each group
    (class, context), a third of them for validation; groups that have no more give none for training. Where its
    ``metadata.csv`` exists, that is the split. Without it the same rule is applied to the file names in sorted order:
    SubpopBench takes them in the order in which the disk lists them, so its split differs from machine to machine.

    Sources: Zhang et al., "NICO++", CVPR 2023 (data); Yang et al., "Change is Hard", ICML 2023 (SubpopBench, its
    scripts/download.py). We know of no published prompts for the attribute; these are ours.
    """

    dataset_dir = "nicopp"
    places = ("nicopp", "nicopp/track_1")
    tree = f"""
        ROOT/nicopp/
          metadata.csv                   filename,y,a,split; optional, SubpopBench's split
          {_CLASSES_FILE}
          {_IMAGES}/train/<context>/<class>/*.jpg
    """
    address = "https://github.com/xxgege/NICO-plus (track_1.zip and the json file beside it)"
    attribute_names = _CONTEXTS
    attribute_prompts = (
        ("a photo taken in autumn.", "autumn leaves."),
        ("a dim photo.", "a dark photo taken at night."),
        ("a photo of grass.", "a meadow."),
        ("a photo taken outdoors.", "an outdoor background."),
        ("a photo of rocks.", "a rocky background."),
        ("a photo of water.", "a water background."),
    )

    def __init__(self, cfg: CfgNode) -> None:
        folder = self.folder(cfg, _CLASSES_FILE, _IMAGES)
        label_of = _read_classes(folder / _CLASSES_FILE)
        metadata = folder / "metadata.csv"
        if metadata.is_file():
            names = [name.replace("_", " ") for name in sorted(label_of, key=label_of.__getitem__)]
            splits = read_metadata(metadata, folder / _IMAGES, names, len(_CONTEXTS), SUBPOPBENCH, after=_IMAGES)
        else:
            splits = self._split(folder / _IMAGES / "train", label_of)
        super().__init__(cfg, *splits)

    def _split(self, images: Path, label_of: dict[str, int]) -> Splits:
        draw = random.Random(_SEED)
        splits: Splits = ([], [], [])
        for attribute, context in enumerate(_CONTEXTS):
            for name, label in label_of.items():  # in the order of the json file, as SubpopBench does
                folder = images / context / name
                files = image_names(folder, (".jpg",)) if folder.is_dir() else []
                split_of = dict.fromkeys(files, 0) | held_out(files, draw)
                for file in files:
                    datum = Datum(str(folder / file), label, attribute, name.replace("_", " "), attribute)
                    splits[split_of[file]].append(datum)
        if not any(splits):
            raise self.missing(f"no .jpg in {images}/<context>/<class>")
        return splits


def held_out(names: list[str], draw: random.Random) -> dict[str, int]:
    """Split (1 validation, 2 test) of the images of one group that are not for training."""
    order = list(names)
    draw.shuffle(order)
    count = min(len(order), _HELD_OUT)
    return {name: 1 if i < count // 3 else 2 for i, name in enumerate(order[:count])}


def _read_classes(path: Path) -> dict[str, int]:
    try:
        label_of = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from error
    if not isinstance(label_of, dict) or sorted(label_of.values(), key=str) != sorted(range(len(label_of)), key=str):
        raise UserError(f"{path}: expected class names with numbers from 0 without gaps")
    return label_of
