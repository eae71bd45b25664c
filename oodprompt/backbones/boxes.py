"""Boxes of regions on their way into an image tower.

How many patches and regions there are decides shapes, and shapes must be known to the host. So all of this is worked out
where the boxes are, on the CPU, and copied to the device afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oodprompt.backbones.devices import to_device


def joined(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """Boxes by image, [n_i, 4] each -> [r, 5] on the CPU: the index of the image, then the box."""
    number = torch.tensor([len(some) for some in boxes], dtype=torch.long)
    owner = torch.arange(len(boxes)).repeat_interleave(number)
    if not len(owner):
        return torch.zeros(0, 5)
    corners = boxes.flatten(0, 1) if isinstance(boxes, Tensor) else torch.cat(list(boxes))
    return torch.cat([owner.unsqueeze(1), corners.cpu()], dim=1).float()


def side_by_side(rois: Tensor, images: int) -> tuple[Tensor, Tensor | None]:
    """Boxes of ``joined`` as [B, K, 4], and where each of them is in it when flattened, [r]; None: they fill it.

    Images with fewer boxes are filled up with whole images.
    """
    owner = rois[:, 0].long()
    number = torch.bincount(owner, minlength=images)
    most = int(number.max())
    if len(rois) == images * most:
        return rois[:, 1:].view(images, most, 4), None
    place = owner * most + torch.arange(len(rois)) - (number.cumsum(0) - number)[owner]
    padded = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(images * most, 1)
    padded[place] = rois[:, 1:]
    return padded.view(images, most, 4), place


@dataclass(frozen=True)
class Patches:
    """The patches of regions: ``image`` [r], the image of each; ``index`` [r, n] of its patches in the image, row by row.

    ``counts`` [r, n] says which of them count, as regions have different numbers; None: all.
    """

    image: Tensor
    index: Tensor
    counts: Tensor | None

    @classmethod
    def of(cls, rois: Tensor, side: int, device: torch.device) -> Patches:
        """Those of boxes of ``joined`` in images of ``side`` x ``side`` patches, on ``device``.

        A patch belongs to a box that holds its centre (half-open), and a box that holds none to the one patch in whose
        cell its own centre lies.
        """
        first, extent = _ranges(rois, side)
        number = extent.prod(dim=1)
        longest, same = int(number.max()), bool((number == number[0]).all())
        numbers = torch.cat([rois[:, :1].long(), first, extent], dim=1)
        image, left, top, across, down = to_device(numbers.T.contiguous(), device).unbind()
        place = torch.arange(longest, device=device)
        counts = None if same else place < (across * down).unsqueeze(1)
        # What fills up a region is its last patch, which counts no second time.
        place = place.minimum((across * down - 1).unsqueeze(1))
        across = across.unsqueeze(1)
        index = (top.unsqueeze(1) + place // across) * side + left.unsqueeze(1) + place % across
        return cls(image, index, counts)


def _ranges(rois: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The first patch across and down of each box of ``joined``, and how many there are across and down; both [r, 2]."""
    centre = (torch.arange(side) + 0.5) / side
    low, high = rois[:, 1:3, None], rois[:, 3:, None]
    inside = (low <= centre) & (centre < high)  # [r, 2, side]
    nearest = (side * (low + high) / 2).long().clamp(0, side - 1)
    lonely = ~inside.any(dim=2, keepdim=True)
    inside = inside | (lonely & (torch.arange(side) == nearest))
    return inside.int().argmax(dim=2), inside.sum(dim=2)


def same_number(rois: Tensor, side: int) -> list[Tensor]:
    """The places of boxes of ``joined`` that hold equally many patches, together."""
    number = _ranges(rois, side)[1].prod(dim=1)
    return [(number == n).nonzero().flatten() for n in number.unique()]
