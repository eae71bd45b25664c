"""For data sets that make their own images: build the images once under ROOT, and plan their groups."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oodprompt.data.tables import write_rows
from oodprompt.errors import UserError
from oodprompt.files import build_folder

COLUMNS = ("img_id", "img_filename", "y", "split", "place")  # of Waterbirds' metadata.csv
SPLITS = ("train", "val", "test")  # by the number in its column ``split``


def built_once(parent: Path, settings: Mapping[str, Any], build: Callable[[Path], None], name: str, verb: str) -> Path:
    """The folder in ``parent`` of the images that ``settings`` describe; ``build`` fills it where it is missing.

    It is built in a temporary folder and renamed. Runs that start at the same time may build twice; one result stays.
    Raises ``UserError`` ("cannot ``verb`` ``name`` into ...") where the place cannot be written.
    """
    text = json.dumps(dict(settings), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = parent / f"correlation{settings['CORRELATION']:g}-{digest}"

    def fill(temporary: Path) -> None:
        build(temporary)
        (temporary / "settings.json").write_text(text + "\n")

    try:
        build_folder(folder, "metadata.csv", fill)
    except OSError as error:
        raise UserError(
            f"cannot {verb} {name} into {folder}: {error.strerror or error}; choose another --root"
        ) from error
    return folder


def planned_groups(split: str, total: int, classes: int, places: int, correlation: float) -> list[tuple[int, int]]:
    """(class, place) of every image of a split, in file order.

    In ``train``, a share ``correlation`` of the images of class i has place i. The rest is spread evenly over the other
    places. The other splits have equally many images of every group.
    """
    if split != "train":
        return [(i % classes, i // classes % places) for i in range(total // (classes * places) * classes * places)]
    pairs = []
    for y in range(classes):
        count = total // classes + (y < total % classes)
        own = round(correlation * count)
        others = [a for a in range(places) if a != y]
        pairs += [(y, y)] * own + [(y, others[i % len(others)]) for i in range(count - own)]
    return pairs


def check_groups(section: str, keys: Mapping[str, Any], places: str) -> None:
    """``UserError`` where CLASSES and the key ``places`` of ``section`` make no groups, or a split has too few images."""
    for key in ("CLASSES", places):
        if len(set(keys[key])) < max(2, len(keys[key])):
            raise UserError(f"{section}.{key}: {keys[key]} must hold two or more different names")
    if len(keys[places]) < len(keys["CLASSES"]):
        raise UserError(f"{section}.{places} must hold at least as many names as {section}.CLASSES")
    groups = len(keys[places]) * len(keys["CLASSES"])
    for key in ("NUM_TRAIN", "NUM_VAL", "NUM_TEST"):
        if keys[key] < groups:
            raise UserError(f"{section}.{key} is {keys[key]}; there are {groups} groups, give each an image")


def write_list(folder: Path, rows: Iterable[Sequence[Any]], more: Sequence[str] = ()) -> None:
    """Write ``metadata.csv`` in Waterbirds' form: rows of ``COLUMNS`` and the columns ``more``."""
    write_rows(folder / "metadata.csv", [*COLUMNS, *more], rows)
