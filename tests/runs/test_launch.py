"""Jobs in processes: what is started, waited for, stopped, and that a grid in pieces equals a grid in one go."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.runs import launch
from oodprompt.runs.aggregate import collect
from oodprompt.runs.benchmark import main, read_arguments
from oodprompt.runs.grid import TrainingRun
from oodprompt.runs.launch import RunsFailed, locked, run_here, runs_status, start, stop
from oodprompt.runs.progress import Progress
from oodprompt.runs.tables import tables
from tests.helpers.jobs import Line, Shell, children_alive, in_fork, results, wait_for
from tests.helpers.runs import REPOSITORY


def quiet(total: int = 1) -> Progress:
    return Progress(total, 1)


@contextlib.contextmanager
def started(job: Shell) -> Iterator[launch.Child]:
    """A job that has its lock; it is killed in the end."""
    child = start(job, {})
    wait_for(lambda: children_alive(job.folder) or child.exitcode is not None)
    try:
        yield child
    finally:
        stop([child])


def test_what_every_job_imports_is_imported_once_ahead_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "on_the_way.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(launch, "_ON_THE_WAY", ("no_module_of_this_name", "on_the_way"))
    monkeypatch.setattr(Shell, "is_finished", lambda job: True)
    jobs = [Shell(tmp_path / name) for name in ("one", "two")]
    run_here(jobs[:1], 1, [], quiet())
    assert "on_the_way" not in sys.modules
    run_here(jobs, 1, [], quiet(2))
    assert sys.modules.pop("on_the_way", None)


# --- one job -----------------------------------------------------------------------------------------------------


def test_child_holds_the_lock_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    job = Shell(tmp_path / "seed1", "sleep 60")
    job.folder.mkdir()
    with started(job) as child:
        with locked(job.folder) as lock:
            assert lock is None
        began = time.monotonic()
        stop([child])
        assert child.exitcode == -signal.SIGTERM and time.monotonic() - began < 5
    with locked(job.folder) as lock:
        assert lock is not None


def test_children_that_do_not_end_are_killed_with_what_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "PATIENCE", 0.3)
    job = Shell(tmp_path / "seed1", "trap '' TERM; sleep 60 & echo $! > pid; echo deaf; wait; sleep 60")
    job.folder.mkdir()
    with started(job) as child:
        wait_for(lambda: job.log.is_file() and job.log.read_text().endswith("deaf\n"))
        stop([child])
        assert child.exitcode == -signal.SIGKILL
    pid = int((job.folder / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(), 5)


def test_what_is_printed_goes_to_the_log_below_the_command(tmp_path: Path) -> None:
    job = Shell(tmp_path / "seed1", "read -r word; echo \"read '$word' $OWN\"; echo to stderr >&2")
    job.folder.mkdir()
    job.log.write_text("of an earlier try\n")
    child = start(job, {"OWN": "thing"})
    wait_for(lambda: child.exitcode is not None)
    log = job.log.read_text().splitlines()
    assert log[0] == "of an earlier try" and log[1].startswith("$ /bin/bash -c ") and log[1].count("sleep") == 0
    assert log[2:] == ["read '' thing", "to stderr"]  # it has nothing to read


def test_where_a_fork_is_not_safe_the_command_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "may_fork", lambda: False)
    monkeypatch.setattr(Shell, "work", lambda self: pytest.fail("in the fork"))
    job = Shell(tmp_path / "seed1", "sleep 0.3; echo by the command > here")
    job.folder.mkdir()
    with started(job) as child:
        with locked(job.folder) as lock:
            assert lock is None, "the command holds the lock, too"
        wait_for(lambda: child.exitcode is not None)
    assert child.exitcode == 0 and (job.folder / "here").read_text() == "by the command\n"


def test_command_line_of_a_run_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(launch, "may_fork", lambda: False)
    run = TrainingRun(tmp_path / "run", ("--trainr", "CoOp"), name="a run")
    (line,) = run_here([run], 1, [], quiet())
    assert line.startswith(f"{tmp_path}/run: error: unrecognized arguments") and "'--trainer'" in line


# --- many --------------------------------------------------------------------------------------------------------


class Pretend:
    """A process that ends when it was looked at often enough; keeps what it was given."""

    pid = 2**30  # of no process

    def __init__(self, job: Any, environment: dict[str, str]) -> None:
        self.job, self.environment, self.polls = job, environment, 0

    @property
    def exitcode(self) -> int | None:
        self.polls += 1
        if self.polls < 3:
            return None
        (self.job.folder / "results.json").write_text('{"accuracy": 0.5}')
        return 0


def test_jobs_at_the_same_time_each_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[Pretend] = []
    most, seen = [], []

    def pretend(job: Any, environment: dict[str, str]) -> Pretend:
        alive = [child for child in running if child.polls < 3]
        most.append(len(alive) + 1)
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        busy = [child.environment["CUDA_VISIBLE_DEVICES"] for child in alive] if seen[-1] else []
        assert busy.count(seen[-1]) < 2  # four at once on two GPUs
        running.append(Pretend(job, environment))
        return running[-1]

    monkeypatch.setattr(launch, "start", pretend)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    progress = quiet(9)
    assert run_here([Shell(tmp_path / f"seed{i}") for i in range(9)], 4, ["3", "5"], progress) == []
    assert max(most) == 4 and set(seen) == {"3", "5"} and len(seen) == progress.done == 9
    assert running[0].environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    running.clear(), most.clear(), seen.clear()
    run_here([Shell(tmp_path / "more" / f"seed{i}") for i in range(2)], 1, [], quiet(2))
    assert max(most) == 1 and seen == [None, None] and running[0].environment["OMP_NUM_THREADS"] == "7"
    args = read_arguments(["--trainers", "CoOp", "--config-file", "f", "--gpus", "0", "1", "2"])
    assert args.gpus == ["0", "1", "2"] and args.jobs is None


def test_failures_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    good = "echo '{\"accuracy\": 0.5}' > results.json"
    lines = {
        "seed1": "echo training; echo error: the disk is full; exit 2",
        "seed2": "kill -KILL $$",
        "seed3": "echo said nothing of it",
        "seed4": good,
        "seed5": f"{good}; exit 1",
    }
    failed = run_here([Shell(tmp_path / name, line) for name, line in lines.items()], 3, [], quiet(5))
    assert sorted(line.replace(str(tmp_path), "") for line in failed) == [
        "/seed1: error: the disk is full",
        "/seed2: killed by signal 9; it printed nothing",
        "/seed3: it wrote no results; said nothing of it",
        "/seed5: it printed nothing",
    ]


def test_status_of_failed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise RunsFailed("1 of 2 runs failed")

    assert (runs_status(work), runs_status(lambda: None)) == (1, 0)
    assert capsys.readouterr().err == "error: 1 of 2 runs failed\n"


def test_run_of_another_process_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A child left by a killed runner holds the lock of its folder until it ends."""
    job, free = Shell(tmp_path / "seed1", "echo again > twice"), Shell(tmp_path / "seed2")
    job.folder.mkdir()
    code = (
        "import fcntl, pathlib, sys, time; file = open(sys.argv[1] + '/.benchmark.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); time.sleep(0.7)\n"
        "pathlib.Path(sys.argv[1], 'results.json').write_text('{\"accuracy\": 0.25}')"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(job.folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    assert run_here([job, free], 2, [], quiet(2)) == []
    assert free.is_finished() and not (job.folder / "twice").exists()
    assert json.loads((job.folder / "results.json").read_text()) == {"accuracy": 0.25}
    assert "is being trained by another process; waiting" in capsys.readouterr().out
    other.wait()


def test_two_runners_that_start_the_same_job_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One holds the lock when the other's process asks for it; that one waits and does not do it again."""
    job = Shell(tmp_path / "seed1", "echo once >> log; sleep 0.3; echo '{\"accuracy\": 0.5}' > results.json")
    job.folder.mkdir()
    monkeypatch.setattr(launch, "_is_locked", lambda job: False)  # both have seen it free
    with started(job):
        assert run_here([job], 1, [], quiet()) == []
    assert (job.folder / "log").read_text() == "once\n" and job.is_finished()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_a_run_is_started_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    children = []

    def signalled(job: Any, environment: dict[str, str]) -> launch.Child:
        os.kill(os.getpid(), number)
        children.append(start(job, environment))
        return children[0]

    monkeypatch.setattr(launch, "start", signalled)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run_here([Shell(tmp_path / "seed1", "sleep 60")], 1, [], quiet())
    assert len(children) == 1 and children[0].exitcode == -signal.SIGTERM
    assert signal.getsignal(number) is before


def test_sigterm_is_as_ctrl_c(tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRun, "work", lambda self: time.sleep(60))
    out = tmp_path / "out"
    with in_fork(lambda: main(line("CoOp"))) as pid:
        wait_for(lambda: children_alive(out))
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert not children_alive(out)


# --- training ----------------------------------------------------------------------------------------------------


def test_finished_runs_are_skipped_and_others_refused(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    monkeypatch.setattr(launch, "start", lambda job, environment: begun.append(job) or start(job, environment))
    args = line("ZeroshotCLIP", "OrthCal", more=["--jobs", 2, "--baseline", "ZeroshotCLIP"], seeds=[2])
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "2 runs, 0 of them finished already" in out and len(begun) == 2
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == tables(collect(tmp_path / "out"), baseline="ZeroshotCLIP") and table in out
    assert "ShapesOnScenes/OrthCal" in table and "points" in table
    log = (tmp_path / "out" / "ShapesOnScenes" / "OrthCal" / "seed2" / "train.log").read_text()
    assert log.startswith(f"$ {sys.executable} {REPOSITORY}/train.py ") and "* accuracy" in log
    broken = tmp_path / "out" / "ShapesOnScenes" / "OrthCal" / "seed2" / "results.json"
    broken.write_text(broken.read_text()[:40])
    capsys.readouterr()
    assert main([*args[: args.index("--opts")], "--dry-run", *args[args.index("--opts") :]]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [c.startswith("# finished: python train.py ") for c in commands] == [True, False]
    assert main(args) == 0 and len(begun) == 3 and begun[-1].folder == broken.parent
    assert (tmp_path / "out" / "table.md").read_text() == table
    other = [*args, "OPTIM.LR", "0.7"]
    assert main(other) == 2
    assert re.search(r"run of another grid \(OPTIM.LR was 0.002, is now 0.7\)", capsys.readouterr().err)
    assert main([*args, "DATALOADER.NUM_WORKERS", "1"]) == 0 and len(begun) == 3  # computes the same


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Steps wait, so that an interruption falls into the middle of training."""
    step = PromptTrainer.forward_backward

    def slowly(self: PromptTrainer, batch: dict[str, Any]) -> Any:
        time.sleep(seconds)
        return step(self, batch)

    monkeypatch.setattr(PromptTrainer, "forward_backward", slowly)


def test_grid_interrupted_twice_equals_the_unbroken_one(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Contexts start at random and learn fast, so that seeds and methods differ.
    opts = ["OPTIM.LR", "0.1", "OPTIM.WARMUP_EPOCH", "-1", "TRAINER.COOP.CTX_INIT", "", "OPTIM.MAX_EPOCH", "3"]
    opts += ["DATASET.SHAPES.NUM_TEST", "80", "TRAINER.COOPOOD.LR", "0.02"]
    grid = {"opts": opts, "more": ["--jobs", 2]}
    assert main(line("CoOp", "CoOpOOD", out="unbroken", **grid)) == 0
    assert len({json.dumps(content) for content in results(tmp_path / "unbroken").values()}) == 4
    args = line("CoOp", "CoOpOOD", out="broken", **grid)
    broken = tmp_path / "broken"
    capfd.readouterr()
    with monkeypatch.context() as patch:
        slow_steps(patch, 0.1)
        with in_fork(lambda: main(args)) as pid:
            wait_for(lambda: list(broken.glob("*/CoOp/*/*/checkpoint")) != [])  # its one model is a whole checkpoint
            os.kill(pid, signal.SIGINT)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    (line_of_error,) = capfd.readouterr().err.splitlines()
    assert line_of_error.startswith("interrupted; ")
    assert not children_alive(broken) and results(broken) == {}
    with monkeypatch.context() as patch:
        slow_steps(patch, 0.02)
        with in_fork(lambda: main(args)) as pid:
            wait_for(lambda: len(results(broken)) > 0)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert len(results(broken)) < 4
    assert main(args) == 0
    assert results(broken) == results(tmp_path / "unbroken") and len(results(broken)) == 4
    assert (broken / "table.md").read_text() == (tmp_path / "unbroken" / "table.md").read_text()
    assert re.search("resuming after epoch [12] of 3", "".join(log.read_text() for log in broken.rglob("log.txt")))
    assert not list(broken.rglob(".*.tmp")) and not children_alive(broken)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_large_grid_interrupted_twice_equals_the_unbroken_one(line: Line, tmp_path: Path) -> None:
    """3 trainers x 2 bases x 3 seeds with the real command: Ctrl-C, then SIGKILL, then to the end.

    It takes a minute or two on two cores. It last ran, and passed, on 2026-11-27.
    """
    command = [sys.executable, str(REPOSITORY / "scripts" / "benchmark.py")]
    trainers, more = ("CoOpOOD", "DebiasedPT", "GroupDRO"), ["--bases", "CoOp", "LinearProbe", "--jobs", 2]

    def arguments(out: str) -> list[str]:
        return [*command, *line(*trainers, out=out, more=more, seeds=(1, 2, 3))]

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    subprocess.run(arguments("unbroken"), check=True)
    for number, at_least in ((signal.SIGINT, 2), (signal.SIGKILL, 8)):
        process = subprocess.Popen(arguments("broken"), start_new_session=True)
        wait_for(lambda n=at_least: len(results(broken)) >= n, 600)
        process.send_signal(number)
        process.wait()
        assert at_least <= len(results(broken)) < 18
    subprocess.run(arguments("broken"), check=True)
    assert results(broken) == results(unbroken) and len(results(broken)) == 18
    assert (broken / "table.md").read_text() == (unbroken / "table.md").read_text()
