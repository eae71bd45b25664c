"""Waterbirds' file list: ``metadata.csv`` with the columns img_filename, y, split (0, 1, 2) and place."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from oodprompt.engine.data import Datum
from oodprompt.errors import UserError

_COLUMNS = ("img_filename", "y", "split", "place")


def read_metadata(path: Path, folder: Path, classnames: Sequence[str]) -> tuple[list[Datum], list[Datum], list[Datum]]:
    """Train, validation and test ``Datum``s of ``path``; image names are relative to ``folder``.

    Raises ``UserError`` that names the file and line for a missing file or column, a bad value, or a missing image.
    """
    if not path.is_file():
        raise UserError(f"no file list at {path}; expected a csv with the columns {', '.join(_COLUMNS)}")
    splits: tuple[list[Datum], list[Datum], list[Datum]] = ([], [], [])
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path}: column {', '.join(missing)} is missing; expected {', '.join(_COLUMNS)}")
            for row in reader:
                line = reader.line_num
                try:
                    label, split, place = (int(row[key]) for key in ("y", "split", "place"))
                except (TypeError, ValueError):
                    raise UserError(f"{path}, line {line}: y, split and place must be whole numbers") from None
                if not (0 <= label < len(classnames) and split in (0, 1, 2) and place >= 0):
                    raise UserError(
                        f"{path}, line {line}: y {label}, split {split}, place {place} are out of range "
                        f"(y below {len(classnames)}, split 0 train, 1 val or 2 test, place 0 or more)"
                    )
                image = folder / (row["img_filename"] or "")
                if not image.is_file():
                    raise UserError(
                        f"{path}, line {line} names {image}, which is missing; restore it or take the line out"
                    )
                splits[split].append(Datum(str(image), label, place, classnames[label], place))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a csv file: {error}") from error
    return splits
