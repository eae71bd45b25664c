"""The configuration: keys, their defaults, registries, and what brings methods and data sets in."""

from oodprompt.config.keys import Key, check_values, declare, get_cfg_default, leaves, merge_file, merge_opts, set_key
from oodprompt.config.registry import DATASET_REGISTRY, EVALUATOR_REGISTRY, GROUP_SOURCE_REGISTRY, TRAINER_REGISTRY

__all__ = [
    "DATASET_REGISTRY",
    "EVALUATOR_REGISTRY",
    "GROUP_SOURCE_REGISTRY",
    "TRAINER_REGISTRY",
    "Key",
    "check_values",
    "declare",
    "get_cfg_default",
    "leaves",
    "merge_file",
    "merge_opts",
    "set_key",
]
