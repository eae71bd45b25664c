"""What is told of runs while they train: lines, a bar in a terminal, the time left."""

from __future__ import annotations

import io
import sys
import threading
import time
from pathlib import Path

import pytest

from oodprompt.runs import progress
from oodprompt.runs.progress import Progress, trained_share
from tests.helpers.jobs import Shell


class Clock:
    """``time.monotonic`` that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def log(job: Shell, text: str) -> None:
    job.folder.mkdir(exist_ok=True)
    job.log.write_text(text)


def test_lines_say_what_starts_what_ends_and_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    jobs = [Shell(tmp_path / name, name=name) for name in ("CoOp", "RaVL", "third", "fourth")]
    told = Progress(4, 2)
    told.started(jobs[0])
    told.started(jobs[1])
    clock.now += 20
    told.tick()
    told.ended(jobs[0])
    told.started(jobs[2])
    clock.now += 11
    told.tick()  # 31 s since the last such line
    told.tick()
    told.ended(jobs[1], "it failed")
    told.ended(jobs[2])
    told.ended(jobs[3])  # by another process
    assert capsys.readouterr().out.splitlines() == [
        "Training CoOp (1 of 4)",
        "Training RaVL (2 of 4)",
        "Finished CoOp after 20 s",
        "Training third (3 of 4), about 20 s left",  # 20 s for each of two more, on two places
        "1 of 4 runs finished, 2 running, about 20 s left",
        "Failed: RaVL after 31 s",
        "Finished third after 11 s",
        "Finished fourth",
    ]


def test_time_left_follows_from_epochs_of_runs_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    jobs = [Shell(tmp_path / str(i), name=str(i)) for i in range(3)]
    told = Progress(3, 1)
    told.started(jobs[0])
    assert told.seconds_left() is None
    clock.now += 60
    log(jobs[0], "epoch [1/10] batch [1/2]\nepoch [1/10] loss 1\nepoch [2/10] loss 1\n  epoch [9/10]\n")
    assert told.seconds_left() == pytest.approx(240 + 2 * 300)
    told.ended(jobs[0])
    told.started(jobs[1])
    assert told.seconds_left() == pytest.approx(2 * 60)
    clock.now += 70
    assert told.seconds_left() == pytest.approx(60), "a run that takes longer than the others is about to end"


def test_share_of_a_log(tmp_path: Path) -> None:
    job = Shell(tmp_path / "run")
    assert trained_share(job.log) == 0
    log(job, "x" * 5000 + "\nepoch [3/4] loss 1\nval\n")
    assert trained_share(job.log) == 0.75
    assert trained_share(job.log, since=time.monotonic() + 5) == 0, "of an earlier try"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "10 s"), (11, "20 s"), (50, "50 s"), (51, "1 min"), (100, "2 min"), (3600, "1.0 h")]
)
def test_estimates_are_round(seconds: float, text: str) -> None:
    assert progress._about(seconds) == text


def test_bar_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock, terminal, threads = Clock(monkeypatch), Terminal(), threading.active_count()
    monkeypatch.setattr(sys, "stderr", terminal)
    jobs = [Shell(tmp_path / name, name=name) for name in ("CoOp", "RaVL", "third")]
    told = Progress(4, 3)
    for job in jobs:
        told.started(job)
    assert "Training CoOp, RaVL and 1 more |" in terminal.getvalue()
    clock.now += 40
    told.ended(jobs[0])
    assert "1 of 4 runs" in terminal.getvalue() and "about 40 s left" in terminal.getvalue()
    told.say("waiting")
    told.close()
    assert "waiting\n" in terminal.getvalue() and capsys.readouterr().out == ""
    assert threading.active_count() == threads, "a process with more threads is not safe to fork"
