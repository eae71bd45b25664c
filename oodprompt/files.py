"""Writing files so that a reader, or the next run, never meets half of one; one run at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from oodprompt.errors import UserError

LOCK = ".run.lock"
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.part")
_PATIENCE = 5.0  # seconds in which a killed process is gone and its lock with it


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` to ``path`` whole or not at all: a temporary file beside it is renamed over it.

    Missing folders are made. Raises ``UserError`` (with the system's reason) when the place cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            # UTF-8 has no halves of undecodable file names: they are written as \udc...
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --output-dir"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file beside ``path`` that takes its place at the end of the block, synchronised with the disk.

    After an error in the block, or Ctrl-C, the temporary file is deleted. After a kill it stays, and ``sweep`` deletes
    it. Raises ``OSError`` when the place cannot be written.
    """
    temporary, descriptor = _new(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # ahead of the unlocking, so that nobody takes it for a leftover
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder in ``parent``, to be renamed in the block when it is whole; else it is deleted at the end of the block.

    After a kill it stays, and ``sweep`` deletes it. Raises ``OSError`` when the place cannot be written.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder, descriptor = _new(parent / "folder", is_folder=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def build_folder(folder: Path, marker: str, fill: Callable[[Path], None]) -> None:
    """Make ``folder`` by ``fill`` in a temporary folder that is renamed, unless it holds the file ``marker`` already.

    Of builds at the same time one result stays. Raises ``OSError`` when the place cannot be written.
    """
    if (folder / marker).is_file():
        return
    sweep(folder.parent)
    with temporary_folder(folder.parent) as temporary:
        fill(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / marker).is_file():
                raise


def sweep(folder: Path) -> int:
    """Delete what killed processes left half written in ``folder``, not below it; returns how many bytes.

    Whoever writes holds a lock, which the system releases when the process ends; what is locked stays. So does
    everything on file systems without locks.
    """
    size = 0
    try:
        with os.scandir(folder) as entries:
            left = [entry for entry in entries if _TEMPORARY.fullmatch(entry.name) and not entry.is_symlink()]
    except OSError:  # there is no such folder yet, or it is not ours to read
        return 0
    for entry in left:
        with contextlib.suppress(OSError):
            is_folder = entry.is_dir()
            descriptor = os.open(entry.path, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                size += sum(file.stat().st_size for file in Path(entry.path).rglob("*")) if is_folder else 0
                size += os.fstat(descriptor).st_size
                shutil.rmtree(entry.path) if is_folder else os.unlink(entry.path)
            finally:
                os.close(descriptor)
    return size


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.part")


def _new(path: Path, is_folder: bool = False) -> tuple[Path, int]:
    """A new temporary file or folder for ``path``, locked, and its descriptor."""
    while True:
        temporary = _temporary(path)
        try:
            if is_folder:
                temporary.mkdir()
            flags = os.O_RDONLY if is_folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags, 0o666)
        except FileExistsError:
            continue
        _lock(descriptor)
        if _is_still(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)  # swept ahead of the lock


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # on file systems without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


# --- one run at a time -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_run_in(folder: Path, patience: float | None = None) -> Iterator[bool]:
    """Hold the lock of an output folder, which is made; False where the file system has no locks.

    ``UserError`` where another process holds it for ``patience`` seconds (None: 5). The lock belongs to this process alone, not to
    the workers that it forks, and the system releases it when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, until = folder / LOCK, time.monotonic() + (_PATIENCE if patience is None else patience)
    descriptor = -1
    while descriptor < 0:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = _is_still(descriptor, path)
        except (BlockingIOError, PermissionError) as error:  # the latter on some systems
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            if time.monotonic() > until:
                os.close(descriptor)
                raise UserError(
                    f"another run{f' ({holder})' if holder else ''} writes to {folder}: wait for its end, or choose "
                    "another --output-dir"
                ) from error
            is_ours = False
        except OSError:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
            yield False
            return
        if not is_ours:
            os.close(descriptor)
            descriptor = -1
            time.sleep(0.05)
    try:
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield True
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # ahead of the unlocking: who waits for this very file sees that it is gone
        os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``, which its last holder deletes."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


# --- paths -----------------------------------------------------------------------------------------------------------


def inside(folder: str, path: str) -> bool:
    """Whether ``path``, absolute or relative to ``folder``, is a place in ``folder`` or below it, by its words alone.

    Symbolic links count as the place where they stand, as only the owner of the folder can make them.
    """
    if ".." not in path and not os.path.isabs(path):
        return True
    folder = os.path.abspath(folder)
    place = os.path.normpath(os.path.join(folder, path))
    return place == folder or place.startswith(os.path.join(folder, ""))
