"""Groups (class, attribute) of a split: by the data set's attribute labels, by pseudo-attributes, or by what discovery finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oodprompt.errors import UserError
from oodprompt.methods.attributes import DiscoveredAttributes, PseudoAttributes
from oodprompt.methods.splits import Split

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

    Raises ``UserError`` where an attribute label is unknown, or where nothing is discovered.
    """
    values = num_values(split, choice, values, pseudo)
    source = discovered if choice == "regions" else pseudo
    attribute = split.attribute if choice == "true" else source.of(split)
    named = [source.names[a] if a < len(source.names) else str(a) for a in range(values)]
    names = tuple(f"{c} / {a}" for c in classnames for a in named)
    return Groups(split.label * values + attribute, names)


def num_values(split: Split, choice: str, values: int, pseudo: PseudoAttributes) -> int:
    """A, the number of attribute values by ``choice``; raises as ``groups_of`` does, without asking for features."""
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
