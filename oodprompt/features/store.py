"""The folder of kept image features: whole files, files that are being written, how much there is, and what goes first.

``KEY.npy`` holds one view, float32 [N, d]; ``KEY.json`` says what of, for people. ``.KEY.partial`` is a view that is
being computed, with ``.KEY.rows`` (how many of its rows are safe); a killed run's work goes on from there. Whoever
computes holds the lock ``KEY.lock``, which the system frees when a process dies.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from oodprompt.errors import UserError
from oodprompt.files import replacing

_SYNC = 20.0  # seconds between the moments when the rows of an unfinished file are made safe
FULL = (errno.ENOSPC, errno.EDQUOT)


def default_folder() -> Path:
    """Where features are kept, unless DATALOADER.CACHE_DIR says otherwise: below XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "oodprompt" / "features"


@dataclass(frozen=True)
class Entry:
    """A kept view: its file, size in bytes, when it was last used (seconds since 1970), and what it holds."""

    path: Path
    size: int
    used: float
    facts: dict[str, Any]


class PartialFile:
    """A view of ``shape`` [N, d] that grows by rows until it is whole. Only who holds the view's lock may have one.

    It goes on behind the rows that an earlier process made safe, ``done`` of them, a multiple of ``multiple`` (so that
    the batches of a resumed computation are those of an unbroken one); with ``fresh`` it starts anew.
    """

    def __init__(self, path: Path, shape: tuple[int, int], multiple: int = 1, fresh: bool = False) -> None:
        self.path, self.shape = path, shape
        self.file, self.progress = path.with_name(f".{path.stem}.partial"), path.with_name(f".{path.stem}.rows")
        self._header = header(shape)
        self.done = 0 if fresh else self._safe_rows(multiple)
        self._stream = self.file.open(
            "r+b" if self.done else "w+b", buffering=0
        )  # what cannot be written fails at once
        if self.done:
            self._stream.seek(len(self._header) + self.done * shape[1] * 4)
            self._stream.truncate()
        else:
            self.progress.unlink(missing_ok=True)
            self._write(self._header)
        self._synced = time.monotonic()

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether another process has begun the view of ``path``."""
        return path.with_name(f".{path.stem}.rows").is_file()

    def _safe_rows(self, multiple: int) -> int:
        try:
            done = int(self.progress.read_text())
            with self.file.open("rb") as stream:
                start, size = stream.read(len(self._header)), os.fstat(stream.fileno()).st_size
        except (OSError, ValueError):
            return 0
        whole = start == self._header and size >= len(self._header) + done * self.shape[1] * 4
        return done // multiple * multiple if whole and 0 <= done <= self.shape[0] else 0

    def append(self, rows: np.ndarray) -> None:
        """Add rows [b, d] float32 at the end."""
        self._write(np.ascontiguousarray(rows, np.dtype("<f4")).data.cast("B") if len(rows) else b"")
        self.done += len(rows)
        if time.monotonic() - self._synced > _SYNC:
            self._make_safe()

    def _write(self, content: bytes | memoryview) -> None:
        left = memoryview(content)
        while left:  # a nearly full disk takes a part
            left = left[self._stream.write(left) :]

    def _make_safe(self) -> None:
        os.fsync(self._stream.fileno())
        with replacing(self.progress) as file:
            file.write(str(self.done).encode())
        self._synced = time.monotonic()

    def rows(self) -> np.ndarray:
        """All rows so far, [done, d]."""
        return np.fromfile(self.file, np.dtype("<f4"), self.done * self.shape[1], offset=len(self._header)).reshape(
            self.done, self.shape[1]
        )

    def finish(self) -> None:
        """Make the file whole under its own name."""
        assert self.done == self.shape[0], "every row has been computed"
        self._make_safe()
        self._stream.close()
        os.replace(self.file, self.path)
        self.progress.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the rows for another process to go on with."""
        if self._stream.closed:
            return
        try:
            if self.done:
                self._make_safe()
        finally:
            self._stream.close()
            if not self.progress.is_file():
                self.file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Give the space back."""
        self._stream.close()
        for file in (self.file, self.progress):
            file.unlink(missing_ok=True)


class FeatureStore:
    """The folder ``folder`` of features; ``limit`` is the most that its whole files take, in bytes (0: any)."""

    def __init__(self, folder: Path, limit: float = 0) -> None:
        self.folder, self.limit = folder, limit

    @contextlib.contextmanager
    def usable(self) -> Iterator[None]:
        """``UserError`` for what keeps the folder from being used, but for a full disk: the command line names that."""
        try:
            yield
        except (OSError, NotImplementedError) as error:  # the latter: filelock's, on file systems without locks
            if isinstance(error, OSError) and error.errno in FULL:
                error.filename = error.filename or str(self.folder)
                raise
            raise UserError(
                f"DATALOADER.CACHE_DIR: cannot use {self.folder} ({getattr(error, 'strerror', None) or error}); give a "
                "folder that can be written, or set DATALOADER.FEATURE_CACHE memory or off"
            ) from error

    def lock(self, path: Path) -> FileLock:
        return FileLock(path.with_suffix(".lock"))

    def open(self, path: Path, shape: tuple[int, int]) -> np.memmap | None:
        """The view in ``path``, mapped into memory, and its use noted; None where there is no whole file.

        What is mapped stays readable, whoever removes the file. ``ValueError`` says what is wrong with a damaged file.
        """
        try:
            if problem := damage(path, shape):
                raise ValueError(problem)
            view = np.memmap(path, np.dtype("<f4"), mode="r", offset=len(header(shape)), shape=shape)
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):  # a folder that is only read is not told
            os.utime(path)
        return view

    def describe(self, path: Path, facts: dict[str, Any]) -> None:
        """Write what a view holds, for ``entries``."""
        with replacing(path.with_suffix(".json")) as file:
            file.write((json.dumps(facts, indent=1) + "\n").encode("utf-8", "backslashreplace"))

    def entries(self) -> list[Entry]:
        """All whole files, those used last first."""
        found = []
        for path in self.folder.glob("*.npy"):
            with contextlib.suppress(FileNotFoundError):  # another process removes it
                status = path.stat()
                found.append(Entry(path, status.st_size, status.st_mtime, _facts(path)))
        return sorted(found, key=lambda entry: -entry.used)

    def unfinished(self) -> list[Path]:
        """Views that were begun, and that no process is computing now."""
        paths = [
            file.with_name(f"{file.name[1:].removesuffix('.partial')}.npy") for file in self.folder.glob(".*.partial")
        ]
        return [path for path in paths if not self._is_held(path)]

    def begun(self, path: Path) -> float:
        """When the last row of an unfinished view was written, in seconds since 1970."""
        try:
            return path.with_name(f".{path.stem}.partial").stat().st_mtime
        except FileNotFoundError:
            return time.time()

    def _is_held(self, path: Path) -> bool:
        lock = self.lock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    def remove(self, path: Path) -> None:
        """Remove a view, whole or begun; a run that has it mapped goes on reading."""
        for file in (path, path.with_suffix(".json"), path.with_suffix(".lock")):
            file.unlink(missing_ok=True)
        for ending in ("partial", "rows"):
            path.with_name(f".{path.stem}.{ending}").unlink(missing_ok=True)

    def make_room(self, size: int) -> list[Entry]:
        """Remove what was used longest ago until ``size`` more bytes are within the limit; returns what was removed."""
        if not self.limit:
            return []
        return self.prune(lambda entry, left: left + size > self.limit)

    def prune(self, goes: Callable[[Entry, int], bool]) -> list[Entry]:
        """Remove files from the one used longest ago on while ``goes(entry, bytes that are left)``; returns them."""
        removed, left = [], sum(entry.size for entry in self.entries())
        for entry in reversed(self.entries()):
            if goes(entry, left) and not self._is_held(entry.path):
                self.remove(entry.path)
                removed.append(entry)
                left -= entry.size
        return removed


def header(shape: tuple[int, ...]) -> bytes:
    """The first bytes of a ``.npy`` file of float32 in C order."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def damage(path: Path, shape: tuple[int, int]) -> str:
    """What keeps a file from holding features of ``shape``; "" when nothing does."""
    start = header(shape)
    with path.open("rb") as file:
        found, size = file.read(len(start)), os.fstat(file.fileno()).st_size
    expected = len(start) + 4 * shape[0] * shape[1]
    if size != expected:
        return f"{size} bytes instead of {expected}"
    return "" if found == start else f"its header is not that of float32 {list(shape)}"


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
