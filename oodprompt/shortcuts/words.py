"""The words of a vocabulary as a CLIP reads them: directions in its space, which it knows, which name a class."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.backbones import CLIP
from oodprompt.data.dataset import NAME_TEMPLATE
from oodprompt.errors import UserError
from oodprompt.log import progress
from oodprompt.methods.attributes import prompt_features
from oodprompt.shortcuts.vocabulary import Vocabulary

TEMPLATES = (NAME_TEMPLATE, "{}", "a picture of {}.")
NEUTRAL = ("thing", "object", "something")
SYNONYM = 0.7  # centred cosine to a class name from which a word is taken to be that class
_AT_ONCE = 128
_SHARED = 0.1  # share of all tokens from which one embedding is that of unknown words


@dataclass(frozen=True)
class Words:
    """Words that a CLIP knows. All tensors are on the CPU in fp32.

    ``direction`` [W, d] is t_w - t_0, with t the normalised mean over ``TEMPLATES`` of normalised text features and t_0
    that of the ``NEUTRAL`` words; ``name`` [W, d] are the features of ``NAME_TEMPLATE`` alone. ``unknown`` words were
    left out, and ``of_class`` says which words name a class, each with that class.
    """

    words: tuple[str, ...]
    sections: tuple[str, ...]
    direction: Tensor
    name: Tensor
    unknown: tuple[str, ...] = ()
    of_class: tuple[tuple[str, str], ...] = ()

    def take(self, index: Sequence[int]) -> Words:
        """The words at ``index``, in that order."""
        chosen = list(index)
        words, sections = (tuple(column[i] for i in chosen) for column in (self.words, self.sections))
        return replace(self, words=words, sections=sections, direction=self.direction[chosen], name=self.name[chosen])


@torch.no_grad()
def read_words(clip: CLIP, vocabulary: Vocabulary, classnames: Sequence[str], show: bool = True) -> Words:
    """The words of ``vocabulary`` that ``clip`` knows and that name no class.

    A word names a class if both are spelt alike but for case, article and plural. It also does if the cosine of their text
    features is ``SYNONYM`` or more, after the mean over the vocabulary is subtracted. ``UserError`` where no word is left.
    """
    known = known_words(clip, vocabulary.words)
    unknown = tuple(word for word, is_known in zip(vocabulary.words, known, strict=True) if not is_known)
    kept = [i for i, is_known in enumerate(known) if is_known]
    if not kept:
        raise UserError(
            f"the backbone knows no word of {vocabulary.source}; give --vocabulary a file of words that it was trained on"
        )
    words = [vocabulary.words[i] for i in kept]
    by_template = _features(clip, words, show)
    text = F.normalize(by_template.mean(dim=1), dim=-1)
    neutral = F.normalize(_features(clip, NEUTRAL, False).mean(dim=(0, 1)), dim=0)
    classes = F.normalize(_features(clip, classnames, False).mean(dim=1), dim=-1)
    names = _class_named(words, text, classnames, classes)
    all_words = Words(
        tuple(words),
        tuple(vocabulary.sections[i] for i in kept),
        (text - neutral).float().cpu(),
        by_template[:, 0].float().cpu(),
        unknown,
        tuple((word, name) for word, name in zip(words, names, strict=True) if name),
    )
    free = [i for i, name in enumerate(names) if not name]
    if not free:
        raise UserError(f"all words of {vocabulary.source} that the backbone knows name a class; give other words")
    return all_words.take(free)


def _features(clip: CLIP, words: Sequence[str], show: bool) -> Tensor:
    """Normalised text features of every word in every template, [W, T, d] in float64."""
    prompts = [template.replace("{}", word) for word in words for template in TEMPLATES]
    parts = []
    with progress(len(words), "Words", "word", show) as bar:
        for start in range(0, len(prompts), _AT_ONCE * len(TEMPLATES)):
            part = prompts[start : start + _AT_ONCE * len(TEMPLATES)]
            parts.append(prompt_features(clip, part, truncate=True))
            bar.update(len(part) // len(TEMPLATES))
    return torch.cat(parts).unflatten(0, (len(words), len(TEMPLATES)))


def known_words(clip: CLIP, words: Sequence[str]) -> list[bool]:
    """Which words have no token that shares its embedding with a tenth of all tokens, as a small CLIP's unknown ones do."""
    table = getattr(clip.token_embedding, "weight", None)
    if not isinstance(table, Tensor) or table.ndim != 2:
        return [True] * len(words)
    mark = torch.randn(table.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = table.detach().cpu().double() @ mark
    values, count = torch.unique(sums, return_counts=True)
    if count.max() < _SHARED * len(table):
        return [True] * len(words)
    shared = set((sums == values[count.argmax()]).nonzero().flatten().tolist())
    frame = set(clip.tokenizer([""])[0].tolist())
    return [not (set(tokens) - frame) & shared for tokens in clip.tokenizer(list(words), True).tolist()]


def _spelling(name: str) -> str:
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word not in ("", "a", "an", "the")]
    return " ".join(word[:-1] if word.endswith("s") and len(word) > 3 else word for word in words)


def _class_named(words: Sequence[str], text: Tensor, classnames: Sequence[str], classes: Tensor) -> list[str]:
    """The class that each word names; "" for none."""
    spelt = {_spelling(name): name for name in classnames}
    centre = text.mean(dim=0)
    similar = F.normalize(text - centre, dim=-1) @ F.normalize(classes - centre, dim=-1).T
    nearest = similar.max(dim=1)
    return [
        spelt.get(_spelling(word)) or (classnames[int(nearest.indices[i])] if nearest.values[i] >= SYNONYM else "")
        for i, word in enumerate(words)
    ]
