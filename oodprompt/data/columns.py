"""The images of a split as columns of numbers and one table of paths, so that a million of them take little memory.

``Images`` is a sequence of ``Datum``: each is made when it is asked for. What is needed of all images at once
(``label``, ``attribute``, ``domain``) is a numpy array.
"""

from __future__ import annotations

import operator
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import overload

import numpy as np

from oodprompt.data.datum import Datum
from oodprompt.data.vectors import Vectors
from oodprompt.log import progress

_ROOT = os.fsencode(os.sep)
_THREADS = 16  # a network file system answers many questions at once; more threads only wait for Python
_AT_ONCE = 4096  # files that a thread asks for before it takes the next


class Texts(Sequence[str]):
    """Strings in one block of bytes behind a ``prefix`` that all share: their length and 8 bytes each, no Python objects.

    Absolute paths among them stand without the prefix, as in ``os.path.join``.
    """

    def __init__(self, texts: Iterable[str] = (), prefix: str = "") -> None:
        self.prefix, self._block, self._ends = os.fsencode(prefix), bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a string at the end; what it begins with beside ``prefix``."""
        self._block += os.fsencode(text)
        self._ends.append(len(self._block))

    @classmethod
    def of_paths(cls, paths: Sequence[str]) -> Texts:
        """Paths, with the folders that all of them share as the prefix."""
        first, last = (min(paths), max(paths)) if paths else ("", "")
        folder = os.path.commonprefix((first, last)).rpartition(os.sep)
        shared = folder[0] + folder[1]
        if any(path.startswith(os.sep, len(shared)) for path in paths):
            shared = ""
        return cls((path[len(shared) :] for path in paths), shared)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def raw(self, i: int) -> bytes:
        """The ``i``-th string as the file system spells it."""
        own = self._block[self._ends[i] : self._ends[i + 1]]
        return bytes(own) if own.startswith(_ROOT) else self.prefix + own

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return os.fsdecode(self.raw(i))


class Images(Sequence[Datum]):
    """Images of a split: a sequence of ``Datum`` over columns.

    ``label``, ``domain``, ``attribute`` [N] are numpy arrays (attribute -1: unknown); ``names`` are the class names that
    ``name`` [N] counts. ``rows`` [N] are the places of the images in ``paths``, ``captions`` (None: no image has one) and
    ``vectors`` (None: the images themselves are there, not their features), which other splits share.
    """

    def __init__(
        self,
        paths: Texts,
        rows: np.ndarray,
        label: np.ndarray,
        domain: np.ndarray,
        attribute: np.ndarray,
        name: np.ndarray,
        names: Sequence[str],
        captions: Texts | None = None,
        vectors: Vectors | None = None,
    ) -> None:
        self.paths, self.captions, self.names, self.vectors = paths, captions, tuple(names), vectors
        self.rows, self.label, self.domain, self.attribute, self.name = (
            np.ascontiguousarray(column, dtype=np.int32) for column in (rows, label, domain, attribute, name)
        )
        self._stamps: np.ndarray | None = None

    @classmethod
    def of(cls, data: Sequence[Datum]) -> Images:
        """The columns of a sequence of ``Datum``; ``data`` itself where it is columns already."""
        if isinstance(data, Images):
            return data
        code: dict[str, int] = {}
        label, domain, attribute = (
            np.fromiter((getattr(d, key) for d in data), np.int32, len(data))
            for key in ("label", "domain", "attribute")
        )
        name = np.fromiter((code.setdefault(d.classname, len(code)) for d in data), np.int32, len(data))
        captions = Texts(d.caption for d in data) if any(d.caption for d in data) else None
        paths = Texts.of_paths([d.impath for d in data])
        return cls(paths, np.arange(len(data)), label, domain, attribute, name, tuple(code), captions)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Datum: ...
    @overload
    def __getitem__(self, i: slice) -> Images: ...
    def __getitem__(self, i: int | slice) -> Datum | Images:
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        row = self.rows[i]
        return Datum.unchecked(
            self.paths[row],
            int(self.label[i]),
            int(self.domain[i]),
            self.names[self.name[i]],
            int(self.attribute[i]),
            self.captions[row] if self.captions is not None else "",
        )

    def __iter__(self) -> Iterator[Datum]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Sequence[Datum]) -> list[Datum]:
        return [*self, *other]

    def __radd__(self, other: Sequence[Datum]) -> list[Datum]:
        return [*other, *self]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list's

    def take(self, index: np.ndarray | Sequence[int], label: np.ndarray | None = None) -> Images:
        """The images at ``index``, in that order; ``label``: with these labels."""
        chosen = np.asarray(index, dtype=np.int64)
        taken = Images(
            self.paths,
            self.rows[chosen],
            self.label[chosen] if label is None else label,
            self.domain[chosen],
            self.attribute[chosen],
            self.name[chosen],
            self.names,
            self.captions,
            self.vectors,
        )
        if self._stamps is not None:
            taken._stamps = self._stamps[chosen]
        return taken

    def impath(self, i: int) -> str:
        """The path of the ``i``-th image."""
        return self.paths[self.rows[i]]

    @property
    def impaths(self) -> Iterator[str]:
        """The paths of all images, one after the other."""
        return (self.paths[row] for row in self.rows)

    # --- files -------------------------------------------------------------------------------------------------

    @property
    def stamps(self) -> np.ndarray:
        """Size in bytes and time of the last change in ns of every file, int64 [N, 2], when they were first asked for.

        A file that is not there, or is no file, has the size -1.
        """
        if self._stamps is None:
            self._stamps = self.look_again()
        return self._stamps

    def look_again(self) -> np.ndarray:
        """``stamps`` as they are now."""
        stamps = np.empty((len(self), 2), dtype=np.int64)

        def look(start: int) -> None:
            for i in range(start, min(start + _AT_ONCE, len(self))):
                stamps[i] = _stamp(self.paths.raw(self.rows[i]))

        starts = range(0, len(self), _AT_ONCE)
        with ThreadPoolExecutor(_THREADS) as pool, progress(len(self), "Looking for the files", "image") as bar:
            for start, _ in zip(starts, pool.map(look, starts), strict=True):
                bar.update(min(_AT_ONCE, len(self) - start))
        return stamps

    def missing(self) -> np.ndarray:
        """Which images have no file, as indices."""
        return np.flatnonzero(self.stamps[:, 0] < 0)


def _stamp(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # the latter: a zero byte in the path
        return -1, 0
    return (status.st_size, status.st_mtime_ns) if (status.st_mode & 0o170000) == 0o100000 else (-1, 0)
