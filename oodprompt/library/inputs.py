"""Images in every form that a user may have them in: paths, PIL images, pixels, or image features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from oodprompt.data.datum import Datum
from oodprompt.errors import UserError
from oodprompt.features.encoder import evaluating
from oodprompt.predict import images_of
from oodprompt.serving.classifier import of_array, of_pillow

if TYPE_CHECKING:
    import pandas as pd

    from oodprompt.engine.trainer import PromptTrainer

_TAKES = (
    "give paths, PIL images, pixels uint8 [N, H, W, 3] or [H, W, 3], or image features [N, d] in floats; one or a list"
)


@dataclass
class Inputs:
    """What to classify: ``names``, and either ``paths``, ``pictures`` or features ``z`` [N, d].

    ``index`` has the names of the rows where a pandas object was given.
    """

    names: list[str]
    paths: list[Path] | None = None
    pictures: list[Image.Image] | None = None
    z: Tensor | None = None
    index: pd.Index | None = None

    @classmethod
    def of(cls, images: Any, trainer: PromptTrainer) -> Inputs:
        """``UserError`` for what is none of these."""
        if isinstance(images, (str, Path)):
            images = [images]
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, Tensor):
            images = _array(images)
        if isinstance(images, np.ndarray) and images.dtype.kind not in "USO":
            return cls._of_array(images[None] if images.dtype.kind == "f" and images.ndim == 1 else images, trainer)
        if isinstance(images, Mapping):
            raise UserError(f"predict: a {type(images).__name__} is no image; {_TAKES}")
        if type(images).__name__ == "DataFrame":
            if "image" not in images.columns:
                raise UserError("predict: the DataFrame has no column 'image' with the paths of images")
            images = images["image"]
        if type(images).__name__ == "Series":
            found = cls._of_items(list(images), trainer)
            if len(found.names) != len(images):
                raise UserError("predict: the table has a folder among its images; give the paths of the images in it")
            found.index = images.index
            return found
        try:
            items = images.ravel().tolist() if isinstance(images, np.ndarray) else list(images)
        except TypeError:
            raise UserError(f"predict: a {type(images).__name__} is no image; {_TAKES}") from None
        return cls._of_items(items, trainer)

    @classmethod
    def _of_items(cls, items: list[Any], trainer: PromptTrainer) -> Inputs:
        items = [_array(item) if isinstance(item, Tensor) else item for item in items]
        is_row = [isinstance(item, np.ndarray) and item.dtype.kind == "f" and item.ndim == 1 for item in items]
        if items and all(is_row):
            if len({len(row) for row in items}) > 1:
                raise UserError("predict: the rows of image features differ in length")
            return cls._of_array(np.stack(items), trainer)
        if all(isinstance(item, (str, Path)) for item in items):
            paths = images_of([Path(item).expanduser() for item in items])
            return cls(list(map(str, paths)), paths=paths)
        if all(isinstance(item, (Image.Image, np.ndarray)) for item in items):
            pictures = [of_array(item) if isinstance(item, np.ndarray) else of_pillow(item) for item in items]
            return cls(_numbers(len(pictures)), pictures=pictures)
        kinds = sorted({type(item).__name__ for item in items})
        raise UserError(f"predict: a list of {', '.join(kinds)} is none of images; {_TAKES}")

    @classmethod
    def _of_array(cls, array: np.ndarray, trainer: PromptTrainer) -> Inputs:
        if array.dtype.kind == "f" and array.ndim == 2:
            width = trainer.clip.shape.embed_dim
            if array.shape[1] != width:
                raise UserError(
                    f"predict: image features of this backbone have {width} entries each, not {array.shape[1]}"
                )
            z = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
            length = z.norm(dim=1)
            if not bool((torch.isfinite(length) & (length > 0)).all()):
                raise UserError("predict: a row of the image features is zero or not finite (NaN or infinity)")
            learner = trainer.learner
            if learner.trains_image_tower or not learner.encodes_as_clip:
                raise UserError(f"predict: {trainer.base_name} changes how images are encoded; give it the images")
            return cls(_numbers(len(z)), z=F.normalize(z, dim=1))
        if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-1] == 3:
            pictures = [of_array(one) for one in (array if array.ndim == 4 else array[None])]
            return cls(_numbers(len(pictures)), pictures=pictures)
        raise UserError(f"predict: an array of {array.dtype} {list(array.shape)} is no image; {_TAKES}")

    def probabilities(self, trainer: PromptTrainer) -> Iterator[Tensor]:
        """Probabilities of the classes, batch by batch, [b, C] on the CPU."""
        if self.paths is not None:
            if self.paths:
                yield trainer.classify(self.paths)
            return
        yield from self._by_batch(
            trainer, lambda batch: trainer.objective.predict(trainer.encoder.align(batch)).softmax(dim=1)
        )

    def features(self, trainer: PromptTrainer) -> Iterator[Tensor]:
        """Image features by the run's learner, batch by batch, [b, d] on the CPU."""
        yield from self._by_batch(trainer, lambda batch: trainer.encoder.align(batch).image_features)

    @torch.no_grad()
    def _by_batch(self, trainer: PromptTrainer, compute: Callable[[dict[str, Any]], Tensor]) -> Iterator[Tensor]:
        with evaluating(trainer.learner, *trainer.debiasers):
            for batch in self._batches(trainer):
                yield compute(batch).float().cpu()

    def _batches(self, trainer: PromptTrainer) -> Iterator[dict[str, Any]]:
        size = trainer.cfg.DATALOADER.TEST.BATCH_SIZE
        encoder = trainer.encoder
        if self.paths is not None:
            if self.paths:
                yield from encoder.data.loader([Datum(str(path)) for path in self.paths])
        elif self.z is not None:
            for part in self.z.split(size):
                yield {"image_features": part.to(encoder.device)}
        else:
            pictures: Sequence[Image.Image] = self.pictures or []
            for start in range(0, len(pictures), size):
                pixels = [encoder.data.transform_test(picture) for picture in pictures[start : start + size]]
                yield {"img": torch.stack(pixels)}


def _array(values: Tensor) -> np.ndarray:
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() else values).numpy()


def _numbers(count: int) -> list[str]:
    return [str(i) for i in range(count)]
