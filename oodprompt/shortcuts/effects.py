"""What a word's presence does to the accuracy of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from oodprompt.shortcuts.association import LEVEL, Flags, Numbers

PRIOR = 10.0  # images that an accuracy is shrunk by towards that of its class


@dataclass(frozen=True)
class Cell:
    """Images of one class with or without a word: their ``number``, how many are ``right``, and the shrunk ``accuracy``."""

    number: int
    right: int
    accuracy: float | None


@dataclass(frozen=True)
class Effect:
    """How much better a model is where a word agrees with what it suggests than where it does not.

    ``cells`` [C][2] of every class without and with the word. In a class that has the word more often than others in
    training, images with it agree; in the other classes images without. ``gap`` is the mean over classes, weighted by
    1 / (1/n + 1/n'), of the difference of shrunk accuracies, with the limits ``low`` and ``high``; None where no class has
    images of both kinds. ``relies``: whether ``low`` is above 0.
    """

    cells: tuple[tuple[Cell, Cell], ...]
    gap: float | None
    low: float | None
    high: float | None

    @property
    def relies(self) -> bool:
        return self.low is not None and self.low > 0


def effect_of(present: Flags, label: NDArray[np.integer], right: Flags, lift: Numbers, tests: int = 1) -> Effect:
    """The effect of a word that is ``present`` [N] in images with ``label`` [N] that the model gets ``right`` [N].

    ``lift`` [C] is ``Association.lift``. A shrunk accuracy is (r + 10 a) / (n + 10) of r right among n images and the
    accuracy a of the class. The limits hold for ``tests`` effects together, 95 %, by the normal approximation.
    """
    cells, gaps, weights, variances = [], [], [], []
    for label_of_class, up in enumerate(lift):
        own = label == label_of_class
        overall = float(right[own].mean()) if own.any() else 0.0
        pair = tuple(_cell(right[own & (present == value)], overall) for value in (False, True))
        cells.append((pair[0], pair[1]))
        without, with_it = pair
        if without.accuracy is None or with_it.accuracy is None or up == 0:
            continue
        gaps.append((with_it.accuracy - without.accuracy) * np.sign(up))
        weights.append(1 / (1 / without.number + 1 / with_it.number))
        variances.append(
            sum(c.accuracy * (1 - c.accuracy) / (c.number + PRIOR) for c in pair if c.accuracy is not None)
        )
    if not gaps:
        return Effect(tuple(cells), None, None, None)
    share = np.array(weights) / sum(weights)
    gap, spread = float(share @ gaps), float(np.sqrt(share**2 @ np.array(variances)))
    reach = float(stats.norm.isf(LEVEL / 2 / tests)) * spread
    return Effect(tuple(cells), gap, gap - reach, gap + reach)


def _cell(right: Sequence[bool] | Flags, overall: float) -> Cell:
    number, correct = len(right), int(np.sum(right))
    return Cell(number, correct, (correct + PRIOR * overall) / (number + PRIOR) if number else None)
