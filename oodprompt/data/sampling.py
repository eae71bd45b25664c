"""The order of images: samplers by Dassl's names, and the batches of an epoch for one of several processes.

The order depends on (seed, epoch) alone, whatever the number of workers and processes. BATCH_SIZE counts per process;
the batches of all processes together are one batch of the whole.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from yacs.config import CfgNode

from oodprompt.data import seeding
from oodprompt.data.columns import Images
from oodprompt.data.datum import Datum
from oodprompt.errors import UserError

EpochOrder = Callable[[int, np.random.Generator], np.ndarray]  # (epoch, random numbers) -> indices in order


def epoch_order(
    sampler: str, data: Sequence[Datum], batch_size: int, rng: np.random.Generator, n_domain: int = 0, n_ins: int = 16
) -> np.ndarray:
    """Indices into ``data`` in the order of one epoch, by Dassl's sampler names.

    Indices are int64. ``RandomClassSampler`` fills batches with ``n_ins`` images of each of batch_size / n_ins classes;
    ``RandomDomainSampler`` with equally many of each of ``n_domain`` domains (0: all). ``UserError`` where the
    batch size or a domain's images do not allow it.
    """
    if sampler == "SequentialSampler":
        return np.arange(len(data))
    if sampler == "RandomSampler":
        return rng.permutation(len(data))
    by_class = sampler == "RandomClassSampler"
    images = Images.of(data)
    pools: dict[int, list[int]] = defaultdict(list)
    for i, pool in enumerate((images.label if by_class else images.domain).tolist()):
        pools[pool].append(i)
    sources = min(batch_size // n_ins, len(pools)) if by_class else (n_domain if n_domain > 0 else len(pools))
    if not 1 <= sources <= len(pools):
        raise UserError(
            f"{sampler}: cannot fill batches of {batch_size} from {len(pools)} "
            + (f"classes with N_INS {n_ins}" if by_class else f"domains with N_DOMAIN {n_domain}")
        )
    each = n_ins if by_class else batch_size // sources
    if batch_size % (sources * each):
        raise UserError(
            f"{sampler}: batches of {batch_size} do not divide into {sources} {'classes' if by_class else 'domains'}"
            + (f" of N_INS {n_ins} images" if by_class else "")
            + "; change DATALOADER.TRAIN_X.BATCH_SIZE"
        )
    small = [] if by_class else [domain for domain, pool in pools.items() if len(pool) < each]
    if small:
        raise UserError(
            f"{sampler}: domain {small[0]} has {len(pools[small[0]])} images, fewer than the {each} of a batch of "
            f"{batch_size}; lower DATALOADER.TRAIN_X.BATCH_SIZE"
        )
    queues = {key: rng.permutation(pool).tolist() for key, pool in pools.items()}
    order: list[int] = []
    while True:
        for key in rng.permutation(sorted(queues))[:sources].tolist():
            queue = queues[key]
            if len(queue) < each and not by_class:
                return np.asarray(order, dtype=np.int64)
            if len(queue) < each:  # a class with too few images is drawn from again, as Dassl does
                queue += rng.choice(pools[key], max(each, len(queue)) - len(queue)).tolist()
            order += [queue.pop() for _ in range(each)]
        if by_class and len(order) >= len(data):
            return np.asarray(order, dtype=np.int64)


class EpochBatches:
    """The batches of one epoch: lists of (index, seed of the image's random transform), sliced for one process.

    The whole of all processes takes ``batch_size * num_processes`` images per step; process r takes the r-th part
    of each. The last incomplete batch is dropped in training when there is a complete one, as in Dassl.
    """

    def __init__(
        self, cfg: CfgNode, data: Sequence[Datum], is_train: bool, rank: int = 0, num_processes: int = 1
    ) -> None:
        section = "TRAIN_X" if is_train else "TEST"
        loader = cfg.DATALOADER[section]
        self.cfg, self.data, self.is_train = cfg, data, is_train
        self.sampler, self.whole = loader.SAMPLER, loader.BATCH_SIZE * num_processes
        self.rank, self.num_processes, self.epoch = rank, num_processes, 0
        self.order: EpochOrder | None = None  # in place of the sampler

    def batches(self) -> list[np.ndarray]:
        """Indices of every batch of the epoch, over all processes."""
        rng = np.random.default_rng(seeding.derive_seed(self.cfg.SEED, seeding.ORDER, self.epoch))
        loader = self.cfg.DATALOADER.TRAIN_X
        if self.order is not None:
            order = self.order(self.epoch, rng)
        else:
            order = epoch_order(self.sampler, self.data, self.whole, rng, loader.N_DOMAIN, loader.N_INS)
        if self.is_train and len(order) >= self.whole:
            order = order[: len(order) // self.whole * self.whole]
        return [order[i : i + self.whole] for i in range(0, len(order), self.whole)]

    def __len__(self) -> int:
        if self.order is None and self.sampler in ("RandomSampler", "SequentialSampler"):
            drop = self.is_train and len(self.data) >= self.whole
            return len(self.data) // self.whole if drop else -(-len(self.data) // self.whole)
        return len(self.batches())

    @contextlib.contextmanager
    def ordered_by(self, order: EpochOrder | None) -> Iterator[None]:
        """Another order for a while; None: the sampler's."""
        kept, self.order = self.order, order
        try:
            yield
        finally:
            self.order = kept

    def own(self, batch: np.ndarray) -> np.ndarray:
        """The indices of this process of a batch of all processes."""
        return np.array_split(batch, self.num_processes)[self.rank]

    def parts(self) -> Iterator[np.ndarray]:
        """Indices of every batch, those of this process."""
        return map(self.own, self.batches())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self.parts():
            yield [(int(i), seeding.derive_seed(self.cfg.SEED, seeding.AUGMENT, self.epoch, int(i))) for i in part]
