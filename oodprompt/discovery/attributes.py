"""What discovery found, as an attribute of images (absent or present) and as a mark on regions.

The attribute takes the place of a named one (``oodprompt.groups.PseudoAttributes`` has the same face), so that methods
that want groups or an attribute need neither labels nor names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.errors import UserError
from oodprompt.groups import Split


@dataclass(frozen=True)
class Found:
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

    def __init__(self, find: Callable[[], Found]) -> None:
        self._find = find
        self._found: Found | None = None

    @property
    def found(self) -> Found:
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
