"""Groups that cost a training or a search: computed once, of all splits, and kept in the run's folder."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.engine.loop import RunState
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.log import logger
from oodprompt.methods.groups import SourceOfGroups
from oodprompt.methods.splits import LabelledData, Split

FILE = "groups.npz"


class KeptGroups:
    """A source whose values are computed at the first question, of the training and the validation split at once.

    A run that is resumed takes those that it kept. Only a process that ``writes`` writes the file.
    """

    is_computed = True

    def __init__(self, source: SourceOfGroups, data: LabelledData, cfg: CfgNode, state: RunState, writes: bool) -> None:
        self.source, self._data, self.cfg, self.state, self.writes = source, data, cfg, state, writes
        self.names, self.may_be_fewer = source.names, source.may_be_fewer
        self._values: dict[str, Tensor] = {}

    def num_values(self, split: Split) -> int:
        """A, as the source says it."""
        return self.source.num_values(split)

    def of(self, split: Split) -> Tensor:
        """The value of every image of the split, [N]. ``UserError`` where the file is damaged, or of other images."""
        if not self._values:
            folder = Path(self.cfg.OUTPUT_DIR)
            resumed = self.state.start_epoch > 0
            found = next(
                (f for f in (folder, Path(self.cfg.RESUME or folder)) if resumed and (f / FILE).is_file()), None
            )
            splits = [s for s in (self._data.train, self._data.val) if s is not None]
            if found is not None:
                self._values = {s.name: self._read(found / FILE, s) for s in splits}
            else:
                self._values = {s.name: self.source.of(s) for s in splits}
            if self.writes and found != folder:
                self._write(folder / FILE, splits)
        if split.name not in self._values:  # of another split than those that methods ask for
            self._values[split.name] = self.source.of(split)
        return self._values[split.name]

    def _write(self, path: Path, splits: Sequence[Split]) -> None:
        arrays: dict[str, Any] = {s.name: self._values[s.name].cpu().numpy().astype(np.int32) for s in splits}
        arrays |= {f"digest_{s.name}": np.array(_digest(s)) for s in splits}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        write_atomically(path, buffer.getvalue())

    def _read(self, path: Path, split: Split) -> Tensor:
        try:
            with np.load(path, allow_pickle=False) as file:
                value, digest = torch.from_numpy(file[split.name]).long(), str(file[f"digest_{split.name}"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to have the groups computed anew") from error
        if digest != _digest(split) or len(value) != len(split.label):
            raise UserError(f"{path} is of other {split.name} images; delete it to have the groups computed anew")
        logger.info(f"Groups of the {split.name} split: those of {path}")
        return value.to(split.label.device)


def _digest(split: Split) -> str:
    """What tells apart splits whose images, or their order, are not the same."""
    digest = hashlib.sha256(split.label.cpu().numpy().tobytes())
    for path in split.paths():
        digest.update(Path(path).name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
