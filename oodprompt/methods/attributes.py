"""Sources of an attribute of images: what zero-shot CLIP sees of named values (*pseudo-attributes*), and what discovery finds.

Both have the same face (``names``, ``of``, ``posterior``), so that methods which want groups or an attribute need
neither attribute labels nor, for what discovery finds, names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.backbones import CLIP
from oodprompt.data.dataset import prompts_of_names
from oodprompt.errors import UserError
from oodprompt.methods.splits import Split


class PseudoAttributes:
    """What the frozen CLIP sees of the spurious attribute: a_hat = argmax_a <z, t_a> for every image.

    t_a = l2norm(mean over the prompts of value a of l2norm(text(prompt))). Computed once per split on the frozen
    features. ``noise`` is the share of images whose a_hat is moved to another value, at random by ``rng(split)``, to
    study methods under wrong pseudo-attributes. ``find`` proposes names in place of ``names``, at the first question.
    ``of_labels``: whether the names are those of the attribute labels, to which a_hat can then be compared.

    Source: Jiang et al., "Debiased Prompt Tuning in Vision-Language Model without Annotations", arXiv 2503.08368.
    """

    def __init__(
        self,
        clip: CLIP,
        names: Sequence[str],
        prompts: Sequence[Sequence[str]],
        noise: float = 0.0,
        rng: Callable[[str], np.random.Generator] = lambda split: np.random.default_rng(0),
        find: Callable[[], Sequence[str]] | None = None,
        of_labels: bool = True,
    ) -> None:
        self.clip, self._names, self._prompts, self.noise, self._rng = clip, tuple(names), prompts, noise, rng
        self._find, self.is_found, self.of_labels = find, find is None, of_labels and find is None
        self._text: Tensor | None = None
        self._posterior: dict[str, Tensor] = {}

    @property
    def are_proposed(self) -> bool:
        """Whether the names are not the data set's, but proposed by what is in its images."""
        return self._find is not None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the values."""
        if not self.is_found and self._find is not None:
            self.take(self._find())
        return self._names

    def take(self, names: Sequence[str]) -> None:
        """Have the values called ``names``, before anybody has asked for their names."""
        self._names, self.is_found = tuple(names), True
        self._prompts = prompts_of_names(self._names)

    @property
    def prompts(self) -> Sequence[Sequence[str]]:
        """The prompts of each value."""
        _ = self.names
        return self._prompts

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
def prompt_features(clip: CLIP, prompts: Sequence[str], truncate: bool = False) -> Tensor:
    """Normalised text features [n, d] of prompts, in float64 for the linear algebra that follows.

    ``UserError`` for a prompt that is longer than the text encoder takes; with ``truncate`` its rest is cut.
    """
    tokens = clip.tokenizer(list(prompts), truncate).to(clip.logit_scale.device)
    return F.normalize(clip.encode_text(tokens).double(), dim=-1)


def span(vectors: Tensor, tolerance: float = 1e-5) -> Tensor:
    """An orthonormal basis [d, r] of the rows of ``vectors`` [n, d].

    Directions whose singular value is below ``tolerance`` times the largest are rounding, as dependent rows leave it.
    """
    _, size, directions = torch.linalg.svd(vectors, full_matrices=False)
    return directions[size > tolerance * size.max()].T


@dataclass(frozen=True)
class DiscoveredClusters:
    """Clusters that discovery calls spurious, and the cluster of every region of every split.

    ``clusters``: indices of the survivors that count, best first (empty: nothing was found); ``assignment`` [r] and
    ``owner`` [r] by name of the split; ``where`` says where this was read or written.
    """

    clusters: tuple[int, ...]
    assignment: dict[str, Tensor]
    owner: dict[str, Tensor]
    where: str = ""


class DiscoveredAttributes:
    """Presence of the discovered clusters: a_i = 1 if image i has a region of one, else 0.

    ``find`` runs or reads discovery, at the first question.
    """

    names = ("absent", "present")

    def __init__(self, find: Callable[[], DiscoveredClusters]) -> None:
        self._find = find
        self._found: DiscoveredClusters | None = None

    @property
    def found(self) -> DiscoveredClusters:
        """Raises ``UserError`` when discovery found nothing, which leaves those who ask with nothing to go by."""
        if self._found is None:
            self._found = self._find()
        if not self._found.clusters:
            raise UserError(
                f"discovery found no spurious cluster ({self._found.where}), so there is nothing to train against; that is "
                "a normal outcome. Look at discovery.html; lower DISCOVERY.THRESHOLD, or change REGIONS.* or DISCOVERY.*"
            )
        return self._found

    def spurious(self, split: Split) -> Tensor:
        """Which regions of a split lie in a discovered cluster, [r] bool."""
        found = self.found
        marks = torch.isin(found.assignment[split.name], torch.tensor(found.clusters))
        return marks.to(split.label.device)

    def of(self, split: Split) -> Tensor:
        """a of every image of the split, [N]."""
        present = torch.zeros_like(split.label)
        present[self.found.owner[split.name].to(present.device)[self.spurious(split)]] = 1
        return present

    def posterior(self, split: Split) -> Tensor:
        """One-hot a, [N, 2]."""
        return F.one_hot(self.of(split), 2).float()

    def prototypes(self, split: Split) -> Tensor:
        """Normalised means of the frozen features of images without and with, [2, d]: what text is to a named attribute."""
        z, a = split.features(), self.of(split)
        for value, name in enumerate(self.names):
            if not (a == value).any():
                raise UserError(
                    f"the discovered cluster is {name} in every image of the {split.name} split, so it tells nothing apart; "
                    "try finer regions (REGIONS.GRID) or another DISCOVERY.CLUSTERS"
                )
        return F.normalize(torch.stack([z[a == value].mean(dim=0) for value in (0, 1)]), dim=-1)
