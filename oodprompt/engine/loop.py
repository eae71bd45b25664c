"""The only training loop: ``fit_epoch``, the state of a run, and the check that losses stay finite."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones.devices import queues_work
from oodprompt.data.loading import Batch
from oodprompt.errors import UserError
from oodprompt.memory import memory_for

_LOOKED_AT_ONCE = 20  # losses on a GPU: to look at one waits for all work that is queued


@dataclass
class RunState:
    """Where a run stands.

    ``epoch``: the epoch that is being trained, from 0, of ``start_epoch`` to ``max_epoch``; ``batch``: that of the last
    step, from 0. ``history``: a row for each finished epoch. ``best``: criterion -> its best validation value and the epoch of it. ``train_seconds``: time in
    training steps, also of the runs that were resumed. ``step_seconds``: of each step of this process.
    ``loaded_step_ms``: the median of the run that was loaded. ``groups_by``: the source of the groups that training used,
    None without.
    """

    max_epoch: int = 0
    start_epoch: int = 0
    epoch: int = 0
    batch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    loaded_step_ms: float = 0.0
    groups_by: str | None = None

    @property
    def step_ms_median(self) -> float:
        """Median time of a training step in milliseconds; of the run that was loaded when this one has trained none."""
        return 1000 * statistics.median(self.step_seconds) if self.step_seconds else self.loaded_step_ms


@dataclass(frozen=True)
class StepReport:
    """What is known after a step: its number in the epoch, from 0; scalars of the step and their sums so far."""

    number: int
    now: dict[str, Tensor]
    sums: dict[str, Tensor]
    data_seconds: float

    def values(self) -> dict[str, tuple[float, float]]:
        """By name, the scalar of the step and its mean so far. The host waits for all queued work, once."""
        both = {(key, kind): value for kind, values in ((0, self.now), (1, self.sums)) for key, value in values.items()}
        numbers = _numbers(both)
        return {key: (numbers[key, 0], numbers[key, 1] / (self.number + 1)) for key in self.now}


def fit_epoch(
    batches: Any,
    state: RunState,
    step: Callable[[int, Batch], dict[str, Tensor]],
    after_step: Callable[[StepReport], None] | None = None,
    queues_work: bool = False,
) -> dict[str, float]:
    """Train the epoch ``state.epoch``: ``step(number, batch)`` on every batch; returns the means of its scalars.

    ``batches`` are a ``Loader`` or a ``FeatureLoader``. ``queues_work``: steps return before their work is done, as on
    a GPU; their time is then the mean over the epoch.
    """
    batches.set_epoch(state.epoch)
    state.batch = 0
    sums: dict[str, Tensor] = {}
    samples = 0
    began = end = time.time()
    for number, batch in enumerate(batches):
        data_seconds, state.batch = time.time() - end, number
        scalars = step(number, batch)
        for key, value in scalars.items():
            sums[key] = value.detach() + sums.get(key, 0.0)
        samples += 1
        state.step_seconds.append(time.time() - end)
        if after_step is not None:
            after_step(StepReport(number, scalars, sums, data_seconds))
        end = time.time()
    totals = {key: value / samples for key, value in _numbers(sums).items()}  # waits for all queued work
    seconds = time.time() - began
    state.train_seconds += seconds
    if queues_work:
        state.step_seconds[-samples:] = [seconds / samples] * samples
    return totals


def _numbers(values: dict[Any, Tensor]) -> dict[Any, float]:
    """The values on the host, which waits for them once."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))


def remedy(cfg: CfgNode, precision: str) -> str:
    """What to do where numbers are no longer finite."""
    return f"Lower OPTIM.LR (now {cfg.OPTIM.LR}), or set TRAINER.PREC fp32 (now {precision})"


@contextlib.contextmanager
def memory_in_training(
    cfg: CfgNode, state: RunState, precision: str, device: torch.device, what: str = "", regions: bool = False
) -> Iterator[None]:
    """``UserError`` where memory runs out in the block, which trains: the step, and what to lower.

    ``what`` as of ``LossCheck``; ``regions``: they are encoded at every step.
    """
    with memory_for(
        lambda: f"in epoch {state.epoch + 1}{what}, batch {state.batch + 1}",
        lambda: _less_memory(cfg, precision, device, 0 if what else state.epoch, regions),
    ):
        yield


def _less_memory(cfg: CfgNode, precision: str, device: torch.device, finished: int, regions: bool) -> str:
    """What to do where memory runs out after ``finished`` epochs."""
    kept = f"TRAIN.ACTIVATION_GIB (now {cfg.TRAIN.ACTIVATION_GIB})"
    others = [f"DATALOADER.TRAIN_X.BATCH_SIZE (now {cfg.DATALOADER.TRAIN_X.BATCH_SIZE})"]
    if regions:
        size = "GRID" if cfg.REGIONS.SOURCE == "grid" else "PER_IMAGE"
        others.append(f"REGIONS.{size} (now {cfg.REGIONS[size]})")
    half = f", or set TRAINER.PREC bf16 (now {precision})" if precision == "fp32" and device.type == "cuda" else ""
    if not finished:
        return f"Lower {' or '.join([*others, kept])}{half}"
    return (
        f"Lower {kept} and rerun the same command, which goes on after epoch {finished}. To lower "
        f"{' or '.join(others)}{half}, choose another --output-dir"
    )


class LossCheck:
    """Raises ``UserError`` when a loss is not finite. On a GPU losses are looked at 20 at a time, as looking waits.

    ``what`` names the training in the message, as in "epoch 3 of the first stage"; empty for the run's own.
    """

    def __init__(self, device: torch.device, remedy: str, what: str = "") -> None:
        self._waits, self._remedy, self._what = queues_work(device), remedy, what
        self._unchecked: list[tuple[int, Tensor]] = []

    def __call__(self, loss: Tensor, epoch: int, number: int, is_last: bool) -> None:
        """``loss`` of step ``number`` of ``epoch``, both from 0; ``is_last`` of the epoch."""
        self._unchecked.append((number + 1, loss.detach()))
        if self._waits and not is_last and len(self._unchecked) < _LOOKED_AT_ONCE:
            return
        unchecked, self._unchecked = self._unchecked, []
        values = torch.stack([value for _, value in unchecked]).tolist()
        for (step, _), value in zip(unchecked, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"the loss became {value} in epoch {epoch + 1}{self._what}, batch {step}{self._saved(epoch)}. "
                    f"{self._remedy}"
                )

    def _saved(self, epoch: int) -> str:
        if self._what:
            return ""
        return f"; the last whole checkpoint is of epoch {epoch}" if epoch else "; no epoch was finished"
