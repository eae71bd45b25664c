"""Config, registries, data, training loop, checkpoints, evaluation, reports."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from oodprompt.config.registry import DATASET_REGISTRY, EVALUATOR_REGISTRY, GROUP_SOURCE_REGISTRY, TRAINER_REGISTRY

if TYPE_CHECKING:
    from oodprompt.data.dataset import DatasetBase, Datum
    from oodprompt.engine.trainer import PromptTrainer, build_trainer, load_run

# Imported when they are first asked for: they take PyTorch, for which ``train.py --help`` does not wait.
_PLACES = {
    "DatasetBase": "oodprompt.data.dataset",
    "Datum": "oodprompt.data.dataset",
    "PromptTrainer": "oodprompt.engine.trainer",
    "build_trainer": "oodprompt.engine.trainer",
    "load_run": "oodprompt.engine.trainer",
}

__all__ = [
    "DATASET_REGISTRY",
    "EVALUATOR_REGISTRY",
    "GROUP_SOURCE_REGISTRY",
    "TRAINER_REGISTRY",
    "DatasetBase",
    "Datum",
    "PromptTrainer",
    "build_trainer",
    "load_run",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
