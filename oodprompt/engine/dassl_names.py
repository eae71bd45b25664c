"""The names by which code on Dassl knows the parts of a trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from oodprompt.engine.loop import RunState
from oodprompt.engine.optim import LRScheduler, TrainedModels
from oodprompt.engine.progress import Progress


def _of_run(name: str) -> Any:
    """An attribute that ``RunState`` holds."""
    return property(lambda self: getattr(self.run, name), lambda self, value: setattr(self.run, name, value))


class DasslNames:
    """Dassl's attributes and small methods, over ``trained`` (models, optimisers), ``run`` (state) and ``progress``."""

    epoch, start_epoch, max_epoch, history = map(_of_run, ("epoch", "start_epoch", "max_epoch", "history"))

    def __init__(self, trained: TrainedModels, run: RunState) -> None:
        self.trained, self.run = trained, run
        self.progress: Progress | None = None
        self._models, self._optims, self._scheds = trained.models, trained.optims, trained.scheds

    def register_model(
        self,
        name: str,
        model: nn.Module,
        optim: torch.optim.Optimizer | None = None,
        sched: LRScheduler | None = None,
    ) -> None:
        """Name a model for checkpoints, with its optimiser and schedule."""
        self.trained.register(name, model, optim, sched)

    def get_model_names(self) -> list[str]:
        return list(self._models)

    def models(self) -> list[nn.Module]:
        return list(self._models.values())

    @contextlib.contextmanager
    def closing_progress(self) -> Iterator[None]:
        """The bar and the trackers of the training in the block are closed afterwards, also where it breaks off."""
        try:
            yield
        finally:
            if self.progress is not None:
                self.progress.close()

    def update_lr(self) -> None:
        """Advance every learning rate by an epoch."""
        self.trained.step_schedules()

    def get_current_lr(self) -> float:
        """Learning rate of the first model that trains."""
        return self.trained.learning_rate

    def write_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a value to TensorBoard's curve ``tag``."""
        if self.progress is not None:
            self.progress.write_scalar(tag, value, step)
