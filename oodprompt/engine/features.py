"""Image features of whole splits: computed once, kept in memory, sliced into batches instead of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm
from yacs.config import CfgNode

from oodprompt.engine.data import Batch, DataManager, Datum, EpochBatches, Loader, is_random
from oodprompt.engine.distributed import sum_over_processes
from oodprompt.errors import UserError, nearest


class FeatureLoader:
    """Batches of the same images in the same order as ``Loader``, with ``image_features`` in place of ``img``.

    ``features`` [V, N, d]: V views of every image; epoch e takes view e mod V.
    """

    def __init__(self, features: Tensor, data: list[Datum], batches: EpochBatches) -> None:
        self.features, self.data, self.batches = features, data, batches
        self._columns = {
            key: torch.tensor([getattr(datum, key) for datum in data]) for key in ("label", "domain", "attribute")
        }

    def set_epoch(self, epoch: int) -> None:
        self.batches.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        view = self.features[self.batches.epoch % len(self.features)]
        for batch in self.batches:
            index = torch.tensor([i for i, _ in batch], dtype=torch.long)
            yield {
                "image_features": view[index.to(view.device)],
                "index": index,
                "impath": [self.data[i].impath for i in index.tolist()],
                **{key: column[index] for key, column in self._columns.items()},
            }


def views_to_cache(cfg: CfgNode, trains_image_tower: bool) -> int:
    """How many views of each training image the cache holds; 0: images are encoded at every step.

    Raises ``UserError`` when DATALOADER.FEATURE_CACHE insists on what cannot be.
    """
    choice = cfg.DATALOADER.FEATURE_CACHE
    if choice not in ("auto", "memory", "off"):
        raise UserError(
            f"DATALOADER.FEATURE_CACHE: unknown choice {choice!r}: {nearest(choice, ['auto', 'memory', 'off'])}"
        )
    if choice == "off":
        return 0
    if trains_image_tower:
        if choice == "memory":
            raise UserError(
                "DATALOADER.FEATURE_CACHE memory: this prompt learner trains the image tower; use auto or off"
            )
        return 0
    if cfg.INPUT.VIEWS > 0:
        return cfg.INPUT.VIEWS
    if not is_random(cfg):
        return 1
    if choice == "memory":
        raise UserError(
            "DATALOADER.FEATURE_CACHE memory: INPUT.TRANSFORMS are random; say with INPUT.VIEWS how many views to keep"
        )
    return 0


@torch.no_grad()
def extract(encode: Callable[[Tensor], Tensor], loader: Loader, title: str, show: bool = True) -> Tensor:
    """Features of every image of ``loader`` by its index, [N, d] on the encoder's device; processes share the work."""
    features: Tensor | None = None
    with tqdm(total=len(loader.dataset), desc=title, unit="image", disable=None if show else True, leave=False) as bar:
        for batch in loader:
            z = encode(batch["img"])
            if features is None:
                features = z.new_zeros(len(loader.dataset), z.shape[1])
            features[batch["index"].to(z.device)] = z
            bar.update(len(z))
    return sum_over_processes(features)


def train_views(data: DataManager, encode: Callable[[Tensor], Tensor], views: int, show: bool = True) -> Tensor:
    """``views`` views of the training images, [views, N, d]; one view is the test transform where the training
    transform is random, and the training transform itself where it is not.
    """
    transform = data.transform_test if views == 1 and is_random(data.cfg) else data.transform_train
    result = []
    for view in range(views):
        loader = data.loader(data.dataset.train_x, transform=transform)
        loader.set_epoch(view)
        result.append(extract(encode, loader, f"Features of training images, view {view + 1}/{views}", show))
    return torch.stack(result)
