"""``Classifier``: classifies images with a file of ``oodprompt export``; no run, data set or training is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oodprompt.data.dataset import told_apart
from oodprompt.data.folders import IMAGE_ENDINGS, images_below
from oodprompt.data.images import PixelRules, read_image
from oodprompt.data.transforms import Transform
from oodprompt.errors import UserError
from oodprompt.serving import file as files
from oodprompt.serving.deployed import Deployed

if TYPE_CHECKING:
    from pandas import DataFrame

AT_ONCE = 64  # images


class Classifier:
    """A trained model from a file: ``Classifier.load("model.safetensors").predict(["a.jpg", "b.jpg"])``.

    ``classnames`` are the names of the classes, each once. ``model``, on ``device``, maps uint8 pixels [B, 3, R, R] to
    probabilities.
    """

    def __init__(self, card: files.Card, model: Deployed, device: torch.device | str = "cpu") -> None:
        self.card, self.device, self.model = card, torch.device(device), model
        self.classnames = told_apart(card.classnames)
        cfg = files.config_of(card)
        self._rules, self._transform = PixelRules.of(cfg), Transform(cfg, is_train=False, in_bytes=True)

    @classmethod
    def load(cls, file: str | Path, backbone_path: str | Path = "", device: torch.device | str = "") -> Classifier:
        """The classifier of a file that ``oodprompt export`` wrote.

        ``backbone_path`` is the checkpoint of the backbone, where it has moved. ``device`` is a GPU where there is one.
        ``UserError`` where the file is no such file, and where the backbone is not the one of the model.
        """
        card, tensors = files.read(file)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(card, files.build(card, tensors, file, backbone_path, device), device)

    def predict(self, images: Any, batch_size: int = AT_ONCE) -> DataFrame:
        """A table with a row per image: image, prediction, probability, and the probability of every class.

        ``images``: paths or folders, PIL images, or pixels uint8 [N, H, W, 3], [H, W, 3] or [H, W] in RGB, one or a list.
        The column image has the paths, or the numbers of the images. ``UserError`` for an image that cannot be read.
        """
        items = listed(images)
        names = [_name(item, i) for i, item in enumerate(items)]
        return table_of(names, self.probabilities(items, batch_size), self.classnames)

    def probabilities(self, images: Any, batch_size: int = AT_ONCE) -> Tensor:
        """Probabilities [N, C] of the classes on the CPU; ``images`` as in ``predict``."""
        items = listed(images)
        parts = [part for _, part, _ in self.by_batch(items, batch_size, skip_unreadable=False)]
        return torch.cat(parts) if parts else torch.empty(0, len(self.classnames))

    def by_batch(
        self, items: Sequence[Any], batch_size: int = AT_ONCE, skip_unreadable: bool = True
    ) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
        """Batch by batch: places in ``items``, probabilities [n, C], and what ails unreadable images by place."""
        if batch_size < 1:
            raise UserError(f"a batch of {batch_size} images is not possible; give 1 or more")
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, len(items), batch_size):
                some = range(start, min(start + batch_size, len(items)))
                read = list(pool.map(self._try, (items[i] for i in some)))
                errors = {i: str(result) for i, result in zip(some, read, strict=True) if isinstance(result, UserError)}
                if errors and not skip_unreadable:
                    raise next(result for result in read if isinstance(result, UserError))
                pixels = [result for result in read if isinstance(result, Tensor)]
                places = [i for i in some if i not in errors]
                yield places, self.classify(torch.stack(pixels)) if pixels else self._nothing(), errors

    def _nothing(self) -> Tensor:
        return torch.empty(0, len(self.classnames))

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [B, 3, R, R] of ``pixels_of`` -> probabilities [B, C] on the CPU."""
        return self.model(pixels.to(self.device)).cpu()

    def pixels_of(self, item: Any) -> Tensor:
        """What the model takes of one image: resized, cut, uint8 [3, R, R]."""
        if isinstance(item, str | os.PathLike):
            image = read_image(os.fspath(item), self._rules)
        elif isinstance(item, Image.Image):
            image = of_pillow(item)
        else:
            image = of_array(np.asarray(item))
        return self._transform(image)

    def _try(self, item: Any) -> Tensor | UserError:
        try:
            return self.pixels_of(item)
        except UserError as error:
            return error


def table_of(names: Sequence[str], probabilities: Tensor, classnames: Sequence[str]) -> DataFrame:
    """A row per image: image, prediction, probability, and those of all classes, ``probabilities`` [N, C]."""
    import pandas

    p = probabilities.numpy()
    best = p.argmax(axis=1)
    first = {"image": names, "prediction": [classnames[i] for i in best], "probability": p[np.arange(len(p)), best]}
    return pandas.concat([pandas.DataFrame(first), pandas.DataFrame(p, columns=pandas.Index(classnames))], axis=1)


def listed(images: Any) -> list[Any]:
    """``images`` as a list of single ones: paths of files, PIL images or arrays; folders are searched."""
    if (
        isinstance(images, str | os.PathLike | Image.Image)
        or isinstance(images, np.ndarray | Tensor)
        and images.ndim in (2, 3)
    ):
        images = [images]
    found: list[Any] = []
    for item in images:
        if isinstance(item, str | os.PathLike) and Path(item).is_dir():
            inside = images_below(Path(item))
            if not inside:
                raise UserError(f"no image in {item}; {IMAGE_ENDINGS}")
            found += map(str, inside)
        else:
            found.append(item)
    return found


def of_pillow(image: Image.Image) -> Image.Image:
    """In RGB; ``UserError`` for more than 8 bits, whose meaning only the file tells."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise UserError(
            f"a PIL image of mode {image.mode} has more than 8 bits; give its path, or convert it to RGB first"
        )
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def of_array(values: np.ndarray) -> Image.Image:
    """The image of an array; ``UserError`` for any but uint8 [H, W, 3] or [H, W]."""
    fits = values.dtype == np.uint8 and (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3))
    if not fits:
        raise UserError(
            f"an array of type {values.dtype} and shape {values.shape} is no image: give uint8 [height, width, 3] in RGB, or "
            "[height, width] in grey"
        )
    return Image.fromarray(values).convert("RGB")


def _name(item: Any, number: int) -> str:
    return os.fspath(item) if isinstance(item, str | os.PathLike) else str(number)
