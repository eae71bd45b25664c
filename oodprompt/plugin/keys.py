"""Our config keys in Dassl's tree, and Dassl's tree as our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from yacs.config import CfgNode

from oodprompt.config.keys import check_values, declared_keys, get_cfg_default, leaves, set_key
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data.transforms import is_random

_SECTIONS = ("DATASET.", "REGIONS.", "DISCOVERY.", "TRAINER.GROUP_SOURCES.")
_KEYS = (
    "TRAINER.BASE",
    "TRAINER.STACK",
    "TRAINER.GROUPS",
    "TRAINER.PSEUDO_NOISE",
    "DATALOADER.CACHE_DIR",
    "DATALOADER.CACHE_MEMORY_MIB",
)
# What our engine reads of Dassl's own keys.
_SHARED = (
    *("OUTPUT_DIR", "RESUME", "SEED", "USE_CUDA", "VERBOSE", "MODEL.BACKBONE.NAME", "TRAINER.NAME"),
    *("INPUT.", "DATALOADER.", "OPTIM.", "TEST."),
)


def _is_ours(name: str) -> bool:
    """Whether the plugin heeds a key that Dassl has not."""
    if name in _KEYS or name.startswith(_SECTIONS):
        return True
    debiasers = tuple(f"TRAINER.{n.upper()}." for n, trainer in TRAINER_REGISTRY.items() if trainer.debiaser_class)
    return name.startswith(debiasers)


def added_keys() -> Iterator[tuple[str, Any]]:
    """The keys that the plugin adds, with their defaults."""
    return ((name, key.default) for name, key in declared_keys().items() if _is_ours(name))


def extend_cfg(cfg: CfgNode) -> None:
    """Add our keys to a tree of Dassl's, in place; keys that it has keep their values.

    ``import oodprompt.plugin`` does this to Dassl's defaults, so a ``train.py`` need not call it.
    """
    for name, default in added_keys():
        *parents, leaf = name.split(".")
        node = cfg
        for parent in parents:
            if parent not in node:
                node[parent] = CfgNode()
            node = node[parent]
        if leaf not in node:
            node[leaf] = default


def own_cfg(cfg: CfgNode) -> CfgNode:
    """A whole tree of ours, with the values of a tree of Dassl's where both have the key and it means the same.

    Few-shot sampling and the choice of classes are done when we see the data. A random training transform, whichever
    it is, stands as random_flip: it is Dassl's that is applied.
    """
    own = get_cfg_default()
    known = leaves(own)
    for name, value in leaves(cfg).items():
        if name in known and (name.startswith(_SHARED) or _is_ours(name)):
            set_key(own, name, value, "the config")
    check_values(own, (name for name, _ in added_keys()))
    own.DATASET.NUM_SHOTS, own.DATASET.SUBSAMPLE_CLASSES = -1, "all"
    if is_random(own):
        kept = [name for name in own.INPUT.TRANSFORMS if name in ("normalize", "instance_norm")]
        own.INPUT.TRANSFORMS = ("random_flip", *kept)
    if own.SEED < 0:
        own.SEED = torch.initial_seed() % 2**31
    return own
