"""Settings of MNIST and FashionMNIST: an item in one quadrant, and a red rectangle in another that goes with a class.

Source: Varma et al., "RaVL: Discovering and Mitigating Spurious Correlations in Fine-Tuned Vision-Language Models",
NeurIPS 2024, section 3.2 and appendix B, and the authors' builder for MNIST.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from oodprompt.data.seeding import derive_seed
from oodprompt.data.tables import read_rows, write_rows
from oodprompt.errors import UserError, nearest
from oodprompt.log import progress
from oodprompt.studies.planting import apportion, check_v, class_counts, contingency
from oodprompt.studies.writing import Picture, Region, Sizes, build_once, digest, hold_out, write_setting

Pixels = NDArray[np.uint8]


class Kind(NamedTuple):
    """A data set of 28 x 28 items: the folder that torchvision keeps it in, and its classes by number."""

    folder: str
    classes: tuple[str, ...]


KINDS = {
    "mnist": Kind("MNIST", ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")),
    "fashion": Kind(
        "FashionMNIST",
        ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}
FEATURE = "rectangle"
EMPTY = "empty"
# The paper gives these for both data sets.
CAPTIONS = (
    "the image shows a {}",
    "the digit appears to be {}",
    "there is an image showing a {}",
    "the number is a {}",
)
SIDE = 28
QUADRANTS = ((0, 0, 28, 28), (28, 0, 56, 28), (0, 28, 28, 56), (28, 28, 56, 56))  # left, top, right, bottom

_RED = (255, 0, 0)
_POOL = 2  # images of the pool for each one of a class, with the feature and again without, as of the paper's 40,000
_BASE_COLUMNS = ("image", "split", "label", "present", "item", "place", "rectangle", "caption")
_ITEM_PARTS = {"train": "train", "val": "t10k", "test": "t10k"}
_BASE, _PLANT = range(2)  # what random numbers are for


class BaseImage(NamedTuple):
    """A row of base.csv. ``item`` counts within the data set's own split, train for train and test for val and test;
    ``place`` and ``rectangle`` are quadrants, ``rectangle`` -1 where there is none.
    """

    image: str
    split: str
    label: int
    present: bool
    item: int
    place: int
    rectangle: int
    caption: str


def read_idx(path: str | Path) -> Pixels:
    """The array of unsigned bytes in an idx file, or in ``path`` + ".gz" or a path that ends so.

    The format: two zero bytes, 0x08 (unsigned byte), the number of dimensions, each dimension as a big-endian 32-bit
    number, then the values, last dimension fastest. Raises ``UserError`` for a file that is missing, cannot be
    unpacked, is of another type, or is shorter or longer than its dimensions say.
    """
    path = Path(path)
    if not path.is_file() and path.with_name(path.name + ".gz").is_file():
        path = path.with_name(path.name + ".gz")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise UserError(f"no file {path.absolute()}, nor {path.name}.gz beside it; put the idx file there") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; get the file again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"{path} is not an idx file of bytes (it starts with {content[:4].hex()}); get the file again")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise UserError(f"{path} ends within its header; get the file again")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise UserError(
            f"{path} holds {len(content) - start:,} values and its header says {math.prod(shape):,}; get the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def read_items(kind: str, root: str | Path, part: str, download: bool = False) -> tuple[Pixels, Pixels]:
    """(images [n, 28, 28], labels [n]) of the ``part`` "train" or "t10k".

    Looked for as torchvision keeps them, in ``root``/MNIST/raw or ``root``/FashionMNIST/raw, then in ``root`` itself;
    with ``download``, torchvision fetches what is missing. Raises ``UserError`` where files are missing or disagree.
    """
    root, known = Path(root).expanduser(), kind_of(kind)
    names = [f"{part}-{what}-ubyte" for what in ("images-idx3", "labels-idx1")]
    places = (root / known.folder / "raw", root)
    folder = next((place for place in places if all(_has(place, name) for name in names)), None)
    if folder is None and download:
        folder = _downloaded(known, root)
    if folder is None:
        raise UserError(
            f"no {names[0]} and {names[1]} (or .gz) in {places[0].absolute()} or {root.absolute()}; put the four files "
            f"of {known.folder} there, or let them be downloaded"
        )
    images, labels = (read_idx(folder / name) for name in names)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{folder}: {part} has images {images.shape} and labels {labels.shape}; expected [n, 28, 28], [n]"
        )
    if len(labels) and labels.max() >= len(known.classes):
        raise UserError(f"{folder / names[1]}: label {labels.max()}; {known.folder} has {len(known.classes)} classes")
    return images, labels


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / f"{name}.gz").is_file()


def _downloaded(known: Kind, root: Path) -> Path:
    try:
        getattr(datasets, known.folder)(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download {known.folder} into {root}: {error}; put its four idx files into "
            f"{root / known.folder / 'raw'}"
        ) from error
    return root / known.folder / "raw"


def kind_of(kind: str) -> Kind:
    """The data set of that name; ``UserError`` for another."""
    if kind not in KINDS:
        raise UserError(f"there is no kind of quadrant images {kind!r}: {nearest(kind, KINDS)}")
    return KINDS[kind]


def class_index(kind: str, target: str | int) -> int:
    """The number of a class given by name or number; ``UserError`` for one that is not there."""
    classes = kind_of(kind).classes
    if str(target).isdecimal() and int(target) < len(classes):
        return int(target)
    if target not in classes:
        raise UserError(f"{kind} has no class {target!r}: {nearest(str(target), classes)}; or 0 to {len(classes) - 1}")
    return classes.index(target)


def quadrant_image(item: Pixels, place: int, rectangle: int = -1) -> Pixels:
    """The item [28, 28] in quadrant ``place`` and the rectangle in quadrant ``rectangle`` (-1: none), [56, 56, 3]."""
    image = np.zeros((2 * SIDE, 2 * SIDE, 3), dtype=np.uint8)
    left, top, right, bottom = QUADRANTS[place]
    image[top:bottom, left:right] = item[:, :, None]
    if rectangle >= 0:
        left, top, right, bottom = QUADRANTS[rectangle]
        image[top:bottom, left:right] = _RED
    return image


def regions_of(label: str, place: int, rectangle: int) -> list[Region]:
    """The four quadrants with what is in each: the class, "rectangle" or "empty"."""
    content = {rectangle: FEATURE, place: label}
    return [(*box, content.get(i, EMPTY)) for i, box in enumerate(QUADRANTS)]


def build_setting(
    kind: str,
    root: str | Path,
    out: str | Path,
    target: str | int,
    V: float,
    n_train: int = 10_000,
    n_val: int = 1000,
    n_test: int = 1000,
    val_share: float = 0.05,
    seed: int = 0,
    download: bool = False,
) -> Path:
    """The folder of a setting in which the red rectangle goes with class ``target`` (name or number); built if missing.

    ``kind`` is "mnist" or "fashion", ``root`` where its idx files are (``read_items``), ``V`` the Cramer's V between
    rectangle and class over the ``n_train`` images of the fine-tuning set, of which ``val_share`` is held out for early
    stopping. For its files see ``write_setting``; the images lie in a folder of their own beside it (``base_folder``),
    shared by all targets and V at the same kind, seed and sizes. ``val`` and ``test`` are the same in all of these and
    have the rectangle in half of the images of each class; no item is in both. ``seed`` fixes everything.

    The table of the fine-tuning set is that of ``contingency`` for classes of ``class_counts``. Differs from the
    authors' builder: it draws the images of val and test with a rectangle at probability 0.5 and classes as they come,
    where here halves and classes are exact; it may draw an item twice, where here items repeat only when a class has
    too few; and it draws the held-out images from all, where here they are the same share of each class and presence.

    Raises ``UserError`` for an unknown kind or class, V outside [0, 1], too few images, and files that are missing.
    """
    classes, target = kind_of(kind).classes, class_index(kind, target)
    check_v(V)
    sizes = Sizes(n_train, n_val, n_test, val_share)
    sizes.check(len(classes))
    base = base_folder(kind, root, out, sizes, seed, download)
    asked = {"kind": kind, "target": classes[target], "v_asked": float(V), "seed": seed, "asked": sizes._asdict()}
    name = f"{kind}-{classes[target].replace(' ', '_')}-v{V:g}-seed{seed}-{digest(asked)}"
    folder = base.parent / name

    def fill(temporary: Path) -> None:
        rng = np.random.default_rng(derive_seed(seed, _PLANT, list(KINDS).index(kind), target, round(V * 1e6)))
        table = contingency(class_counts(n_train, len(classes), rng), target, V, rng)
        splits = _chosen(read_base(base), table, val_share, rng)
        pictures = {split: [_picture(row, base.name, classes) for row in rows] for split, rows in splits.items()}
        setting = {**asked, "feature": FEATURE, "classes": list(classes), "base": base.name}
        write_setting(temporary, pictures, setting)

    return build_once(folder, "setting.json", fill)


def _chosen(
    rows: Sequence[BaseImage], table: NDArray[np.int64], val_share: float, rng: np.random.Generator
) -> dict[str, list[BaseImage]]:
    """The images of each split; those of the fine-tuning set, as many as in ``table``, are drawn from the pool."""
    pool: dict[tuple[int, int], list[BaseImage]] = {(c, a): [] for c in range(len(table)) for a in (0, 1)}
    for row in rows:
        if row.split == "train":
            pool[row.label, int(row.present)].append(row)
    splits: dict[str, list[BaseImage]] = {"train": [], "held_out": []}
    aside = hold_out(table, val_share)
    for cell, members in pool.items():
        drawn = [members[i] for i in rng.permutation(len(members))[: table[cell]]]
        splits["held_out"] += drawn[: aside[cell]]
        splits["train"] += drawn[aside[cell] :]
    splits = {split: [members[i] for i in rng.permutation(len(members))] for split, members in splits.items()}
    return splits | {split: [row for row in rows if row.split == split] for split in ("val", "test")}


def _picture(row: BaseImage, base: str, classes: Sequence[str]) -> Picture:
    label = classes[row.label]
    regions = regions_of(label, row.place, row.rectangle)
    return Picture(f"../{base}/{row.image}", label, row.present, row.caption, regions)


def base_folder(kind: str, root: str | Path, out: str | Path, sizes: Sizes, seed: int, download: bool = False) -> Path:
    """The folder of the images that settings name: ``images/*.png`` and ``base.csv``; built under ``out`` if missing.

    A pool for fine-tuning sets, from the data set's train split: for each class twice as many as a fine-tuning set has,
    with the rectangle and again without (40,000 at n_train 10,000, the paper's number); and val and test, from its
    test split. Quadrants and captions are drawn for each image.
    """
    classes = kind_of(kind).classes
    keys = {"kind": kind, "seed": seed, "train": sizes.train, "val": sizes.val, "test": sizes.test}
    folder = Path(out).expanduser() / f"base-{kind}-seed{seed}-{digest(keys)}"

    def fill(temporary: Path) -> None:
        items = {part: read_items(kind, root, part, download) for part in ("train", "t10k")}
        rng = np.random.default_rng(derive_seed(seed, _BASE, list(KINDS).index(kind)))
        rows = _base_rows(kind, classes, {part: labels for part, (_, labels) in items.items()}, sizes, rng)
        (temporary / "images").mkdir()
        for row in progress.over(rows, f"Drawing {kind}", "image"):
            images = items[_ITEM_PARTS[row.split]][0]
            pixels = quadrant_image(images[row.item], row.place, row.rectangle)
            Image.fromarray(pixels).save(temporary / row.image, compress_level=1)
        write_rows(temporary / "base.csv", _BASE_COLUMNS, ((*row[:3], int(row.present), *row[4:]) for row in rows))

    return build_once(folder, "base.csv", fill)


def read_base(folder: Path) -> list[BaseImage]:
    """The rows of base.csv."""
    rows = []
    for _, (image, split, label, present, item, place, rectangle, caption) in read_rows(
        folder / "base.csv", _BASE_COLUMNS
    ):
        rows.append(BaseImage(image, split, int(label), present == "1", int(item), int(place), int(rectangle), caption))
    return rows


def _base_rows(
    kind: str, classes: Sequence[str], labels: dict[str, Pixels], sizes: Sizes, rng: np.random.Generator
) -> list[BaseImage]:
    """What is on every image of the base; the images of a split in random order."""
    half = np.full((len(classes), 2), _POOL * math.ceil(sizes.train / len(classes)))
    cells = {"train": half} | {
        split: apportion(size, np.ones(2 * len(classes))).reshape(-1, 2)
        for split, size in (("val", sizes.val), ("test", sizes.test))
    }
    waiting = {
        part: [rng.permutation(np.flatnonzero(of == c)) for c in range(len(classes))] for part, of in labels.items()
    }
    rows = []
    for split, cell in cells.items():
        part, drawn = _ITEM_PARTS[split], []
        for label, needed in enumerate(cell.sum(axis=1)):
            have = waiting[part][label]
            if not len(have) or (split != "train" and needed > len(have)):
                raise UserError(
                    f"{kind}: {split} needs {needed} more images of {classes[label]!r} and the files have {len(have)} "
                    "left; ask for smaller n_val and n_test, or get the whole data set"
                )
            chosen = np.resize(have, needed)
            waiting[part][label] = have[needed:] if split != "train" else have
            drawn += [(label, i >= cell[label, 0], int(item)) for i, item in enumerate(chosen)]
        for number, i in enumerate(rng.permutation(len(drawn))):
            label, present, item = drawn[i]
            place, other = rng.permutation(len(QUADRANTS))[:2]
            caption = CAPTIONS[rng.integers(len(CAPTIONS))].format(classes[label])
            name = f"images/{split}_{number:06d}.png"
            rows.append(
                BaseImage(name, split, label, present, item, int(place), int(other) if present else -1, caption)
            )
    return rows
