"""Images and what is known of them: ``Datum``, ``DatasetBase``, few-shot samples, choices of classes.

Names and behaviour are Dassl's. One difference: ``Datum`` carries the (spurious) attribute.
"""

from __future__ import annotations

import copy
import hashlib
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data import seeding
from oodprompt.data.columns import Images
from oodprompt.data.datum import Datum as Datum  # its documented place, as in Dassl
from oodprompt.errors import UserError

NAME_TEMPLATE = "a photo of {}."  # what zero-shot CLIP is asked of an attribute value that has a name and no prompts


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
    made_by: Mapping[str, str] = {}  # of features in place of images: ``backbone`` and ``backbone_digest``, where known

    def __init__(
        self,
        cfg: CfgNode,
        train_x: Sequence[Datum],
        val: Sequence[Datum] = (),
        test: Sequence[Datum] = (),
    ) -> None:
        train, *others = (Images.of(split) for split in (train_x, val, test))
        self._check_classes(train, *others)
        train = few_shot(train, cfg.DATASET.NUM_SHOTS, cfg.SEED)
        self.train_x, self.val, self.test = subsample_classes(cfg.DATASET.SUBSAMPLE_CLASSES, train, *others)
        if not self.test:
            raise UserError(f"{type(self).__name__}: the test split is empty; give it at least one image")
        self.lab2cname = _names(self.train_x) if self.train_x else _names(self.val) | _names(self.test)
        self.lab2cname = dict(sorted(self.lab2cname.items()))
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
            prompts = prompts_of_names(self.attribute_names)
        self.attribute_prompts = prompts or list(self.attribute_prompts)
        if len(self.attribute_names) != len(self.attribute_prompts):
            raise UserError(
                f"DATASET.ATTRIBUTE_NAMES has {len(self.attribute_names)} entries and "
                f"DATASET.ATTRIBUTE_PROMPTS {len(self.attribute_prompts)}: give one entry of prompts per name"
            )

    def _check_classes(self, train_x: Images, *others: Images) -> None:
        """``UserError`` where a class has no training image; no image at all, where nothing can be trained."""
        name = type(self).__name__
        known = set(_labels(*([train_x] if train_x else others)))
        last = max(_labels(train_x, *others), default=-1)
        missing = [label for label in range(last + 1) if label not in known]
        if missing:
            raise UserError(
                f"{name}: class{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of 0..{last} "
                f"has no {'training ' if train_x else ''}image; every class needs one (are the labels consecutive, is the "
                "folder empty?)"
            )

    @property
    def has_attributes(self) -> bool:
        """Whether a test image carries a known attribute, so that there are groups to report."""
        return bool((self.test.attribute >= 0).any())

    @property
    def has_pixels(self) -> bool:
        """Whether there are images; else there are their features alone."""
        return self.test.vectors is None

    def need_pixels(self, who: str) -> None:
        """``UserError`` where ``who``, "VPT changes ...", needs images and there are features alone."""
        if not self.has_pixels:
            raise UserError(
                f"{who}, and {type(self).__name__} has image features alone; train on the images themselves"
            )

    @classmethod
    def root(cls, cfg: CfgNode) -> Path:
        """``DATASET.ROOT``; ``UserError`` when it is not given or no folder."""
        if not cfg.DATASET.ROOT:
            raise UserError(f"{cls.__name__} needs the folder of the data sets: give --root DIR (or DATASET.ROOT)")
        root = Path(cfg.DATASET.ROOT).expanduser()
        if not root.is_dir():
            raise UserError(f"--root: there is no folder {root.absolute()}")
        return root


def few_shot(data: Sequence[Datum], num_shots: int, seed: int) -> Images:
    """``num_shots`` images of each class, drawn with ``seed``; all of a class that has fewer; all for -1."""
    images = Images.of(data)
    if num_shots < 1:
        return images
    draw = random.Random(seeding.derive_seed(seed, seeding.FEW_SHOT))
    by_label = (np.flatnonzero(images.label == label).tolist() for label in np.unique(images.label))
    return images.take([i for mine in by_label for i in draw.sample(mine, min(num_shots, len(mine)))])


def subsample_classes(which: str, train: Sequence[Datum], *others: Sequence[Datum]) -> list[Images]:
    """Keep ``all`` classes, the ``base`` ones (first half, rounded up) or the ``new`` ones (the rest), renumbered."""
    splits = [Images.of(split) for split in (train, *others)]
    if which == "all":
        return splits
    labels = np.array(sorted(set(_labels(*(splits[:1] if train else splits[1:])))))
    half = (len(labels) + 1) // 2
    kept = {"base": labels[:half], "new": labels[half:]}[which]
    indices = [np.flatnonzero(np.isin(split.label, kept)) for split in splits]
    return [s.take(index, np.searchsorted(kept, s.label[index])) for s, index in zip(splits, indices, strict=True)]


def _labels(*splits: Images) -> list[int]:
    """The labels that occur, of each split in order."""
    return [label for split in splits for label in np.unique(split.label).tolist()]


def _names(images: Images) -> dict[int, str]:
    """Label -> class name, in the order of labels; that of the last image where a class has several names."""
    labels, from_the_end = np.unique(images.label[::-1], return_index=True)
    names = images.name[::-1][from_the_end]
    return {int(label): images.names[name] for label, name in zip(labels, names, strict=True)}


def digest(root: str, *splits: Sequence[Datum]) -> str:
    """Of the images' places under ``root``, labels and attributes, in order: what makes a run one on the same data.

    The folder ``root`` may move; of images elsewhere the file name counts. Their contents are not read.
    """
    root = os.path.join(root, "")
    sha = hashlib.sha256()
    for images in map(Images.of, splits):
        numbers = zip(images.impaths, images.label.tolist(), images.attribute.tolist(), strict=True)
        for path, label, attribute in numbers:
            place = path[len(root) :] if path.startswith(root) else os.path.basename(path)
            sha.update(f"{place}\t{label}\t{attribute}\n".encode("utf-8", "surrogateescape"))
        sha.update(b"\n")
    return sha.hexdigest()[:16]


def prompts_of_names(names: Sequence[str]) -> list[Sequence[str]]:
    """The prompts of attribute values that have names and no prompts of their own, one each."""
    return [(NAME_TEMPLATE.replace("{}", name),) for name in names]


def with_names(dataset: DatasetBase, names: Sequence[str], prompts: Sequence[Sequence[str]]) -> DatasetBase:
    """The data set with ``names`` as the values of its attribute, in place of its own."""
    named = copy.copy(dataset)
    named.attribute_names, named.attribute_prompts = names, prompts
    return named


def names_are_auto(cfg: CfgNode) -> bool:
    """Whether DATASET.ATTRIBUTE_NAMES asks an audit to propose the names of the attribute.

    ``UserError`` for prompts that belong to other names, and for TRAINER.PSEUDO_NAMES beside auto.
    """
    auto = tuple(cfg.DATASET.ATTRIBUTE_NAMES) == ("auto",)
    if auto and cfg.DATASET.ATTRIBUTE_PROMPTS:
        raise UserError(
            "DATASET.ATTRIBUTE_PROMPTS: prompts belong to names; give DATASET.ATTRIBUTE_NAMES, too, not auto"
        )
    if cfg.TRAINER.PSEUDO_NAMES and auto:
        raise UserError("TRAINER.PSEUDO_NAMES and DATASET.ATTRIBUTE_NAMES auto: give one of them")
    if cfg.TRAINER.PSEUDO_NAMES and cfg.DATASET.ATTRIBUTE_PROMPTS:
        raise UserError(
            f"TRAINER.PSEUDO_NAMES: the prompts are '{NAME_TEMPLATE}' with each name; leave out DATASET.ATTRIBUTE_PROMPTS"
        )
    return auto


def with_own_names(cfg: CfgNode) -> CfgNode:
    """The config by which a data set is built: where names are proposed, its own names and labels stay what they are."""
    if not names_are_auto(cfg):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASET.ATTRIBUTE_NAMES = ()
    cfg.freeze()
    return cfg


def build_dataset(cfg: CfgNode) -> DatasetBase:
    """The data set named by ``DATASET.NAME``."""
    cfg = with_own_names(cfg)
    return DATASET_REGISTRY.get(cfg.DATASET.NAME, "DATASET.NAME")(cfg)


def told_apart(classnames: Sequence[str]) -> list[str]:
    """The names of the classes for a reader: those that several classes have get the class's number, "crane (class 134)".

    For tables, pictures and columns only. Prompts keep the names as they are: ImageNet has two missiles.
    """
    count = Counter(classnames)
    return [name if count[name] == 1 else f"{name} (class {i})" for i, name in enumerate(classnames)]


def attribute_values(dataset: DatasetBase) -> int:
    """A, how many values the attribute has: those that have names, and those that an image of any split has."""
    splits = (Images.of(split) for split in (dataset.train_x, dataset.val, dataset.test))
    return max(len(dataset.attribute_names), *(int(split.attribute.max(initial=-1)) + 1 for split in splits))


def attribute_name(dataset: DatasetBase, attribute: int) -> str:
    names = dataset.attribute_names
    if attribute < 0:
        return "unknown"
    return names[attribute] if 0 <= attribute < len(names) else str(attribute)
