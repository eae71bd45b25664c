"""What data sets that read the user's files share: finding folders, lines and csv rows, a validation split."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from oodprompt.data.columns import Images
from oodprompt.data.dataset import DatasetBase, Datum
from oodprompt.errors import UserError
from oodprompt.log import logger

Splits = tuple[list[Datum], list[Datum], list[Datum]]


class FilesDataset(DatasetBase):
    """A data set whose files the user has put under ROOT.

    Class attributes: ``places`` (where its folder may be under ROOT), ``tree`` (the files expected) and ``address``
    (where to get them); an error about missing files shows all three.
    """

    places: Sequence[str] = ()
    tree = ""
    address = ""

    @classmethod
    def folder(cls, cfg: CfgNode, *needed: str) -> Path:
        """The first of ``places`` under ROOT that holds every path of ``needed``; ``UserError`` if none does."""
        root = cls.root(cfg)
        for place in cls.places:
            if all((root / place / name).exists() for name in needed):
                return root / place
        raise cls.not_in(root, " and ".join(needed))

    @classmethod
    def not_in(cls, root: Path, what: str) -> UserError:
        """The error for something that none of ``places`` holds."""
        looked = ", ".join("ROOT itself" if place == "." else place for place in cls.places)
        return cls.missing(f"no {what} in {root.absolute()} (looked in {looked})")

    @classmethod
    def missing(cls, problem: str) -> UserError:
        """The error for files that are not there: the problem, the tree that is expected, the address."""
        tree = textwrap.indent(textwrap.dedent(cls.tree).strip("\n"), "  ")
        source = f"\nget it from {cls.address}" if cls.address else ""
        return UserError(f"{cls.__name__}: {problem}; expected (ROOT is --root):\n{tree}{source}")


def readable(name: str) -> str:
    """A folder's name as words: "Alarm_Clock" is "alarm clock"."""
    return name.replace("_", " ").lower()


def listed(
    path: Path,
    line: int,
    image: Path | str,
    label: int,
    classname: str,
    attribute: int,
    remedy: str = "",
    caption: str = "",
) -> Datum:
    """The ``Datum`` of an image that a line of a file list names; ``UserError`` names file and line if it is missing.

    The attribute serves as the domain too, for samplers that balance domains.
    """
    remedy = remedy or "restore it or take the line out"
    return named(f"{path}, line {line}", remedy, image, label, attribute, classname, attribute, caption)


def named(
    where: str,
    remedy: str,
    image: Path | str,
    label: int,
    domain: int,
    classname: str,
    attribute: int = -1,
    caption: str = "",
) -> Datum:
    """The ``Datum`` of an image that is named at ``where``; ``UserError`` says so, and the remedy, if it is missing."""
    try:
        return Datum(str(image), label, domain, classname, attribute, caption)
    except UserError:  # asked for only now, so that an image is looked for once
        raise UserError(f"{where} names {image}, which is missing; {remedy}") from None


def check_names(where: Path | str, *splits: Iterable[Datum]) -> None:
    """``UserError`` where a class number has two names: a list whose numbers are wrong would train on wrong classes."""
    names: dict[int, str] = {}
    for datum in (datum for split in splits for datum in split):
        if names.setdefault(datum.label, datum.classname) != datum.classname:
            raise UserError(
                f"{where}: class {datum.label} is named {names[datum.label]!r} and {datum.classname!r} "
                f"(image {datum.impath}); fetch the list again"
            )


def sorted_values(values: Iterable[str]) -> list[str]:
    """Sorted, as numbers if all of them are."""
    values = list(values)
    return sorted(values, key=int if all(value.isdecimal() for value in values) else str)


def number_attributes(cfg: CfgNode, where: Path, values: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """(number of each attribute value that occurs, names of the numbers).

    DATASET.ATTRIBUTE_NAMES renames the sorted values or, where it holds all of them, orders them; ``UserError`` if it
    has another number of names. Without any value, its names stand, for methods that need names alone.
    """
    values, names = sorted_values(values), tuple(cfg.DATASET.ATTRIBUTE_NAMES)
    if names and set(values) <= set(names):
        values = list(names)
    elif len(names) not in (0, len(values)):
        raise UserError(
            f"DATASET.ATTRIBUTE_NAMES has {len(names)} names, but {where} has {len(values)} attribute values: "
            f"{'; '.join(values)[:200]}"
        )
    elif names and set(values) & set(names):
        raise UserError(
            f"DATASET.ATTRIBUTE_NAMES has {'; '.join(names)}, but {where} has {'; '.join(values)[:200]}: give exactly these "
            "names, or others for all of them in this order"
        )
    elif names and values:
        renamed = ", ".join(f"{value} is called {name}" for value, name in zip(values, names, strict=True))
        logger.info(f"Attribute values by DATASET.ATTRIBUTE_NAMES: {renamed}"[:300])
    return {value: i for i, value in enumerate(values)}, names or tuple(values)


def split_off_validation(cfg: CfgNode, name: str, train: Sequence[Datum]) -> tuple[Images, Images]:
    """(train, val): of every class the share DATASET.VAL_PERCENT goes to val, for data sets without validation images.

    The draw is always the same, whatever SEED, so that runs with different seeds are compared on the same images; it
    does not look at the attribute. A class keeps at least one training image.
    """
    share, images, draw = cfg.DATASET.VAL_PERCENT, Images.of(train), random.Random(0)
    chosen = np.zeros(len(images), dtype=bool)
    for label in np.unique(images.label):
        mine = np.flatnonzero(images.label == label).tolist()
        chosen[draw.sample(mine, min(round(share * len(mine)), len(mine) - 1))] = True
    logger.info(
        f"{name} has no validation images: {chosen.sum():,} of {len(images):,} training images are set aside "
        f"(DATASET.VAL_PERCENT {share:g}, the same for every SEED)"
    )
    return images.take(np.flatnonzero(~chosen)), images.take(np.flatnonzero(chosen))
