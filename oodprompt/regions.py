"""Regions of images: where they come from, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Regions:
    """Regions of the images of a split, ordered by image.

    ``boxes`` [r, 4] float32 as (left, top, right, bottom) in fractions of the image *as the model sees it* (after the
    test transform); ``owner`` [r] the index of each region's image in the split, not decreasing; ``names`` what an
    annotation calls each region ("" where it says nothing; empty when there is no annotation); ``source`` says in
    words where they come from.
    """

    boxes: Tensor
    owner: Tensor
    names: Sequence[str] = ()
    source: str = ""
