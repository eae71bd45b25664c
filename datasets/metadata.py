"""File lists in the form of Waterbirds' ``metadata.csv``: an image, its class, its split (0, 1, 2), its attribute."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from oodprompt.datasets.file_lists import Splits, listed

from oodprompt.data.tables import missing, portable, read_rows, whole
from oodprompt.errors import UserError
from oodprompt.files import inside

WATERBIRDS = ("img_filename", "y", "split", "place")
SUBPOPBENCH = ("filename", "y", "split", "a")


def read_metadata(
    path: Path,
    folder: Path,
    classnames: Sequence[str],
    attributes: int | None = None,
    columns: tuple[str, str, str, str] = WATERBIRDS,
    after: str = "",
) -> Splits:
    """Train, validation and test ``Datum``s of ``path``; image names are relative to ``folder``.

    ``columns`` name image, class, split and attribute. Numbers may be written as floats ("1.0"). The attribute is below
    ``attributes`` where that is given; one that is missing ("", "nan", ...) is unknown (-1).
    With ``after``, only the part of an image's name behind the folder of that name counts: lists that another machine
    wrote hold its absolute paths. Raises ``UserError`` that names the file and line for a missing file or column, a
    bad value, or a missing image.
    """
    if not path.is_file():
        raise UserError(f"no file list at {path}; expected a csv with the columns {', '.join(columns)}")
    splits: Splits = ([], [], [])
    _, y, s, a = columns
    for line, (name, *numbers) in read_rows(path, columns, strict=False):
        try:
            label, split = (whole(number) for number in numbers[:2])
            attribute = -1 if missing(numbers[2]) else whole(numbers[2])
        except ValueError:
            raise UserError(f"{path}, line {line}: {y}, {s} and {a} must be whole numbers") from None
        known = attribute >= 0 and (attributes is None or attribute < attributes)
        if not (0 <= label < len(classnames) and split in (0, 1, 2) and (known or missing(numbers[2]))):
            raise UserError(
                f"{path}, line {line}: {y} {label}, {s} {split}, {a} {attribute} are out of range "
                f"({y} below {len(classnames)}, {s} 0 train, 1 val or 2 test, "
                f"{a} {'0 or more' if attributes is None else f'below {attributes}'})"
            )
        name = portable(name, folder)
        if after:
            _, found, name = name.rpartition(f"{after}/")
            if not found:
                raise UserError(f"{path}, line {line}: the image's path has no folder {after}")
        if not os.path.isabs(name) and not inside(str(folder), name):
            raise UserError(f"{path}, line {line}: {name[:200]} leaves the folder {folder}; fetch the list again")
        splits[split].append(listed(path, line, folder / name, label, classnames[label], attribute))
    return splits
