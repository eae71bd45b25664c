"""What is noteworthy in the images of a data set, found by decoding every one as training does.

Of an image that was looked at, 16 bytes are kept (BLAKE2 of its pixels) and one of what was seen. With labels and places in
the lists this is about 100 bytes an image.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntFlag
from typing import Any

import numpy as np
from PIL import Image

from oodprompt.data.dataset import DatasetBase, attribute_name
from oodprompt.data.images import PixelRules, decode
from oodprompt.errors import UserError
from oodprompt.log import progress

_EXAMPLES = 3
_NAMED = 5  # files that cannot be read
_BLOCK = 512  # images that are looked at between two looks at the clock; bounds what waits for a thread, too
# A line drawing is white but for a few percent of its pixels, so that only nearly all of one colour is noteworthy. A grey
# file with more than 8 bits is a measurement: where most of it is at an end, its range of values is wrong.
_SHARE_OF_ONE_END = 0.99
_SHARE_OF_ENDS = 0.95
_DARK = 64  # of 256 levels; 14 bits of 16 reach no more
_DUPLICATES = 0.01  # share of a split's images that another split may hold

View = Callable[[Any], Any]


class Seen(IntFlag):
    """What is seen of one image."""

    NOTHING = 0
    CONSTANT = 1
    EMPTY = 2  # nearly all black or nearly all white
    CLIPPED = 4
    DARK = 8
    FRAMES = 16


_WORDS = {
    Seen.CONSTANT: "show one constant colour",
    Seen.EMPTY: f"are black or white in more than {_SHARE_OF_ONE_END:.0%} of their pixels",
    Seen.CLIPPED: f"have more than 8 bits and become black or white in more than {_SHARE_OF_ENDS:.0%} of their pixels "
    "(INPUT.IMAGE_RANGE sets their range of values)",
    Seen.DARK: "have more than 8 bits and use less than a quarter of the grey levels (INPUT.IMAGE_RANGE sets their range "
    "of values)",
    Seen.FRAMES: "have several frames, of which the first is read",
}


@dataclass(frozen=True)
class Finding:
    """One kind of thing that a person should know: what, with how many, and a few examples."""

    text: str
    examples: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text}: {', '.join(self.examples)}" if self.examples else self.text


@dataclass(frozen=True)
class Report:
    """What the check of a data set found; ``looked`` of ``images`` different files were decoded in time."""

    images: int
    looked: int
    unreadable: tuple[str, ...]  # one message per file
    findings: tuple[Finding, ...]

    def error(self) -> UserError | None:
        """The error that names the files that cannot be read; None where all can be."""
        if not self.unreadable:
            return None
        number = len(self.unreadable)
        more = f"\nand {number - _NAMED} more, {number:,} of {self.looked:,} images" if number > _NAMED else ""
        return UserError("\n".join(self.unreadable[:_NAMED]) + more)


def look(path: str, rules: PixelRules, view: View) -> tuple[bytes, Seen]:
    """(BLAKE2 of the decoded pixels, what is seen in ``view`` of the image); ``UserError`` as ``read_image``."""
    image, is_deep, has_frames = decode(path, rules, count_frames=True)
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, person=repr(image.size).encode()[:16]).digest()
    seen = Seen.FRAMES if has_frames else Seen.NOTHING
    shown: Image.Image = view(image)
    pixels = np.asarray(shown)  # [height, width, 3]
    if (pixels == pixels[0, 0]).all():
        return digest, seen | Seen.CONSTANT
    counts = np.bincount(pixels.ravel(), minlength=256)
    black, white = counts[0] / counts.sum(), counts[255] / counts.sum()
    if is_deep and black + white > _SHARE_OF_ENDS:
        seen |= Seen.CLIPPED
    elif max(black, white) > _SHARE_OF_ONE_END:
        seen |= Seen.EMPTY
    elif is_deep and pixels.max() < _DARK:
        seen |= Seen.DARK
    return digest, seen


def check_data(
    dataset: DatasetBase, rules: PixelRules, view: View, until: float = math.inf, show: bool = True
) -> Report:
    """Look at every image once, in threads, and at what the splits have in common.

    ``view`` is the part of the test transform that acts on images. After ``until`` (of ``time.monotonic()``) no further
    images are begun; those looked at so far are then spread evenly over the data set. ``show``: whether progress
    is shown.
    """
    return _Check(dataset, rules, view).run(until, show)


class _Check:
    """The columns of a data set, and for each different file what was seen of it."""

    def __init__(self, dataset: DatasetBase, rules: PixelRules, view: View) -> None:
        self.dataset, self.rules, self.view = dataset, rules, view
        splits = {"training": dataset.train_x, "validation": dataset.val, "test": dataset.test}
        self.splits = {name: split for name, split in splits.items() if len(split)}
        self.label = {name: split.label.astype(np.int64) for name, split in self.splits.items()}
        self.attribute = {name: split.attribute.astype(np.int64) for name, split in self.splits.items()}
        paths = np.concatenate([np.fromiter(map(hash, s.impaths), np.int64, len(s)) for s in self.splits.values()])
        _, self.first, file = np.unique(paths, return_index=True, return_inverse=True)
        ends = np.cumsum([len(split) for split in self.splits.values()])
        self.file = dict(zip(self.splits, np.split(file.reshape(-1), ends[:-1]), strict=True))
        self.digest = np.zeros(len(self.first), "S16")
        self.seen = np.zeros(len(self.first), np.uint8)
        self.looked = np.zeros(len(self.first), bool)

    def run(self, until: float, show: bool) -> Report:
        unreadable = tuple(self._look_at_all(until, show))
        findings = [*self._of_images(), *self._duplicates(), *self._of_groups()]
        return Report(len(self.first), int(self.looked.sum()), unreadable, tuple(findings))

    def _path(self, file: int) -> str:
        index = int(self.first[file])
        for split in self.splits.values():
            if index < len(split):
                return split.impath(index)
            index -= len(split)
        raise IndexError(file)

    def _look_at_all(self, until: float, show: bool) -> Iterator[str]:
        """Look at the files; the messages of those that cannot be read."""

        def attempt(file: int) -> tuple[bytes, int] | str:
            try:
                return look(self._path(file), self.rules, self.view)
            except UserError as error:
                return str(error)

        # In the order of the lists, whose files mostly lie beside each other; in any order where time is limited.
        order = np.argsort(self.first) if until == math.inf else np.random.default_rng(0).permutation(len(self.first))
        block = _BLOCK if until == math.inf else 4 * (os.cpu_count() or 1)
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress(len(order), "Images", "image", show) as bar:
            for start in range(0, len(order), block):
                if time.monotonic() > until:
                    return
                files = order[start : start + block].tolist()
                for file, found in zip(files, pool.map(attempt, files), strict=True):
                    bar.update()
                    self.looked[file] = True
                    if isinstance(found, str):
                        yield found
                    else:
                        self.digest[file], self.seen[file] = found

    def _of_images(self) -> Iterator[Finding]:
        for kind, words in _WORDS.items():
            files = np.flatnonzero(self.seen & kind.value)
            if len(files):
                yield Finding(_of(len(files), int(self.looked.sum()), "images", words), self._examples(files))

    def _examples(self, files: np.ndarray) -> tuple[str, ...]:
        return tuple(self._path(int(file)) for file in files[np.argsort(self.first[files])][:_EXAMPLES])

    def _duplicates(self) -> Iterator[Finding]:
        """Pictures of one split that another holds, and equal pictures of a split that have several labels."""
        known = (self.digest != b"") & (
            self.seen & Seen.CONSTANT.value == 0
        )  # those without a picture are no duplicates
        _, picture = np.unique(self.digest, return_inverse=True)
        picture = picture.reshape(-1)
        for one, other in itertools.combinations(self.splits, 2):
            if self.dataset.test_only and one == "training":
                continue
            mine, theirs = (file[known[file]] for file in (self.file[other], self.file[one]))
            both = mine[np.isin(picture[mine], picture[theirs])]
            if len(both) > _DUPLICATES * len(self.file[other]):
                words = f"are {one} images too, by their pixels"
                yield Finding(_of(len(both), len(self.file[other]), f"{other} images", words), self._examples(both))
        for name, files in self.file.items():
            chosen = known[files]
            pairs = np.unique(np.stack([picture[files[chosen]], self.label[name][chosen]], 1), axis=0)
            pictures, labels = np.unique(pairs[:, 0], return_counts=True)
            several = files[chosen & np.isin(picture[files], pictures[labels > 1])]
            if len(several):
                words = "have the pixels of another image with another label"
                yield Finding(_of(len(several), len(files), f"{name} images", words), self._examples(several))

    def _of_groups(self) -> Iterator[Finding]:
        """Groups (class, attribute) without training or test images; of domains, that is how the splits are meant."""
        known = max(int(column.max()) for column in self.attribute.values()) + 1
        if not known or self.dataset.domains:
            return
        classes, values = self.dataset.num_classes, max(known, len(self.dataset.attribute_names))
        for name in ("training", "test"):
            if name not in self.splits or (self.dataset.test_only and name == "training"):
                continue
            has = self.attribute[name] >= 0
            if not has.any():
                continue  # unknown in the whole split, which is not the same as none
            there = np.zeros(classes * values, bool)
            there[self.label[name][has] * values + self.attribute[name][has]] = True
            empty = np.flatnonzero(~there)
            if len(empty):
                text = f"{len(empty):,} of {classes * values:,} groups (class / attribute) have no {name} images"
                yield Finding(text, tuple(self._group(*divmod(int(group), values)) for group in empty[:_EXAMPLES]))

    def _group(self, label: int, attribute: int) -> str:
        return f"{self.dataset.classnames[label]} / {attribute_name(self.dataset, attribute)}"


def _of(number: int, total: int, what: str, words: str) -> str:
    return f"{number:,} of {total:,} {what} ({number / total:.1%}) {words}"
