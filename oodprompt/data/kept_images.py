"""Transformed images that stay in memory, for a process and the workers that are forked from it."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oodprompt.errors import UserError


class KeptImages:
    """The transformed images of the lowest indices, as many as fit into ``room`` bytes.

    ``shape`` and ``dtype`` are those of one image. Processes that are forked later share the memory: what one has put
    there, all get. So the bytes count once, whatever the number of workers. The memory is taken when images come. A pickled
    copy keeps nothing.

    No lock is needed: whoever puts an image puts the same bytes there, and says afterwards that they are there.
    """

    def __init__(
        self, number: int = 0, shape: Sequence[int] = (), dtype: torch.dtype = torch.uint8, room: float = 0
    ) -> None:
        each = math.prod(shape) * dtype.itemsize
        self.number = min(number, int(room) // each) if each else 0
        if self.number:
            self._is_there = self._shared(self.number, torch.uint8)
            self._images = self._shared(self.number * each, dtype).view(self.number, *shape)

    @staticmethod
    def _shared(size: int, dtype: torch.dtype) -> Tensor:
        """Zeros in ``size`` bytes of memory without a file: of /dev/shm there may be little."""
        try:
            return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)
        except (OSError, MemoryError) as error:
            raise UserError(
                f"cannot reserve {size / 2**20:,.0f} MiB for images ({error}); lower DATALOADER.IMAGE_CACHE_MIB"
            ) from error

    def get(self, index: int) -> Tensor | None:
        """The image of that index; None where it is not kept."""
        return self._images[index] if index < self.number and self._is_there[index] else None

    def put(self, index: int, image: Tensor) -> None:
        """Keep the image, where there is room for it and it is one of those that are kept here."""
        if index < self.number and (image.shape, image.dtype) == (self._images.shape[1:], self._images.dtype):
            self._images[index] = image
            self._is_there[index] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptImages, ()
