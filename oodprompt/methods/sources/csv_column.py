"""Source of groups ``csv``: a column of a csv file, by the path of each image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import GROUP_SOURCE_REGISTRY
from oodprompt.data.tables import normalised, portable, read_header, read_rows
from oodprompt.errors import UserError, nearest
from oodprompt.methods.contracts import Context, GroupSource
from oodprompt.methods.splits import Split

_SECTION = "TRAINER.GROUP_SOURCES.CSV"
_IMAGE = ("image", "path", "filename", "img_filename", "image_id", "file")
declare(
    _SECTION,
    {
        "FILE": ("", "The csv file, as the metadata.csv of a data set."),
        "COLUMN": ("", "Column of the value of each image; an empty cell: unknown."),
        "IMAGE": Key(
            "",
            "Column of the image's path: absolute, relative to the file's folder, or the end of the path; empty: the first "
            f"of {', '.join(_IMAGE)} that there is.",
        ),
    },
)


@GROUP_SOURCE_REGISTRY.register(name="csv")
class CsvColumn(GroupSource):
    """The value that a column of a csv file gives an image, found by the image's path.

    A row is that of the image whose path ends with its path, by whole folders: "images/a.png" is that of
    "/data/birds/images/a.png". Values are numbered in sorted order. Every training image needs a row with a value; another
    image without is in no group. ``UserError`` names the file and what is wrong: no such column, an image with two rows,
    a row of two images, training images without.
    """

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys = cfg.TRAINER.GROUP_SOURCES.CSV
        self.file = Path(self.keys.FILE).expanduser()
        self._text = self._read()
        texts = sorted({text for text in self._text.values() if text}, key=_order)
        if len(texts) < 2:
            raise UserError(
                f"{_SECTION}.COLUMN: {self.file} has {len(texts) or 'no'} value{'s' * (len(texts) != 1)} in the column "
                f"{self.keys.COLUMN}; groups need two"
            )
        self.names = tuple(texts)
        self._number = {text: i for i, text in enumerate(texts)}
        self._values: dict[str, Tensor] = {}
        self._taken: dict[str, str] = {}  # the image of a row, in any split

    def _read(self) -> dict[str, str]:
        """The text of every row by its path, without "./" and backslashes; "" is unknown."""
        for key in ("FILE", "COLUMN"):
            if not self.keys[key]:
                raise UserError(f"TRAINER.GROUPS csv needs {_SECTION}.{key}")
        header = read_header(self.file)
        image = self.keys.IMAGE or next((name for name in _IMAGE if name in header), "")
        for key, column in (("IMAGE", image), ("COLUMN", self.keys.COLUMN)):
            if column not in header:
                hint = nearest(column, header) if column else f"it has: {', '.join(header)}"
                raise UserError(f"{_SECTION}.{key}: {self.file} has no column {column or 'of paths'}: {hint}")
        rows = list(read_rows(self.file, (image, self.keys.COLUMN)))
        meaning = normalised({value for _, (_, value) in rows})
        found: dict[str, str] = {}
        for line, (path, value) in rows:
            name = os.path.normpath(portable(path.strip(), self.file.parent))
            if name in found:
                raise UserError(f"{self.file}, line {line}: {name[:200]} has a row already; give each image one row")
            found[name] = meaning[value]
        return found

    def num_values(self, split: Split) -> int:
        self.of(split)
        return len(self.names)

    def of(self, split: Split) -> Tensor:
        if split.name not in self._values:
            self._values[split.name] = self._looked_up(split)
        return self._values[split.name].to(split.label.device)

    def _looked_up(self, split: Split) -> Tensor:
        paths = split.paths()
        values, lacking = [], []
        for path in paths:
            row = next((name for name in _endings(path, self.file.parent) if name in self._text), None)
            if row is not None and self._taken.setdefault(row, path) != path:
                raise UserError(
                    f"{self.file}: the row of {row} could be that of {self._taken[row]} and of {path}; give longer paths"
                )
            text = self._text[row] if row is not None else ""
            values.append(self._number[text] if text else -1)
            if not text:
                lacking.append(path)
        if lacking and (split.name == "train" or len(lacking) == len(paths)):
            raise UserError(
                f"TRAINER.GROUPS csv: {self.file} gives no value in the column {self.keys.COLUMN} to {len(lacking):,} of "
                f"{len(paths):,} images of the {split.name} split, such as {lacking[0]}; add them or take them out of the list"
            )
        return torch.tensor(values)


def _endings(path: str, folder: Path) -> Iterator[str]:
    """What a row may call an image: its path, whole or from the csv file's folder on, then ever shorter ends of it."""
    whole = os.path.abspath(path)
    yield os.path.normpath(path)
    yield whole
    yield os.path.relpath(whole, os.path.abspath(folder))
    parts = whole.split(os.sep)
    for start in range(1, len(parts)):
        yield os.sep.join(parts[start:])


def _order(text: str) -> tuple[bool, int, str]:
    """Numbers by size, ahead of words."""
    return (False, int(text), text) if text.isdecimal() else (True, 0, text)
