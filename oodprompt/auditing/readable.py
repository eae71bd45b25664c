"""Image features and outputs of a model over images some of which may be damaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.log import logger, progress

_SHOWN = 3


class ReadableImages:
    """The splits of a trainer without the images that cannot be read, and an ``encoder`` of them.

    ``unreadable``: path -> what is wrong with it. Nothing is looked for before an image fails; then all images are read
    once.
    """

    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer, self.encoder = trainer, trainer.encoder
        self.unreadable: dict[str, str] = {}

    def compute(self, splits: Sequence[str]) -> None:
        """Have the features of ``splits`` computed, or read from the cache; images that cannot be read are left out.

        ``UserError`` where a split has no image that can be read.
        """
        try:
            self._compute(splits)
        except UserError:
            if not self._leave_out(splits):
                raise
            self._compute(splits)

    def _compute(self, splits: Sequence[str]) -> None:
        for split in splits:
            self.encoder.frozen_features_of(split)

    def _leave_out(self, splits: Sequence[str]) -> bool:
        """Take unreadable images out of the splits; whether there were any."""
        data, dataset = self.encoder.data, self.encoder.data.dataset
        if not dataset.has_pixels:
            return False
        for split in splits:
            images = self.encoder.data_of(split)
            broken: dict[int, str] = {}
            for batch in progress.over(data.loader(images, skip_unreadable=True), f"Reading {split} images", "batch"):
                broken |= batch.get("unreadable", {})
            if not broken:
                continue
            kept = np.setdiff1d(np.arange(len(images)), list(broken))
            if not len(kept):
                raise UserError(f"no image of the {split} split can be read: {next(iter(broken.values()))}")
            self.unreadable |= {images.impath(i): why for i, why in broken.items()}
            setattr(dataset, "train_x" if split == "train" else split, images.take(kept))
        if self.unreadable:
            first = "; ".join(list(self.unreadable.values())[:_SHOWN])
            logger.warning(f"Note: {len(self.unreadable):,} images cannot be read and are left out: {first}")
            data.train_loader_x = data.loader(dataset.train_x, is_train=True)
            data.val_loader = data.loader(dataset.val) if dataset.val else None
            data.test_loader = data.loader(dataset.test)
            old = self.encoder
            self.encoder = Encoder(old.cfg, old.clip, data, old.learner, old.device, old.precision, old.show_progress)
        return bool(self.unreadable)
