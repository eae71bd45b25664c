"""What is seen of a training as it goes on: a bar, lines, and the curves of trackers."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from oodprompt.engine.loop import RunState, StepReport
from oodprompt.engine.trackers import Trackers
from oodprompt.features.encoder import Encoder
from oodprompt.log import logger, progress

_RECENT = 50  # steps whose mean time tells the time left


def announce(encoder: Encoder, num_processes: int, notes: Sequence[str] = ()) -> None:
    """Say what computes, whether image features are kept, and what to mind of the data."""
    views = encoder.views
    cached = f"cache of {views} view{'s' if views > 1 else ''}" if views else "computed at every step"
    logger.info(f"Device: {encoder.device}, {num_processes} process(es), precision {encoder.precision}")
    logger.info(f"Image features: {cached}")
    for note in notes:
        logger.warning(f"Note: {note}")


class Progress:
    """Shows the steps of a run whose epochs have ``num_batches`` steps.

    TRAIN.PRINT_FREQ: steps between lines; 0: none. ``show_progress``: whether this process shows a bar. ``folder``: that of
    the run, for its trackers; None: there are none.
    """

    def __init__(
        self, cfg: CfgNode, state: RunState, num_batches: int, show_progress: bool, folder: Path | None
    ) -> None:
        self.state, self.num_batches, self.print_freq = state, num_batches, cfg.TRAIN.PRINT_FREQ
        done = state.start_epoch * num_batches
        self._trackers = Trackers(cfg, folder, done if state.start_epoch else None)
        left = num_batches if state.start_epoch < state.max_epoch else 0
        self._bar = progress(
            state.max_epoch * left, cfg.TRAINER.NAME, "step", show_progress, initial=state.start_epoch * left
        )

    def after_step(self, report: StepReport, learning_rate: float) -> None:
        self._bar.update()
        due = self.print_freq > 0 and ((report.number + 1) % self.print_freq == 0 or self.num_batches < self.print_freq)
        if due:
            self._print(report, learning_rate)

    def _print(self, report: StepReport, learning_rate: float) -> None:
        state, now = self.state, report.values()
        seconds = statistics.fmean(state.step_seconds[-_RECENT:])
        left = self.num_batches * (state.max_epoch - state.epoch) - report.number - 1
        values = " ".join(f"{key} {value:.4f} ({mean:.4f})" for key, (value, mean) in now.items())
        logger.info(
            f"epoch [{state.epoch + 1}/{state.max_epoch}] batch [{report.number + 1}/{self.num_batches}] "
            f"time {state.step_seconds[-1]:.3f} ({seconds:.3f}) data {report.data_seconds:.3f} {values} "
            f"lr {learning_rate:.4e} eta {datetime.timedelta(seconds=int(seconds * left))}"
        )
        step = state.epoch * self.num_batches + report.number
        for key, (value, _) in now.items():
            self.write_scalar(f"train/{key}", value, step)
        self.write_scalar("train/lr", learning_rate, step)

    def after_epoch(self, row: dict[str, Any], means: dict[str, float]) -> None:
        """Write the epoch's scalars; print its line where steps have none. ``row`` as ``epoch_row`` makes it."""
        last_step = row["epoch"] * self.num_batches - 1
        for key, value in row.items():
            if key.startswith("val_") and value is not None:
                self.write_scalar(f"val/{key.removeprefix('val_')}", value, last_step)
        for key, value in means.items():
            self.write_scalar(f"train_epoch/{key}", value, last_step)
        if self.print_freq <= 0:
            numbers = {k: v for k, v in row.items() if k not in ("epoch", "by_group") and v is not None}
            words = " ".join(f"{k} {v:.4g}" for k, v in numbers.items())
            logger.info(f"epoch [{row['epoch']}/{self.state.max_epoch}] {words}")

    def write_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a value to the trackers' curve ``tag``."""
        self._trackers.write(tag, value, step)

    def close_bar(self) -> None:
        self._bar.close()

    def close(self) -> None:
        """Close the bar and the trackers."""
        self.close_bar()
        self._trackers.close()
