"""Groups (class, attribute) of a split, and what a source of groups must say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.data.dataset import told_apart
from oodprompt.errors import UserError
from oodprompt.methods.attributes import DiscoveredAttributes, PseudoAttributes
from oodprompt.methods.splits import LabelledData, Split


@dataclass(frozen=True)
class Groups:
    """The group g_i = y_i A + a_i of every image of a split, [N], and the names of all G = C A groups.

    An image whose attribute is not known is in no group, -1. Only splits other than the training split have such.
    """

    index: Tensor
    names: tuple[str, ...]

    @property
    def count(self) -> Tensor:
        """N_g [G], the number of images of each group."""
        return torch.bincount(self.index[self.known], minlength=len(self.names))

    @property
    def known(self) -> Tensor:
        """Which images are in a group, [N] bool."""
        return self.index >= 0


class SourceOfGroups(Protocol):
    """Says which value of an attribute each image has; a group is a pair (class, value).

    ``names`` of the values, by number; a value beyond them is called by its number. ``may_be_fewer``: ``num_values`` is the
    most that there may be, so that some values have no image. ``is_computed``: the values come out of a training or a search.
    """

    names: Sequence[str]
    may_be_fewer: bool
    is_computed: bool

    def num_values(self, split: Split) -> int:
        """A, the number of values. ``UserError`` where the source cannot tell them; asks for no image features."""

    def of(self, split: Split) -> Tensor:
        """The value of every image of the split, [N], from 0 to A - 1; -1: unknown, which no training image may be."""


class AttributeSources:
    """The attributes that a run offers, and the groups that the source ``choice`` (TRAINER.GROUPS) makes.

    ``pseudo`` is what zero-shot CLIP sees of the run's names, ``proposed`` (None: as ``pseudo``) what it sees of the names
    that an audit proposes. ``build_source()`` builds the source when groups are asked for. ``groups_by`` says which source
    gave groups so far (None: nobody asked), ``asked`` of which splits.
    """

    def __init__(
        self,
        choice: str,
        data: LabelledData,
        pseudo: PseudoAttributes,
        discovered: DiscoveredAttributes,
        build_source: Callable[[], SourceOfGroups],
        proposed: PseudoAttributes | None = None,
    ) -> None:
        self.choice, self.data, self.pseudo, self.discovered = choice, data, pseudo, discovered
        self.proposed = proposed or pseudo
        self._build_source = build_source
        self.groups_by: str | None = None
        self.asked: list[str] = []

    @cached_property
    def source(self) -> SourceOfGroups:
        """The source of groups."""
        return self._build_source()

    def groups(self, split: Split) -> Groups:
        """The groups of a split. ``UserError`` as ``check_groups``, and where a source finds nothing."""
        source, values = self.source, self.source.num_values(split)
        attribute = self.values(split)
        named = [source.names[a] if a < len(source.names) else str(a) for a in range(values)]
        names = tuple(f"{c} / {a}" for c in told_apart(self.data.classnames) for a in named)
        return Groups(torch.where(attribute < 0, -1, split.label * values + attribute), names)

    @property
    def are_computed(self) -> bool:
        """Whether the groups come out of a training or a search, which may take long."""
        return self.source.is_computed

    @property
    def may_be_fewer(self) -> bool:
        """Whether ``num_groups`` is the most that there may be, so that some groups have no image."""
        return self.source.may_be_fewer

    def values(self, split: Split) -> Tensor:
        """The value that the source gives each image of a split, [N]; -1: unknown."""
        self.groups_by = self.choice
        if split.name not in self.asked:
            self.asked.append(split.name)
        return self.source.of(split)

    def num_groups(self) -> int:
        """G = C A of the training split, without asking for image features. ``UserError`` as ``check_groups``."""
        return len(self.data.classnames) * self.source.num_values(self.data.train)

    def check_groups(self, split: Split) -> None:
        """``UserError`` where names or attribute labels are missing; asks for no features."""
        self.source.num_values(split)


class GroupAttributes:
    """The values of the source of groups with the face of ``PseudoAttributes``: an attribute that nobody need name."""

    def __init__(self, attributes: AttributeSources) -> None:
        self.attributes = attributes
        self.names = attributes.source.names

    @property
    def count(self) -> int:
        """A, the number of values, some of which may have no image. ``UserError`` as ``check_groups``."""
        return self.attributes.source.num_values(self.attributes.data.train)

    def of(self, split: Split) -> Tensor:
        """a of every image of the split, [N]."""
        return self.attributes.values(split)

    def posterior(self, split: Split) -> Tensor:
        """One-hot a, [N, A]; zeros where it is unknown."""
        a = self.of(split)
        return F.one_hot(a.clamp(min=0), self.count).float() * (a >= 0).unsqueeze(1)

    def prototypes(self, split: Split) -> Tensor:
        """Normalised means of the frozen features of the images of each value, [A, d]; zeros for a value without any."""
        a = self.posterior(split)
        if (a.sum(dim=0) > 0).sum() < 2:
            raise UserError(
                f"TRAINER.GROUPS {self.attributes.choice}: all images of the {split.name} split have one value, which tells "
                "nothing apart; take another source"
            )
        return F.normalize(a.T @ split.features(), dim=-1)


def per_group(values: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` [B] and number of images in each of ``count`` groups, both [G] in float64.

    Sums in float64, so that the order of images does not show in what is computed from them.
    """
    zeros = torch.zeros(count, dtype=torch.float64, device=values.device)
    total = zeros.index_add(0, group, values.double())
    return total, zeros.index_add(0, group, torch.ones_like(values, dtype=torch.float64))
