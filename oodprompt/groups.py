"""Groups (class, attribute) of a split: by the data set's attribute labels, or by what zero-shot CLIP sees of an
attribute whose values have names, which needs no labels at all (*pseudo-attributes*), or by what discovery finds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.backbones import CLIP, tokenize
from oodprompt.errors import UserError, nearest

if TYPE_CHECKING:
    from oodprompt.discovery.attributes import DiscoveredAttributes

CHOICES = ("pseudo", "true", "regions")


@dataclass(frozen=True)
class Split:
    """A split as debiasers see it, in the order of its ``index``.

    ``label`` [N]; ``attribute`` [N] of the data set (-1: unknown); ``features()`` gives normalised features [N, d] of
    its images from CLIP as it was released, computed once.
    """

    name: str
    label: Tensor
    attribute: Tensor
    features: Callable[[], Tensor]


@dataclass(frozen=True)
class Groups:
    """The group g_i = y_i A + a_i of every image of a split, [N], and the names of all G = C A groups."""

    index: Tensor
    names: tuple[str, ...]

    @property
    def count(self) -> Tensor:
        """N_g [G], the number of images of each group."""
        return torch.bincount(self.index, minlength=len(self.names))


class PseudoAttributes:
    """What the frozen CLIP sees of the spurious attribute: a_hat = argmax_a <z, t_a> for every image.

    t_a = l2norm(mean over the prompts of value a of l2norm(text(prompt))). Computed once per split on the frozen
    features. ``noise`` is the share of images whose a_hat is moved to another value, at random by ``rng(split)``, to
    study methods under wrong pseudo-attributes.

    Source: Jiang et al., "Debiased Prompt Tuning in Vision-Language Model without Annotations", arXiv 2503.08368.
    """

    def __init__(
        self,
        clip: CLIP,
        names: Sequence[str],
        prompts: Sequence[Sequence[str]],
        noise: float = 0.0,
        rng: Callable[[str], np.random.Generator] = lambda split: np.random.default_rng(0),
    ) -> None:
        if not 0 <= noise <= 1:
            raise UserError(f"TRAINER.PSEUDO_NOISE is a share between 0 and 1, not {noise}")
        self.clip, self.names, self.prompts, self.noise, self._rng = clip, tuple(names), prompts, noise, rng
        self._text: Tensor | None = None
        self._posterior: dict[str, Tensor] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose pseudo-attributes have been asked for."""
        return tuple(self._posterior)

    @property
    @torch.no_grad()
    def text(self) -> Tensor:
        """t_a, [A, d]. Raises ``UserError`` when the data set names fewer than two values."""
        if len(self.prompts) < 2:
            raise UserError(
                "this method needs the names of the spurious attribute, and the data set gives none: set "
                "DATASET.ATTRIBUTE_NAMES \"('water', 'land')\" and, for better prompts, DATASET.ATTRIBUTE_PROMPTS; "
                "or use attribute labels with TRAINER.GROUPS true, where the method takes groups"
            )
        if self._text is None:
            rows = []
            for prompts in self.prompts:
                rows.append(F.normalize(prompt_features(self.clip, prompts).mean(dim=0), dim=0))
            self._text = torch.stack(rows).float()
        return self._text

    @property
    def basis(self) -> Tensor:
        """An orthonormal basis [d, r] of the text features of all prompts, each by itself. Raises as ``text`` does."""
        _ = self.text
        return span(prompt_features(self.clip, [prompt for prompts in self.prompts for prompt in prompts]))

    @torch.no_grad()
    def posterior(self, split: Split) -> Tensor:
        """softmax_a(s <z_i, t_a>) for every image of the split, [N, A]."""
        if split.name not in self._posterior:
            posterior = F.softmax(self.clip.logit_scale.exp().float() * split.features() @ self.text.T, dim=1)
            self._posterior[split.name] = self._with_noise(posterior, split.name)
        return self._posterior[split.name]

    def of(self, split: Split) -> Tensor:
        """a_hat of every image of the split, [N]."""
        return self.posterior(split).argmax(dim=1)

    def _with_noise(self, posterior: Tensor, split: str) -> Tensor:
        """The posterior of the chosen images with its values moved round by 1 to A - 1 places."""
        if not self.noise:
            return posterior
        rng, (count, values) = self._rng(split), posterior.shape
        shift = np.zeros(count, dtype=np.int64)
        chosen = rng.permutation(count)[: round(self.noise * count)]
        shift[chosen] = rng.integers(1, values, len(chosen))
        places = (torch.arange(values) - torch.from_numpy(shift).unsqueeze(1)) % values
        return posterior.gather(1, places.to(posterior.device))


@torch.no_grad()
def prompt_features(clip: CLIP, prompts: Sequence[str]) -> Tensor:
    """Normalised text features [n, d] of prompts, in float64 for the linear algebra that follows."""
    tokens = tokenize(list(prompts)).to(clip.logit_scale.device)
    return F.normalize(clip.encode_text(tokens).double(), dim=-1)


def span(vectors: Tensor, tolerance: float = 1e-5) -> Tensor:
    """An orthonormal basis [d, r] of the rows of ``vectors`` [n, d].

    Directions whose singular value is below ``tolerance`` times the largest are rounding, as dependent rows leave it.
    """
    _, size, directions = torch.linalg.svd(vectors, full_matrices=False)
    return directions[size > tolerance * size.max()].T


def groups_of(
    split: Split,
    choice: str,
    classnames: Sequence[str],
    values: int,
    pseudo: PseudoAttributes,
    discovered: DiscoveredAttributes,
) -> Groups:
    """The groups of a split by ``choice``: the data set's attributes ("true"), pseudo-attributes ("pseudo") or the
    presence of discovered regions ("regions").

    ``values`` is the number of attribute values in all splits of the data set.

    Raises ``UserError`` for another choice, where an attribute label is unknown, or where nothing is discovered.
    """
    values = num_values(split, choice, values, pseudo)
    source = discovered if choice == "regions" else pseudo
    attribute = split.attribute if choice == "true" else source.of(split)
    named = [source.names[a] if a < len(source.names) else str(a) for a in range(values)]
    names = tuple(f"{c} / {a}" for c in classnames for a in named)
    return Groups(split.label * values + attribute, names)


def num_values(split: Split, choice: str, values: int, pseudo: PseudoAttributes) -> int:
    """A, the number of attribute values by ``choice``; raises as ``groups_of`` does, without asking for features."""
    if choice not in CHOICES:
        raise UserError(f"TRAINER.GROUPS: unknown choice {choice!r}: {nearest(choice, CHOICES)}")
    if choice == "pseudo":
        return len(pseudo.text)
    if choice == "regions":
        return 2
    unknown = int((split.attribute < 0).sum())
    if unknown:
        raise UserError(
            f"TRAINER.GROUPS true: {unknown:,} of {len(split.attribute):,} images of the {split.name} split have no "
            "attribute label; use TRAINER.GROUPS pseudo, which needs the names of its values only, or regions"
        )
    return max(len(pseudo.names), values)


def per_group(values: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` [B] and number of images in each of ``count`` groups, both [G] in float64.

    Sums in float64, so that the order of images does not show in what is computed from them.
    """
    zeros = torch.zeros(count, dtype=torch.float64, device=values.device)
    total = zeros.index_add(0, group, values.double())
    return total, zeros.index_add(0, group, torch.ones_like(values, dtype=torch.float64))
