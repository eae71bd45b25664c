"""Settings of COCO: categories whose images are chosen so that another category is seen with one of them.

Source: Varma et al., "RaVL", NeurIPS 2024, section 3.2 and appendix B: feature and label from the annotated categories,
label sets of 2 to 5 classes, original captions, fine-tuning sets from the training images and evaluation sets from the
held-back ones, boxes of the annotation. The paper says no more, and its builder is not public; decided here:

* An image belongs to a label set when it shows exactly one of its categories, which is its label. The feature is a
  category outside the set. Images in which one of these is annotated as a crowd only roughly outlined are not used.
* Fine-tuning sets have equally many images of each class, as many as are asked for or the rarest cell allows.
* With captions, an image is used for fine-tuning only when one of them names its label (also in the plural); one of
  these, drawn at random, is its caption.
* val and test are two parts of COCO's val images; half of the images of each class have the feature, so that V is 0;
  classes differ in size where images are few.
* Pairs and the other labels of a set are drawn at random among those with enough images in every cell.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oodprompt.data.seeding import derive_seed
from oodprompt.errors import UserError, nearest
from oodprompt.log import progress
from oodprompt.studies.planting import Table, check_v, contingency
from oodprompt.studies.writing import Picture, Region, Sizes, build_once, digest, hold_out, write_setting

LABEL_SET_SIZES = (2, 5)

_PAIRS, _PLANT = range(2, 4)  # what random numbers are for


class CocoPair(NamedTuple):
    """A candidate: the category that is the feature, the label it is to go with, and the label set, sorted."""

    feature: str
    label: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class CocoImages:
    """The annotation of n images over K categories.

    ``files`` names of images; ``categories`` their K names; ``shown`` [n, K] whether an image has an object of a
    category; ``crowded`` [n, K] whether it has a crowd of it; ``boxes`` of each image's objects, (left, top, right,
    bottom, category) in pixels; ``captions`` of each image, empty without a file of captions.
    """

    files: tuple[str, ...]
    categories: tuple[str, ...]
    shown: NDArray[np.bool_]
    crowded: NDArray[np.bool_]
    boxes: tuple[tuple[Region, ...], ...]
    captions: tuple[tuple[str, ...], ...]
    _names: dict[int, NDArray[np.bool_]] = field(default_factory=dict, repr=False, compare=False)

    def numbers(self, names: Sequence[str]) -> list[int]:
        """The columns of categories; ``UserError`` for a name that is not there."""
        for name in names:
            if name not in self.categories:
                raise UserError(f"COCO has no category {name!r}: {nearest(name, self.categories)}")
        return [self.categories.index(name) for name in names]

    def cells(self, feature: str, labels: Sequence[str], named: bool) -> list[tuple[NDArray[np.int64], ...]]:
        """The usable images of each label without and with the feature; if ``named``, those whose captions name it."""
        e, *ys = self.numbers([feature, *labels])
        usable = (self.shown[:, ys].sum(axis=1) == 1) & ~self.crowded[:, [e, *ys]].any(axis=1)
        cells = []
        for y in ys:
            mine = np.flatnonzero(usable & self.shown[:, y])
            if named:
                mine = mine[self._named(y)[mine]]
            cells.append(tuple(mine[self.shown[mine, e] == present] for present in (False, True)))
        return cells

    def _named(self, y: int) -> NDArray[np.bool_]:
        """Whether a caption of an image that shows category ``y`` names it, [n]; found once."""
        if y not in self._names:
            named = np.zeros(len(self.files), dtype=bool)
            for i in np.flatnonzero(self.shown[:, y]):
                named[i] = bool(naming(self.captions[i], self.categories[y]))
            self._names[y] = named
        return self._names[y]


def naming(captions: Sequence[str], label: str) -> list[str]:
    """The captions that name the category, in the singular or with s or es, whatever the case."""
    pattern = re.compile(rf"\b{re.escape(label)}(?:e?s)?\b", re.IGNORECASE)
    return [caption for caption in captions if pattern.search(caption)]


def read_coco(annotation_file: str | Path, captions_file: str | Path | None = None) -> CocoImages:
    """COCO's instances_*.json and captions_*.json; a file is read once per process while it does not change.

    Boxes are cut at the image's edges; those without any width or height left are dropped. Raises ``UserError`` for a
    missing file or one that is not of COCO's form.
    """
    return _read(*(_with_time(path) for path in (annotation_file, captions_file)))


def _with_time(path: str | Path | None) -> tuple[Path, int] | None:
    if path is None:
        return None
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise UserError(
            f"no file {path}; put COCO's annotations there (annotations_trainval2017.zip of cocodataset.org)"
        )
    return path, path.stat().st_mtime_ns


@lru_cache(maxsize=4)
def _read(annotations: tuple[Path, int], captions: tuple[Path, int] | None) -> CocoImages:
    content = _json(annotations[0], ("images", "annotations", "categories"))
    try:
        images = {image["id"]: image for image in content["images"]}
        categories = tuple(category["name"] for category in content["categories"])
        column = {category["id"]: k for k, category in enumerate(content["categories"])}
        row = {key: i for i, key in enumerate(images)}
        shown, crowded = np.zeros((2, len(images), len(categories)), dtype=bool)
        boxes: dict[int, list[Region]] = defaultdict(list)
        for note in content["annotations"]:
            i, k = row[note["image_id"]], column[note["category_id"]]
            if note.get("iscrowd"):
                crowded[i, k] = True
                continue
            box = _corners(note["bbox"], images[note["image_id"]])
            if box is not None:
                shown[i, k] = True
                boxes[i].append((*box, categories[k]))
        files = tuple(image["file_name"] for image in images.values())
        texts: dict[int, list[str]] = defaultdict(list)
        for note in _json(captions[0], ("annotations",))["annotations"] if captions else ():
            if note["image_id"] in row:
                texts[row[note["image_id"]]].append(" ".join(note["caption"].split()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        where = f"{annotations[0]}" + (f" or {captions[0]}" if captions else "")
        raise UserError(
            f"{where} is not of COCO's form ({type(error).__name__}: {error}); get the file again"
        ) from error
    everything = range(len(files))
    return CocoImages(
        files,
        categories,
        shown,
        crowded,
        tuple(tuple(boxes[i]) for i in everything),
        tuple(tuple(texts[i]) for i in everything),
    )


def _json(path: Path, keys: Sequence[str]) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; get the file again") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}; expected a COCO file with {', '.join(keys)}")
    return content


def _corners(bbox: Sequence[float], image: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """COCO's (x, y, width, height) as (left, top, right, bottom) within the image; None if nothing is left."""
    x, y, width, height = map(float, bbox)
    left, right = (min(max(v, 0.0), float(image["width"])) for v in (x, x + width))
    top, bottom = (min(max(v, 0.0), float(image["height"])) for v in (y, y + height))
    return (left, top, right, bottom) if right > left and bottom > top else None


def coco_pairs(
    annotation_file: str | Path,
    captions_file: str | Path | None = None,
    evaluation_file: str | Path | None = None,
    count: int = 520,
    sizes: tuple[int, int] = LABEL_SET_SIZES,
    min_images: int = 50,
    min_evaluation: int = 10,
    seed: int = 0,
) -> list[CocoPair]:
    """``count`` different pairs (feature, label) with their label sets, drawn at random; the paper has 520 sets.

    A label set has ``sizes[0]`` to ``sizes[1]`` classes, its size drawn first. Every cell (label, with or without the
    feature) has ``min_images`` images or more in ``annotation_file`` (whose captions name the label, if
    ``captions_file`` is given) and ``min_evaluation`` in ``evaluation_file`` (if given). Fewer pairs come back when
    no more are found. Raises ``UserError`` for sizes that cannot be, and when no pair is found at all.
    """
    if not 2 <= sizes[0] <= sizes[1]:
        raise UserError(f"a label set has two or more classes, and {sizes} is asked for")
    train = read_coco(annotation_file, captions_file)
    evaluation = read_coco(evaluation_file) if evaluation_file is not None else None
    if len(train.categories) < sizes[0] + 1:
        raise UserError(
            f"{annotation_file} has {len(train.categories)} categories; {sizes[0]} labels and a feature need more"
        )
    rng = np.random.default_rng(derive_seed(seed, _PAIRS))
    enough = _apart(train) >= min_images
    if evaluation is not None:
        columns = evaluation.numbers(train.categories)
        enough &= (_apart(evaluation) >= min_evaluation)[columns][:, columns]
    candidates = np.argwhere(enough)
    found: list[CocoPair] = []
    bar = progress.over(rng.permutation(candidates), "Drawing pairs", "pair")
    for e, a in bar:
        if len(found) == count:
            break
        pair = _label_set(train, e, a, np.flatnonzero(enough[e]), sizes, rng)
        if pair is None or _smallest_cell(train, pair, captions_file is not None) < min_images:
            continue
        if evaluation is None or _smallest_cell(evaluation, pair, False) >= min_evaluation:
            found.append(pair)
    if not found:
        raise UserError(
            f"{annotation_file}: no pair of categories has {min_images} images in every cell (and {min_evaluation} for "
            "evaluation); ask for fewer images or smaller label sets"
        )
    return found


def _apart(coco: CocoImages) -> NDArray[np.int64]:
    """The smaller number of images that show category y with and without category e, [e, y]; 0 where e is y."""
    shown = coco.shown.astype(np.float32)
    both = (shown.T @ shown).astype(np.int64)
    return np.minimum(both, both.diagonal()[None, :] - both)


def _label_set(
    coco: CocoImages, e: int, a: int, others: NDArray[np.int64], sizes: tuple[int, int], rng: np.random.Generator
) -> CocoPair | None:
    others = rng.permutation(others[(others != a) & (others != e)])
    size = int(rng.integers(sizes[0], sizes[1] + 1))
    if len(others) < size - 1:
        return None
    labels = sorted(coco.categories[k] for k in (a, *others[: size - 1]))
    return CocoPair(coco.categories[e], coco.categories[a], tuple(labels))


def _smallest_cell(coco: CocoImages, pair: CocoPair, named: bool) -> int:
    return min(len(images) for cell in coco.cells(pair.feature, pair.labels, named) for images in cell)


def build_coco_setting(
    root: str | Path,
    out: str | Path,
    pair: CocoPair,
    V: float,
    n_train: int = 10_000,
    n_val: int = 1000,
    n_test: int = 1000,
    val_share: float = 0.05,
    seed: int = 0,
    year: str = "2017",
) -> Path:
    """The folder of a setting in which ``pair.feature`` is seen with ``pair.label``; built under ``out`` if missing.

    ``root`` is COCO's own layout: annotations/{instances,captions}_{train,val}2017.json, train2017/, val2017/ (the
    captions of train may be absent: then all images are used and captions are empty). Images are named by their
    absolute path, not copied. ``V`` is Cramer's V between feature and label over the fine-tuning set of at most
    ``n_train`` images, of which ``val_share`` is held out. For the files see ``write_setting``, for how images are
    chosen the top of this file. setting.json has the numbers that were reached; ``seed`` fixes everything.

    Raises ``UserError`` for missing files, an unknown category, a feature within the label set, V outside [0, 1], and
    where images are too few for one of each cell.
    """
    root, labels, sizes = (
        Path(root).expanduser().absolute(),
        tuple(pair.labels),
        Sizes(n_train, n_val, n_test, val_share),
    )
    _check(pair, V, sizes)
    asked = {"kind": "coco", "root": str(root), "year": year, **pair._asdict(), "v_asked": float(V), "seed": seed}
    asked["asked"] = sizes._asdict()
    name = "-".join(["coco", pair.feature, "with", pair.label, f"v{V:g}", f"seed{seed}", digest(asked)]).replace(
        " ", "_"
    )

    def fill(temporary: Path) -> None:
        rng = np.random.default_rng(
            derive_seed(seed, _PLANT, round(V * 1e6), *"|".join([pair.feature, *labels]).encode())
        )
        files = {split: root / "annotations" / f"instances_{split}{year}.json" for split in ("train", "val")}
        captions = root / "annotations" / f"captions_train{year}.json"
        train = read_coco(files["train"], captions if captions.is_file() else None)
        evaluation = read_coco(files["val"])
        chosen = _fine_tuning(train, pair, V, sizes, captions.is_file(), rng)
        splits = {split: _pictures(train, root / f"train{year}", part, labels, rng) for split, part in chosen.items()}
        for split, part in _evaluation(evaluation, pair, sizes, rng).items():
            splits[split] = _pictures(evaluation, root / f"val{year}", part, labels, rng)
        setting = {k: v for k, v in asked.items() if k not in ("label", "labels")}
        write_setting(temporary, splits, setting | {"target": pair.label, "classes": list(labels)})

    return build_once(Path(out).expanduser() / name, "setting.json", fill)


def _check(pair: CocoPair, V: float, sizes: Sizes) -> None:
    if len(set(pair.labels)) < max(2, len(pair.labels)) or pair.label not in pair.labels:
        raise UserError(
            f"the label set {pair.labels} must hold two or more different classes, {pair.label!r} among them"
        )
    if pair.feature in pair.labels:
        raise UserError(f"the feature {pair.feature!r} is in the label set {pair.labels}; take it out")
    check_v(V)
    sizes.check(len(pair.labels))


class _Chosen(NamedTuple):
    label: int
    present: bool
    image: int  # its number


def _fine_tuning(
    coco: CocoImages, pair: CocoPair, V: float, sizes: Sizes, named: bool, rng: np.random.Generator
) -> dict[str, list[_Chosen]]:
    """train and held_out, with the correlation."""
    cells = coco.cells(pair.feature, pair.labels, named)
    have = np.array([[len(images) for images in cell] for cell in cells])
    table = fitting_table(have, pair.labels.index(pair.label), V, sizes.train // len(cells), rng)
    if table is None:
        raise UserError(
            f"the training images are too few for Cramer's V {V:g} between {pair.feature} and {pair.label}: of each "
            f"label without and with it there are {dict(zip(pair.labels, have.tolist(), strict=True))}; "
            "take other labels"
        )
    aside = hold_out(table, sizes.val_share)
    splits: dict[str, list[_Chosen]] = {"train": [], "held_out": []}
    for y, cell in enumerate(cells):
        for a, images in enumerate(cell):
            drawn = [_Chosen(y, bool(a), int(i)) for i in rng.permutation(images)[: table[y, a]]]
            splits["held_out"] += drawn[: aside[y, a]]
            splits["train"] += drawn[aside[y, a] :]
    return {split: [part[i] for i in rng.permutation(len(part))] for split, part in splits.items()}


def fitting_table(have: Table, target: int, V: float, most: int, rng: np.random.Generator) -> Table | None:
    """The largest table of ``contingency`` with equally many images of each class that the images at hand can fill.

    ``have`` [C, 2] is how many there are of each cell, ``most`` the most of a class; None where not even two of each
    class fit. Where rounding makes the need for images jump, a table of a few images less may come back.
    """
    each = most
    turn = rng.integers(2**32)
    while each >= 2:
        table = contingency([each] * len(have), target, V, np.random.default_rng(turn))
        if (table <= have).all():
            return table
        fit = np.min((have + 1) / np.maximum(table - 1, 1), where=table > have, initial=1.0)
        each = min(each - 1, math.ceil(each * fit))
    return None


def _evaluation(coco: CocoImages, pair: CocoPair, sizes: Sizes, rng: np.random.Generator) -> dict[str, list[_Chosen]]:
    """val and test: of each class as many with the feature as without."""
    splits: dict[str, list[_Chosen]] = {"val": [], "test": []}
    most = {"val": sizes.val // (2 * len(pair.labels)), "test": sizes.test // (2 * len(pair.labels))}
    for y, cell in enumerate(coco.cells(pair.feature, pair.labels, named=False)):
        have = min(map(len, cell))
        val = min(most["val"], have * most["val"] // sum(most.values()))
        counts = {"val": val, "test": min(most["test"], have - val)}
        if min(counts.values()) < 1:
            raise UserError(
                f"the images for evaluation are too few: {pair.labels[y]} has {len(cell[0])} without {pair.feature} "
                f"and {len(cell[1])} with it, and val and test each need one of both; take other labels"
            )
        for a, images in enumerate(cell):
            drawn = [_Chosen(y, bool(a), int(i)) for i in rng.permutation(images)]
            splits["val"] += drawn[:val]
            splits["test"] += drawn[val : val + counts["test"]]
    return splits


def _pictures(
    coco: CocoImages, folder: Path, chosen: Sequence[_Chosen], labels: Sequence[str], rng: np.random.Generator
) -> list[Picture]:
    pictures = []
    for label, present, index in chosen:
        path = folder / coco.files[index]
        if not path.is_file():
            raise UserError(f"no image {path}, which the annotations name; put COCO's images into {folder}")
        captions = naming(coco.captions[index], labels[label])
        caption = captions[rng.integers(len(captions))] if captions else ""
        pictures.append(Picture(str(path), labels[label], present, caption, coco.boxes[index]))
    return pictures
