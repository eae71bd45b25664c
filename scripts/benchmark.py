"""Train trainers x bases x data sets x seeds and tabulate: ``python scripts/benchmark.py --trainers CoOp CoOpOOD --config-file F``.

    python scripts/benchmark.py --trainers CoOp CoOpOOD DebiasedPT --bases CoOp MaPLe --datasets waterbirds celeba \\
        --seeds 1 2 3 --root DATA --config-file CoOp=configs/trainers/CoOp/vit_b16_ep50_ctxv1.yaml ... --gpus 0 1

Debiasers go over every base, prompt learners stand alone; ``CoOpOOD+DebiasedPT`` is a stack. Each run is a ``train.py`` of
its own, in ``OUT/<data set>/<method>/seed<N>``, what it prints in ``train.log`` there. The same command again skips what is
finished and resumes what is not. Ends in the tables of ``scripts/collect.py``, also in ``OUT/table.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tqdm import tqdm

from oodprompt.cli import Parser, build_parser, exit_status, setup_cfg
from oodprompt.config import extensions
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.runs import collecting

REPOSITORY = Path(__file__).resolve().parent.parent
TRAIN_LOG, LOCK, PROMPT = "train.log", ".benchmark.lock", "$ "
PATIENCE = 10.0  # seconds that a child has to end after SIGTERM
# Keys that --opts cannot change, and what does.
_OWN_KEYS = {
    "SEED": "give --seeds",
    "OUTPUT_DIR": "give --out",
    "RESUME": "runs are resumed by themselves",
    "TRAINER.NAME": "give --trainers",
    "TRAINER.BASE": "give --bases",
    "TRAINER.STACK": "give --trainers A+B",
}


@dataclass(frozen=True)
class Job:
    """A run: its output folder and its command line after ``train.py``."""

    folder: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(REPOSITORY / "train.py"), *self.arguments]

    @property
    def log(self) -> Path:
        return self.folder / TRAIN_LOG


class Child(Protocol):
    """What is needed of ``subprocess.Popen``; the child leads a process group of its own."""

    pid: int

    def poll(self) -> int | None: ...


# --- the grid --------------------------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--trainers", nargs="+", required=True, metavar="NAME", help="names, or stacks as A+B")
    parser.add_argument("--bases", nargs="+", default=[""], metavar="NAME", help="under debiasers; default: their own")
    parser.add_argument(
        "--datasets", nargs="+", default=[""], metavar="NAME", help="files of configs/datasets, or paths"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--config-file", nargs="+", required=True, metavar="[TRAINER=]FILE", help="of all trainers, or of one"
    )
    extensions.add_flag(parser)
    parser.add_argument("--root", default="data", help="folder that holds the data sets")
    parser.add_argument("--out", type=Path, default=Path("output/benchmark"))
    parser.add_argument("--jobs", type=int, help="runs at the same time; default: one, or one per GPU of --gpus")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="ID", help="each run sees one of them")
    parser.add_argument("--slurm", default="", metavar="PARTITION", help="submit to Slurm (needs submitit)")
    parser.add_argument(
        "--slurm-opts", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's parameters, e.g. timeout_min=600"
    )
    parser.add_argument("--baseline", default="", metavar="METHOD", help="paired differences to this method")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys for every run")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs: give 1 or more")
    if args.slurm and args.gpus:
        raise UserError("--gpus: Slurm gives each run a GPU of its own; leave it out with --slurm")
    if wrong := [pair for pair in args.slurm_opts if "=" not in pair]:
        raise UserError(f"--slurm-opts: KEY=VALUE expected, not {wrong[0]!r}; submitit's README lists the keys")
    if min(args.seeds) < 0:
        raise UserError("--seeds: give 0 or more; a negative seed is another one in every run")
    if taken := [f"{key}: {use}" for key, use in _OWN_KEYS.items() if key in args.opts[::2]]:
        raise UserError(f"--opts {taken[0]}")
    for name in ("trainers", "bases", "datasets", "seeds"):
        values = getattr(args, name)
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f"--{name}: {twice[0]} is given twice")
    return args


def jobs(args: argparse.Namespace) -> list[Job]:
    """All runs of the grid, every one's config checked; ``UserError`` for the first that cannot be."""
    found: dict[Path, Job] = {}
    extensions.add(args.imports)
    imports = [word for name in args.imports for word in ("--import", name)]
    for dataset, trainer in itertools.product(args.datasets, args.trainers):
        flags = [*_dataset_flags(dataset), "--config-file", _config_file(args.config_file, trainer)]
        for base in dict.fromkeys(args.bases if _is_debiaser(trainer) else [""]):
            main, *stack = trainer.split("+")
            method = ["--trainer", main, *(["--base", base] if base else [])]
            keys = ["TRAINER.STACK", repr(tuple(stack))] if stack else []
            keys += ["DATASET.NAME", _dataset_name(flags)] if dataset else []  # a method's file may name another
            line = [*imports, "--root", args.root, *flags, *method, *keys, *args.opts]
            name = _check(line)
            place = args.out / (Path(dataset).stem or name) / "-".join([trainer, *([base] if base else [])])
            for seed in args.seeds:
                folder = place / f"seed{seed}"
                if folder in found:
                    raise UserError(f"--datasets: two files are named {place.parent.name}, rename one")
                found[folder] = Job(folder, ("--seed", str(seed), "--output-dir", str(folder), *line))
    if args.baseline:  # now, and not when all runs are finished
        places = dict.fromkeys(folder.parent.relative_to(args.out).parts for folder in found)
        collecting.baselines([collecting.Row(parts, name="/".join(parts)) for parts in places], args.baseline)
    return list(found.values())


def _is_debiaser(trainer: str) -> bool:
    from oodprompt.config.extensions import register_all
    from oodprompt.config.registry import TRAINER_REGISTRY

    register_all()
    return "+" in trainer or TRAINER_REGISTRY.get(trainer, "--trainers").debiaser_class is not None


def _config_file(files: Sequence[str], trainer: str) -> str:
    """The method's file of a trainer: its own (``TRAINER=FILE``), else the one that is for all."""
    named = dict(file.split("=", 1) if "=" in file else ("", file) for file in files)
    if len(named) < len(files):
        raise UserError("--config-file: give one file for all trainers, and one as TRAINER=FILE for each that differs")
    for name in (trainer, trainer.split("+")[0], ""):
        if name in named:
            return named[name]
    raise UserError(f"--config-file: none for {trainer}; give FILE for all trainers or {trainer}=FILE")


def _dataset_flags(dataset: str) -> list[str]:
    if not dataset:
        return []
    path = Path(dataset) if dataset.endswith((".yaml", ".yml")) else REPOSITORY / f"configs/datasets/{dataset}.yaml"
    return ["--dataset-config-file", str(path)]


def _dataset_name(flags: Sequence[str]) -> str:
    return _config(flags[:2]).DATASET.NAME


def _config(line: Sequence[str]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return setup_cfg(build_parser().parse_intermixed_args([*line, "--output-dir", os.devnull]))


def _check(line: Sequence[str]) -> str:
    """Build the config of a command line; returns the data set's name."""
    from oodprompt.methods.resolve import resolve_methods

    cfg = _config([*line, "--seed", "0"])
    resolve_methods(cfg)
    return cfg.DATASET.NAME or "no_dataset"


def unfinished(all_jobs: Sequence[Job]) -> list[Job]:
    """The runs without whole results; ``UserError`` where a finished one was run with other keys."""
    missing = []
    for job in all_jobs:
        if collecting.finished_results(job.folder) is None:
            missing.append(job)
        elif changed := collecting.changed_keys(job.folder, job.arguments):
            raise UserError(
                f"{job.folder} is a run of another grid ({'; '.join(changed[:3])}): delete it, or choose another --out"
            )
    return missing


# --- running on this machine -----------------------------------------------------------------------------------


def launch(job: Job, environment: dict[str, str], lock: int) -> Child:
    """Start a run; it holds ``lock`` as long as it lives, also when this process is gone."""
    with job.log.open("ab") as log:
        log.write(f"{PROMPT}{shlex.join(job.command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock,),
            start_new_session=True,
        )


def stop(children: Sequence[Child]) -> None:
    """End children and what they have started: SIGTERM, and SIGKILL for those that do not end."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
        for child in children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
        until = time.monotonic() + patience
        while any(child.poll() is None for child in children) and time.monotonic() < until:
            time.sleep(0.02)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM to the end of the block, so that no child is started and not known."""
    seen: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def locked(job: Job) -> Iterator[int | None]:
    """The lock of a run's folder, or None where another process trains it."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        file = os.open(job.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--out: cannot write {job.folder}: {error.strerror}; choose another folder") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file
    finally:
        os.close(file)  # a child that was given it keeps the lock


def failure(job: Job, status: int) -> str | None:
    """Why a run that ended has no results, in a line; None when it has."""
    if status == 0 and collecting.finished_results(job.folder) is not None:
        return None
    why = collecting.last_line(job.log)
    why = "it printed nothing" if not why or why.startswith(PROMPT) else why
    how = f"killed by signal {-status}; " if status < 0 else "" if status else "it wrote no results; "
    return f"{job.folder}: {how}{why}"


def run_here(todo: Sequence[Job], at_once: int, gpus: Sequence[str], done: Callable[[], Any]) -> list[str]:
    """Run all jobs, ``at_once`` at the same time; returns what failed, a line each.

    What another process trains (one left by a killed benchmark, or a second benchmark) is waited for.
    """
    waiting, running, failed = list(todo), {}, []
    slots = list(range(at_once))
    told = False
    try:
        while waiting or running:
            for slot, (job, child) in list(running.items()):
                if (status := child.poll()) is not None:
                    del running[slot]
                    slots.append(slot)
                    failed += [line for line in [failure(job, status)] if line]
                    done()
            for job in list(waiting):
                if not slots:
                    break
                with locked(job) as lock:
                    if lock is None:
                        continue
                    waiting.remove(job)
                    if collecting.finished_results(job.folder) is not None:
                        done()
                        continue
                    slot = slots.pop(0)
                    with uninterrupted():
                        running[slot] = job, launch(job, _environment(gpus, slot), lock)
            if waiting and not running and not told:
                told = True
                print(f"{waiting[0].folder} is being trained by another process; waiting for it", flush=True)
            time.sleep(0.05)
    except BaseException:
        stop([child for _, child in running.values()])
        raise
    return failed


def _environment(gpus: Sequence[str], slot: int) -> dict[str, str]:
    own = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    return {"OMP_NUM_THREADS": "1", **os.environ, **own}  # processes, not threads, share the cores


# --- running on Slurm ------------------------------------------------------------------------------------------


def train_on_node(command: list[str], log: str) -> int:
    """One run on a node of the cluster; its exit status."""
    import pathlib
    import subprocess

    pathlib.Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def run_on_slurm(
    todo: Sequence[Job], at_once: int | None, args: argparse.Namespace, done: Callable[[], Any]
) -> list[str]:
    """Submit all jobs as one array and wait for them; returns what failed, a line each."""
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise UserError("--slurm: submitit is missing; run `pip install submitit`") from error
    executor = submitit.AutoExecutor(folder=str(args.out / "slurm"))
    parameters: dict[str, Any] = {"name": "benchmark", "gpus_per_node": 1, "cpus_per_task": 8, "timeout_min": 24 * 60}
    parameters |= {"slurm_partition": args.slurm} | ({"slurm_array_parallelism": at_once} if at_once else {})
    pairs = (pair.split("=", 1) for pair in args.slurm_opts)
    executor.update_parameters(**parameters | {k: int(v) if v.isdigit() else v for k, v in pairs})
    submitted = executor.map_array(train_on_node, [job.command for job in todo], [str(job.log) for job in todo])
    failed = []
    try:
        for job, handle in zip(todo, submitted, strict=True):
            try:
                line = failure(job, handle.result())
            except Exception as error:  # submitit's, of several kinds: the other runs go on, and the end names it
                line = f"{job.folder}: {' '.join(str(error).split())[-200:]}"
            failed += [line] if line else []
            done()
    except BaseException:
        for handle in submitted:
            handle.cancel()
        raise
    return failed


# --- all together ----------------------------------------------------------------------------------------------


def interrupt(*_: Any) -> NoReturn:
    """SIGTERM, as Ctrl-C."""
    raise KeyboardInterrupt


def run(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(argv)
    grid = jobs(args)
    todo = unfinished(grid)
    if args.dry_run:
        for job in grid:
            print(("" if job in todo else "# finished: ") + shlex.join(["python", "train.py", *job.arguments]))
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    at_once = args.jobs or max(1, len(args.gpus))
    print(f"{len(grid)} runs, {len(grid) - len(todo)} of them finished already", flush=True)
    try:
        with tqdm(total=len(todo), desc="Runs", unit="run", disable=None) as bar:
            if args.slurm and todo:
                failed = run_on_slurm(todo, args.jobs, args, bar.update)
            else:
                failed = run_here(todo, at_once, args.gpus, bar.update)
    finally:
        signal.signal(signal.SIGTERM, previous)
    report(args, grid, failed)


def report(args: argparse.Namespace, grid: Sequence[Job], failed: Sequence[str]) -> None:
    """Print and write the tables of what is finished; ``RunsFailed`` where runs failed."""
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if len(failed) < len(grid):
        tree = collecting.collect(args.out, only=[job.folder for job in grid])
        for problem in tree.problems:
            print(problem, file=sys.stderr)
        text = collecting.tables(tree, baseline=args.baseline)
        write_atomically(args.out / "table.md", text)
        print(f"\n{text}\nWrote {args.out / 'table.md'}")
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(grid)} runs failed; the same command again tries them anew")


class RunsFailed(Exception):
    """Some runs of a grid failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 0, 1 where runs failed or were interrupted, 2 for a user's error."""
    status = 0

    def work() -> None:
        nonlocal status
        try:
            run(argv)
        except RunsFailed as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1

    return exit_status(work) or status


if __name__ == "__main__":
    sys.exit(main())
