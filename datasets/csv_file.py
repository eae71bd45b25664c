"""CSV: your own images, classes, splits and attributes in a csv file; no code."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from oodprompt.datasets.file_lists import FilesDataset, number_attributes, sorted_values, split_off_validation
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.columns import Images, Texts
from oodprompt.data.dataset import prompts_of_names
from oodprompt.data.tables import SPLITS, missing, normalised, portable, read_rows
from oodprompt.errors import UserError, nearest
from oodprompt.files import inside
from oodprompt.log import logger

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
        "OUTSIDE": (
            False,
            "Whether relative image paths may leave both the csv file's folder and ROOT by '..'. Absolute paths may always, with a note.",
        ),
        "CLASSNAMES": ((), "Names of numbered classes, or the order of named ones; empty: as in the file, sorted."),
    },
)


class _Values:
    """A column of words: which of the distinct ones each row holds, and the line where each is met first."""

    def __init__(self) -> None:
        self.rows, self.line_of = array("i"), dict[Any, int]()
        self._number: dict[Any, int] = {}

    def append(self, value: Any, line: int) -> None:
        number = self._number.get(value)
        if number is None:
            number = self._number[value] = len(self._number)
            self.line_of[value] = line
        self.rows.append(number)

    def mapped(self, meaning: Mapping[Any, int]) -> np.ndarray:
        """The number of each row by the meaning of the distinct values, [N]."""
        return np.array([meaning[value] for value in self._number], dtype=np.int32)[np.asarray(self.rows)]


class _Rows:
    """The rows of the file, column by column."""

    def __init__(self, path: Path, keys: CfgNode, root: str) -> None:
        self.path, self.keys, self._outside = path, keys, 0
        self._allowed = [os.path.abspath(folder) for folder in (path.parent, os.path.expanduser(root)) if folder]
        self.line, self.images = array("i"), Texts(prefix=os.path.join(path.parent, ""))
        self.label, self.split, self.attribute = _Values(), _Values(), _Values()
        self.captions: Texts | None = None
        self._read()

    def _read(self) -> None:
        keys, folder, attributes = self.keys, self.path.parent, tuple(self.keys.ATTRIBUTES)
        needed = (keys.IMAGE, keys.LABEL, keys.SPLIT)
        optional = attributes if attributes == _DEFAULT_ATTRIBUTES else ()
        columns = needed if optional else (*needed, *attributes)
        captioned, captions = False, Texts()
        for line, (image, label, split, *values, caption) in read_rows(self.path, columns, (*optional, keys.CAPTION)):
            image = image.strip()
            if not (image and label and split):
                self._refuse_blank(line, image, label, split)
            self.line.append(line)
            self.images.append(self._place(line, portable(image, folder)))
            self.label.append(label, line)
            self.split.append(split, line)
            self.attribute.append(tuple(values), line)
            caption = caption.strip()
            captioned = captioned or bool(caption)
            captions.append(caption)
        if captioned:
            self.captions = captions
        if self._outside:
            logger.info(f"Note: {self._outside:,} images of {self.path} are outside {folder}")

    def _place(self, line: int, image: str) -> str:
        """The path ``image``, ``UserError`` where it leaves the folder and nobody has said that it may."""
        place = os.path.join(self._allowed[0], image) if ".." in image else image
        if not any(inside(folder, place) for folder in self._allowed):
            if not os.path.isabs(image) and not self.keys.OUTSIDE:
                raise UserError(
                    f"{self.path}, line {line}: {image[:200]} leaves the folder of the file and --root; if that is meant, set "
                    "DATASET.CSV.OUTSIDE True or give absolute paths"
                )
            self._outside += 1
        return image

    def _refuse_blank(self, line: int, *values: str) -> None:
        for column, value in zip((self.keys.IMAGE, self.keys.LABEL, self.keys.SPLIT), values, strict=True):
            if missing(value):
                raise UserError(f"{self.path}, line {line}: column {column} is empty")

    def splits(self) -> np.ndarray:
        """0, 1 or 2 of each row, for train, val and test."""
        meaning = {}
        for value, line in self.split.line_of.items():
            self._refuse_blank(line, "image", "label", value)
            word = normalised([value])[value].lower()
            if word not in SPLITS:
                where = f"{self.path}, line {line}"
                raise UserError(f"{where}: {self.keys.SPLIT} is train, val, test, 0, 1 or 2, not {value.strip()!r}")
            meaning[value] = SPLITS[word]
        return self.split.mapped(meaning)

    def attributes(self, named: Sequence[str]) -> dict[tuple[str, ...], str]:
        """What each distinct combination of attribute values is called; "" where one is missing.

        A word for missing values is a value where it is among ``named``.
        """
        columns = tuple(self.keys.ATTRIBUTES)
        distinct = [_meaning([values[i] for values in self.attribute.line_of], named) for i in range(len(columns))]
        return {
            values: combine(columns, [distinct[i][value] for i, value in enumerate(values)])
            for values in self.attribute.line_of
        }


def _meaning(values: Iterable[str], named: Sequence[str]) -> dict[str, str]:
    """As ``normalised``, but names that the configuration gives are never missing."""
    values = set(values)
    kept = {value: value.strip() for value in values if value.strip() in named}
    return {**normalised(values - set(kept)), **kept}


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
        rows = _Rows(path, keys, cfg.DATASET.ROOT)
        split = rows.splits()
        if not (split == 2).any():
            raise UserError(f"{path}: no row has the {keys.SPLIT} test (or 2); the data set needs some")
        label, names = _classes(rows, split, tuple(keys.CLASSNAMES))
        called = rows.attributes(cfg.DATASET.ATTRIBUTE_NAMES)
        value_of, self.attribute_names = number_attributes(cfg, path, {*called.values()} - {""})
        self.attribute_prompts = prompts_of_names(self.attribute_names)
        attribute = rows.attribute.mapped({values: value_of.get(name, -1) for values, name in called.items()})
        images = Images(
            rows.images, np.arange(len(label)), label, attribute, attribute, label, names, captions=rows.captions
        )
        _refuse_missing(rows, images)
        train, val, test = (images.take(np.flatnonzero(split == number)) for number in range(3))
        if not val and train:
            train, val = split_off_validation(cfg, str(path), train)
        super().__init__(cfg, train, val, test)


def _refuse_missing(rows: _Rows, images: Images) -> None:
    absent = images.missing()
    if len(absent):
        first, more = int(absent[0]), f" (and {len(absent) - 1:,} more)" if len(absent) > 1 else ""
        raise UserError(
            f"{rows.path}, line {rows.line[first]} names {images.impath(first)}, which is missing{more}; restore it or take "
            "the line out"
        )


def combine(columns: Sequence[str], values: Sequence[str]) -> str:
    """One name for a row's values: "urban, cow"; numbers of several columns say which: "place=1, object=0"."""
    if not values or not all(values):
        return ""
    if len(values) == 1:
        return values[0]
    return ", ".join(f"{c}={v}" if v.isdecimal() else v for c, v in zip(columns, values, strict=True))


def _classes(rows: _Rows, split: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """(label of each row, class names)."""
    if len(set(names)) < len(names):
        raise UserError(f"DATASET.CSV.CLASSNAMES: {names} holds a name twice")
    path, line_of = rows.path, rows.label.line_of
    called = _meaning(line_of, names)
    for value, line in line_of.items():
        if not called[value]:
            raise UserError(f"{path}, line {line}: column {rows.keys.LABEL} is empty")
    values = sorted_values({*called.values()})
    numbered = all(value.isdecimal() for value in values)
    if numbered and not names and [int(value) for value in values] != list(range(len(values))):
        raise UserError(f"{path}: numbered classes go from 0 without gaps; these are {', '.join(values)[:200]}")
    names = names or tuple(values)
    label_of = {v: int(v) for v in values} if numbered else {name: i for i, name in enumerate(names)}
    for value, line in line_of.items():
        if label_of.get(called[value], len(names)) >= len(names):
            hint = nearest(called[value], names)
            raise UserError(f"{path}, line {line}: {called[value]!r} is not in DATASET.CSV.CLASSNAMES: {hint}")
    label = rows.label.mapped({value: label_of[called[value]] for value in line_of})
    trained = set(label[split == 0].tolist())
    for number, name in enumerate(names):
        if trained and number not in trained:
            raise UserError(f"{path}: class {name!r} has no training row; every class needs one")
    return label, list(names)
