"""Keywords of errors, after Bias-to-Text: words that fit the misclassified images of a class better than the others.

    s(w) = mean over misclassified images <z, t_w>  -  mean over correct images <z, t_w>

Source: Kim et al., "Discovering and Mitigating Visual Biases through Keyword Explanation", CVPR 2024. There, keywords are
extracted from captions that a captioner writes. Here the words are those of the captions of the class's misclassified
images where images have captions, else those of the vocabulary.
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
    """The ``most`` keywords of every class, highest score first; none of a class with few errors or few right answers.

    ``features`` [N, d] of the images with ``label`` [N], ``right`` [N] where the model is right, ``captions`` [N].
    """
    features, place = features.cpu().float(), {word: i for i, word in enumerate(words.words)}
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
