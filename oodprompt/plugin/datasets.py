"""Our data sets for Dassl, and Dassl's for us."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dassl.data.datasets import DATASET_REGISTRY as DASSL_DATASETS
from dassl.data.datasets import DatasetBase as DasslDataset
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum, with_own_names

# Before our names, so that no data set of Dassl, CoOp or MaPLe has the same.
PREFIX = "OOD"


class _OurDataset(DasslDataset):
    """A data set of ours as Dassl takes them; images keep their attributes."""

    ours: type[DatasetBase]

    def __init__(self, cfg: CfgNode) -> None:
        build: Any = self.ours  # registered data sets are built from the configuration alone
        data = build(with_own_names(cfg))
        super().__init__(train_x=list(data.train_x), val=list(data.val) or None, test=list(data.test))
        self.template = data.template
        self.attribute_names, self.attribute_prompts = data.attribute_names, data.attribute_prompts


def register_datasets() -> list[str]:
    """Put every data set of ours into Dassl's registry; returns the names there."""
    names = []
    for name, ours in DATASET_REGISTRY.items():
        adapted = type(f"{PREFIX}{name}", (_OurDataset,), {"ours": ours, "__doc__": ours.__doc__})
        DASSL_DATASETS.register(adapted, force=True)
        names.append(adapted.__name__)
    return names


class TheirDataset(DatasetBase):
    """A data set as Dassl built it, with what our engine wants to know of it.

    Images of other data sets have no attribute (-1), unless theirs has one of that name; names of the attribute's values
    come from DATASET.ATTRIBUTE_NAMES.
    """

    def __init__(self, cfg: CfgNode, data: Any) -> None:
        for name in ("template", "attribute_names", "attribute_prompts"):
            setattr(self, name, getattr(data, name, getattr(DatasetBase, name)))
        super().__init__(with_own_names(cfg), *(_ours(split or ()) for split in (data.train_x, data.val, data.test)))


def _ours(split: Sequence[Any]) -> list[Datum]:
    return [
        d if isinstance(d, Datum) else Datum(d.impath, d.label, d.domain, d.classname, getattr(d, "attribute", -1))
        for d in split
    ]
