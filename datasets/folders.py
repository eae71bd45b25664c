"""Folders: your own images in one folder per class, and below it, if you like, one per attribute; no code."""

from __future__ import annotations

from pathlib import Path

from oodprompt.datasets.file_lists import (
    IMAGE_SUFFIXES,
    FilesDataset,
    image_names,
    number_attributes,
    split_off_validation,
)
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import Datum
from oodprompt.errors import UserError, nearest

declare("DATASET.FOLDERS", {"DIR": ("", "Folder under ROOT that holds train, val and test; empty: ROOT itself.")})


@DATASET_REGISTRY.register()
class Folders(FilesDataset):
    """Your own data: train/<class>/*.jpg, or train/<class>/<attribute>/*.jpg; likewise val and test.

    Classes and attribute values are the folders' names in sorted order, with "_" read as a blank. An image right in a
    class's folder has an unknown attribute where others have one. Without val, DATASET.VAL_PERCENT of the training
    images of each class are set aside.
    """

    tree = """
        ROOT/                            or ROOT/<DATASET.FOLDERS.DIR>/
          train/<class>/*.jpg            or train/<class>/<attribute>/*.jpg
          val/<class>/...                optional
          test/<class>/...
    """

    def __init__(self, cfg: CfgNode) -> None:
        root = self.root(cfg) / cfg.DATASET.FOLDERS.DIR
        for split in ("train", "test"):
            if not (root / split).is_dir():
                raise self.missing(f"no folder {split} in {root.absolute()}")
        found = {split: _scan(root / split) for split in ("train", "val", "test") if (root / split).is_dir()}
        classes = sorted({name for name, _, _ in found["train"]})
        if not classes:
            raise self.missing(f"no image in {(root / 'train').absolute()}")
        values = {attribute for images in found.values() for _, attribute, _ in images} - {""}
        value_of, self.attribute_names = number_attributes(cfg, root, values)
        self.attribute_prompts = [(f"a photo of {name}.",) for name in self.attribute_names]
        splits: dict[str, list[Datum]] = {"train": [], "val": [], "test": []}
        for split, images in found.items():
            for name, attribute, path in images:
                if name not in classes:
                    raise UserError(f"{path}: class {name!r} has no folder in train: {nearest(name, classes)}")
                number = value_of.get(attribute, -1)
                splits[split].append(Datum(str(path), classes.index(name), number, name, number))
        if not splits["test"]:
            raise self.missing(f"no image in {(root / 'test').absolute()}")
        train, val = splits["train"], splits["val"]
        if not val:
            train, val = split_off_validation(cfg, str(root), train)
        super().__init__(cfg, train, val, splits["test"])


def _readable(folder: Path) -> str:
    return folder.name.replace("_", " ")


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _scan(folder: Path) -> list[tuple[str, str, Path]]:
    """(class, attribute or "", image) of a split; by class and then by file name, whatever the attribute."""
    if stray := image_names(folder):
        raise UserError(f"{folder / stray[0]} lies beside the class folders; put it into one")
    images = []
    for class_folder in _folders(folder):
        mine = [("", class_folder / name) for name in image_names(class_folder)]
        for attribute in _folders(class_folder):
            mine += [(_readable(attribute), attribute / name) for name in image_names(attribute)]
            if deeper := _folders(attribute):
                raise UserError(f"{deeper[0]} is a folder below class and attribute; images lie at most at that depth")
        if not mine:
            raise UserError(f"no image in {class_folder}; images end in {', '.join(IMAGE_SUFFIXES)}")
        images += [(_readable(class_folder), a, p) for a, p in sorted(mine, key=lambda pair: (pair[1].name, pair[0]))]
    return images
