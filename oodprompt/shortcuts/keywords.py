"""Keywords of errors, after Bias-to-Text: words that fit the misclassified images of a class better than the others.

    s(w) = mean over misclassified images <z, t_w - t_0>  -  mean over correct images <z, t_w - t_0>

t_w - t_0 is the direction of word w (``Words``), and the score is in cosines of images and words. t_0 moves the scores of
all words of a class by the same number.

Source: Kim et al., "Discovering and Mitigating Visual Biases through Keyword Explanation", CVPR 2024. There, keywords are
extracted from captions that a captioner writes, and t_w is the feature of the word alone. Here the words are those of the
vocabulary. Where images have captions, they are only those that the captions of the class's misclassified images have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from oodprompt.shortcuts.association import Flags
from oodprompt.shortcuts.vocabulary import words_of_caption
from oodprompt.shortcuts.words import Words

_FEWEST = 5  # misclassified images of a class, and correct ones
_OF_CAPTIONS = 100


@dataclass(frozen=True)
class Keyword:
    """A ``word`` that fits the errors of a class: ``score`` is in cosines."""

    word: str
    score: float


@torch.no_grad()
def keywords(
    words: Words,
    features: Tensor,
    label: NDArray[np.integer],
    right: Flags,
    classes: int,
    captions: Sequence[str] | None = None,
    most: int = 10,
) -> list[list[Keyword]]:
    """The ``most`` keywords of every class with a score above 0, highest first.

    A class with fewer than 5 errors or 5 right answers has none. ``features`` [N, d] of the images with ``label`` [N],
    ``right`` [N] where the model is right. With ``captions`` [N], a keyword must be in a caption of a misclassified image of
    its class, and among the 100 most frequent of such words.
    """
    features, place = features.cpu().float(), {word.lower(): i for i, word in enumerate(words.words)}
    found: list[list[Keyword]] = []
    for number in range(classes):
        own = label == number
        wrong, correct = np.flatnonzero(own & ~right), np.flatnonzero(own & right)
        if min(len(wrong), len(correct)) < _FEWEST:
            found.append([])
            continue
        among = list(range(len(place)))
        if captions is not None:
            count = Counter(w for i in wrong.tolist() for w in words_of_caption(captions[i]))
            among = [place[w] for w, _ in count.most_common() if w in place][:_OF_CAPTIONS]
        difference = features[wrong].mean(dim=0) - features[correct].mean(dim=0)
        score = (words.direction[among] @ difference).tolist()
        best = sorted(zip(score, among, strict=True), key=lambda pair: (-pair[0], pair[1]))[:most]
        found.append([Keyword(words.words[i], s) for s, i in best if s > 0])
    return found
