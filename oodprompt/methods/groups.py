"""Groups (class, attribute) of a split: by the data set's attribute labels, by pseudo-attributes, or by what discovery finds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oodprompt.errors import UserError, nearest
from oodprompt.methods.attributes import DiscoveredAttributes, PseudoAttributes
from oodprompt.methods.splits import LabelledData, Split

CHOICES = ("pseudo", "true", "regions")


@dataclass(frozen=True)
class Groups:
    """The group g_i = y_i A + a_i of every image of a split, [N], and the names of all G = C A groups."""

    index: Tensor
    names: tuple[str, ...]

    @property
    def count(self) -> Tensor:
        """N_g [G], the number of images of each group."""
        return torch.bincount(self.index, minlength=len(self.names))


class AttributeSources:
    """The sources of attributes that a run offers, and the groups that ``choice`` (TRAINER.GROUPS) makes of them.

    ``choice`` is the data set's attribute labels ("true"), pseudo-attributes ("pseudo") or the presence of discovered
    regions ("regions"). ``values`` is the number of attribute values in all splits of the data set. ``groups_by`` says
    which source gave groups so far; None: nobody asked.
    """

    def __init__(
        self,
        choice: str,
        data: LabelledData,
        values: int,
        pseudo: PseudoAttributes,
        discovered: DiscoveredAttributes,
    ) -> None:
        self.choice, self.data, self.values, self.pseudo, self.discovered = choice, data, values, pseudo, discovered
        self.groups_by: str | None = None

    def groups(self, split: Split) -> Groups:
        """The groups of a split. ``UserError`` as ``check_groups``, and where nothing is discovered."""
        self.groups_by = self.choice
        values = self._num_values(split)
        source = self.discovered if self.choice == "regions" else self.pseudo
        attribute = split.attribute if self.choice == "true" else source.of(split)
        named = [source.names[a] if a < len(source.names) else str(a) for a in range(values)]
        names = tuple(f"{c} / {a}" for c in self.data.classnames for a in named)
        return Groups(split.label * values + attribute, names)

    def num_groups(self) -> int:
        """G = C A of the training split, without asking for image features. ``UserError`` as ``check_groups``."""
        return len(self.data.classnames) * self._num_values(self.data.train)

    def check_groups(self, split: Split) -> None:
        """``UserError`` for another choice, or where names or attribute labels are missing; asks for no features."""
        self._num_values(split)

    def _num_values(self, split: Split) -> int:
        """A, the number of attribute values by the choice."""
        if self.choice not in CHOICES:
            raise UserError(f"TRAINER.GROUPS: unknown choice {self.choice!r}: {nearest(self.choice, CHOICES)}")
        if self.choice == "pseudo":
            return len(self.pseudo.text)
        if self.choice == "regions":
            return 2
        unknown = int((split.attribute < 0).sum())
        if unknown:
            raise UserError(
                f"TRAINER.GROUPS true: {unknown:,} of {len(split.attribute):,} images of the {split.name} split have no "
                "attribute label; use TRAINER.GROUPS pseudo, which needs the names of its values only, or regions"
            )
        return max(len(self.pseudo.names), self.values)


def per_group(values: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum of ``values`` [B] and number of images in each of ``count`` groups, both [G] in float64.

    Sums in float64, so that the order of images does not show in what is computed from them.
    """
    zeros = torch.zeros(count, dtype=torch.float64, device=values.device)
    total = zeros.index_add(0, group, values.double())
    return total, zeros.index_add(0, group, torch.ones_like(values, dtype=torch.float64))
