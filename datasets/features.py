"""Features: image features that you have already, in place of images; no code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from oodprompt.datasets.file_lists import FilesDataset, sorted_values, split_off_validation
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.columns import Images, Texts
from oodprompt.data.dataset import prompts_of_names
from oodprompt.data.feature_files import ENDINGS, FEATURES, FeatureFile, is_feature_file, read_feature_file
from oodprompt.data.tables import SPLITS, missing
from oodprompt.data.vectors import Vectors
from oodprompt.errors import UserError, nearest

declare(
    "DATASET.FEATURES",
    {
        "FILE": (
            "features.npz",
            "An .npz or .safetensors file of image features, or a folder of such; absolute or under ROOT.",
        ),
        "CLASS_NAMES": ((), "Names of the classes, in the order of their numbers; empty: class_names of the file."),
    },
)

_SPLIT_OF_FILE = re.compile(r"(train|val|test)([-_.].*)?")


@DATASET_REGISTRY.register()
class Features(FilesDataset):
    """Your own image features in place of images: an .npz, a .safetensors, or a folder of such.

    Prompt learners that leave the image tower alone and debiasers that take no regions train on them; the results are
    those of the images. ``oodprompt features`` writes such a file from images, and ``oodprompt.write_features`` from
    arrays. Rows need not have length 1. Without rows of split val, DATASET.VAL_PERCENT of the training rows of each class
    are set aside.
    """

    tree = """
        ROOT/features.npz                (DATASET.FEATURES.FILE)
          image_features [N, d]          floats, by the CLIP that --backbone names
          label [N]                      numbers from 0, or names
          split [N]                      train, val, test, or 0, 1, 2
          attribute [N]                  optional: numbers from 0 (-1: unknown), or names ("": unknown)
          class_names, attribute_names, backbone, template, image [N], caption [N]    optional
        or a folder of such: train.npz, val.npz, test-1.safetensors, ... (the name gives the split where no entry does)
    """

    def __init__(self, cfg: CfgNode) -> None:
        path = Path(cfg.DATASET.FEATURES.FILE).expanduser()
        path = path if path.is_absolute() else self.root(cfg) / path
        files = [read_feature_file(file) for file in self._files(path)]
        _check_alike(files)
        vectors = Vectors([file.features for file in files])
        for row, why in vectors.unusable():
            raise UserError(f"{_place(files, row)} of {FEATURES} {why}; take the row out")
        label, names = _labels(files, tuple(cfg.DATASET.FEATURES.CLASS_NAMES))
        split = _splits(files)
        if not (split == 2).any():
            raise UserError(f"{path}: no row has the split test (or 2); the data set needs some")
        attribute = self._attributes(cfg, path, files)
        self.template = files[0].words.get("template", self.template)
        self.made_by = {name: files[0].words.get(name, "") for name in ("backbone", "backbone_digest")}
        domain = _whole_numbers(files, "domain") if all("domain" in file.rows for file in files) else attribute
        order = np.arange(len(vectors))
        captions = _texts(files, "caption")
        images = Images(_paths(files), order, label, domain, attribute, label, names, captions, vectors)
        train, val, test = (images.take(np.flatnonzero(split == number)) for number in range(3))
        _check_trained(path, train, names)
        if not val and train:
            train, val = split_off_validation(cfg, str(path), train)
        super().__init__(cfg, train, val, test)

    @classmethod
    def _files(cls, path: Path) -> list[Path]:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if is_feature_file(file) and not file.name.startswith("."))
            if not files:
                raise cls.missing(f"no file that ends in {' or '.join(ENDINGS)} in {path.absolute()}")
            return files
        if not path.is_file():
            raise cls.missing(f"no file {path.absolute()} (DATASET.FEATURES.FILE)")
        if not is_feature_file(path):
            raise UserError(f"{path}: a file of image features ends in {' or '.join(ENDINGS)}")
        return [path]

    def _attributes(self, cfg: CfgNode, path: Path, files: Sequence[FeatureFile]) -> np.ndarray:
        """The number of each row's attribute, and the names and prompts of the numbers."""
        given, prompts = files[0].lists.get("attribute_names", ()), files[0].lists.get("attribute_prompts", ())
        values = _column(files, "attribute", _default=-1)
        named = values.dtype.kind == "U"
        if named:
            called = np.array(["" if _is_unknown(value, given) else value.strip() for value in values.tolist()])
            known = list(given) or sorted_values({*called.tolist()} - {""})
        else:
            _check_numbers(files, values, "attribute", -1, len(given) or None)
            known = list(given) or [str(number) for number in range(int(values.max()) + 1)]
        wanted = list(cfg.DATASET.ATTRIBUTE_NAMES)
        order = wanted if wanted and set(wanted) == set(known) else known
        if wanted and order is not wanted and known and (len(wanted) != len(known) or set(wanted) & set(known)):
            raise UserError(
                f"DATASET.ATTRIBUTE_NAMES has {'; '.join(wanted)}, but {path} has {'; '.join(known)[:200]}: give exactly these "
                "names, or others for all of them in this order"
            )
        self.attribute_names = tuple(wanted or known)
        is_whole = bool(prompts) and len(prompts) == len(known) and self.attribute_names == tuple(known)
        texts = [tuple(entry.split("|")) for entry in prompts] if is_whole else []
        self.attribute_prompts = texts or prompts_of_names(self.attribute_names)
        number_of = {name: number for number, name in enumerate(order)}
        if not named:
            meaning = np.array([*(number_of[name] for name in known), -1], dtype=np.int32)  # the last is -1
            return meaning[values]
        for row, name in enumerate(called.tolist()):
            if name and name not in number_of:
                raise UserError(f"{_place(files, row)} has the attribute {name!r}: {nearest(name, known)}")
        return np.array([number_of.get(name, -1) for name in called.tolist()], dtype=np.int32)


# --- columns of all files ----------------------------------------------------------------------------------------


def _place(files: Sequence[FeatureFile], row: int) -> str:
    for file in files:
        if row < len(file.features):
            return f"{file.path}: row {row:,}"
        row -= len(file.features)
    raise IndexError(row)


def _check_alike(files: Sequence[FeatureFile]) -> None:
    """``UserError`` where the files of a folder do not go together."""
    first = files[0]
    for file in files[1:]:
        if file.features.shape[1] != first.features.shape[1]:
            widths = f"{file.features.shape[1]} and {first.features.shape[1]} entries"
            raise UserError(
                f"the features of {file.path} and {first.path} have {widths} each; they must be of one CLIP"
            )
        for name in sorted({*file.lists, *file.words, *first.lists, *first.words}):
            one, other = (f.lists.get(name, f.words.get(name)) for f in (file, first))
            if one != other:
                raise UserError(f"{file.path} and {first.path} have different {name}: {one!r} and {other!r}"[:400])
        for name in ("label", "attribute", "domain", "image", "caption"):
            if (name in file.rows) != (name in first.rows):
                raise UserError(f"{file.path} and {first.path}: one has {name} and the other has not")


def _column(files: Sequence[FeatureFile], name: str, _default: int | None = None) -> np.ndarray:
    """Whole numbers (int64) or words [N] of all files; where no file has the column, ``_default``."""
    if name not in files[0].rows and _default is not None:
        return np.full(sum(len(file.features) for file in files), _default, np.int64)
    parts = []
    for file in files:
        if name not in file.rows:
            raise UserError(f"{file.path} has no entry {name!r}; give it one value for each row")
        values = file.rows[name]
        if values.dtype.kind == "S":
            values = np.char.decode(values, "utf-8", "surrogateescape")
        if values.dtype.kind not in "iuU":
            raise UserError(f"{file.path}: {name} must be whole numbers or words, not {values.dtype}")
        parts.append(values if values.dtype.kind == "U" else values.astype(np.int64))
    if len({part.dtype.kind for part in parts}) > 1:
        raise UserError(f"{files[0].path.parent}: {name} has numbers in one file and words in another; use one of them")
    return np.concatenate(parts)


def _whole_numbers(files: Sequence[FeatureFile], name: str) -> np.ndarray:
    values = _column(files, name)
    if values.dtype.kind == "U":
        raise UserError(f"{files[0].path}: {name} must be whole numbers")
    return values


def _check_numbers(files: Sequence[FeatureFile], values: np.ndarray, name: str, low: int, end: int | None) -> None:
    bad = np.flatnonzero((values < low) | (values >= (np.iinfo(np.int32).max if end is None else end)))
    if len(bad):
        row = int(bad[0])
        names = "class_names" if name == "label" else "attribute_names"
        why = f"{names} has {end} entries, 0 to {end - 1}" if end is not None else f"numbers begin with {low}"
        raise UserError(f"{_place(files, row)} has the {name} {values[row]}, but {why}")


def _is_unknown(value: str, names: Sequence[str]) -> bool:
    """Whether a word says that a value is missing, and is none of the ``names`` that the file gives."""
    return missing(value) and value.strip() not in names


def _labels(files: Sequence[FeatureFile], wanted: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """(label of each row, class names)."""
    values, names = _column(files, "label"), list(wanted or files[0].lists.get("class_names", ()))
    if values.dtype.kind != "U":
        if not names:
            raise UserError(
                f"{files[0].path} has numbered labels and no class_names, which prompts are made of; add them to the file, "
                "or give DATASET.FEATURES.CLASS_NAMES \"('cat', 'dog')\""
            )
        _check_numbers(files, values, "label", 0, len(names))
        return values, names
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(
            f"{files[0].path}: class_names holds a name twice, {twice[0]}, and labels are names; give numbers as labels"
        )
    distinct, row, inverse = np.unique(values, return_index=True, return_inverse=True)
    for name, first in zip(distinct.tolist(), row.tolist(), strict=True):
        if _is_unknown(name, names):
            raise UserError(
                f"{_place(files, first)} has the label {name!r}, which says that it is not known; take the row out, or "
                "list the name in class_names"
            )
    names = names or sorted_values(distinct.tolist())
    number_of = {name: number for number, name in enumerate(names)}
    for name, first in zip(distinct.tolist(), row.tolist(), strict=True):
        if name not in number_of:
            raise UserError(f"{_place(files, first)} has the label {name!r}: {nearest(name, names)}")
    return np.array([number_of[name] for name in distinct.tolist()], np.int32)[inverse.reshape(-1)], names


def _splits(files: Sequence[FeatureFile]) -> np.ndarray:
    """0, 1 or 2 of each row, for train, val and test."""
    parts = []
    for file in files:
        if "split" not in file.rows:
            found = _SPLIT_OF_FILE.fullmatch(file.path.stem)
            if found is None:
                raise UserError(
                    f"{file.path} has no entry 'split': give train, val or test for each row, or a folder of files that are "
                    "named train, val and test"
                )
            parts.append(np.full(len(file.features), SPLITS[found[1]]))
            continue
        values = _column([file], "split")
        distinct, row, inverse = np.unique(values, return_index=True, return_inverse=True)
        words = [str(value).strip().lower() for value in distinct.tolist()]
        for word, first in zip(words, row.tolist(), strict=True):
            if word not in SPLITS:
                raise UserError(f"{file.path}: row {first:,} has the split {word!r}; use train, val, test, 0, 1 or 2")
        parts.append(np.array([SPLITS[word] for word in words])[inverse.reshape(-1)])
    return np.concatenate(parts)


def _check_trained(path: Path, train: Images, names: Sequence[str]) -> None:
    trained = set(train.label.tolist())
    for number, name in enumerate(names):
        if trained and number not in trained:
            raise UserError(f"{path}: class {name!r} has no training row; every class needs one")


def _texts(files: Sequence[FeatureFile], name: str) -> Texts | None:
    if name not in files[0].rows:
        return None
    return Texts(str(text).strip() for file in files for text in file.rows[name].tolist())


def _paths(files: Sequence[FeatureFile]) -> Texts:
    """What each row is called: its ``image``, else its place in its file."""
    named = _texts(files, "image")
    if named is not None:
        return named
    return Texts.of_paths([f"{file.path}[{row}]" for file in files for row in range(len(file.features))])
