"""Folders: your own images in one folder per class, and below it, if you like, one per attribute; no code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from oodprompt.datasets.file_lists import FilesDataset, number_attributes, split_off_validation
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.columns import Images
from oodprompt.data.dataset import prompts_of_names
from oodprompt.data.datum import Datum
from oodprompt.data.folders import IMAGE_ENDINGS, as_words, check_spelling, image_names, note_passed_over, subfolders
from oodprompt.errors import UserError, nearest

declare("DATASET.FOLDERS", {"DIR": ("", "Folder under ROOT that holds train, val and test; empty: ROOT itself.")})


@DATASET_REGISTRY.register()
class Folders(FilesDataset):
    """Your own data: train/<class>/*.jpg, or train/<class>/<attribute>/*.jpg; likewise val and test.

    Classes and attribute values are the folders' names in sorted order, with "_" read as a blank. An image right in a
    class's folder has an unknown attribute where others have one. Without val, DATASET.VAL_PERCENT of the training
    images of each class are set aside. Files that are no images are counted in one line; what systems leave in folders is
    passed over. Two folders whose names are two spellings of one class or attribute value are an error.
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
        splits_there = [split for split in ("train", "val", "test") if (root / split).is_dir()]
        class_folders = [folder for split in splits_there for folder in subfolders(root / split)]
        check_spelling(class_folders, "class")
        check_spelling((value for folder in class_folders for value in subfolders(folder)), "attribute value")
        passed_over: Counter[str] = Counter()
        found = {split: _scan(root / split, passed_over) for split in splits_there}
        note_passed_over(passed_over, root)
        classes = sorted({name for name, _, _ in found["train"]})
        if not classes:
            raise self.missing(f"no image in {(root / 'train').absolute()}")
        values = {attribute for images in found.values() for _, attribute, _ in images} - {""}
        value_of, self.attribute_names = number_attributes(cfg, root, values)
        self.attribute_prompts = prompts_of_names(self.attribute_names)
        label_of = {name: label for label, name in enumerate(classes)}
        splits: dict[str, list[Datum]] = {"train": [], "val": [], "test": []}
        for split, images in found.items():
            for name, attribute, path in images:
                if name not in classes:
                    raise UserError(f"{path}: class {name!r} has no folder in train: {nearest(name, classes)}")
                number = value_of.get(attribute, -1)
                splits[split].append(Datum.unchecked(str(path), label_of[name], number, name, number, ""))
        if not splits["test"]:
            raise self.missing(f"no image in {(root / 'test').absolute()}")
        train, val = Images.of(splits["train"]), Images.of(splits["val"])
        if not val:
            train, val = split_off_validation(cfg, str(root), train)
        super().__init__(cfg, train, val, splits["test"])


def _scan(folder: Path, passed_over: Counter[str]) -> list[tuple[str, str, Path]]:
    """(class, attribute or "", image) of a split; by class and then by file name, whatever the attribute."""
    if stray := image_names(folder, passed_over=passed_over):
        raise UserError(f"{folder / stray[0]} lies beside the class folders; put it into one")
    images = []
    for class_folder in subfolders(folder):
        mine = [("", class_folder / name) for name in image_names(class_folder, passed_over=passed_over)]
        for attribute in subfolders(class_folder):
            inside = image_names(attribute, passed_over=passed_over)
            mine += [(as_words(attribute.name), attribute / name) for name in inside]
            if deeper := subfolders(attribute):
                raise UserError(f"{deeper[0]} is a folder below class and attribute; images lie at most at that depth")
        if not mine:
            raise UserError(f"no image in {class_folder}; {IMAGE_ENDINGS}")
        name = as_words(class_folder.name)
        images += [(name, a, p) for a, p in sorted(mine, key=lambda pair: (pair[1].name, pair[0]))]
    return images
