"""A trained run in the hands of a user: evaluate, predict, features, export, discover."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.data.dataset import told_apart
from oodprompt.engine import device
from oodprompt.errors import UserError
from oodprompt.library.inputs import Inputs
from oodprompt.library.results import Results
from oodprompt.library.state import Processes, call
from oodprompt.serving.classifier import table_of

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from oodprompt.engine.trainer import PromptTrainer
    from oodprompt.serving import Report

    Images = str | Path | Image | np.ndarray | Tensor | Sequence[str | Path] | Sequence[Image | np.ndarray]

_SPLITS = ("train", "val", "test")


class Run:
    """A trained model with its data: what ``oodprompt.train`` and ``oodprompt.load`` return.

    ``folder`` has its files, ``cfg`` its settings, ``classes`` the names of its classes. ``trainer`` is the engine's own
    object.
    """

    def __init__(self, trainer: PromptTrainer, processes: Processes, verbose: bool = False) -> None:
        self.trainer, self.verbose, self._processes = trainer, verbose, processes

    @property
    def folder(self) -> Path:
        """The output folder."""
        return self.trainer.output_dir

    @property
    def cfg(self) -> CfgNode:
        """All settings, as config.yaml has them."""
        return self.trainer.cfg

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of their numbers; equal names carry the number."""
        return told_apart(self.trainer.dataset.classnames)

    def __repr__(self) -> str:
        from oodprompt.reports.results import method_title

        data = f"{self.cfg.DATASET.NAME}, backbone {self.cfg.MODEL.BACKBONE.PATH or self.cfg.MODEL.BACKBONE.NAME}"
        return f"Run({method_title(self._names())} on {data}, folder {self.folder})"

    def evaluate(self, split: str = "test") -> Results:
        """Evaluate on ``train``, ``val`` or ``test`` of the run's data; ``UserError`` for a split that has no images.

        It writes no files.
        """
        if split not in _SPLITS:
            raise UserError(f"evaluate: the split is train, val or test, not {split!r}")
        trainer = self.trainer
        with self._call():
            if not len(trainer.encoder.data_of(split)):
                raise UserError(f"evaluate: {self.cfg.DATASET.NAME} has no {split} images")
            metrics = trainer.evaluate(split)
        facts = {"dataset": self.cfg.DATASET.NAME, "seed": self.cfg.SEED, "split": split}
        return Results({**self._names(), **facts, **metrics})

    def predict(self, images: Images) -> pd.DataFrame:
        """Classify images; a row for each: image, prediction, probability, and the probability of every class.

        ``images``: paths or folders, PIL images, pixels uint8 [N, H, W, 3] or [H, W, 3] in RGB, or image features
        [N, d] (floats, by the frozen backbone), one of them or a list. A DataFrame with a column image is taken, too, and
        its rows keep their index. ``UserError`` for what cannot be read.
        """
        with self._call():
            given = Inputs.of(images, self.trainer)
            probabilities = torch.cat([torch.empty(0, len(self.classes)), *given.probabilities(self.trainer)])
        table = table_of(given.names, probabilities, self.classes)
        return table if given.index is None else table.set_axis(given.index)

    def features(self, images: Images) -> np.ndarray:
        """Image features of this model, L2-normalised, float32 [N, d]; ``images`` as in ``predict``."""
        with self._call():
            given = Inputs.of(images, self.trainer)
            width = self.trainer.clip.shape.embed_dim
            return torch.cat([torch.empty(0, width), *given.features(self.trainer)]).numpy()

    def discover(self, folder: str | Path | None = None) -> Path:
        """RaVL's discovery: which regions of images the model wrongly goes by; returns the page, discovery.html.

        ``folder``: where to write; default: the run's.
        """
        from oodprompt.discovering import discover_in

        out = Path(folder).expanduser() if folder is not None else self.folder
        with self._call():
            discover_in(self.trainer, out)
        return out / "discovery.html"

    def export(self, file: str | Path, **options: Any) -> Report:
        """Write the model to one file, which ``oodprompt.Classifier.load`` reads; ``options`` as of ``serving.export``.

        Returns what was written, and how far it is from this model.
        """
        from oodprompt import serving

        with self._call():
            return serving.export(self, Path(file).expanduser(), **options)

    # --- inside ------------------------------------------------------------------------------------------------

    def _names(self) -> dict[str, Any]:
        keys = self.cfg.TRAINER
        return {"trainer": keys.NAME, "base": self.trainer.base_name, "stack": list(keys.STACK)}

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        with call(self._processes, self.verbose):
            device.set_torch(self.cfg, self.trainer.device)  # the call before put the program's settings back
            yield
