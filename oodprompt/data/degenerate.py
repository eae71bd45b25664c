"""Problems whose numbers mean less than they seem to: one class in all, training images in the test, no group apart.

What can only be a mistake is refused; what may be meant is said in words, which stay with the results. Columns of the
file lists are enough for it: no image is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from oodprompt.data.columns import Images
from oodprompt.data.dataset import DatasetBase, attribute_name, told_apart
from oodprompt.data.datum import Datum
from oodprompt.errors import UserError


@dataclass(frozen=True)
class _Columns:
    """A split as columns: hashes [N] of its images' paths, ``label`` [N] and ``attribute`` [N] (-1: unknown)."""

    name: str
    paths: np.ndarray
    label: np.ndarray
    attribute: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Which images have an attribute, [N] bool."""
        return self.attribute >= 0

    @property
    def groups(self) -> set[tuple[int, int]]:
        """(class, attribute) of the images that have one."""
        pairs = np.stack([self.label, self.attribute], axis=1)[self.known]
        return {(int(y), int(a)) for y, a in np.unique(pairs, axis=0)}


def _columns(name: str, split: Sequence[Datum]) -> _Columns:
    """The one place that takes a split apart. Of a million paths two have one hash with a probability of 1 in 10^7."""
    images = Images.of(split)
    paths = np.fromiter((hash(_plain(path)) for path in images.impaths), np.int64, len(images))
    return _Columns(name, paths, images.label, images.attribute)


def _plain(path: str) -> str:
    """The path without parts like "a/../", so that an image has one path."""
    return os.path.normpath(path) if "/." in path or "//" in path else path


def notes_on(dataset: DatasetBase) -> list[str]:
    """What to mind when the results on ``dataset`` are read, a sentence or two each; empty for a sound problem.

    ``UserError`` for a data set of one class, and where every test image is a training image.
    """
    if dataset.num_classes < 2:
        raise UserError(
            f"{type(dataset).__name__} has one class only ({dataset.classnames[0]!r}), so that every answer is right; "
            "give two or more classes (DATASET.SUBSAMPLE_CLASSES all)"
        )
    train, val, test = (
        _columns(name, split)
        for name, split in (("training", dataset.train_x), ("validation", dataset.val), ("test", dataset.test))
    )
    if dataset.test_only:  # its test images stand in for training images
        train = _columns("training", [])
    notes = [*_listed_twice(train, val, test), *_shared(train, val, test), *_classes(dataset, test)]
    return [*notes, *_attributes(dataset, train, val, test)]


def _listed_twice(*splits: _Columns) -> Iterator[str]:
    for split in splits:
        again = len(split.paths) - len(np.unique(split.paths))
        if again:
            labelled = np.unique(np.stack([split.paths, split.label]), axis=1)[0]  # a path as often as it has classes
            torn = int((np.unique(labelled, return_counts=True)[1] > 1).sum())
            classes = f" {torn:,} of them have more than one class." if torn else ""
            yield (
                f"{again:,} of the {len(split.paths):,} {split.name} images are in the list more than once, "
                f"and count as often.{classes}"
            )


def _shared(train: _Columns, val: _Columns, test: _Columns) -> Iterator[str]:
    for split, other, harm in (
        (test, train, "accuracy on them says nothing of new images."),
        (test, val, "an epoch that is chosen on validation images is chosen on them."),
        (val, train, "accuracy on them says nothing of new images."),
    ):
        shared = int(np.isin(split.paths, other.paths).sum())
        if shared and shared == len(split.paths) and split is test and other is train:
            raise UserError(
                f"every test image is a training image too (all {shared:,}), so that the test says nothing of new images; "
                "give the test split images of its own"
            )
        if shared:
            share = f"{shared:,} of the {len(split.paths):,} {split.name} images ({shared / len(split.paths):.1%})"
            yield f"{share} are {other.name} images too: {harm}"


def _classes(dataset: DatasetBase, test: _Columns) -> Iterator[str]:
    names = told_apart(dataset.classnames)
    there = set(np.unique(test.label).tolist())
    absent = [name for label, name in enumerate(names) if label not in there]
    if len(there) == 1:
        only = names[there.pop()]
        yield f"Every test image is of the class {only}: who always answers {only} is right on all of them."
    elif absent:
        yield f"{_of(absent, len(names), 'classes')} no test image: the results say nothing of {_them(absent)}."
    spelled = Counter(map(_spelling, dataset.classnames))
    if twice := list(dict.fromkeys(name for name in dataset.classnames if spelled[_spelling(name)] > 1)):
        yield f"Several classes have the name {_some(twice)}: prompts that differ by the name alone cannot tell them apart."


def _spelling(name: str) -> str:
    """A name without what prompts do not tell apart: "Red_fox" is "red fox"."""
    return " ".join(name.replace("_", " ").split()).casefold()


def _attributes(dataset: DatasetBase, train: _Columns, val: _Columns, test: _Columns) -> Iterator[str]:
    splits = [split for split in (train, val, test) if len(split.paths)]
    if not any(split.known.any() for split in splits):
        return
    unknown = [
        f"{(~split.known).sum():,} of the {len(split.paths):,} {split.name} images"
        for split in splits
        if not split.known.all()
    ]
    if unknown:
        yield f"The attribute is not known of {' and of '.join(unknown)}: they are in no group."
    learned, tested = train.groups, test.groups
    if not tested:
        return
    worst = "The worst group is the worst class, and says nothing of a shortcut."
    values = {a for _, a in tested}
    if len(values) == 1:
        yield f"Every test image has the attribute {attribute_name(dataset, values.pop())}. {worst}"
    elif _one_each(tested):
        where = "in training and testing" if _one_each(learned) and tested <= learned else "in the test split"
        yield f"The attribute is the class {where}: every class has one value ({_names(dataset, tested)}). {worst}"
    if len({a for _, a in learned}) > 1 and _one_each(learned) and not (_one_each(tested) and tested <= learned):
        yield (
            f"The attribute is the class in training: every class has one value ({_names(dataset, learned)}). "
            "No training image is against the shortcut."
        )
    if len(train.paths) and (unseen := tested - learned):
        if unseen == tested:
            yield "No test group has a training image: the adjusted average accuracy is the plain one."
        else:
            named = [_name(dataset, group) for group in sorted(unseen)]
            lacking = _of(named, len(tested), "test groups")
            yield f"{lacking} no training image: the adjusted average leaves {_them(named)} out."
    if len(values) > 1 and not _one_each(tested) and tested & learned and (untested := learned - tested):
        named = [_name(dataset, group) for group in sorted(untested)]
        lacking = _of(named, len(learned), "training groups")
        yield f"{lacking} no test image: the worst group is that of the others."


def _one_each(groups: set[tuple[int, int]]) -> bool:
    """Whether every class of the groups has one attribute value only."""
    return len({y for y, _ in groups}) == len(groups)


def _name(dataset: DatasetBase, group: tuple[int, int]) -> str:
    return f"{told_apart(dataset.classnames)[group[0]]} / {attribute_name(dataset, group[1])}"


def _names(dataset: DatasetBase, groups: set[tuple[int, int]]) -> str:
    return _some([_name(dataset, group) for group in sorted(groups)])


def _of(names: Sequence[str], count: int, what: str) -> str:
    """ "2 of the 10 classes (cat, dog) have": who lacks something."""
    return f"{len(names):,} of the {count:,} {what} ({_some(names)}) {'has' if len(names) == 1 else 'have'}"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
