"""Where image features of whole splits are kept: in memory, or in files that outlive the run.

A view of a split is one ``.npy`` file, float32 [N, d], named by a SHA256 over all that its values follow from: the
image tower's weights, the transform, precision, kind of device, the draw of a random transform, and path, size and
time of every image in order; for parts of images also which they are and how their features are made. What changes
only how sums are rounded (batch size, number of processes) is left out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.backbones.weights import digest
from oodprompt.config.keys import leaves
from oodprompt.data.dataset import Datum
from oodprompt.data.transforms import is_random
from oodprompt.errors import UserError
from oodprompt.files import replacing, sweep
from oodprompt.log import logger

Views = Tensor | Sequence[np.ndarray]  # V views [N, d] of a split: on the compute device, or memory-mapped files

_FORMAT = 1  # raise it when transforms, image towers or the files' layout change, so that older files are not read
# Seconds after which the other processes of a run that waits for another run hear that it still does; their
# collectives give up after 600.
_PATIENCE = 60.0


class FeatureCache:
    """Where views of CLIP's image features are kept: in memory, or in files that later runs read.

    ``precision`` is the one they are computed in, on ``device``; ``say`` shows a line.
    """

    def __init__(
        self, cfg: CfgNode, clip: CLIP, precision: str, device: torch.device, say: Callable[[str], None] = logger.info
    ) -> None:
        self.cfg, self.clip, self.precision, self.device, self.say = cfg, clip, precision, device, say
        self.folder = Path(cfg.DATALOADER.CACHE_DIR or "~/.cache/oodprompt/features").expanduser()
        self._backbone = ""

    def on_disk(self, rows: int) -> bool:
        """Whether ``rows`` features are kept in files."""
        keys = self.cfg.DATALOADER
        size = rows * self.clip.shape.embed_dim * 4 / 2**20
        return keys.FEATURE_CACHE == "disk" or (keys.FEATURE_CACHE == "auto" and size > keys.CACHE_MEMORY_MIB)

    def views(
        self,
        split: str,
        images: Sequence[Datum],
        number: int,
        is_train: bool,
        compute: Callable[[int], Tensor],
        rows: int | None = None,
        parts: str = "",
    ) -> Views:
        """``number`` views of ``images`` by the training or the test transform; ``compute(view)`` where not in files.

        Features of parts of the images have ``rows`` rows, and ``parts`` says which parts they are and how features are
        made of them; files are named by it, too. All processes call it together. Raises ``UserError`` when the folder
        cannot be used.
        """
        rows = len(images) if rows is None else rows
        if not self.on_disk(number * rows):
            return torch.stack([compute(view) for view in range(number)])
        began, shape = time.time(), (rows, self.clip.shape.embed_dim)
        paths = self._in_main_process(self._paths, images, number, is_train, parts)
        computed = [self._provide(split, path, shape, compute, view) for view, path in enumerate(paths)]
        self.say(
            f"Image features: {split} {'written to' if any(computed) else 'read from'} "
            f"{paths[0] if number == 1 else f'{number} files in {self.folder}'} (disk cache, {time.time() - began:.1f} s)"
        )
        offset = len(_header(shape))
        return [np.memmap(path, np.dtype("<f4"), mode="r", offset=offset, shape=shape) for path in paths]

    def _paths(self, images: Sequence[Datum], number: int, is_train: bool, parts: str) -> list[Path]:
        """The files of the views, each named by what its features follow from."""
        self._backbone = self._backbone or digest(self.clip.visual)
        facts = {
            "format": _FORMAT,
            "backbone": self._backbone,
            "precision": self.precision,
            "device": self.device.type,
            "transform": "train" if is_train else "test",
            "input": {key: value for key, value in leaves(self.cfg.INPUT).items() if key != "VIEWS"},
        }
        if parts:
            facts["parts"] = parts
        sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for datum in images:
            status = os.stat(datum.impath)
            path = os.fsencode(os.path.abspath(datum.impath))
            sha256.update(path + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
        paths = []
        for view in range(number):
            key = sha256.copy()
            if is_train and is_random(self.cfg):
                key.update(f"seed {self.cfg.SEED} view {view}".encode())
            paths.append(self.folder / f"{key.hexdigest()}.npy")
        return paths

    def _provide(
        self, split: str, path: Path, shape: tuple[int, int], compute: Callable[[int], Tensor], view: int
    ) -> bool:
        """See to it that the file is there; whether it had to be computed. One of several runs does, others wait."""
        lock, patience = FileLock(path.with_suffix(".lock")), 0.0
        try:
            while (found := self._in_main_process(self._find, path, shape, lock, patience)) is None:
                if not patience:
                    self.say(f"Image features: {split} are being computed by another run, for which this one waits")
                patience = _PATIENCE
            if not found:
                self._in_main_process(self._write, path, compute(view))
            return not found
        finally:
            lock.release()  # nothing where it is not held

    def _find(self, path: Path, shape: tuple[int, int], lock: FileLock, patience: float) -> bool | None:
        """Whether the file is whole. If it is not, the lock is taken; None: another run holds it after ``patience`` s."""
        with self._usable_folder():
            if path.is_file() and not _damage(path, shape):
                return True
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=patience)
            except Timeout:
                return None
            sweep(self.folder)
            damage = _damage(path, shape) if path.is_file() else ""
            if damage:
                self.say(f"Note: {path} is damaged ({damage}); its features are computed anew")
            return path.is_file() and not damage

    def _write(self, path: Path, features: Tensor) -> None:
        """Write the file whole or not at all."""
        rows = np.ascontiguousarray(features.cpu().numpy(), np.dtype("<f4"))
        with self._usable_folder(), replacing(path) as file:
            file.write(_header(rows.shape))
            file.write(rows.data)  # not numpy's tofile, whose error on a full disk has no errno

    @contextlib.contextmanager
    def _usable_folder(self) -> Iterator[None]:
        """``UserError`` for what keeps the folder from being used, but for a full disk: the command line names that."""
        try:
            yield
        except (OSError, NotImplementedError) as error:  # the latter: filelock's, on file systems without locks
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.filename = error.filename or str(self.folder)
                raise
            raise UserError(
                f"DATALOADER.CACHE_DIR: cannot use {self.folder} ({getattr(error, 'strerror', None) or error}); give a "
                "folder that can be written, or set DATALOADER.FEATURE_CACHE memory or off"
            ) from error

    def _in_main_process(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns in the main process, in all processes; so with its errors."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return function(*arguments)
        outcome: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                outcome[0] = function(*arguments)
            except (UserError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _header(shape: tuple[int, ...]) -> bytes:
    """The first bytes of a ``.npy`` file of float32 in C order."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _damage(path: Path, shape: tuple[int, int]) -> str:
    """What keeps a file from holding features of ``shape``; "" when nothing does."""
    header = _header(shape)
    with path.open("rb") as file:
        start, size = file.read(len(header)), os.fstat(file.fileno()).st_size
    expected = len(header) + 4 * shape[0] * shape[1]
    if size != expected:
        return f"{size} bytes instead of {expected}"
    return "" if start == header else f"its header is not that of float32 {list(shape)}"
