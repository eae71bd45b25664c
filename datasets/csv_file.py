"""CSV: your own images, classes, splits and attributes in a csv file; no code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from oodprompt.datasets.file_lists import (
    FilesDataset,
    Splits,
    listed,
    number_attributes,
    sorted_values,
    split_off_validation,
)
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.tables import read_rows
from oodprompt.errors import UserError, nearest

_DEFAULT_ATTRIBUTES = ("attribute",)
declare(
    "DATASET.CSV",
    {
        "FILE": ("metadata.csv", "The csv file, absolute or under ROOT; image paths in it are relative to its folder."),
        "IMAGE": ("image", "Column of the image's path."),
        "LABEL": ("label", "Column of the class: a name, or a number from 0."),
        "SPLIT": ("split", "Column of the split: train, val, test, or 0, 1, 2."),
        "ATTRIBUTES": (
            _DEFAULT_ATTRIBUTES,
            "Columns of the spurious attribute; of several, every combination is a value. The default may be absent.",
        ),
        "CAPTION": ("caption", "Column of the caption, for methods that train on captions; may be absent."),
        "CLASSNAMES": ((), "Names of numbered classes, or the order of named ones; empty: as in the file, sorted."),
    },
)

_SPLITS = {"train": 0, "0": 0, "val": 1, "valid": 1, "validation": 1, "1": 1, "test": 2, "2": 2}


class _Row(NamedTuple):
    line: int
    image: str
    label: str
    split: int
    attribute: str  # empty: unknown
    caption: str


@DATASET_REGISTRY.register()
class CSV(FilesDataset):
    """Your own data: a csv file with a row for each image (path, class, split, attributes).

    Labels are names (classes in alphabetical order, or in that of DATASET.CSV.CLASSNAMES) or numbers from 0 (named by
    CLASSNAMES, else by the number). Attribute values are named as in the file; DATASET.ATTRIBUTE_NAMES renames them in
    sorted order or, where it lists the same names, gives their order. An empty attribute is unknown. Without rows of
    split val, DATASET.VAL_PERCENT of the training rows of each class are set aside.
    """

    tree = """
        ROOT/metadata.csv                image,label,split,attribute     (DATASET.CSV.FILE)
                                         photos/1.jpg,cat,train,indoor
                                         photos/2.jpg,dog,test,outdoor
        ROOT/photos/1.jpg
        ...
    """

    def __init__(self, cfg: CfgNode) -> None:
        keys = cfg.DATASET.CSV
        path = Path(keys.FILE).expanduser()
        path = path if path.is_absolute() else self.root(cfg) / path
        if not path.is_file():
            raise self.missing(f"no file {path.absolute()} (DATASET.CSV.FILE)")
        rows = _read(path, keys)
        label_of, names = _classes(path, rows, tuple(keys.CLASSNAMES))
        value_of, self.attribute_names = number_attributes(cfg, path, {row.attribute for row in rows} - {""})
        self.attribute_prompts = [(f"a photo of {name}.",) for name in self.attribute_names]
        splits: Splits = ([], [], [])
        for row in rows:
            label = label_of[row.label]
            attribute = value_of.get(row.attribute, -1)
            image = path.parent / row.image
            splits[row.split].append(listed(path, row.line, image, label, names[label], attribute, caption=row.caption))
        train, val, test = splits
        if not val:
            train, val = split_off_validation(cfg, str(path), train)
        super().__init__(cfg, train, val, test)


def _read(path: Path, keys: CfgNode) -> list[_Row]:
    attributes = tuple(keys.ATTRIBUTES)
    needed = (keys.IMAGE, keys.LABEL, keys.SPLIT)
    optional = attributes if attributes == _DEFAULT_ATTRIBUTES else ()
    rows = []
    for line, row in read_rows(path, needed if optional else (*needed, *attributes), (*optional, keys.CAPTION)):
        image, label, split, *values, caption = (value.strip() for value in row)
        for column, value in zip(needed, (image, label, split), strict=True):
            if not value:
                raise UserError(f"{path}, line {line}: column {column} is empty")
        if split.lower() not in _SPLITS:
            raise UserError(f"{path}, line {line}: {keys.SPLIT} is train, val, test, 0, 1 or 2, not {split!r}")
        rows.append(_Row(line, image, label, _SPLITS[split.lower()], combine(attributes, values), caption))
    for split, number in (("train", 0), ("test", 2)):
        if not any(row.split == number for row in rows):
            raise UserError(f"{path}: no row has the {keys.SPLIT} {split} (or {number}); the data set needs some")
    return rows


def combine(columns: Sequence[str], values: Sequence[str]) -> str:
    """One name for a row's values: "urban, cow"; numbers of several columns say which: "place=1, object=0"."""
    if not values or not all(values):
        return ""
    if len(values) == 1:
        return values[0]
    return ", ".join(f"{c}={v}" if v.isdecimal() else v for c, v in zip(columns, values, strict=True))


def _classes(path: Path, rows: Sequence[_Row], names: tuple[str, ...]) -> tuple[dict[str, int], list[str]]:
    """(label of each value of the label column, class names)."""
    values = sorted_values({row.label for row in rows})
    if len(set(names)) < len(names):
        raise UserError(f"DATASET.CSV.CLASSNAMES: {names} holds a name twice")
    numbered = all(value.isdecimal() for value in values)
    if numbered and not names and [int(value) for value in values] != list(range(len(values))):
        raise UserError(f"{path}: numbered classes go from 0 without gaps; these are {', '.join(values)[:200]}")
    names = names or tuple(values)
    label_of = {v: int(v) for v in values} if numbered else {name: i for i, name in enumerate(names)}
    for row in rows:
        if label_of.get(row.label, len(names)) >= len(names):
            hint = nearest(row.label, names)
            raise UserError(f"{path}, line {row.line}: {row.label!r} is not in DATASET.CSV.CLASSNAMES: {hint}")
    trained = {label_of[row.label] for row in rows if row.split == 0}
    for label, name in enumerate(names):
        if label not in trained:
            raise UserError(f"{path}: class {name!r} has no training row; every class needs one")
    return label_of, list(names)
