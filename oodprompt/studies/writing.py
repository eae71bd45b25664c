"""The files of a setting with a planted correlation, and folders that are built once and whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from oodprompt.data.tables import write_rows
from oodprompt.errors import UserError
from oodprompt.files import build_folder
from oodprompt.studies.planting import Table, apportion, cramers_v

VERSION = 1  # of the builders; another version builds anew beside the old folders
SPLITS = ("train", "held_out", "val", "test")

Region = tuple[float, float, float, float, str]  # left, top, right, bottom in pixels, and what is in it


class Picture(NamedTuple):
    """An image of a setting: its path as the csv files name it, class, presence of the feature, caption, regions."""

    image: str
    label: str
    present: bool
    caption: str
    regions: Sequence[Region]


class Sizes(NamedTuple):
    """Images of the fine-tuning set (with what is held out of it), of val and of test, and the share held out."""

    train: int
    val: int
    test: int
    val_share: float

    def check(self, classes: int) -> None:
        """``UserError`` where a class would go without images, with or without the feature."""
        if self.train < 2 * classes:
            raise UserError(f"n_train is {self.train}; {classes} classes need {2 * classes} images or more")
        for name, size in (("n_val", self.val), ("n_test", self.test)):
            if size < 2 * classes:
                raise UserError(
                    f"{name} is {size}; {classes} classes, with and without the feature, need {2 * classes} or more"
                )
        if not 0 <= self.val_share < 1:
            raise UserError(f"val_share is a share from 0 to below 1, not {self.val_share:g}")


def digest(values: Mapping[str, Any]) -> str:
    """Eight characters that stand for ``values`` in the name of a folder."""
    text = json.dumps({**values, "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def build_once(folder: Path, marker: str, fill: Callable[[Path], None]) -> Path:
    """``folder``, made as by ``build_folder``. Raises ``UserError`` when the place cannot be written."""
    try:
        build_folder(folder, marker, fill)
    except OSError as error:
        raise UserError(
            f"cannot build {folder}: {error.strerror or error}; free some space, move what is there away, or choose "
            "another output folder"
        ) from error
    return folder


def hold_out(table: Table, share: float) -> Table:
    """Images of each class and presence to set aside of a fine-tuning set, [C, 2]: the same share of each cell."""
    return apportion(round(share * table.sum()), table.ravel()).reshape(table.shape)


def table_of(pictures: Sequence[Picture], classes: Sequence[str]) -> Table:
    """Images of every class without and with the feature, [C, 2]."""
    number = {name: i for i, name in enumerate(classes)}
    table = np.zeros((len(classes), 2), dtype=np.int64)
    np.add.at(table, ([number[p.label] for p in pictures], [int(p.present) for p in pictures]), 1)
    return table


def write_setting(folder: Path, splits: Mapping[str, Sequence[Picture]], setting: Mapping[str, Any]) -> None:
    """Write the files of a setting into ``folder``; ``splits`` holds the pictures of each of ``SPLITS``.

    ``metadata.csv`` (image, label, split, attribute, caption): train without what is held out, val and test without
    the correlation; attribute is 0 where the feature is absent and 1 where it is present, and paths are relative to
    the folder or absolute, so that the CSV data set reads it. ``finetune.csv``, of the same form: the held-out images
    in place of val, for early stopping on images like those of train. ``regions.csv`` (image, left, top, right, bottom,
    label), in pixels, of all images. ``setting.json``: ``setting`` (with its ``classes``, ``target`` and ``feature``),
    the tables of images [C][without, with] and Cramer's V of each split and of the whole fine-tuning set
    (``v_reached``, ``table``).
    """
    classes = setting["classes"]
    tables = {split: table_of(splits[split], classes) for split in SPLITS}
    header = ("image", "label", "split", "attribute", "caption")
    for name, val in (("metadata.csv", "val"), ("finetune.csv", "held_out")):
        parts = {"train": splits["train"], "val": splits[val], "test": splits["test"]}
        rows = ((p.image, p.label, split, int(p.present), p.caption) for split in parts for p in parts[split])
        write_rows(folder / name, header, rows)
    regions = ((p.image, *region) for split in SPLITS for p in splits[split] for region in p.regions)
    write_rows(folder / "regions.csv", ("image", "left", "top", "right", "bottom", "label"), regions)
    whole = tables["train"] + tables["held_out"]
    content = {
        **setting,
        "attribute_names": [f"no {setting['feature']}", setting["feature"]],
        "v_reached": cramers_v(whole),
        "table": whole.tolist(),
        "sizes": {split: len(splits[split]) for split in SPLITS},
        "v": {split: cramers_v(tables[split]) for split in SPLITS},
        "tables": {split: tables[split].tolist() for split in SPLITS},
        "version": VERSION,
    }
    (folder / "setting.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
