"""Config, registries, data, training loop, checkpoints, evaluation, reports."""

from oodprompt.config.registry import DATASET_REGISTRY, EVALUATOR_REGISTRY, GROUP_SOURCE_REGISTRY, TRAINER_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum
from oodprompt.engine.trainer import PromptTrainer, build_trainer, load_run

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
