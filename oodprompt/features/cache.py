"""Image features of whole splits that are computed once: kept in memory, or in files that outlive the run.

A view of a split is one file, named by a SHA256 over all that its values follow from: the image tower's weights, the
transform, precision, kind of device, the draw of a random transform, and path, size and time of every image in order;
for parts of images also which they are and how their features are made. What changes only how sums are rounded (batch
size, number of processes) is left out.

By itself (FEATURE_CACHE auto) a view is kept in a file where it takes more than a few seconds, or would fill the memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import BaseFileLock, Timeout
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.backbones.company import shared
from oodprompt.backbones.weights import digest
from oodprompt.config.keys import leaves
from oodprompt.data.columns import Images
from oodprompt.data.datum import Datum
from oodprompt.data.transforms import is_random
from oodprompt.data.vectors import VectorRows
from oodprompt.errors import UserError
from oodprompt.features.store import FeatureStore, PartialFile, default_folder
from oodprompt.files import sweep
from oodprompt.log import logger

View = Tensor | np.ndarray | VectorRows  # [N, d]: on the compute device, memory-mapped, or rows of the user's files
Views = Tensor | Sequence[np.ndarray | VectorRows]  # V views of a split
# (view, first row) -> the rows from there on, in order, as tensors [b, d] on the compute device
Compute = Callable[[int, int], Iterator[Tensor]]

_FORMAT = 2  # raise it when transforms, image towers or the files' layout change, so that older files are not read
# Seconds after which the other processes of a run that waits for another run hear that it still does, so that no
# collective of theirs waits for as long.
_PATIENCE = 60.0


class FeatureCache:
    """Where views of CLIP's image features are kept: in memory, or in files that later runs read.

    ``precision`` is the one they are computed in, on ``device``; ``say`` shows a line.
    """

    def __init__(
        self, cfg: CfgNode, clip: CLIP, precision: str, device: torch.device, say: Callable[[str], None] = logger.info
    ) -> None:
        self.cfg, self.clip, self.precision, self.device, self.say = cfg, clip, precision, device, say
        keys = cfg.DATALOADER
        folder = Path(os.path.expanduser(keys.CACHE_DIR)) if keys.CACHE_DIR else default_folder()
        self.store = FeatureStore(folder, keys.CACHE_LIMIT_GIB * 2**30)
        self.insists = keys.FEATURE_CACHE == "disk"
        self.uses_files = self.insists or keys.FEATURE_CACHE == "auto"
        self._backbone = ""

    def views(
        self,
        split: str,
        images: Sequence[Datum],
        number: int,
        is_train: bool,
        compute: Compute,
        rows: int | None = None,
        parts: str = "",
    ) -> Views:
        """``number`` views of ``images`` by the training or the test transform; ``compute`` where not in files.

        Features of parts of the images have ``rows`` rows, and ``parts`` says which parts they are and how features are
        made of them; files are named by it, too. All processes call it together. Raises ``UserError`` when
        FEATURE_CACHE disk insists on a folder that cannot be used.
        """
        columns = Images.of(images)
        shape = (len(columns) if rows is None else rows, self.clip.shape.embed_dim)
        paths: list[Path] | None = self.tolerate(self._paths, columns, number, is_train, parts)
        if paths is None:
            return self._views(split, columns, shape, [None] * number, compute)
        which = ("features", *paths, self.insists, self.cfg.DATALOADER.CACHE_MEMORY_MIB)
        return shared(which, lambda: self._views(split, columns, shape, paths, compute))

    def _views(
        self, split: str, columns: Images, shape: tuple[int, int], paths: Sequence[Path | None], compute: Compute
    ) -> Views:
        """A view of ``shape`` for each of ``paths``, which are their files; None: without one."""
        began, number = time.time(), len(paths)
        fits = number * shape[0] * shape[1] * 4 <= self.cfg.DATALOADER.CACHE_MEMORY_MIB * 2**20
        made = [_View(self, split, columns, path, shape, fits) for path in paths]
        values = [one.get(compute, view) for view, one in enumerate(made)]
        outcomes = [one.outcome for one in made]
        if any(outcomes):
            verb = "written to" if "written" in outcomes else "read from"
            where = str(paths[0]) if number == 1 else f"{number} files in {self.store.folder}"
            self.say(f"Image features: {split} {verb} {where} (disk cache, {time.time() - began:.1f} s)")
        mapped = [value for value in values if not isinstance(value, Tensor)]
        if (self.insists or not fits) and len(mapped) == number:
            return mapped
        return torch.stack([self._on_device(value) for value in values])

    def _on_device(self, value: Tensor | np.ndarray) -> Tensor:
        return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value)).to(self.device)

    def _paths(self, images: Images, number: int, is_train: bool, parts: str) -> list[Path]:
        """The files of the views, each named by what its features follow from."""
        tower = self.clip.visual
        self._backbone = self._backbone or shared(("digest", tower), lambda: digest(tower))
        by_default = {"RESIZE"} if self.cfg.INPUT.RESIZE == "shortest" else set()  # as before there was the key
        left_out = {"VIEWS", "MAX_PIXELS"} | by_default
        facts = {
            "format": _FORMAT,
            "backbone": self._backbone,
            "precision": self.precision,
            "device": self.device.type,
            "transform": "train" if is_train else "test",
            "input": {key: value for key, value in leaves(self.cfg.INPUT).items() if key not in left_out},
        }
        if (
            self.device.type == "cuda" and self.cfg.TRAIN.TF32 != "convolutions"
        ):  # the default was before there was a key
            facts["tf32"] = self.cfg.TRAIN.TF32
        if parts:
            facts["parts"] = parts
        sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for path, (size, changed) in zip(images.impaths, images.stamps.tolist(), strict=True):
            sha256.update(os.fsencode(os.path.abspath(path)) + f"\0{size} {changed}\n".encode())
        paths = []
        for view in range(number):
            key = sha256.copy()
            if is_train and is_random(self.cfg):
                key.update(f"seed {self.cfg.SEED} view {view}".encode())
            paths.append(self.store.folder / f"{key.hexdigest()}.npy")
        return paths

    def facts(self, split: str, images: Images, shape: tuple[int, int], seconds: float) -> dict[str, Any]:
        """What a person wants to know of a file of features."""
        return {
            "data": self.cfg.DATASET.NAME,
            "folder": os.path.abspath(os.fsdecode(images.paths.prefix)),
            "split": split,
            "rows": shape[0],
            "width": shape[1],
            "backbone": self.cfg.MODEL.BACKBONE.PATH or self.cfg.MODEL.BACKBONE.NAME,
            "precision": self.precision,
            "seconds": round(seconds, 1),
        }

    def tolerate(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``in_main_process``, but an unusable folder or full disk is said once, and files are done without.

        Where FEATURE_CACHE disk insists on files, it is an error. None where files are not used, or not any more.
        """
        if not self.uses_files:
            return None
        try:
            with self.store.usable():
                return self.in_main_process(function, *arguments)
        except (UserError, OSError) as error:
            if self.insists:
                raise
            self.uses_files = False
            reason = f"the disk is full for {error.filename}" if isinstance(error, OSError) else str(error)
            self.say(f"Note: image features stay in memory and end with this run: {reason}")
            return None

    def in_main_process(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns in the main process, in all processes; so with its errors."""
        if alone():
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


def alone() -> bool:
    """Whether this process is the only one of the run."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def _one_behind(
    parts: Iterator[Tensor], goes_to_file: Callable[[], bool]
) -> Iterator[tuple[Tensor, Callable[[], np.ndarray]]]:
    """Each part [b, d] and what gives it on the host; of a GPU, when the computation of the next part has begun.

    The copy of a part begins right behind its computation where it ``goes_to_file``. So the GPU has the next part to do
    while the host waits for the copy, writes it and reads images.
    """
    waiting: list[tuple[Tensor, Callable[[], np.ndarray]]] = []
    for part in parts:
        if part.device.type != "cuda":
            yield part, part.numpy
            continue
        this = part, (_copied(part) if goes_to_file() else lambda part=part: part.cpu().numpy())
        yield from waiting
        waiting = [this]
    yield from waiting


def _copied(part: Tensor) -> Callable[[], np.ndarray]:
    """Begins to copy ``part`` to the host; what is returned waits for the copy alone."""
    copy = part.to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.current_stream(part.device).record_event()

    def wait() -> np.ndarray:
        copied.synchronize()
        return copy.numpy()

    return wait


class _View:
    """One view [N, d] of a split: read from its file, or computed, and written where that pays.

    ``path``: its file, None without files. ``fits``: the views of the split are small enough for the memory.
    ``outcome``: "read", "written" or "", when it has been got.
    """

    def __init__(
        self, cache: FeatureCache, split: str, images: Images, path: Path | None, shape: tuple[int, int], fits: bool
    ) -> None:
        self.cache, self.split, self.images, self.path, self.shape, self.fits = cache, split, images, path, shape, fits
        self.outcome, self._began = "", time.monotonic()
        self._writer: PartialFile | None = None
        self._unnamed: np.ndarray | None = None  # rows in a file that has no name any more

    def get(self, compute: Compute, view: int) -> Tensor | np.ndarray:
        """The rows, on the compute device or mapped from the file."""
        if self.path is None:
            rows = self._compute(compute, view, None)
            assert rows is not None, "without a file they are in memory"
            return rows
        lock = self.cache.store.lock(self.path)
        try:
            return self._get(compute, view, self.path, lock)
        except OSError:
            if self._writer is not None:
                self._writer.remove()
            raise
        finally:
            if self._writer is not None:
                self._writer.close()
            lock.release()  # nothing where it is not held

    def _get(self, compute: Compute, view: int, path: Path, lock: BaseFileLock) -> Tensor | np.ndarray:
        tolerate = self.cache.tolerate
        self.at_once = self.cache.insists or not self.fits or bool(tolerate(PartialFile.exists, path))
        found = self._wait(lock) if self.at_once else tolerate(self._is_there)
        self._began = time.monotonic()
        rows = None if found else self._compute(compute, view, lock)
        written = not found and tolerate(self._finish, rows is not None)
        self.outcome = "read" if found else "written" if written else ""
        if found or (written and (self.cache.insists or rows is None)):
            kept = self.cache.store.open(path, self.shape)
            assert kept is not None, "it was there a moment ago"
            return kept
        if rows is None:
            return self._unnamed if self._unnamed is not None else self._leave_file(None)
        return rows

    # --- finding -----------------------------------------------------------------------------------------------

    def _is_there(self) -> bool:
        assert self.path is not None
        try:
            return self.cache.store.open(self.path, self.shape) is not None
        except ValueError as error:
            self.cache.say(f"Note: {self.path} is damaged ({error}); its features are computed anew")
            self.path.unlink(missing_ok=True)
            return False

    def _wait(self, lock: BaseFileLock) -> bool | None:
        """Whether the file is whole. If it is not, the lock is taken: one of several runs computes, others wait."""
        patience = 0.0
        while self.cache.uses_files:
            found = self.cache.tolerate(self._find, lock, patience)
            if found is not None:
                return found
            if self.cache.uses_files and not patience:
                self.cache.say(
                    f"Image features: {self.split} are being computed by another run, for which this one waits"
                )
            patience = _PATIENCE
        return None

    def _find(self, lock: BaseFileLock, patience: float) -> bool | None:
        """Whether the file is whole; None: another run holds the lock after ``patience`` s."""
        if self._is_there():
            return True
        if not self._locks(lock, patience):
            return None
        sweep(self.cache.store.folder)
        return self._is_there()

    def _locks(self, lock: BaseFileLock, patience: float = 0.0) -> bool:
        self.cache.store.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return False
        return True

    # --- computing ---------------------------------------------------------------------------------------------

    def _compute(self, compute: Compute, view: int, lock: BaseFileLock | None) -> Tensor | None:
        """All rows on the device; None where they are in the file alone.

        One process writes them batch by batch, so that another can go on from there; several write them at the end.
        """
        tolerate, in_file = self.cache.tolerate, lock is None or self.at_once
        if lock is not None and self.at_once and alone():
            tolerate(self._begin, lock, None)
        done = self._writer.done if self._writer is not None else 0
        rows: Tensor | None = None
        for part, on_host in _one_behind(compute(view, done), lambda: self._writer is not None):
            if rows is None and (self.fits or self._writer is None):
                rows = part.new_empty(self.shape)
                rows[:done] = self._written(rows.device)
            if self._writer is not None and tolerate(self._append, on_host) is None:
                rows = self._leave_file(rows)
            if rows is not None:
                rows[done : done + len(part)] = part
            done += len(part)
            if not in_file and alone() and self._takes_long():
                in_file = True  # or another run writes it
                tolerate(self._begin, lock, rows[:done] if rows is not None else None)
        if lock is not None and not alone() and self.cache.in_main_process(lambda: self.at_once or self._takes_long()):
            tolerate(self._begin, lock, rows)
        return rows

    def _takes_long(self) -> bool:
        return time.monotonic() - self._began > self.cache.cfg.DATALOADER.CACHE_SECONDS

    def _begin(self, lock: BaseFileLock, rows: Tensor | None) -> None:
        """Begin the file, with ``rows`` that have been computed; not where another run is writing it."""
        assert self.path is not None
        if not lock.is_locked and not self._locks(lock):
            return
        if removed := self.cache.store.make_room(4 * self.shape[0] * self.shape[1]):
            size = sum(entry.size for entry in removed) / 2**30
            self.cache.say(
                f"Note: {len(removed)} files of image features ({size:.1f} GiB, those used longest ago) are removed to keep "
                "within DATALOADER.CACHE_LIMIT_GIB"
            )
        multiple = self.cache.cfg.DATALOADER.TEST.BATCH_SIZE
        self._writer = PartialFile(self.path, self.shape, multiple, fresh=rows is not None)
        if rows is not None:
            self._append(lambda: rows.cpu().numpy())
        elif self._writer.done:
            self.cache.say(
                f"Image features: {self.split} go on behind the {self._writer.done:,} of {self.shape[0]:,} that an earlier "
                "run has computed"
            )

    def _append(self, rows: Callable[[], np.ndarray]) -> bool:
        assert self._writer is not None
        self._writer.append(rows())
        return True

    def _leave_file(self, rows: Tensor | None) -> Tensor:
        """All rows so far in memory, where the file cannot be written any more."""
        assert self._writer is not None
        if rows is None:
            rows = torch.empty(self.shape, device=self.cache.device)
            rows[: self._writer.done] = self._written(rows.device)
        self._writer.remove()
        self._writer = None
        return rows

    def _written(self, device: torch.device) -> Tensor:
        """The rows that the file has so far, [done, d]."""
        rows = self._writer.rows() if self._writer is not None else np.empty((0, self.shape[1]), np.float32)
        return torch.from_numpy(rows).to(device)

    def _finish(self, in_memory: bool) -> bool:
        """Give the file its name, unless an image has changed since the data were listed. Whether it has it."""
        if self._writer is None or self.path is None:
            return False
        changed = np.flatnonzero((self.images.look_again() != self.images.stamps).any(axis=1))
        if len(changed):
            self.cache.say(
                f"Note: {len(changed):,} images of {self.split} were changed while this run was reading them (first "
                f"{self.images.impath(int(changed[0]))}); their features are of this run alone and are not kept"
            )
            if in_memory:
                self._writer.remove()
                return False
        else:  # ahead of the file, which so is never without
            seconds = time.monotonic() - self._began
            self.cache.store.describe(self.path, self.cache.facts(self.split, self.images, self.shape, seconds))
        self._writer.finish()
        if len(changed):
            self._unnamed = self.cache.store.open(self.path, self.shape)
            self.cache.store.remove(self.path)
            return False
        return True
