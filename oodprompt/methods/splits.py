"""A split of the data as debiasers see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Split:
    """A split as debiasers see it, in the order of its ``index``.

    ``label`` [N]; ``attribute`` [N] of the data set (-1: unknown); ``features()`` gives normalised features [N, d] of
    its images from CLIP as it was released, computed once; ``paths()`` gives the N paths of the images.
    """

    name: str
    label: Tensor
    attribute: Tensor
    features: Callable[[], Tensor]
    paths: Callable[[], Sequence[str]] = tuple


@dataclass
class LabelledData:
    """What debiasers know of the data: the splits (``val`` is None without validation data) and all names.

    ``num_attribute_values``: how many values the data set's attribute labels have in all splits.
    """

    train: Split
    val: Split | None
    classnames: Sequence[str]
    attribute_names: Sequence[str]
    num_attribute_values: int = 0
