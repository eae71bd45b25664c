"""The transforms of training and test images, as Dassl composes them.

Torchvision is imported when the first image is transformed: it takes more than a second, and a run over features that
are kept on disk reads no image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

if TYPE_CHECKING:
    from torchvision.transforms import Compose, InterpolationMode


class _Later:
    """The module ``torchvision.transforms``, imported when something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        from torchvision import transforms

        return getattr(transforms, name)


T: Any = _Later()
INTERPOLATION_MODES = ("bilinear", "bicubic", "nearest")
RESIZE_MODES = ("shortest", "squash", "longest")


@dataclass(frozen=True)
class CentreView:
    """What the model sees of a test image: ``size`` (height, width) in pixels.

    ``resize`` says how it is made. "shortest": the short edge becomes max(``size``), then the centre is cut out.
    "squash": the whole image is stretched to ``size``. "longest": the whole image is resized to fit into ``size``, and
    the rest is black.

    An instance is a step of the test transform, and ``window`` says in pixels of the image file what that step keeps.
    Both follow one plan, which is that of torchvision's ``Resize`` and ``CenterCrop``, and for "longest" that of
    OpenCLIP, so boxes and pixels cannot drift apart. Torchvision's own boxes (``tv_tensors.BoundingBoxes``) go
    through the same two steps, but in single precision, and they are clamped before their area outside is known.
    """

    size: tuple[int, int]
    interpolation: InterpolationMode | str = "bilinear"  # torchvision's, or its value
    resize: str = "shortest"

    def __call__(self, image: Any) -> Any:
        """The image (PIL or tensor) as the model sees it, of ``size``."""
        _, height, width = T.functional.get_dimensions(image)
        resized, (left, top) = self._plan(width, height)
        mode = T.InterpolationMode(self.interpolation)
        image = T.functional.resize(image, [resized[1], resized[0]], interpolation=mode)
        return T.functional.crop(image, top, left, *self.size)  # what lies outside the image is black

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of an image of that size which is kept: left, top, right, bottom in its own pixels.

        With "longest" it reaches beyond the image where the rest is black.
        """
        resized, starts = self._plan(width, height)
        (left, across), (top, down) = (
            (start * edge / now, keep * edge / now)
            for start, edge, now, keep in zip(starts, (width, height), resized, reversed(self.size), strict=True)
        )
        return left, top, left + across, top + down

    def _plan(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Width and height after resizing, and left and top of the cut there, below 0 where the cut is larger.

        "shortest": the long edge follows in proportion and is rounded down, and the cut is never larger. "longest": the
        short edge follows in proportion and is rounded to the nearest.
        """
        if self.resize == "squash":
            return (self.size[1], self.size[0]), (0, 0)
        if self.resize == "longest":
            ratio = max(height / self.size[0], width / self.size[1])
            wide, high = (max(1, round(edge / ratio)) for edge in (width, height))
            return (wide, high), (-((self.size[1] - wide) // 2), -((self.size[0] - high) // 2))
        short, shorter = max(self.size), min(width, height)
        wide, high = (short if edge == shorter else int(short * edge / shorter) for edge in (width, height))
        return (wide, high), (round((wide - self.size[1]) / 2), round((high - self.size[0]) / 2))


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
    return T.InterpolationMode(cfg.INPUT.INTERPOLATION)


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
_KEEP_BYTES = ("cutout",)  # of those on the tensor: the same of pixels in bytes


class _ToBytes:
    """An image in RGB with 8 bits as uint8 [3, H, W]: torchvision's ``ToTensor`` before it divides by 255."""

    def __call__(self, image: Any) -> Tensor:
        return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


def _names(cfg: CfgNode, is_train: bool) -> tuple[str, ...]:
    """INPUT.TRANSFORMS, those that training or testing applies."""
    names = () if cfg.INPUT.NO_TRANSFORM else tuple(cfg.INPUT.TRANSFORMS)
    return names if is_train else tuple(name for name in names if name in ("normalize", "instance_norm"))


def build_transform(cfg: CfgNode, is_train: bool = True, in_bytes: bool = False) -> Compose:
    """The transform of training or test images, as Dassl composes it.

    Training: resize to SIZE (unless a random crop does), the named transforms, tensor, normalisation. The image is
    stretched to SIZE as in Dassl; with RESIZE longest it is padded as in testing.
    Test: resize as RESIZE says, tensor, normalisation; with "shortest" and bicubic this is CLIP's own.
    ``in_bytes``: pixels in uint8 that are not normalised, for ``Pixels``; where ``Transform.ends_in_pixels``.
    """
    names, size = _names(cfg, is_train), tuple(cfg.INPUT.SIZE)
    if is_train:
        cropped = {"random_crop", "random_resized_crop"} & set(names)
        pads = cfg.INPUT.RESIZE == "longest"
        whole = (
            CentreView(size, cfg.INPUT.INTERPOLATION, "longest") if pads else T.Resize(size, interpolation=_mode(cfg))
        )
        steps: list[Any] = [] if cropped else [whole]
        steps += [make(cfg) for name, make in _ON_IMAGE.items() if name in names]
    else:
        steps = [CentreView(size, cfg.INPUT.INTERPOLATION, cfg.INPUT.RESIZE)]
    steps.append(_ToBytes() if in_bytes else T.ToTensor())
    on_tensor = _KEEP_BYTES if in_bytes else tuple(_ON_TENSOR)
    steps += [_ON_TENSOR[name](cfg) for name in on_tensor if name in names]
    return T.Compose(steps)


class Transform:
    """``build_transform(cfg, is_train, in_bytes)``, composed when the first image comes."""

    def __init__(self, cfg: CfgNode, is_train: bool, in_bytes: bool = False) -> None:
        self._cfg, self._is_train, self._in_bytes = cfg, is_train, in_bytes
        self._composed: Compose | None = None

    def compose(self) -> Compose:
        """The transform itself; also to have it ready before processes are forked."""
        if self._composed is None:
            self._composed = build_transform(self._cfg, self._is_train, self._in_bytes)
        return self._composed

    def __call__(self, image: Any) -> Any:
        return self.compose()(image)

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers, of Python or torch."""
        return self._is_train and is_random(self._cfg)

    @property
    def ends_in_pixels(self) -> bool:
        """Whether nothing but the normalisation needs floats: images can then be carried in bytes.

        Gaussian noise is drawn in floats, and instance norm takes means of floats.
        """
        after = [name for name in _names(self._cfg, self._is_train) if name in _ON_TENSOR]
        return set(after) <= {"normalize", *_KEEP_BYTES}

    def in_two(self, device: torch.device) -> tuple[Transform, Pixels]:
        """This transform up to uint8 [3, H, W] of one image, and what makes of batches of these the same as this one."""
        keys = self._cfg.INPUT
        is_normalised = "normalize" in _names(self._cfg, self._is_train)
        mean, std = (keys.PIXEL_MEAN, keys.PIXEL_STD) if is_normalised else ((), ())
        return Transform(self._cfg, self._is_train, in_bytes=True), Pixels(device, mean, std)


class Pixels:
    """uint8 pixels [B, 3, H, W] -> x / 255 in float32 on ``device``; (x / 255 - mean) / std where these are given.

    ``mean`` and ``std`` are of each channel. The operations and their order are those of torchvision's ``ToTensor`` and
    ``Normalize``. The numbers they take are tensors, so that a GPU divides too, where it would multiply by the inverse of
    a plain number: each pixel is the same on every device, bit for bit.
    """

    def __init__(self, device: torch.device, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        self.device, self._mean, self._std = device, tuple(mean), tuple(std)
        self._on_device: tuple[Tensor, ...] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        x = images.to(self.device, non_blocking=True).to(torch.float32)
        most, mean, std = self._numbers()
        x.div_(most)
        return x.sub_(mean).div_(std) if self._mean else x

    def _numbers(self) -> tuple[Tensor, ...]:
        if self._on_device is None:
            numbers = (torch.tensor(n, dtype=torch.float32).view(-1, 1, 1) for n in ((255,), self._mean, self._std))
            self._on_device = tuple(number.to(self.device, non_blocking=True) for number in numbers)
        return self._on_device


def is_random(cfg: CfgNode) -> bool:
    """Whether the training transform draws random numbers."""
    return not cfg.INPUT.NO_TRANSFORM and any(name not in _NOT_RANDOM for name in cfg.INPUT.TRANSFORMS)
