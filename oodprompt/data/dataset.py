"""Images and what is known of them: ``Datum``, ``DatasetBase``, few-shot samples, choices of classes.

Names and behaviour are Dassl's. One difference: ``Datum`` carries the (spurious) attribute.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data import seeding
from oodprompt.errors import UserError


class Datum:
    """One image: its path, class label, domain, class name, (spurious) attribute (-1: unknown) and caption ("": none)."""

    __slots__ = ("_attribute", "_caption", "_classname", "_domain", "_impath", "_label")

    def __init__(
        self,
        impath: str = "",
        label: int = 0,
        domain: int = 0,
        classname: str = "",
        attribute: int = -1,
        caption: str = "",
    ) -> None:
        if not os.path.isfile(impath):  # four times as fast as Path, which counts where there are 200,000
            raise UserError(f"no image at {impath}; the data set's file list names it")
        self._impath, self._label, self._domain = str(impath), int(label), int(domain)
        self._classname, self._attribute, self._caption = str(classname), int(attribute), caption

    impath = property(lambda self: self._impath)
    label = property(lambda self: self._label)
    domain = property(lambda self: self._domain)
    classname = property(lambda self: self._classname)
    attribute = property(lambda self: self._attribute)
    caption = property(lambda self: self._caption)

    def relabelled(self, label: int) -> Datum:
        """The same image with another label; everything else is kept."""
        return Datum(self.impath, label, self.domain, self.classname, self.attribute, self.caption)


class DatasetBase:
    """Splits of ``Datum``s and what is known of their classes and attributes.

    A subclass is built by ``Cls(cfg)``; it reads its files and calls ``super().__init__``, which draws the few-shot
    sample (``DATASET.NUM_SHOTS``) and keeps the classes that ``DATASET.SUBSAMPLE_CLASSES`` asks for.

    Without training images (an empty ``train_x``) it serves methods that train nothing, and trained models. Classes are
    then those of the other splits.

    Class attributes: ``dataset_dir (folder under ROOT), ``template`` (prompt of zero-shot classification),
    ``attribute_names`` and ``attribute_prompts`` (per value of the spurious attribute, the prompts that name it).
    """

    dataset_dir = ""
    domains: Sequence[str] = ()
    template = "a photo of a {}."
    attribute_names: Sequence[str] = ()
    attribute_prompts: Sequence[Sequence[str]] = ()
    test_only = False  # whether the images given as training images are those of the test

    def __init__(
        self,
        cfg: CfgNode,
        train_x: Sequence[Datum],
        val: Sequence[Datum] = (),
        test: Sequence[Datum] = (),
    ) -> None:
        self._check_classes(train_x, val, test)
        train_x = few_shot(train_x, cfg.DATASET.NUM_SHOTS, cfg.SEED)
        self.train_x, self.val, self.test = subsample_classes(cfg.DATASET.SUBSAMPLE_CLASSES, train_x, val, test)
        if not self.test:
            raise UserError(f"{type(self).__name__}: the test split is empty; give it at least one image")
        named = self.train_x or [*self.val, *self.test]
        self.lab2cname = {datum.label: datum.classname for datum in sorted(named, key=lambda d: d.label)}
        self.classnames = [self.lab2cname[label] for label in range(len(self.lab2cname))]
        self.num_classes = len(self.classnames)
        self.template = cfg.DATASET.TEMPLATE or self.template
        if "{}" not in self.template:
            raise UserError(f"DATASET.TEMPLATE {self.template!r} has no {{}} for the class name")
        self.attribute_names = tuple(cfg.DATASET.ATTRIBUTE_NAMES) or tuple(self.attribute_names)
        prompts: list[Sequence[str]] = [
            tuple(p.strip() for p in entry.split("|")) for entry in cfg.DATASET.ATTRIBUTE_PROMPTS
        ]
        if any("" in entry for entry in prompts):
            raise UserError("DATASET.ATTRIBUTE_PROMPTS: an entry has an empty prompt; separate prompts by one '|'")
        if not prompts and cfg.DATASET.ATTRIBUTE_NAMES:
            prompts = [(f"a photo of {name}.",) for name in self.attribute_names]
        self.attribute_prompts = prompts or list(self.attribute_prompts)
        if len(self.attribute_names) != len(self.attribute_prompts):
            raise UserError(
                f"DATASET.ATTRIBUTE_NAMES has {len(self.attribute_names)} entries and "
                f"DATASET.ATTRIBUTE_PROMPTS {len(self.attribute_prompts)}: give one entry of prompts per name"
            )

    def _check_classes(self, train_x: Sequence[Datum], *others: Sequence[Datum]) -> None:
        """``UserError`` where a class has no training image; no image at all, where nothing can be trained."""
        name = type(self).__name__
        count = Counter(datum.label for datum in train_x or chain(*others))
        last = max((datum.label for split in (train_x, *others) for datum in split), default=-1)
        missing = [label for label in range(last + 1) if label not in count]
        if missing:
            raise UserError(
                f"{name}: class{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of 0..{last} "
                f"has no {'training ' if train_x else ''}image; every class needs one (are the labels consecutive, is the "
                "folder empty?)"
            )

    @property
    def has_attributes(self) -> bool:
        """Whether a test image carries a known attribute, so that there are groups to report."""
        return any(datum.attribute >= 0 for datum in self.test)

    @classmethod
    def root(cls, cfg: CfgNode) -> Path:
        """``DATASET.ROOT``; ``UserError`` when it is not given or no folder."""
        if not cfg.DATASET.ROOT:
            raise UserError(f"{cls.__name__} needs the folder of the data sets: give --root DIR (or DATASET.ROOT)")
        root = Path(cfg.DATASET.ROOT).expanduser()
        if not root.is_dir():
            raise UserError(f"--root: there is no folder {root.absolute()}")
        return root


def few_shot(data: Sequence[Datum], num_shots: int, seed: int) -> list[Datum]:
    """``num_shots`` images of each class, drawn with ``seed``; all of a class that has fewer; all for -1."""
    if num_shots < 1:
        return list(data)
    by_label: dict[int, list[Datum]] = defaultdict(list)
    for datum in data:
        by_label[datum.label].append(datum)
    draw = random.Random(seeding.derive_seed(seed, seeding.FEW_SHOT))
    return [d for label in sorted(by_label) for d in draw.sample(by_label[label], min(num_shots, len(by_label[label])))]


def subsample_classes(which: str, train: Sequence[Datum], *others: Sequence[Datum]) -> list[list[Datum]]:
    """Keep ``all`` classes, the ``base`` ones (first half, rounded up) or the ``new`` ones (the rest), renumbered."""
    splits = [train, *others]
    if which == "all":
        return [list(split) for split in splits]
    labels = sorted({datum.label for datum in train or chain(*others)})
    half = (len(labels) + 1) // 2
    choices = {"base": labels[:half], "new": labels[half:]}
    new_label = {label: i for i, label in enumerate(choices[which])}
    return [[d.relabelled(new_label[d.label]) for d in split if d.label in new_label] for split in splits]


def digest(root: str, *splits: Sequence[Datum]) -> str:
    """Of the images' places under ``root``, labels and attributes, in order: what makes a run one on the same data.

    The folder ``root`` may move; of images elsewhere the file name counts. Their contents are not read.
    """
    root = os.path.join(root, "")
    sha = hashlib.sha256()
    for split in splits:
        for d in split:
            place = d.impath[len(root) :] if d.impath.startswith(root) else os.path.basename(d.impath)
            sha.update(f"{place}\t{d.label}\t{d.attribute}\n".encode())
        sha.update(b"\n")
    return sha.hexdigest()[:16]


def build_dataset(cfg: CfgNode) -> DatasetBase:
    """The data set named by ``DATASET.NAME``."""
    return DATASET_REGISTRY.get(cfg.DATASET.NAME, "DATASET.NAME")(cfg)


def told_apart(classnames: Sequence[str]) -> list[str]:
    """The names of the classes for a reader: those that several classes have get the class's number, "crane (class 134)".

    For tables, pictures and columns only. Prompts keep the names as they are: ImageNet has two missiles.
    """
    count = Counter(classnames)
    return [name if count[name] == 1 else f"{name} (class {i})" for i, name in enumerate(classnames)]


def attribute_name(dataset: DatasetBase, attribute: int) -> str:
    names = dataset.attribute_names
    if attribute < 0:
        return "unknown"
    return names[attribute] if 0 <= attribute < len(names) else str(attribute)
