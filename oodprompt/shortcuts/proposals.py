"""From words that go with the label to proposals: words that say the same are one, and each has names to train against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from oodprompt.errors import UserError
from oodprompt.shortcuts.association import (
    LEVEL,
    STRONG,
    Association,
    Flags,
    Numbers,
    Within,
    associations,
    chi_squared,
    table_of,
    v_interval,
)
from oodprompt.shortcuts.vocabulary import Vocabulary
from oodprompt.shortcuts.words import Words

SAME_IMAGES = 0.8  # correlation of two words' presence from which they are one proposal
SAME_TEXT, SAME_TEXT_IMAGES = 0.95, 0.5  # or cosine of their text features, with this correlation
_LOOKED_AT = 150  # words that may become proposals, the strongest ones
_OPPOSITE = 0.9  # how good, to the best word, a word from the other side must be as the other name
_ENOUGH_MORE = 0.5  # of the first two names' chi^2, by which a further name must raise it
_MOST_NAMES = 8
_MOST_PARTS = 5  # strong proposals whose images are told apart for those after them
_MOST_IMAGES, _NEARLY = 0.6, 0.1  # share of images with a word, and difference of V, for ``_led``


@dataclass(frozen=True)
class Proposal:
    """A suspected shortcut: the word ``best`` and the words that say ``same``, or the ``opposite``, by falling V.

    ``names`` are the names of the attribute to train against, in the order of the classes that they go with. They split
    the training images as ``best`` does with the correlation ``agreement``. Where no other word tells images with the word
    from the rest, there are no names, and ``agreement`` is None. ``goes_with`` is the class that has the word most often
    beyond the other classes, and ``rarely_with`` the one that has it least. ``after`` are the limits of V where the images
    are compared among those alike in the strong proposals before it. ``strong``: the word is, and still is after those.
    """

    best: Association
    same: tuple[Association, ...]
    opposite: tuple[Association, ...]
    names: tuple[str, ...]
    agreement: float | None
    goes_with: int
    rarely_with: int
    after: tuple[float, float]

    @property
    def strong(self) -> bool:
        return self.best.strong and self.after[0] >= STRONG


@dataclass(frozen=True)
class Proposals:
    """The ``proposals``, strongest first, of the ``words`` that were looked for; ``too_rare`` counts those left out.

    ``further`` words with an association are in no proposal, as there were enough.
    """

    proposals: tuple[Proposal, ...]
    words: Words
    vocabulary: Vocabulary
    tested: int
    too_rare: int
    further: int

    @property
    def strong(self) -> tuple[Proposal, ...]:
        return tuple(proposal for proposal in self.proposals if proposal.strong)

    def present(self, proposal: Proposal, features: Tensor) -> tuple[Numbers, Flags]:
        """The score of the proposal's best word above its threshold [N], and whether it is present, for ``features`` [N, d]."""
        score = _above(features.cpu().float(), self.words, proposal.best)
        return score, score > 0

    def word(self, association: Association) -> str:
        return self.words.words[association.word]


@torch.no_grad()
def propose(
    words: Words,
    vocabulary: Vocabulary,
    features: Tensor,
    label: NDArray[np.integer],
    classes: Tensor,
    most: int = 12,
    show: bool = True,
) -> Proposals:
    """The ``most`` strongest proposals for training images with ``features`` [N, d] and ``label`` [N].

    ``classes`` [C, d] are the normalised text features of the classes. Words are ranked by V, then by how clearly the
    image features show them. Nothing here is random. ``UserError`` where there are no images or only one class.
    """
    if not len(label) or len(np.unique(label)) < 2:
        raise UserError("an audit compares classes; the training images must be of two classes at least")
    features, classes = features.cpu().float(), classes.cpu().float()
    found = associations(features, label, words.direction, classes, show)
    ranked = sorted((a for a in found if a.v > 0), key=lambda a: (-round(a.v, 4), -round(a.split.clarity, 4), a.word))
    looked = ranked[:_LOOKED_AT]
    presence = np.stack([_above(features, words, a) > 0 for a in looked]) if looked else np.zeros((0, len(label)), bool)
    everything = sorted(_led(looked, *group) for group in _merged(looked, presence, words.direction))  # by what leads
    groups = everything[:most]
    inside, level = Within(features, label, classes), LEVEL / max(len(found), 1)
    afters: list[tuple[float, float]] = []
    part, strong = np.zeros(len(label), dtype=np.int64), list[int]()  # images alike in the strong proposals so far
    for (first, *_), _ in groups:
        best = looked[first]
        shown = inside.present(words.direction[best.word], best.split, best.adjusted)
        tables = [table_of(label[part == i], shown[part == i], len(classes)) for i in np.unique(part)]
        afters.append(v_interval(tables, level) if strong else (best.low, best.high))
        if best.strong and afters[-1][0] >= STRONG and len(strong) < _MOST_PARTS:
            strong.append(best.word)
            part = 2 * part + presence[first]
    namer = _Namer(words, features, label, len(classes))
    proposals = []
    for (same, opposite), after in zip(groups, afters, strict=True):
        best = looked[same[0]]
        others = [looked[i].word for (i, *_), _ in everything if looked[i].strong and looked[i] is not best]
        names, agreement = namer.names(best, presence[same[0]], [looked[i].word for i in opposite], others)
        of_same, of_opposite = (tuple(looked[i] for i in side) for side in (same[1:], opposite))
        goes, rarely = int(best.lift.argmax()), int(best.lift.argmin())
        proposals.append(Proposal(best, of_same, of_opposite, names, agreement, goes, rarely, after))
    further = len(ranked) - sum(1 + len(p.same) + len(p.opposite) for p in proposals)
    return Proposals(tuple(proposals), words, vocabulary, len(found), len(words.words) - len(found), further)


def _above(features: Tensor, words: Words, a: Association) -> Numbers:
    """By how much the score of a word is above its threshold, [N]: the word is present where that is more than 0."""
    return (features @ words.direction[a.word]).double().numpy() - a.split.threshold


def _merged(looked: Sequence[Association], presence: Flags, direction: Tensor) -> list[tuple[list[int], list[int]]]:
    """Groups of places in ``looked``, strongest first: words that say the same as the first one, and the opposite."""
    unit = presence - presence.mean(axis=1, keepdims=True) if len(presence) else np.zeros((0, 1))
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    text = F.normalize(torch.stack([direction[a.word] for a in looked]), dim=-1) if looked else direction[:0]
    groups: list[tuple[list[int], list[int]]] = []
    for i in range(len(looked)):
        for same, opposite in groups:
            r, cosine = float(unit[i] @ unit[same[0]]), float(text[i] @ text[same[0]])
            if r >= SAME_IMAGES or cosine >= SAME_TEXT and r >= SAME_TEXT_IMAGES:
                same.append(i)
                break
            if r <= -SAME_IMAGES:
                opposite.append(i)
                break
        else:
            groups.append(([i], []))
    return groups


def _led(looked: Sequence[Association], same: list[int], opposite: list[int]) -> tuple[list[int], list[int]]:
    """The group with the side first that is in fewer images, where its best word is nearly as strong as the other's.

    That something is there is a better name than that it is not.
    """
    if opposite and looked[same[0]].share > _MOST_IMAGES and looked[opposite[0]].v >= looked[same[0]].v - _NEARLY:
        return opposite, same
    return same, opposite


class _Namer:
    """Chooses names whose zero-shot split of the images, the largest cosine, is that of a word's presence."""

    def __init__(self, words: Words, features: Tensor, label: NDArray[np.integer], classes: int) -> None:
        self.words, self.label, self.classes = words, label, classes
        self.fit = (features @ words.name.T).numpy()  # [N, W]

    def names(
        self, best: Association, present: Flags, opposite: Sequence[int], others: Sequence[int]
    ) -> tuple[tuple[str, ...], float | None]:
        """(names, how their split into images of the best word and others correlates with ``present``).

        The first name is the best word, the second the one with which it splits best. A word from ``opposite`` is
        preferred if it is nearly as good; after these, a word from ``others``. ``others`` are the best words of other
        proposals with a large V. Those of them follow that raise the chi^2 of split and label much. Without a word that
        splits the images there are no names.
        """
        agreement = _correlations(self.fit[:, [best.word]] > self.fit, present)
        agreement[best.word] = -1
        second = int(agreement.argmax())
        if agreement[second] <= -1:
            return (), None
        for preferred in (opposite, others):
            nearest = max(preferred, key=lambda i: (round(float(agreement[i]), 4), -i), default=None)
            if nearest is not None and agreement[nearest] >= _OPPOSITE * agreement[second]:
                second = nearest
                break
        chosen = [best.word, second]
        first = value = self._chi_squared(chosen)
        while len(chosen) < min(_MOST_NAMES, self.classes):
            rest = [i for i in others if i not in chosen]
            values = [self._chi_squared([*chosen, i]) for i in rest]
            if not rest or max(values) < value + _ENOUGH_MORE * first:
                break
            value = max(values)
            chosen.append(rest[values.index(value)])
        if len(chosen) > 2:  # the second was the best name for "none of the first", which others may be by now
            seconds = [i for i in (second, *others) if i not in chosen[2:] and i != best.word]
            chosen[1] = max(seconds, key=lambda i: (self._chi_squared([best.word, i, *chosen[2:]]), -i))
        split = self.fit[:, chosen].argmax(axis=1)
        names = [self.words.words[i] for i in chosen]
        order = sorted(range(len(chosen)), key=lambda a: (self._class_of(split == a), a))
        return tuple(names[a] for a in order), float(_correlations((split == 0)[:, None], present)[0])

    def _chi_squared(self, chosen: Sequence[int]) -> float:
        split = self.fit[:, list(chosen)].argmax(axis=1)
        counts = np.bincount(len(chosen) * self.label.astype(np.int64) + split, minlength=self.classes * len(chosen))
        return chi_squared(counts.reshape(self.classes, len(chosen)))[0]

    def _class_of(self, chosen: Flags) -> int:
        """The class with the largest share of the ``chosen`` images."""
        table = table_of(self.label, chosen, self.classes)
        return int((table[:, 1] / np.maximum(table.sum(axis=1), 1)).argmax())


def _correlations(splits: Flags, present: Flags) -> Numbers:
    """phi of every column of ``splits`` [N, W] with ``present`` [N]; -1 for columns that split nothing."""
    n, share, own = len(present), splits.mean(axis=0), present.mean()
    both = present.astype(np.float64) @ splits / n
    size = np.sqrt(share * (1 - share) * own * (1 - own))
    return np.divide(both - share * own, size, out=np.full(splits.shape[1], -1.0), where=size > 1e-9)
