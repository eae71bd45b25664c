"""From a data set's file lists to batches: ``Datum``, ``DatasetBase``, transforms, samplers, ``DataManager``.

Names and behaviour are Dassl's, with three differences: ``Datum`` carries the (spurious) attribute; the order of
images and every random transform depend on (seed, epoch, index) alone, whatever the number of workers and
processes; and BATCH_SIZE counts per process, whose batches together are one batch of the whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from tqdm import tqdm
from yacs.config import CfgNode

from oodprompt.engine import seeding
from oodprompt.engine.registry import DATASET_REGISTRY
from oodprompt.errors import UserError, nearest

Batch = dict[str, Any]
EpochOrder = Callable[[int, np.random.Generator], np.ndarray]  # (epoch, random numbers) -> indices in order


class Datum:
    """One image: its path, class label, domain, class name, (spurious) attribute (-1: unknown) and caption ("": none)."""

    __slots__ = ("_attribute", "_caption", "_classname", "_domain", "_impath", "_label")

    def __init__(
        self,
        impath: str = "",
        label: int = 0,
        domain: int = 0,
        classname: str = "",
        attribute: int = -1,
        caption: str = "",
    ) -> None:
        if not os.path.isfile(impath):  # four times as fast as Path, which counts where there are 200,000
            raise UserError(f"no image at {impath}; the data set's file list names it")
        self._impath, self._label, self._domain = str(impath), int(label), int(domain)
        self._classname, self._attribute, self._caption = str(classname), int(attribute), caption

    impath = property(lambda self: self._impath)
    label = property(lambda self: self._label)
    domain = property(lambda self: self._domain)
    classname = property(lambda self: self._classname)
    attribute = property(lambda self: self._attribute)
    caption = property(lambda self: self._caption)

    def relabelled(self, label: int) -> Datum:
        """The same image with another label; everything else is kept."""
        return Datum(self.impath, label, self.domain, self.classname, self.attribute, self.caption)


class DatasetBase:
    """Splits of ``Datum``s and what is known of their classes and attributes.

    A subclass is built by ``Cls(cfg)``; it reads its files and calls ``super().__init__``, which draws the few-shot
    sample (``DATASET.NUM_SHOTS``) and keeps the classes that ``DATASET.SUBSAMPLE_CLASSES`` asks for.

    Class attributes: ``dataset_dir`` (folder under ROOT), ``template`` (prompt of zero-shot classification),
    ``attribute_names`` and ``attribute_prompts`` (per value of the spurious attribute, the prompts that name it).
    """

    dataset_dir = ""
    domains: Sequence[str] = ()
    template = "a photo of a {}."
    attribute_names: Sequence[str] = ()
    attribute_prompts: Sequence[Sequence[str]] = ()
    test_only = False  # whether the images given as training images are those of the test

    def __init__(
        self,
        cfg: CfgNode,
        train_x: Sequence[Datum],
        val: Sequence[Datum] = (),
        test: Sequence[Datum] = (),
    ) -> None:
        self._check_classes(train_x, val, test)
        train_x = few_shot(train_x, cfg.DATASET.NUM_SHOTS, cfg.SEED)
        self.train_x, self.val, self.test = subsample_classes(cfg.DATASET.SUBSAMPLE_CLASSES, train_x, val, test)
        if not self.test:
            raise UserError(f"{type(self).__name__}: the test split is empty; give it at least one image")
        self.lab2cname = {datum.label: datum.classname for datum in sorted(self.train_x, key=lambda d: d.label)}
        self.classnames = [self.lab2cname[label] for label in range(len(self.lab2cname))]
        self.num_classes = len(self.classnames)
        self.template = cfg.DATASET.TEMPLATE or self.template
        if "{}" not in self.template:
            raise UserError(f"DATASET.TEMPLATE {self.template!r} has no {{}} for the class name")
        self.attribute_names = tuple(cfg.DATASET.ATTRIBUTE_NAMES) or tuple(self.attribute_names)
        prompts = [tuple(p.strip() for p in entry.split("|")) for entry in cfg.DATASET.ATTRIBUTE_PROMPTS]
        if any("" in entry for entry in prompts):
            raise UserError("DATASET.ATTRIBUTE_PROMPTS: an entry has an empty prompt; separate prompts by one '|'")
        if not prompts and cfg.DATASET.ATTRIBUTE_NAMES:
            prompts = [(f"a photo of {name}.",) for name in self.attribute_names]
        self.attribute_prompts = prompts or list(self.attribute_prompts)
        if len(self.attribute_names) != len(self.attribute_prompts):
            raise UserError(
                f"DATASET.ATTRIBUTE_NAMES has {len(self.attribute_names)} entries and "
                f"DATASET.ATTRIBUTE_PROMPTS {len(self.attribute_prompts)}: give one entry of prompts per name"
            )

    def _check_classes(self, train_x: Sequence[Datum], *others: Sequence[Datum]) -> None:
        name = type(self).__name__
        if not train_x:
            raise UserError(f"{name}: the train split is empty; give it at least one image of every class")
        count = Counter(datum.label for datum in train_x)
        last = max(datum.label for split in (train_x, *others) for datum in split)
        missing = [label for label in range(last + 1) if label not in count]
        if missing:
            raise UserError(
                f"{name}: class{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of 0..{last} "
                "has no training image; every class needs one (are the labels consecutive, is the folder empty?)"
            )

    @property
    def has_attributes(self) -> bool:
        """Whether every test image carries a known attribute, so that groups can be told apart."""
        return all(datum.attribute >= 0 for datum in self.test)

    @classmethod
    def root(cls, cfg: CfgNode) -> Path:
        """``DATASET.ROOT``; ``UserError`` when it is not given or no folder."""
        if not cfg.DATASET.ROOT:
            raise UserError(f"{cls.__name__} needs the folder of the data sets: give --root DIR (or DATASET.ROOT)")
        root = Path(cfg.DATASET.ROOT).expanduser()
        if not root.is_dir():
            raise UserError(f"--root: there is no folder {root.absolute()}")
        return root


def few_shot(data: Sequence[Datum], num_shots: int, seed: int) -> list[Datum]:
    """``num_shots`` images of each class, drawn with ``seed``; all of a class that has fewer; all for -1."""
    if num_shots < 1:
        return list(data)
    by_label: dict[int, list[Datum]] = defaultdict(list)
    for datum in data:
        by_label[datum.label].append(datum)
    draw = random.Random(seeding.derive_seed(seed, seeding.FEW_SHOT))
    return [d for label in sorted(by_label) for d in draw.sample(by_label[label], min(num_shots, len(by_label[label])))]


def subsample_classes(which: str, train: Sequence[Datum], *others: Sequence[Datum]) -> list[list[Datum]]:
    """Keep ``all`` classes, the ``base`` ones (first half, rounded up) or the ``new`` ones (the rest), renumbered."""
    splits = [train, *others]
    if which == "all":
        return [list(split) for split in splits]
    labels = sorted({datum.label for datum in train})
    half = (len(labels) + 1) // 2
    choices = {"base": labels[:half], "new": labels[half:]}
    if which not in choices:
        raise UserError(f"DATASET.SUBSAMPLE_CLASSES: {which!r} is none of all, base, new")
    new_label = {label: i for i, label in enumerate(choices[which])}
    return [[d.relabelled(new_label[d.label]) for d in split if d.label in new_label] for split in splits]


# --- transforms ------------------------------------------------------------------------------------------------

INTERPOLATION_MODES = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
    "nearest": InterpolationMode.NEAREST,
}


class _InstanceNorm:
    """Zero mean and unit variance per channel of one image."""

    def __call__(self, x: Tensor) -> Tensor:
        return (x - x.mean((1, 2), keepdim=True)) / (x.std((1, 2), keepdim=True) + 1e-8)


class _GaussianNoise:
    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def __call__(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * self.std + self.mean


class _Cutout:
    """Black out ``holes`` squares of side ``length`` around random centres."""

    def __init__(self, holes: int, length: int) -> None:
        self.holes, self.length = holes, length

    def __call__(self, x: Tensor) -> Tensor:
        x = x.clone()
        _, height, width = x.shape
        for _ in range(self.holes):
            top = int(torch.randint(height, ())) - self.length // 2
            left = int(torch.randint(width, ())) - self.length // 2
            x[:, max(top, 0) : top + self.length, max(left, 0) : left + self.length] = 0
        return x


def _mode(cfg: CfgNode) -> InterpolationMode:
    if cfg.INPUT.INTERPOLATION not in INTERPOLATION_MODES:
        raise UserError(f"INPUT.INTERPOLATION: unknown mode: {nearest(cfg.INPUT.INTERPOLATION, INTERPOLATION_MODES)}")
    return INTERPOLATION_MODES[cfg.INPUT.INTERPOLATION]


# Training transforms by name, in the order in which they are applied: on the image, then on the tensor.
_ON_IMAGE: dict[str, Callable[[CfgNode], Any]] = {
    "random_crop": lambda c: T.RandomCrop(tuple(c.INPUT.SIZE), padding=c.INPUT.CROP_PADDING),
    "random_resized_crop": lambda c: T.RandomResizedCrop(
        tuple(c.INPUT.SIZE), scale=tuple(c.INPUT.RRCROP_SCALE), interpolation=_mode(c)
    ),
    "center_crop": lambda c: T.CenterCrop(tuple(c.INPUT.SIZE)),
    "random_flip": lambda c: T.RandomHorizontalFlip(),
    "imagenet_policy": lambda c: T.AutoAugment(T.AutoAugmentPolicy.IMAGENET),
    "cifar10_policy": lambda c: T.AutoAugment(T.AutoAugmentPolicy.CIFAR10),
    "svhn_policy": lambda c: T.AutoAugment(T.AutoAugmentPolicy.SVHN),
    "randaugment": lambda c: T.RandAugment(c.INPUT.RANDAUGMENT_N, c.INPUT.RANDAUGMENT_M),
    "colorjitter": lambda c: T.ColorJitter(
        c.INPUT.COLORJITTER_B, c.INPUT.COLORJITTER_C, c.INPUT.COLORJITTER_S, c.INPUT.COLORJITTER_H
    ),
    "randomgrayscale": lambda c: T.RandomGrayscale(c.INPUT.RGS_P),
    "gaussian_blur": lambda c: T.RandomApply([T.GaussianBlur(c.INPUT.GB_K)], p=c.INPUT.GB_P),
}
_ON_TENSOR: dict[str, Callable[[CfgNode], Any]] = {
    "cutout": lambda c: _Cutout(c.INPUT.CUTOUT_N, c.INPUT.CUTOUT_LEN),
    "normalize": lambda c: T.Normalize(c.INPUT.PIXEL_MEAN, c.INPUT.PIXEL_STD),
    "gaussian_noise": lambda c: _GaussianNoise(c.INPUT.GN_MEAN, c.INPUT.GN_STD),
    "instance_norm": lambda c: _InstanceNorm(),
}
_NOT_RANDOM = {"center_crop", "normalize", "instance_norm"}


def build_transform(cfg: CfgNode, is_train: bool = True) -> T.Compose:
    """The transform of training or test images, as Dassl composes it.

    Training: resize to SIZE (unless a random crop does), the named transforms, tensor, normalisation.
    Test: resize the short edge to max(SIZE), centre crop, tensor, normalisation; with bicubic this is CLIP's own.
    """
    names = () if cfg.INPUT.NO_TRANSFORM else tuple(cfg.INPUT.TRANSFORMS)
    for name in names:
        if name not in _ON_IMAGE and name not in _ON_TENSOR:
            raise UserError(f"INPUT.TRANSFORMS: unknown transform {name!r}: {nearest(name, [*_ON_IMAGE, *_ON_TENSOR])}")
    size = tuple(cfg.INPUT.SIZE)
    if is_train:
        cropped = {"random_crop", "random_resized_crop"} & set(names)
        steps = [] if cropped else [T.Resize(size, interpolation=_mode(cfg))]
        steps += [make(cfg) for name, make in _ON_IMAGE.items() if name in names]
        steps.append(T.ToTensor())
        steps += [make(cfg) for name, make in _ON_TENSOR.items() if name in names]
    else:
        steps = [T.Resize(max(size), interpolation=_mode(cfg)), T.CenterCrop(size), T.ToTensor()]
        steps += [_ON_TENSOR[name](cfg) for name in ("normalize", "instance_norm") if name in names]
    return T.Compose(steps)


def is_random(cfg: CfgNode) -> bool:
    """Whether the training transform draws random numbers."""
    return not cfg.INPUT.NO_TRANSFORM and any(name not in _NOT_RANDOM for name in cfg.INPUT.TRANSFORMS)


def read_image(path: str) -> Image.Image:
    """The image at ``path`` in RGB; ``UserError`` names a missing, truncated or foreign file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read the image {path}: {error}; replace the file or take it out of the list"
        ) from error


def digest(root: str, *splits: Sequence[Datum]) -> str:
    """Of the images' places under ``root``, labels and attributes, in order: what makes a run one on the same data.

    The folder ``root`` may move; of images elsewhere the file name counts. Their contents are not read.
    """
    root = os.path.join(root, "")
    sha = hashlib.sha256()
    for split in splits:
        for d in split:
            place = d.impath[len(root) :] if d.impath.startswith(root) else os.path.basename(d.impath)
            sha.update(f"{place}\t{d.label}\t{d.attribute}\n".encode())
        sha.update(b"\n")
    return sha.hexdigest()[:16]


def check_images(*splits: Sequence[Datum]) -> int:
    """Read every image once; returns how many. ``UserError`` names those that cannot be read."""
    paths = list(dict.fromkeys(d.impath for split in splits for d in split))

    def problem(path: str) -> str | None:
        try:
            read_image(path)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [p for p in tqdm(pool.map(problem, paths), "images", len(paths), unit="image", disable=None) if p]
    if found:
        more = f"\nand {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError("\n".join(found[:5]) + more)
    return len(paths)


# --- samplers and loaders --------------------------------------------------------------------------------------


def epoch_order(
    sampler: str, data: Sequence[Datum], batch_size: int, rng: np.random.Generator, n_domain: int = 0, n_ins: int = 16
) -> list[int]:
    """Indices into ``data`` in the order of one epoch, by Dassl's sampler names.

    ``RandomClassSampler`` fills batches with ``n_ins`` images of each of batch_size / n_ins classes;
    ``RandomDomainSampler`` with equally many of each of ``n_domain`` domains (0: all). ``UserError`` where the
    batch size or a domain's images do not allow it.
    """
    if sampler == "SequentialSampler":
        return list(range(len(data)))
    if sampler == "RandomSampler":
        return rng.permutation(len(data)).tolist()
    by_class = sampler == "RandomClassSampler"
    pools: dict[int, list[int]] = defaultdict(list)
    for i, datum in enumerate(data):
        pools[datum.label if by_class else datum.domain].append(i)
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
                return order
            if len(queue) < each:  # a class with too few images is drawn from again, as Dassl does
                queue += rng.choice(pools[key], max(each, len(queue)) - len(queue)).tolist()
            order += [queue.pop() for _ in range(each)]
        if by_class and len(order) >= len(data):
            return order


# Evaluation must meet every image once.
_SAMPLERS = {
    "TRAIN_X": ("RandomSampler", "SequentialSampler", "RandomClassSampler", "RandomDomainSampler"),
    "TEST": ("SequentialSampler", "RandomSampler"),
}


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
        if loader.BATCH_SIZE < 1:
            raise UserError(f"DATALOADER.{section}.BATCH_SIZE: {loader.BATCH_SIZE} is not possible; give 1 or more")
        if self.sampler not in _SAMPLERS[section]:
            known = nearest(self.sampler, _SAMPLERS[section])
            raise UserError(f"DATALOADER.{section}.SAMPLER: unknown sampler {self.sampler!r}: {known}")
        self.rank, self.num_processes, self.epoch = rank, num_processes, 0
        self.order: EpochOrder | None = None  # in place of the sampler

    def batches(self) -> list[np.ndarray]:
        """Indices of every batch of the epoch, over all processes."""
        rng = np.random.default_rng(seeding.derive_seed(self.cfg.SEED, seeding.ORDER, self.epoch))
        loader = self.cfg.DATALOADER.TRAIN_X
        if self.order is not None:
            order = self.order(self.epoch, rng)
        else:
            order = np.asarray(epoch_order(self.sampler, self.data, self.whole, rng, loader.N_DOMAIN, loader.N_INS))
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

    def parts(self) -> Iterator[np.ndarray]:
        """Indices of every batch, those of this process."""
        for batch in self.batches():
            yield np.array_split(batch, self.num_processes)[self.rank]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for part in self.parts():
            yield [(int(i), seeding.derive_seed(self.cfg.SEED, seeding.AUGMENT, self.epoch, int(i))) for i in part]


class DatasetWrapper(Dataset):
    """Reads and transforms one image: (index, seed) -> dict with img, label, domain, attribute, impath, index.

    ``room`` is how many bytes of transformed images may stay in memory (``kept``); where nothing is random.
    """

    def __init__(self, data_source: Sequence[Datum], transform: Callable) -> None:
        self.data_source, self.transform = data_source, transform
        self.room, self.kept = 0, {}

    def __len__(self) -> int:
        return len(self.data_source)

    def __getitem__(self, item: tuple[int, int]) -> Batch | UserError:
        index, seed = item
        datum = self.data_source[index]
        image = self.kept.get(index)
        if image is None:
            try:
                image = read_image(datum.impath)
            except UserError as error:
                return error  # raised by ``Loader``: an exception inside a worker would lose its one clear line
            with _random_numbers_from(seed):
                image = self.transform(image)
            if self.room >= image.nbytes:
                self.kept[index], self.room = image, self.room - image.nbytes
        return {
            "img": image,
            "label": datum.label,
            "domain": datum.domain,
            "attribute": datum.attribute,
            "impath": datum.impath,
            "index": index,
        }


@contextlib.contextmanager
def _random_numbers_from(seed: int) -> Iterator[None]:
    """Python's and torch's random numbers on the CPU come from ``seed``; then go on as if nothing had been drawn."""
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPU too
    try:
        yield
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)


class _Collate:
    """Stacks items into a batch. A process may get no item of a small last batch: then tensors of length 0."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, items: list[Batch | UserError]) -> Batch | UserError:
        for item in items:
            if isinstance(item, UserError):
                return item
        images = torch.stack([item["img"] for item in items]) if items else torch.empty(0, 3, *self.size)
        batch: Batch = {"img": images, "impath": [item["impath"] for item in items]}
        for key in ("label", "domain", "attribute", "index"):
            batch[key] = torch.tensor([item[key] for item in items], dtype=torch.long)
        return batch


class Loader:
    """Iterates over the batches of ``EpochBatches``; ``set_epoch`` before each epoch."""

    def __init__(self, cfg: CfgNode, data: Sequence[Datum], transform: Callable, batches: EpochBatches) -> None:
        workers = min(max(cfg.DATALOADER.NUM_WORKERS, 0), len(batches))
        self.batches, self.dataset = batches, DatasetWrapper(data, transform)
        # Its own generator, so that reading images draws nothing from torch's, like reading cached features.
        self._generator = torch.Generator()
        self._loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_Collate(tuple(cfg.INPUT.SIZE)),
            pin_memory=torch.cuda.is_available() and cfg.USE_CUDA,
            generator=self._generator,
        )

    def set_epoch(self, epoch: int) -> None:
        self.batches.epoch = epoch

    def keep_images(self) -> None:
        """Keep transformed images, for those who come back in every epoch; not in workers, which end with the epoch."""
        if not self._loader.num_workers:
            self.dataset.room = int(self.batches.cfg.DATALOADER.IMAGE_CACHE_MIB * 2**20)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        self._generator.manual_seed(seeding.derive_seed(self.batches.cfg.SEED, seeding.AUGMENT, self.batches.epoch))
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


# --- data manager ----------------------------------------------------------------------------------------------


def build_dataset(cfg: CfgNode) -> DatasetBase:
    """The data set named by ``DATASET.NAME``."""
    return DATASET_REGISTRY.get(cfg.DATASET.NAME, "DATASET.NAME")(cfg)


class DataManager:
    """Builds the data set and its loaders: ``train_loader_x``, ``val_loader`` (or None), ``test_loader``."""

    def __init__(self, cfg: CfgNode, rank: int = 0, num_processes: int = 1) -> None:
        self.cfg, self.dataset = cfg, build_dataset(cfg)
        self.rank, self.num_processes = rank, num_processes
        self.num_classes, self.lab2cname = self.dataset.num_classes, self.dataset.lab2cname
        if "normalize" not in cfg.INPUT.TRANSFORMS:
            print("Note: INPUT.TRANSFORMS has no 'normalize', but CLIP expects normalised pixels")
        if cfg.DATALOADER.K_TRANSFORMS != 1 or cfg.DATALOADER.RETURN_IMG0:
            raise UserError("DATALOADER.K_TRANSFORMS and RETURN_IMG0 are not offered here; leave them at 1 and False")
        self.transform_train, self.transform_test = build_transform(cfg, True), build_transform(cfg, False)
        self.train_loader_x = self.loader(self.dataset.train_x, is_train=True)
        self.val_loader = self.loader(self.dataset.val) if self.dataset.val else None
        self.test_loader = self.loader(self.dataset.test)

    def loader(self, data: Sequence[Datum], is_train: bool = False, transform: Callable | None = None) -> Loader:
        """A loader over ``data``; test order and test transform unless ``is_train``."""
        batches = EpochBatches(self.cfg, data, is_train, self.rank, self.num_processes)
        transform = transform or (self.transform_train if is_train else self.transform_test)
        return Loader(self.cfg, data, transform, batches)

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
            groups = Counter((d.label, d.attribute) for d in data.train_x)
            for (label, attribute), n in sorted(groups.items()):
                rows.append((f"# train_x: {self.lab2cname[label]} / {attribute_name(data, attribute)}", f"{n:,}"))
        return rows


def attribute_name(dataset: DatasetBase, attribute: int) -> str:
    names = dataset.attribute_names
    return names[attribute] if 0 <= attribute < len(names) else str(attribute)
