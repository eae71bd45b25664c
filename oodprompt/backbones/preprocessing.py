"""What an image tower was trained on: the size of its images, how they are resized and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """``size`` (height, width) in pixels, ``mean`` and ``std`` by channel, ``interpolation`` and ``resize_mode``.

    ``resize_mode``: "shortest" (the short edge becomes the size, then the centre is cut), "squash" (stretched)
    or "longest" (the long edge becomes the size, then the rest is black).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def keys(self) -> dict[str, Any]:
        """The configuration keys of INPUT that say the same."""
        return {
            "INPUT.SIZE": self.size,
            "INPUT.PIXEL_MEAN": list(self.mean),
            "INPUT.PIXEL_STD": list(self.std),
            "INPUT.INTERPOLATION": self.interpolation,
            "INPUT.RESIZE": self.resize_mode,
        }
