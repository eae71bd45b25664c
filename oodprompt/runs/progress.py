"""How far the runs of a grid are: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines that say how far all runs are
_EPOCH = re.compile(rb"^epoch \[(\d+)/(\d+)\]", re.MULTILINE)


class Named(Protocol):
    """A run: what it is called, the file that it prints to, and its outcome in a few words ("" where there is none)."""

    @property
    def name(self) -> str: ...

    @property
    def log(self) -> Path: ...

    def outcome(self) -> str: ...


class _Bar(tqdm):
    """tqdm's bar without its thread: a process with threads is not safe to fork."""

    monitor_interval = 0


class Progress:
    """Tells of ``total`` runs, ``at_once`` at the same time, which start and end.

    The time left follows from the runs that have ended and from the epochs of those that train.
    """

    def __init__(self, total: int, at_once: int) -> None:
        self.total, self.at_once = total, at_once
        self.begun, self.done = 0, 0
        self.durations: list[float] = []  # of the runs that have ended, in seconds
        self.running: dict[Any, float] = {}  # run -> when it started
        self.told = time.monotonic()
        self.bar = None
        if total and sys.stderr.isatty():
            form = "{desc} |{bar}| {n_fmt} of {total_fmt} runs, {elapsed}{postfix}"
            self.bar = _Bar(total=total, bar_format=form, desc="Training", leave=False)

    def started(self, run: Named) -> None:
        """A run starts."""
        self.begun += 1
        self.running[run] = time.monotonic()
        self._line(f"Training {run.name} ({self.begun} of {self.total}){self._left()}")

    def ended(self, run: Named, failure: str | None = None) -> None:
        """A run has ended; ``failure`` says why without results. It need not have been started here."""
        self.done += 1
        began = self.running.pop(run, None)
        seconds = "" if began is None else f" after {_took(time.monotonic() - began)}"
        if began is not None and failure is None:
            self.durations.append(time.monotonic() - began)
        outcome = run.outcome() if failure is None else ""
        self._line(
            f"Failed: {run.name}{seconds}"
            if failure
            else f"Finished {run.name}{seconds}" + (outcome and f": {outcome}")
        )

    def postponed(self, run: Named) -> None:
        """A run that was started here turned out to be another process's."""
        self.running.pop(run, None)
        self.begun -= 1

    def tick(self) -> None:
        """Called every so often: draws the bar again, or prints the line that is due."""
        now = time.monotonic()
        if now - self.told < (1.0 if self.bar is not None else EVERY):
            return
        self.told = now
        if self.bar is not None:
            self._draw()
        else:
            self._line(f"{self.done} of {self.total} runs finished, {len(self.running)} running{self._left()}")

    def say(self, text: str) -> None:
        """Print a line that is no news of a run, also above a bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()

    def _line(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self._draw()

    def _draw(self) -> None:
        assert self.bar is not None
        names = [run.name for run in self.running]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        self.bar.set_description_str(f"Training {', '.join(names[:2])}{more}" if names else "Training", refresh=False)
        self.bar.set_postfix_str(self._left().removeprefix(", "), refresh=False)
        self.bar.n = self.done
        self.bar.refresh()

    def _left(self) -> str:
        """ ", about 3 min left"; nothing while no run has said anything."""
        seconds = self.seconds_left()
        return "" if seconds is None else f", about {_about(seconds)} left"

    def seconds_left(self) -> float | None:
        """Seconds until all runs have ended; None while nothing is known."""
        now = time.monotonic()
        whole: dict[Any, float] = {}  # run that trains -> how long it takes in all
        for run, began in self.running.items():
            share = trained_share(run.log, since=began)
            if share >= 0.05:
                whole[run] = (now - began) / share
        known = [*self.durations, *whole.values()]
        if not known:
            return None
        typical = statistics.fmean(known)
        rest = [max(whole.get(run, typical) - (now - began), 0.0) for run, began in self.running.items()]
        waiting = self.total - self.done - len(rest)
        free = [*rest, *[0.0] * min(waiting, self.at_once - len(rest))]  # when each place takes the next run
        heapq.heapify(free)
        for _ in range(waiting):
            heapq.heapreplace(free, free[0] + typical)
        return max(free, default=0.0)


def trained_share(log: Path, since: float = 0.0) -> float:
    """The share of its epochs that a run has behind it, from the last line of its log that says so; else 0.

    A log that was not written to after ``since`` (``time.monotonic``) is of an earlier try.
    """
    with contextlib.suppress(OSError), log.open("rb") as file:
        status = os.fstat(file.fileno())
        if time.time() - status.st_mtime > time.monotonic() - since:
            return 0.0
        file.seek(max(0, status.st_size - 4096))
        found: Sequence[tuple[bytes, bytes]] = _EPOCH.findall(file.read())
        if found:
            done, epochs = map(int, found[-1])
            return min(1.0, done / epochs) if epochs else 0.0
    return 0.0


def _took(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _about(seconds: float) -> str:
    """A time that is an estimate: in tens of seconds, minutes, or hours with a digit."""
    if seconds <= 50:
        return f"{max(10, 10 * math.ceil(seconds / 10))} s"
    if seconds < 55 * 60:
        return f"{math.ceil(seconds / 60 - 0.2)} min"
    return f"{seconds / 3600:.1f} h"
