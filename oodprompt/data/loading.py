"""From file lists to batches: ``DataManager`` builds the data set and its loaders.

Every random transform depends on (seed, epoch, index) alone, whatever the number of workers and processes.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from yacs.config import CfgNode

from oodprompt.data import seeding
from oodprompt.data.dataset import Datum, attribute_name, build_dataset, told_apart
from oodprompt.data.images import PixelRules, read_image
from oodprompt.data.kept_images import KeptImages
from oodprompt.data.sampling import EpochBatches
from oodprompt.data.transforms import Transform
from oodprompt.errors import UserError
from oodprompt.log import logger

CPU = torch.device("cpu")
# The images of this process. "whole" [B] are the indices of the images of all processes, on the CPU, from which every
# process knows how many rows the others have; a batch of one process may lack it.
Batch = dict[str, Any]
Unreadable = tuple[int, UserError]  # the index of an image, and what is wrong with its file
_NUMBERS = ("label", "domain", "attribute", "index")


class DatasetWrapper(Dataset):
    """Reads and transforms one image: (index, seed) -> dict with img, label, domain, attribute, impath, index.

    ``kept`` has the transformed images that stay in memory; only where nothing is random.
    """

    def __init__(self, data_source: Sequence[Datum], transform: Callable, rules: PixelRules = PixelRules()) -> None:
        self.data_source, self.transform, self.rules = data_source, transform, rules
        self.kept = KeptImages()
        self._draws = transform.is_random if isinstance(transform, Transform) else True
        self._draws_with_numpy = not isinstance(transform, Transform)

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, item: tuple[int, int]) -> Batch | Unreadable:
        index, seed = item
        datum = self.data_source[index]
        image: Any = self.kept.get(index)
        if image is None:
            try:
                image = read_image(datum.impath, self.rules)
            except UserError as error:
                return index, error  # raised by ``Loader``: an exception inside a worker would lose its one clear line
            if self._draws:
                with _random_numbers_from(seed, self._draws_with_numpy):
                    image = self.transform(image)
            else:
                image = self.transform(image)
            self.kept.put(index, image)
        return {
            "img": image,
            "label": datum.label,
            "domain": datum.domain,
            "attribute": datum.attribute,
            "impath": datum.impath,
            "index": index,
        }


@contextlib.contextmanager
def _random_numbers_from(seed: int, of_numpy: bool = False) -> Iterator[None]:
    """Random numbers on the CPU of Python, torch and maybe numpy come from ``seed``; then all go on as if none were drawn.

    Numpy's take 0.1 ms an image, as much as a transform may.
    """
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = np.random.get_state() if of_numpy else None
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPU too
    if of_numpy:
        np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if numpy_state is not None:
            np.random.set_state(numpy_state)


class _Collate:
    """Stacks items into a batch. A process may get no item of a small last batch: then tensors of length 0.

    With ``skip_unreadable`` the batch has the images that can be read; ``unreadable`` says of others why not.
    """

    def __init__(self, size: tuple[int, int], skip_unreadable: bool = False) -> None:
        self.size, self.skip_unreadable = size, skip_unreadable

    def __call__(self, items: list[Batch | Unreadable]) -> Batch | UserError:
        read: list[Batch] = []
        unreadable: dict[int, str] = {}
        for item in items:
            if not isinstance(item, tuple):
                read.append(item)
            elif self.skip_unreadable:
                unreadable[item[0]] = str(item[1])
            else:
                return item[1]
        images = torch.stack([item["img"] for item in read]) if read else torch.empty(0, 3, *self.size)
        batch: Batch = {"img": images, "impath": [item["impath"] for item in read]}
        if unreadable:
            batch["unreadable"] = unreadable
        # An array and no tensors: from a worker, each tensor would be an open file as long as it lives.
        batch["numbers"] = np.array([[item[key] for item in read] for key in _NUMBERS], dtype=np.int64)
        return batch


class Loader:
    """Iterates over the batches of ``EpochBatches``; ``set_epoch`` before each epoch.

    ``img`` [B, 3, R, R] is on ``device``, as ``transform`` gives it. Where a ``Transform`` ends in pixels, they are read
    and carried in bytes and become floats on ``device``. Labels and indices are on the CPU, pinned for a GPU.
    """

    def __init__(
        self,
        cfg: CfgNode,
        data: Sequence[Datum],
        transform: Callable,
        batches: EpochBatches,
        skip_unreadable: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self._workers = min(max(cfg.DATALOADER.NUM_WORKERS, 0), len(batches))
        self._finish: Callable[[torch.Tensor], torch.Tensor] = lambda images: images.to(device, non_blocking=True)
        self._in_bytes = isinstance(transform, Transform) and transform.ends_in_pixels
        if isinstance(transform, Transform) and self._in_bytes:
            transform, self._finish = transform.in_two(device)
        self.batches, self.dataset = batches, DatasetWrapper(data, transform, PixelRules.of(cfg))
        self._size, self._pins = tuple(cfg.INPUT.SIZE), device.type == "cuda"
        self._collate = _Collate(self._size, skip_unreadable)
        # Its own generator, so that reading images draws nothing from torch's, like reading cached features.
        self._generator = torch.Generator()
        self._lasts = False
        self._waiting: list[DataLoader] = []  # with workers that have read an epoch and wait for the next

    def set_epoch(self, epoch: int) -> None:
        self.batches.epoch = epoch

    def cache_images(self) -> None:
        """Keep transformed images, for those who come back in every epoch."""
        room = self.batches.cfg.DATALOADER.IMAGE_CACHE_MIB * 2**20
        dtype = torch.uint8 if self._in_bytes else torch.float32
        self.dataset.kept = KeptImages(len(self.dataset), (3, *self._size), dtype, room)

    @contextlib.contextmanager
    def lasting_workers(self) -> Iterator[None]:
        """Workers that have read an epoch read the next one, and end when this context does.

        They hold the images' list, transform and kept images as these were at the first epoch. The order and the seeds
        of every epoch come to them from ``batches``.
        """
        self._lasts = self._workers > 0
        try:
            yield
        finally:
            self._lasts = False
            self._waiting.clear()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self._generator.manual_seed(seeding.derive_seed(self.batches.cfg.SEED, seeding.AUGMENT, self.batches.epoch))
        if isinstance(self.dataset.transform, Transform):
            self.dataset.transform.compose()  # once, and not in every worker
        source = self._waiting.pop() if self._waiting else self._source()
        wholes = iter(self.batches.batches() if self.batches.num_processes > 1 else ())
        error: UserError | None = None
        for batch in source:
            if isinstance(batch, UserError):
                error = batch
                break
            numbers = torch.from_numpy(batch.pop("numbers"))
            if self._pins:
                numbers = numbers.pin_memory()
            if self.batches.num_processes > 1:
                batch["whole"] = torch.from_numpy(next(wholes).astype("int64"))
            yield batch | {"img": self._finish(batch["img"])} | dict(zip(_NUMBERS, numbers, strict=True))
        if error is not None:
            del source  # whose workers would live as long as the traceback
            raise error
        if self._lasts:  # workers whose epoch was left early have ended with it
            self._waiting.append(source)

    def _source(self) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=self._workers,
            collate_fn=self._collate,
            pin_memory=self._pins,
            generator=self._generator,
            persistent_workers=self._lasts,
        )


class DataManager:
    """Builds the data set and its loaders: ``train_loader_x``, ``val_loader`` (or None), ``test_loader``.

    Images of their batches are on ``device``.
    """

    def __init__(self, cfg: CfgNode, rank: int = 0, num_processes: int = 1, device: torch.device = CPU) -> None:
        self.cfg, self.device, self.dataset = cfg, device, build_dataset(cfg)
        self.rank, self.num_processes = rank, num_processes
        self.num_classes, self.lab2cname = self.dataset.num_classes, self.dataset.lab2cname
        if "normalize" not in cfg.INPUT.TRANSFORMS and self.dataset.has_pixels:
            logger.warning("Note: INPUT.TRANSFORMS has no 'normalize', but CLIP expects normalised pixels")
        self.transform_train, self.transform_test = Transform(cfg, is_train=True), Transform(cfg, is_train=False)
        self.train_loader_x = self.loader(self.dataset.train_x, is_train=True)
        self.val_loader = self.loader(self.dataset.val) if self.dataset.val else None
        self.test_loader = self.loader(self.dataset.test)

    def loader(
        self,
        data: Sequence[Datum],
        is_train: bool = False,
        transform: Callable | None = None,
        skip_unreadable: bool = False,
    ) -> Loader:
        """A loader over ``data``; test order and test transform unless ``is_train``.

        ``UserError`` for an image that cannot be read; with ``skip_unreadable`` batches lack it and say why.
        """
        batches = EpochBatches(self.cfg, data, is_train, self.rank, self.num_processes)
        transform = transform or (self.transform_train if is_train else self.transform_test)
        return Loader(self.cfg, data, transform, batches, skip_unreadable, self.device)

    def summary(self) -> list[tuple[str, Any]]:
        """What a person wants to know of the data before training starts."""
        data = self.dataset
        rows: list[tuple[str, Any]] = [
            ("Dataset", self.cfg.DATASET.NAME),
            ("# classes", f"{self.num_classes:,}"),
            ("# train_x", f"{len(data.train_x):,}"),
            ("# val", f"{len(data.val):,}"),
            ("# test", f"{len(data.test):,}"),
        ]
        if data.has_attributes:
            groups = Counter(zip(data.train_x.label.tolist(), data.train_x.attribute.tolist(), strict=True))
            names = told_apart(data.classnames)
            for (label, attribute), n in sorted(groups.items()):
                rows.append((f"# train_x: {names[label]} / {attribute_name(data, attribute)}", f"{n:,}"))
        return rows
