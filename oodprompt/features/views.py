"""Image features of whole splits: computed once, kept, and sliced into batches instead of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones.devices import to_device
from oodprompt.data.columns import Images
from oodprompt.data.datum import Datum
from oodprompt.data.distributed import gather_rows, whole_index
from oodprompt.data.loading import Batch, DataManager, Loader
from oodprompt.data.sampling import EpochBatches
from oodprompt.data.transforms import is_random
from oodprompt.data.vectors import VectorRows
from oodprompt.errors import UserError
from oodprompt.features.cache import FeatureCache, View, Views
from oodprompt.log import progress
from oodprompt.memory import memory_for


class FeatureBatch(Batch):
    """A batch whose tensors are on the device. ``impath``, the paths, are put together when they are asked for."""

    def __init__(self, values: Batch, rows: np.ndarray, data: Images) -> None:
        super().__init__(values)
        self._rows, self._data = rows, data

    def __missing__(self, key: str) -> list[str]:
        if key != "impath":
            raise KeyError(key)
        return [self._data.impath(i) for i in self._rows.tolist()]


class FeatureLoader:
    """Batches of the same images in the same order as ``Loader``, with ``image_features`` in place of ``img``.

    Everything is on ``device``, where a batch is cut out without a word to the host. Epoch e takes view e mod V of
    ``features``; rows of memory-mapped views are moved to the device batch by batch.
    """

    _KEYS = ("label", "domain", "attribute")

    def __init__(
        self, features: Views, data: Sequence[Datum], batches: EpochBatches, device: torch.device | str = "cpu"
    ) -> None:
        self.features, self.data, self.batches, self.device = features, Images.of(data), batches, torch.device(device)
        columns = np.stack([np.asarray(getattr(self.data, key), dtype=np.int64) for key in self._KEYS], axis=1)
        self._columns = torch.from_numpy(columns).to(self.device)  # [N, 3]

    def set_epoch(self, epoch: int) -> None:
        self.batches.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        view = self.features[self.batches.epoch % len(self.features)]
        wholes = [whole.astype(np.int64) for whole in self.batches.batches()]
        parts = [self.batches.own(whole) for whole in wholes]
        order = to_device(torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)])), self.device)
        for whole, part, index in zip(wholes, parts, order.split([len(part) for part in parts]), strict=True):
            if isinstance(view, Tensor):
                features = view.index_select(0, index.to(view.device))
            else:
                features = to_device(torch.from_numpy(view[part]), self.device)
            columns = self._columns.index_select(0, index).unbind(1)
            values = {"image_features": features, "index": index, "whole": torch.from_numpy(whole)}
            yield FeatureBatch(values | dict(zip(self._KEYS, columns, strict=True)), part, self.data)


def rows_of(view: View, index: Tensor, device: torch.device | str) -> Tensor:
    """Rows ``index`` of a view [N, d]; of a memory-mapped one only they are read, and moved to ``device``."""
    if isinstance(view, Tensor):
        return view[to_device(index, view.device)]
    # indexing with an array copies: the file stays untouched
    return to_device(torch.from_numpy(view[index.cpu().numpy()]), device)


def whole(view: View, device: torch.device) -> Tensor:
    """All of a view [N, d], on ``device``."""
    return view if isinstance(view, Tensor) else torch.from_numpy(np.array(view)).to(device)


def given_view(images: Sequence[Datum], device: torch.device, memory_mib: float) -> Views | None:
    """The features [1, N, d] that come in place of images; None where images come.

    What takes more than ``memory_mib`` MiB stays in its files, from where batches are read.
    """
    columns = Images.of(images)
    if columns.vectors is None:
        return None
    view = VectorRows(columns.vectors, columns.rows)
    fits = 4 * view.shape[0] * view.shape[1] <= memory_mib * 2**20
    return whole(view, device)[None] if fits else [view]


def views_to_cache(cfg: CfgNode, trains_image_tower: bool, own_encoder: bool = False) -> int:
    """How many views of each training image the cache holds; 0: images are encoded at every step.

    ``own_encoder``: the prompt learner encodes images otherwise than by CLIP alone, from which files are named.
    Raises ``UserError`` when DATALOADER.FEATURE_CACHE insists on what cannot be.
    """
    choice = cfg.DATALOADER.FEATURE_CACHE
    if choice == "off":
        return 0
    insists = choice in ("memory", "disk")
    if trains_image_tower:
        if insists:
            raise UserError(
                f"DATALOADER.FEATURE_CACHE {choice}: this prompt learner trains the image tower; use auto or off"
            )
        return 0
    if own_encoder and choice == "disk":
        raise UserError(
            "DATALOADER.FEATURE_CACHE disk: this prompt learner encodes images in its own way, which files are not "
            "named by; use auto, memory or off"
        )
    if cfg.INPUT.VIEWS > 0:
        return cfg.INPUT.VIEWS
    if not is_random(cfg):
        return 1
    if insists:
        raise UserError(
            f"DATALOADER.FEATURE_CACHE {choice}: INPUT.TRANSFORMS are random; say with INPUT.VIEWS how many views to keep"
        )
    return 0


@torch.no_grad()
def rows_in_order(
    encode: Callable[[Tensor], Tensor], loader: Loader, title: str, show: bool = True, start: int = 0
) -> Iterator[Tensor]:
    """Features of the images of ``loader`` from the index ``start`` on, batch by batch, [b, d] on the encoder's device.

    They come in the order of the indices, whatever the loader's sampler; processes share the work.
    """
    total, keys = len(loader.dataset), loader.batches.cfg.DATALOADER.TEST
    with (
        memory_for(f"while computing: {title}", lambda: f"Lower DATALOADER.TEST.BATCH_SIZE (now {keys.BATCH_SIZE})"),
        loader.batches.ordered_by(lambda epoch, rng: np.arange(start, total)),
        progress(total, title, "image", show, start) as bar,
    ):
        for batch in loader:
            z = gather_rows(encode(batch["img"]), len(whole_index(batch)))
            yield z
            bar.update(len(z))


def extract(encode: Callable[[Tensor], Tensor], loader: Loader, title: str, show: bool = True) -> Tensor:
    """Features of every image of ``loader`` by its index, [N, d] on the encoder's device; processes share the work."""
    return torch.cat(list(rows_in_order(encode, loader, title, show)))


def train_views(
    data: DataManager,
    encode: Callable[[Tensor], Tensor],
    views: int,
    show: bool = True,
    cache: FeatureCache | None = None,
) -> Views:
    """``views`` views of the training images, [views, N, d]; one view is the test transform where the training
    transform is random, and the training transform itself where it is not.
    """
    is_train = views > 1 or not is_random(data.cfg)
    transform = data.transform_train if is_train else data.transform_test

    def compute(view: int, start: int = 0) -> Iterator[Tensor]:
        loader = data.loader(data.dataset.train_x, transform=transform)
        loader.set_epoch(view)
        return rows_in_order(encode, loader, f"Features of training images, view {view + 1}/{views}", show, start)

    if cache is None:
        return torch.stack([torch.cat(list(compute(view))) for view in range(views)])
    return cache.views("train", data.dataset.train_x, views, is_train, compute)


def evaluation_view(
    split: str, images: Loader, encode: Callable[[Tensor], Tensor], show: bool = True, cache: FeatureCache | None = None
) -> Views:
    """The one view of the images of an evaluation split, [1, N, d]."""

    def compute(view: int, start: int = 0) -> Iterator[Tensor]:
        return rows_in_order(encode, images, f"Features of {split} images", show, start)

    if cache is None:
        return torch.cat(list(compute(0)))[None]
    return cache.views(split, images.dataset.data_source, 1, False, compute)
