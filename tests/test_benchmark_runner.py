"""scripts/benchmark.py: what it runs, what it skips, what stops it, and that a grid in pieces equals a grid in one go.

And the shell scripts of our trainers: each prints a command line that train.py takes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from oodprompt import cli
from oodprompt.config import extensions
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.runs import collecting
from tests.helpers.runs import CONFIG, REPOSITORY, SMALL, load_script

TINY = [*SMALL, "TRAIN.VAL_FREQ", "0", "OPTIM.MAX_EPOCH", "2"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("scripts/benchmark.py")


Line = Callable[..., list[str]]


@pytest.fixture
def line(data_root: Path, tmp_path: Path) -> Line:
    """The arguments of a small grid: ``line("CoOp", "CoOpOOD", more=[...], opts=[...], out="out")``."""

    def build(*trainers: str, more: Any = (), opts: Any = (), out: str = "out", seeds: Any = (1, 2)) -> list[str]:
        flags = ["--trainers", *trainers, "--config-file", CONFIG, "--root", data_root, "--out", tmp_path / out]
        return [str(word) for word in (*flags, "--seeds", *seeds, *more, "--opts", *TINY, *opts)]

    return build


class Fork:
    """A run in a fork of this process, which has PyTorch loaded already."""

    def __init__(self, job: Any, environment: dict[str, str], work: Callable[[], int]) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.setpgid(0, 0)
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_DFL)
                log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                sys.stdout, sys.stderr = (open(n, "w", closefd=False, buffering=1) for n in (1, 2))  # noqa: SIM115
                os.environ.update(environment)
                status = work()
            finally:
                os._exit(status)
        with contextlib.suppress(OSError):
            os.setpgid(self.pid, self.pid)

    def poll(self) -> int | None:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status


@pytest.fixture
def forks(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs are forks, not new processes, which would import PyTorch for seconds; returns the jobs that were started."""
    started: list[Any] = []

    def launch(job: Any, environment: dict[str, str], lock: int) -> Fork:
        started.append(job)
        return Fork(job, environment, lambda: cli.main(list(job.arguments)))

    monkeypatch.setattr(benchmark, "launch", launch)
    return started


def results(out: Path) -> dict[str, Any]:
    """Folder -> what does not depend on time."""
    keys = ("accuracy", "worst_group_accuracy", "macro_f1", "groups")
    files = {str(f.parent.relative_to(out)): json.loads(f.read_text()) for f in out.rglob("results.json")}
    return {name: {key: content[key] for key in keys} for name, content in files.items()}


# --- the grid ----------------------------------------------------------------------------------------------------


def test_dry_run_prints_every_run_of_the_grid(
    benchmark: ModuleType,
    line: Line,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setenv(extensions.ENVIRONMENT, "")
    more = ["--bases", "CoOp", "MaPLe", "--datasets", "waterbirds", "shapes_on_scenes", "--dry-run"]
    more += ["--import", tmp_path / "mine.py"]
    assert benchmark.main(line("CoOp", "CoOpOOD", "CoOpOOD+DebiasedPT", more=more, opts=["OPTIM.LR", "0.5"])) == 0
    commands = [shlex.split(text) for text in capsys.readouterr().out.splitlines()]
    assert all(words[:2] == ["python", "train.py"] for words in commands)
    assert all(words[words.index("--import") + 1] == str(tmp_path / "mine.py") for words in commands)
    configs = [cli.setup_cfg(cli.build_parser().parse_intermixed_args(words[2:])) for words in commands]
    found = {
        str(Path(c.OUTPUT_DIR).relative_to(tmp_path / "out")): (c.TRAINER.NAME, c.TRAINER.BASE, c.TRAINER.STACK)
        for c in configs
    }
    methods = {
        "CoOp": ("CoOp", "", ()),
        "CoOpOOD-CoOp": ("CoOpOOD", "CoOp", ()),
        "CoOpOOD-MaPLe": ("CoOpOOD", "MaPLe", ()),
        "CoOpOOD+DebiasedPT-CoOp": ("CoOpOOD", "CoOp", ("DebiasedPT",)),
        "CoOpOOD+DebiasedPT-MaPLe": ("CoOpOOD", "MaPLe", ("DebiasedPT",)),
    }
    folders = ("waterbirds", "shapes_on_scenes")
    assert found == {f"{d}/{m}/seed{s}": keys for d in folders for m, keys in methods.items() for s in (1, 2)}
    assert len(commands) == len(found) == 20
    for cfg in configs:
        place = Path(cfg.OUTPUT_DIR)
        # The data set that is asked for wins over the one that the method's file names.
        assert {"waterbirds": "Waterbirds", "shapes_on_scenes": "ShapesOnScenes"}[place.parts[-3]] == cfg.DATASET.NAME
        assert int(place.name[4:]) == cfg.SEED and cfg.OPTIM.LR == 0.5 and cfg.OPTIM.MAX_EPOCH == 2
    assert not (tmp_path / "out").exists()


def test_each_trainer_has_its_own_file(benchmark: ModuleType, line: Line) -> None:
    file = str(REPOSITORY / "configs/trainers/DebiasedPT/tiny_shapes.yaml")
    args = line("CoOp", "CoOpOOD", "CoOpOOD+GroupDRO", seeds=[1])
    place = args.index("--config-file") + 2
    args[place:place] = [f"CoOpOOD={file}"]
    jobs = benchmark.jobs(benchmark.read_arguments(args))
    files = [job.arguments[job.arguments.index("--config-file") + 1] for job in jobs]
    assert files == [CONFIG, file, file]
    assert [job.folder.parts[-3:-1] for job in jobs][0] == ("ShapesOnScenes", "CoOp")
    del args[place - 1]
    with pytest.raises(UserError, match="--config-file: none for CoOp; give FILE for all trainers or CoOp=FILE"):
        benchmark.jobs(benchmark.read_arguments(args))


@pytest.mark.parametrize(
    ("trainers", "more", "opts", "message"),
    [
        (["CoOpp"], [], [], "--trainers: .*CoOpp.*did you mean 'CoOp'"),
        (["CoOpOOD"], ["--bases", "MaPL"], [], "unknown prompt learner 'MaPL'"),
        (["CoOp"], ["--datasets", "waterbird"], [], "no config file at .*waterbird.yaml"),
        (["CoOp"], [], ["OPTIM.LRR", "1"], "unknown config key 'OPTIM.LRR'"),
        (["CoOp"], ["--jobs", "0"], [], "--jobs: give 1 or more"),
        (["CoOp", "CoOp"], [], [], "--trainers: CoOp is given twice"),
        (["CoOp"], ["--slurm", "gpu", "--gpus", "0"], [], "leave it out with --slurm"),
        (["CoOp"], ["--slurm", "gpu", "--slurm-opts", "x"], [], "KEY=VALUE expected, not 'x'"),
        (["CoOp"], ["--datasets", "csv", "/else/csv.yaml"], [], "no config file at /else/csv.yaml|two files"),
        (["CoOp"], ["--config-file", CONFIG, CONFIG], [], "one file for all trainers"),
        (["CoOp"], [], ["SEED", "7"], "--opts SEED: give --seeds"),
        (["CoOp"], [], ["TRAINER.STACK", "('DFR',)"], r"--opts TRAINER.STACK: give --trainers A\+B"),
        (["CoOp"], ["--seeds", "-1", "1"], [], "--seeds: give 0 or more"),
        (["CoOp"], ["--baseline", "Coop"], [], "--baseline: no row is of 'Coop': did you mean 'CoOp'"),
        (["CoOp"], ["--out", "/proc/nowhere"], [], "--out: cannot write /proc/nowhere/.*choose another folder"),
        (["CoOp"], ["--job", "x"], [], "--jobs: invalid int value"),
    ],
)
def test_grids_that_make_no_sense(
    benchmark: ModuleType,
    line: Line,
    tmp_path: Path,
    trainers: list[str],
    more: list[str],
    opts: list[str],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        benchmark.run(line(*trainers, more=more, opts=opts))
    assert not (tmp_path / "out").exists(), "nothing is trained first"


def test_two_data_sets_of_one_folder(benchmark: ModuleType, line: Line, tmp_path: Path) -> None:
    (tmp_path / "csv.yaml").write_text("DATASET:\n  NAME: CSV\n")
    with pytest.raises(UserError, match="two files are named csv"):
        benchmark.run(line("CoOp", more=["--datasets", "csv", tmp_path / "csv.yaml"]))


# --- running -----------------------------------------------------------------------------------------------------


def test_finished_runs_are_skipped_and_others_refused(
    benchmark: ModuleType, line: Line, forks: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = line("ZeroshotCLIP", "OrthCal", more=["--jobs", 2, "--baseline", "ZeroshotCLIP"], seeds=[2])
    assert benchmark.main(args) == 0
    out = capsys.readouterr().out
    assert "2 runs, 0 of them finished already" in out and len(forks) == 2
    table = (tmp_path / "out" / "table.md").read_text()
    assert table == collecting.tables(collecting.collect(tmp_path / "out"), baseline="ZeroshotCLIP") and table in out
    assert "ShapesOnScenes/OrthCal" in table and "points" in table
    log = (tmp_path / "out" / "ShapesOnScenes" / "OrthCal" / "seed2" / "train.log").read_text()
    assert log.startswith("** Arguments") or "accuracy" in log
    broken = tmp_path / "out" / "ShapesOnScenes" / "OrthCal" / "seed2" / "results.json"
    broken.write_text(broken.read_text()[:40])
    capsys.readouterr()
    assert benchmark.main([*args[: args.index("--opts")], "--dry-run", *args[args.index("--opts") :]]) == 0
    commands = capsys.readouterr().out.splitlines()
    assert [c.startswith("# finished: python train.py ") for c in commands] == [True, False]
    assert benchmark.main(args) == 0 and len(forks) == 3 and forks[-1].folder == broken.parent
    assert (tmp_path / "out" / "table.md").read_text() == table
    other = [*args, "OPTIM.LR", "0.7"]
    assert benchmark.main(other) == 2
    assert re.search(r"run of another grid \(OPTIM.LR was 0.002, is now 0.7\)", capsys.readouterr().err)
    assert benchmark.main([*args, "DATALOADER.NUM_WORKERS", "1"]) == 0 and len(forks) == 3  # computes the same


def test_failures_are_named_and_the_others_go_on(
    benchmark: ModuleType,
    line: Line,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends = {
        "seed1": "print('training'); print('error: the disk is full', flush=True); raise SystemExit(2)",
        "seed2": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "seed3": "print('said nothing of it')",
    }
    whole = json.dumps({"dataset": "S", "accuracy": 0.5})
    good = (
        "import pathlib, sys; pathlib.Path(sys.argv[1], 'results.json').write_text(sys.argv[2]); raise SystemExit({})"
    )

    def command(job: Any) -> list[str]:
        code = ends.get(job.folder.name, good.format(1 if job.folder.name == "seed5" else 0))
        return [sys.executable, "-c", code, str(job.folder), whole]

    monkeypatch.setattr(benchmark.Job, "command", property(command))
    seeds = (1, 2, 3, 4, 5)
    assert benchmark.main(line("CoOp", seeds=seeds, more=["--jobs", 3])) == 1
    done = capsys.readouterr()
    lines = [text.replace(str(tmp_path), "") for text in done.err.splitlines() if text.startswith(("failed", "error"))]
    assert sorted(lines) == [
        "error: 4 of 5 runs failed; the same command again tries them anew",
        "failed: /out/ShapesOnScenes/CoOp/seed1: error: the disk is full",
        "failed: /out/ShapesOnScenes/CoOp/seed2: killed by signal 9; it printed nothing",
        "failed: /out/ShapesOnScenes/CoOp/seed3: it wrote no results; said nothing of it",
        "failed: /out/ShapesOnScenes/CoOp/seed5: it printed nothing",
    ]
    assert "| ShapesOnScenes/CoOp | 50.0 ± 0.0" in done.out
    log = (tmp_path / "out" / "ShapesOnScenes" / "CoOp" / "seed1" / "train.log").read_text()
    assert log.startswith(f"$ {sys.executable} -c") and log.endswith("training\nerror: the disk is full\n")
    ends.clear()
    for name in ("seed1", "seed2", "seed3", "seed5"):
        (tmp_path / "out" / "ShapesOnScenes" / "CoOp" / name / "results.json").unlink(missing_ok=True)


def test_command_is_train_py_of_this_checkout(benchmark: ModuleType, tmp_path: Path) -> None:
    job = benchmark.Job(tmp_path, ("--seed", "1"))
    assert job.command == [sys.executable, str(REPOSITORY / "train.py"), "--seed", "1"]


class Pretend:
    """A run that ends when it is told to; keeps what it was given."""

    pid = 2**30  # of no process

    def __init__(self, job: Any, environment: dict[str, str]) -> None:
        self.job, self.environment, self.polls = job, environment, 0

    def poll(self) -> int | None:
        self.polls += 1
        if self.polls < 3:
            return None
        (self.job.folder / "results.json").write_text('{"accuracy": 0.5}')
        return 0


def test_jobs_at_the_same_time_each_on_a_gpu(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[Pretend] = []
    most, seen = [], []

    def launch(job: Any, environment: dict[str, str], lock: int) -> Pretend:
        alive = [child for child in running if child.polls < 3]
        most.append(len(alive) + 1)
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        busy = [child.environment["CUDA_VISIBLE_DEVICES"] for child in alive] if seen[-1] else []
        assert busy.count(seen[-1]) < 2  # four at once on two GPUs
        running.append(Pretend(job, environment))
        return running[-1]

    monkeypatch.setattr(benchmark, "launch", launch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    todo = [benchmark.Job(tmp_path / f"seed{i}", ()) for i in range(9)]
    done: list[int] = []
    assert benchmark.run_here(todo, 4, ["3", "5"], lambda: done.append(1)) == []
    assert max(most) == 4 and set(seen) == {"3", "5"} and len(seen) == len(done) == 9
    assert running[0].environment["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    running.clear(), most.clear(), seen.clear()
    benchmark.run_here([benchmark.Job(tmp_path / "more" / f"seed{i}", ()) for i in range(2)], 1, [], lambda: None)
    assert max(most) == 1 and seen == [None, None] and running[0].environment["OMP_NUM_THREADS"] == "7"
    args = benchmark.read_arguments(["--trainers", "CoOp", "--config-file", "f", "--gpus", "0", "1", "2"])
    assert args.gpus == ["0", "1", "2"] and args.jobs is None


def test_run_of_another_process_is_waited_for(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A child left by a killed benchmark holds the lock of its folder until it ends."""
    job, free = benchmark.Job(tmp_path / "seed1", ()), benchmark.Job(tmp_path / "seed2", ())
    job.folder.mkdir()
    code = (
        "import fcntl, pathlib, sys, time; file = open(sys.argv[1] + '/.benchmark.lock', 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); time.sleep(0.7)\n"
        "pathlib.Path(sys.argv[1], 'results.json').write_text('{\"accuracy\": 0.25}')"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(job.folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    started: list[Any] = []
    monkeypatch.setattr(benchmark, "launch", lambda j, e, lock: started.append(j) or Pretend(j, e))
    assert benchmark.run_here([job, free], 2, [], lambda: None) == []
    assert started == [free] and json.loads((job.folder / "results.json").read_text()) == {"accuracy": 0.25}
    assert "is being trained by another process; waiting" in capsys.readouterr().out
    other.wait()


def test_child_holds_the_lock_when_its_parent_has_let_go(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.Job, "command", property(lambda job: ["sleep", "60"]))
    job = benchmark.Job(tmp_path / "seed1", ())
    with benchmark.locked(job) as lock:
        child = benchmark.launch(job, dict(os.environ), lock)
    with benchmark.locked(job) as again:
        assert again is None
    began = time.monotonic()
    benchmark.stop([child])
    assert child.poll() == -signal.SIGTERM and time.monotonic() - began < 5
    with benchmark.locked(job) as again:
        assert again is not None


def test_children_that_do_not_end_are_killed(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(benchmark.Job, "command", property(lambda job: [sys.executable, "-c", code]))
    monkeypatch.setattr(benchmark, "PATIENCE", 0.3)
    job = benchmark.Job(tmp_path / "seed1", ())
    with benchmark.locked(job) as lock:
        child = benchmark.launch(job, dict(os.environ), lock)
    wait_for(lambda: job.log.read_text().endswith("deaf\n"))
    benchmark.stop([child])
    assert child.poll() == -signal.SIGKILL


# --- interrupted -------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def in_fork(work: Callable[[], int]) -> Iterator[int]:
    """``work`` in a forked process; its id. It is killed in the end."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = work()
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def children_alive(out: Path) -> bool:
    """Whether a run in ``out`` is still held by a process."""
    for lock in out.rglob(".benchmark.lock"):
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def slow_steps(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Steps wait, so that an interruption falls into the middle of training."""
    step = PromptTrainer.forward_backward

    def slowly(self: PromptTrainer, batch: dict[str, Any]) -> Any:
        time.sleep(seconds)
        return step(self, batch)

    monkeypatch.setattr(PromptTrainer, "forward_backward", slowly)


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and so their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def checkpoints(out: Path) -> list[Path]:
    """The pointers to whole checkpoints."""
    return list(out.rglob("checkpoint"))


def test_grid_interrupted_twice_equals_the_unbroken_one(
    benchmark: ModuleType,
    line: Line,
    forks: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # Contexts start at random and learn fast, so that seeds and methods differ.
    opts = ["OPTIM.LR", "0.1", "OPTIM.WARMUP_EPOCH", "-1", "TRAINER.COOP.CTX_INIT", "", "OPTIM.MAX_EPOCH", "3"]
    opts += ["DATASET.SHAPES.NUM_TEST", "80", "TRAINER.COOPOOD.LR", "0.02"]
    grid = {"opts": opts, "more": ["--jobs", 2]}
    assert benchmark.main(line("CoOp", "CoOpOOD", out="unbroken", **grid)) == 0
    assert len({json.dumps(content) for content in results(tmp_path / "unbroken").values()}) == 4
    args = line("CoOp", "CoOpOOD", out="broken", **grid)
    broken = tmp_path / "broken"
    capfd.readouterr()
    with monkeypatch.context() as patch:
        slow_steps(patch, 0.1)
        with in_fork(lambda: benchmark.main(args)) as pid:
            wait_for(lambda: checkpoints(broken) != [])
            os.kill(pid, signal.SIGINT)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert capfd.readouterr().err.splitlines() == [
        "interrupted; run the same command again to go on from the last finished epoch"
    ]
    assert not children_alive(broken) and results(broken) == {}
    with monkeypatch.context() as patch:
        slow_steps(patch, 0.02)
        with in_fork(lambda: benchmark.main(args)) as pid:
            wait_for(lambda: len(results(broken)) > 0)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert len(results(broken)) < 4
    assert benchmark.main(args) == 0
    assert results(broken) == results(tmp_path / "unbroken") and len(results(broken)) == 4
    assert (broken / "table.md").read_text() == (tmp_path / "unbroken" / "table.md").read_text()
    assert re.search("resuming after epoch [12] of 3", "".join(log.read_text() for log in broken.rglob("log.txt")))
    assert not list(broken.rglob(".*.tmp")) and not children_alive(broken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_while_a_run_is_started_wait(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    start, started = benchmark.launch, []

    def launch(job: Any, environment: dict[str, str], lock: int) -> Any:
        os.kill(os.getpid(), number)
        started.append(start(job, environment, lock))
        return started[0]

    monkeypatch.setattr(benchmark, "launch", launch)
    monkeypatch.setattr(benchmark.Job, "command", property(lambda job: ["sleep", "60"]))
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run_here([benchmark.Job(tmp_path / "seed1", ())], 1, [], lambda: None)
    assert len(started) == 1 and started[0].poll() == -signal.SIGTERM
    assert signal.getsignal(number) is before


def test_sigterm_is_as_ctrl_c(
    benchmark: ModuleType, tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark.Job, "command", property(lambda job: ["sleep", "60"]))
    out = tmp_path / "out"
    with in_fork(lambda: benchmark.main(line("CoOp"))) as pid:
        wait_for(lambda: children_alive(out))
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert not children_alive(out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_large_grid_interrupted_twice_equals_the_unbroken_one(
    line: Line, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """3 trainers x 2 bases x 3 seeds with the real command: Ctrl-C, then SIGKILL, then to the end.

    Last run on 2026-11-22: passed, 4 min 34 s on 2 cores that did other work too.
    """
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")
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


# --- Slurm -------------------------------------------------------------------------------------------------------


class Handle:
    def __init__(self, work: Callable[[], int]) -> None:
        self.work, self.cancelled = work, False

    def result(self) -> int:
        return self.work()

    def cancel(self) -> None:
        self.cancelled = True


class Executor:
    """submitit's, but that jobs run here when their result is asked for."""

    made: list[Executor] = []

    def __init__(self, folder: str) -> None:
        self.folder, self.parameters, self.handles = folder, {}, []
        self.made.append(self)

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters.update(parameters)

    def map_array(self, work: Callable[..., int], *columns: Any) -> list[Handle]:
        self.handles = [Handle(lambda row=row: work(*row)) for row in zip(*columns, strict=True)]
        return self.handles


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> type[Executor]:
    Executor.made.clear()
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    return Executor


def test_slurm_without_submitit(benchmark: ModuleType, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="submitit is missing; run `pip install submitit`"):
        benchmark.run(line("CoOp", more=["--slurm", "gpu"]))


def test_slurm_submits_every_run(
    benchmark: ModuleType,
    line: Line,
    tmp_path: Path,
    submitit: type[Executor],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); print('on the node', flush=True)\n"
        "folder.name == 'seed2' and sys.exit('error: no GPU')\n"
        '(folder / \'results.json\').write_text(\'{"dataset": "S", "accuracy": 0.5}\')'
    )
    monkeypatch.setattr(benchmark.Job, "command", property(lambda job: [sys.executable, "-c", code, str(job.folder)]))
    flags = ["--slurm", "gpu", "--jobs", 3, "--slurm-opts", "timeout_min=60", "mem_gb=8"]
    assert benchmark.main(line("CoOp", more=flags)) == 1
    done = capsys.readouterr()
    assert "seed2: error: no GPU" in done.err and "| ShapesOnScenes/CoOp | 50.0" in done.out
    executor = submitit.made[0]
    assert executor.folder == str(tmp_path / "out" / "slurm") and len(executor.handles) == 2
    expected = {"slurm_partition": "gpu", "timeout_min": 60, "mem_gb": "8", "slurm_array_parallelism": 3}
    assert {k: str(executor.parameters[k]) for k in expected} == {k: str(v) for k, v in expected.items()}
    assert executor.parameters["gpus_per_node"] == 1


def test_interrupted_slurm_runs_are_cancelled_and_crashed_ones_named(
    benchmark: ModuleType, line: Line, submitit: type[Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: Any) -> int:
        raise RuntimeError("the job\nwas preempted")

    args = benchmark.read_arguments(line("CoOp", more=["--slurm", "gpu"]))
    jobs = benchmark.jobs(args)
    monkeypatch.setattr(benchmark, "train_on_node", crash)
    failed = benchmark.run_on_slurm(jobs, None, args, lambda: None)
    assert [text.split(": ", 1)[1] for text in failed] == ["the job was preempted"] * 2
    assert "slurm_array_parallelism" not in submitit.made[-1].parameters

    def ctrl_c(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "train_on_node", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run_on_slurm(jobs, None, args, lambda: None)
    assert [handle.cancelled for handle in submitit.made[-1].handles] == [True, True]


# --- shell scripts -----------------------------------------------------------------------------------------------

TRAINERS = {"coopood": "CoOpOOD", "debiasedpt": "DebiasedPT", "ravl": "RaVL"}
DEFAULT = "vit_b16_ep50_ctxv1"
PLACES = {
    "main": f"waterbirds/{{t}}/{DEFAULT}_16shots/nctx4_cscFalse_ctpend",
    "base2new_train": f"base2new/train_base/waterbirds/shots_16/{{t}}/{DEFAULT}",
    "base2new_test": f"base2new/test_new/waterbirds/shots_16/{{t}}/{DEFAULT}",
    "xd_train": f"waterbirds/{{t}}/{DEFAULT}_16shots",
    "xd_test": f"evaluation/{{t}}/{DEFAULT}_16shots/waterbirds",
    "dg": f"dg/waterbirds/{{t}}/{DEFAULT}/sketch_photo",
    "groups": f"groups/waterbirds/{{t}}/{DEFAULT}",
}


def script(name: str, *arguments: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPOSITORY / "scripts" / f"{name}.sh"), *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd="/")


def parsed(done: subprocess.CompletedProcess[str]) -> tuple[Any, Any]:
    """The printed command, as train.py understands it: its arguments and its config."""
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == [sys.executable, "train.py"]
    args = cli.build_parser().parse_intermixed_args(words[2:])
    for name in ("config_file", "dataset_config_file"):
        setattr(args, name, str(REPOSITORY / getattr(args, name)))
    return args, cli.setup_cfg(args)


@pytest.mark.parametrize("folder", TRAINERS)
def test_shell_scripts_print_commands_of_train_py(folder: str) -> None:
    for kind, place in PLACES.items():
        file = REPOSITORY / "scripts" / folder / f"{kind}.sh"
        assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
        domains = ["sketch photo", "art cartoon"] if kind == "dg" else []
        done = script(
            f"{folder}/{kind}", "waterbirds", 3, *domains, "--dry-run", "OPTIM.LR", "0.5", DATA="/my data", OUTPUT="/o"
        )
        args, cfg = parsed(done)
        assert (TRAINERS[folder], "", 3) == (cfg.TRAINER.NAME, cfg.TRAINER.BASE, cfg.SEED)
        assert (cfg.DATASET.NAME, cfg.DATASET.ROOT, cfg.OPTIM.LR) == ("Waterbirds", "/my data", 0.5)
        assert f"/o/{place.format(t=TRAINERS[folder])}/seed3" == cfg.OUTPUT_DIR
        assert (-1 if kind in ("dg", "groups", "xd_test") else 16) == cfg.DATASET.NUM_SHOTS
        half = {"base2new_train": "base", "base2new_test": "new"}
        assert half.get(kind, "all") == cfg.DATASET.SUBSAMPLE_CLASSES
        assert args.eval_only == kind.endswith("_test")
        models = {"base2new_test": PLACES["base2new_train"], "xd_test": "imagenet/{t}/" + f"{DEFAULT}_16shots"}
        model = models.get(kind, "").format(t=TRAINERS[folder])
        assert args.model_dir == (f"/o/{model}/seed3" if model else "")
        if kind == "dg":
            assert tuple(cfg.DATASET.TARGET_DOMAINS) == ("sketch", "photo")
            assert tuple(cfg.DATASET.SOURCE_DOMAINS) == ("art", "cartoon")


def test_shell_scripts_take_variables() -> None:
    own = {"DATA": "/d", "OUTPUT": "/o", "BASE": "MaPLe", "CFG": "vit_b16_c2_ep5_batch4_2ctx", "SHOTS": "4"}
    args, cfg = parsed(script("coopood/main", "waterbirds", 1, "--dry-run", **own))
    assert cfg.OUTPUT_DIR == "/o/waterbirds/CoOpOOD-MaPLe/vit_b16_c2_ep5_batch4_2ctx_4shots/seed1"
    assert args.config_file.endswith("configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml")
    assert (cfg.TRAINER.BASE, cfg.DATASET.NUM_SHOTS) == ("MaPLe", 4)
    args, cfg = parsed(script("ravl/xd_test", "waterbirds", 1, "--dry-run", **own, SOURCE="celeba", LOADEP="5"))
    assert args.load_epoch == 5 and "/o/celeba/RaVL-MaPLe/" in args.model_dir
    _, cfg = parsed(script("ravl/main", "waterbirds", 1, "--dry-run", DATA="/d", NCTX="8", CSC="True", CTP="front"))
    keys = cfg.TRAINER.COOP
    assert (keys.N_CTX, keys.CSC, keys.CLASS_TOKEN_POSITION) == (8, True, "front")
    assert cfg.OUTPUT_DIR.endswith(f"{DEFAULT}_16shots/nctx8_cscTrue_ctpfront/seed1")
    _, cfg = parsed(script("debiasedpt/groups", "waterbirds", 1, "--dry-run", DATA="d", OUTPUT="o", SHOTS="2"))
    assert cfg.DATASET.ROOT == "//d" and f"//o/groups/waterbirds/DebiasedPT/{DEFAULT}_2shots/seed1" == cfg.OUTPUT_DIR


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "message"),
    [
        ("coopood/main", ["waterbirds"], {"DATA": "/d"}, "usage: DATA=FOLDER bash"),
        ("coopood/main", ["waterbirds", 1], {}, "DATA is not set"),
        ("ravl/dg", ["pacs", 1, "photo"], {"DATA": "/d"}, "'TARGET ...' 'SOURCE ...'"),
        ("ravl/dg", ["pacs", 1, "photo", " "], {"DATA": "/d"}, "domains to test on and domains to train on"),
        ("ravl/groups", ["pacs", 1, "--base", "MaPLe"], {"DATA": "/d"}, "BASE=NAME in front"),
    ],
)
def test_shell_scripts_say_what_is_missing(
    name: str, arguments: list[Any], variables: dict[str, str], message: str
) -> None:
    done = script(name, *arguments, **variables)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_shell_script_runs_and_goes_on(data_root: Path, tmp_path: Path) -> None:
    """The command is started with its words as they are; what train.py's status is, is the script's."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    python.chmod(0o755)
    variables = {"DATA": str(data_root), "OUTPUT": str(tmp_path / "o"), "PYTHON": str(python)}
    done = script("coopood/groups", "shapes_on_scenes", 1, "DATASET.ATTRIBUTE_NAMES", "('a b',)", **variables)
    assert done.returncode == 3 and done.stdout.splitlines()[:2] == [
        f"Output: {tmp_path}/o/groups/shapes_on_scenes/CoOpOOD/{DEFAULT}/seed1",
        "train.py",
    ]
    assert done.stdout.splitlines()[-2:] == ["DATASET.ATTRIBUTE_NAMES", "('a b',)"]
    (tmp_path / "o" / "groups" / "shapes_on_scenes" / "CoOpOOD" / DEFAULT / "seed1").mkdir(parents=True)
    assert "is there: going on with it" in script("coopood/groups", "shapes_on_scenes", 1, **variables).stdout
