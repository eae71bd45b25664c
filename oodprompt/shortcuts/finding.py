"""The one door: proposals for the training images of a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from oodprompt.backbones import CLIP
from oodprompt.log import logger
from oodprompt.methods.prompts import class_text_features
from oodprompt.shortcuts.proposals import Proposals, propose
from oodprompt.shortcuts.vocabulary import Vocabulary
from oodprompt.shortcuts.words import read_words

MOST_IMAGES = 20_000


def find_proposals(
    clip: CLIP,
    classnames: Sequence[str],
    template: str,
    features: Tensor,
    label: NDArray[np.integer],
    vocabulary: Vocabulary,
    most: int = 12,
    show: bool = True,
) -> Proposals:
    """The ``most`` strongest proposals among the words of ``vocabulary``.

    ``features`` [N, d] are normalised image features by ``clip`` of the training images with their ``label`` [N]. Of more
    than ``MOST_IMAGES`` images as many are looked at, evenly spread over their order. ``UserError`` as ``propose`` and
    ``read_words``.
    """
    if len(label) > MOST_IMAGES:
        chosen = np.linspace(0, len(label) - 1, MOST_IMAGES).round().astype(np.int64)
        logger.info(f"Note: words are looked for in {MOST_IMAGES:,} of {len(label):,} training images, evenly spread")
        features, label = features[chosen], label[chosen]
    words = read_words(clip, vocabulary, classnames, show)
    if words.unknown:
        logger.info(
            f"Note: the backbone has no embedding of {len(words.unknown):,} of {len(vocabulary.words):,} words of "
            f"{vocabulary.source}; they are left out"
        )
    classes = class_text_features(clip, classnames, [template])
    return propose(words, vocabulary, features, label, classes, most, show)
