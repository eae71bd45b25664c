"""Many jobs on this machine: each in a process of its own, in a folder of its own, which it holds a lock on.

A job's process is a fork of this one, which has imported everything already, so that it starts at once. Where a fork is
not safe (macOS, or CUDA was asked for ahead of it) the process becomes the job's command line.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from oodprompt.errors import UserError
from oodprompt.runs.bundles import Bundle
from oodprompt.runs.progress import Progress
from oodprompt.runs.reading import changed_keys, last_line
from oodprompt.terminal import exit_status

LOCK, PROMPT = ".benchmark.lock", "$ "
LOCKED = 75  # exit status of a process that found its folder locked
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Modules that a training imports late (the first optimiser step imports PyTorch's compiler): 3 s in every process.
_ON_THE_WAY = ("torch._dynamo", "torchvision.transforms", "torch.utils.tensorboard", "matplotlib.backends.backend_agg")
PATIENCE = 10.0  # seconds that a child has to end after SIGTERM


class Job(Protocol):
    """What is done in a folder of its own by a process of its own; hashable.

    ``name`` is what it is called, ``log`` the file that it prints to, ``command`` the command line that does the same,
    ``arguments`` the command line of ``train.py`` of the run that is in the folder.
    """

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def log(self) -> Path: ...

    @property
    def command(self) -> list[str]: ...

    @property
    def arguments(self) -> Sequence[str]: ...

    def work(self) -> int:
        """Do it, in the process that it is given; the exit status."""

    def is_finished(self) -> bool:
        """Whether its results are there, whole."""

    def outcome(self) -> str:
        """Its results in a few words."""


AnyJob = TypeVar("AnyJob", bound=Job)


class Child(Protocol):
    """What is needed of a process; it leads a process group of its own."""

    @property
    def pid(self) -> int | None: ...

    @property
    def exitcode(self) -> int | None: ...


# --- one job -----------------------------------------------------------------------------------------------------


def start(job: Job, environment: dict[str, str]) -> Child:
    """Start a job; its process holds the lock of its folder as long as it lives, also when this process is gone."""
    child = multiprocessing.get_context("fork").Process(target=_do, args=(job, environment))
    child.start()
    return child


def _do(job: Job, environment: dict[str, str]) -> None:
    """The work of a job's process."""
    os.setsid()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # its own: a lock that is shared stays locked where one of its holders is killed
    with contextlib.ExitStack() as stack:
        locks = [(part, stack.enter_context(locked(part.folder))) for part in parts_of(job)]
        ours = [(part, lock) for part, lock in locks if lock is not None and not part.is_finished()]  # by now
        if not ours:
            sys.exit(LOCKED if any(lock is None for _, lock in locks) else 0)
        for _, lock in ours:
            os.set_inheritable(lock, True)  # by a command that takes this process's place
        if isinstance(job, Bundle):
            job = ours[0][0] if len(ours) == 1 else job.of({part.folder for part, _ in ours})
        _print_to(job.log)
        if not isinstance(job, Bundle):  # several say so themselves, each in its own log
            print(f"{PROMPT}{shlex.join(job.command)}", flush=True)
        if not may_fork():
            os.execv(job.command[0], job.command)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        sys.exit(job.work())


def parts_of(job: Job) -> Sequence[Job]:
    """The runs of a job, each in a folder of its own."""
    return job.parts if isinstance(job, Bundle) else [job]


def _print_to(log: Path) -> None:
    """Everything printed from now on goes to the end of ``log``; nothing is read."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115


def may_fork() -> bool:
    """Whether a fork of this process, seen from within it, may go on with what its parent has loaded.

    It may not on macOS, and where there are GPUs and the parent has asked CUDA for them: CUDA then works in no fork.
    """
    torch = sys.modules.get("torch")
    if sys.platform != "linux" or torch is None:
        return sys.platform == "linux"
    return not (torch.cuda._is_in_bad_fork() and torch.cuda.device_count())


def _import_ahead() -> None:
    """Import what every job would import, for all forks of this process. No import starts a thread or asks CUDA."""
    if sys.platform == "linux" and "torch" in sys.modules:
        for name in _ON_THE_WAY:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def stop(children: Sequence[Child]) -> None:
    """End children and what they have started: SIGTERM, and SIGKILL for those that do not end."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, PATIENCE)):
        for child in children:
            if child.exitcode is None and child.pid is not None:
                try:
                    os.killpg(child.pid, number)
                except ProcessLookupError:  # it leads no group yet, or has just ended
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, number)
        until = time.monotonic() + patience
        while any(child.exitcode is None for child in children) and time.monotonic() < until:
            time.sleep(0.02)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM to the end of the block, so that no child is started and not known.

    A child that is forked in it has them blocked, so that it loses none before it is ready for them.
    """
    seen: list[int] = []
    numbers = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {n: signal.signal(n, lambda number, _: seen.append(number)) for n in numbers}
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """The lock of a job's folder, which is made; None where another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--out: cannot write {folder}: {error.strerror}; choose another folder") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file
    finally:
        os.close(file)


def unfinished(jobs: Sequence[AnyJob]) -> list[AnyJob]:
    """The jobs that are to be done; ``UserError`` where what is in the folder of another was run with other keys."""
    missing = []
    for job in jobs:
        if not job.is_finished():
            missing.append(job)
        elif changed := changed_keys(job.folder, job.arguments):
            raise UserError(
                f"{job.folder} is a run of another grid ({'; '.join(changed[:3])}): delete it, or choose another --out"
            )
    return missing


def failure(job: Job, status: int) -> str | None:
    """Why a job that ended has no results, in a line; None when it has."""
    if status == 0 and job.is_finished():
        return None
    why = last_line(job.log)
    why = "it printed nothing" if not why or why.startswith(PROMPT) else why
    how = f"killed by signal {-status}; " if status < 0 else "" if status else "it wrote no results; "
    return f"{job.folder}: {how}{why}"


# --- all jobs ----------------------------------------------------------------------------------------------------


def run_here(todo: Sequence[Job], at_once: int, gpus: Sequence[str], progress: Progress) -> list[str]:
    """Do all jobs, ``at_once`` at the same time, each on one of ``gpus``; returns what failed, a line each.

    What another process does (one left by a killed runner, or a second runner) is waited for.
    """
    if len(todo) > 1:
        _import_ahead()
    waiting, failed = list(todo), []
    running: dict[int, tuple[Job, Child]] = {}
    slots = list(range(at_once))
    told = False
    try:
        while waiting or running:
            for slot, (job, child) in list(running.items()):
                if (status := child.exitcode) is None:
                    continue
                del running[slot]
                slots.append(slot)
                for part in parts_of(job):
                    if status == LOCKED or (part is not job and not part.is_finished() and _is_locked(part)):
                        progress.postponed(part)  # another process was faster
                        waiting.append(part)
                        continue
                    # Of runs together, the status is that of the one that fared worst.
                    line = None if part is not job and part.is_finished() else failure(part, status)
                    failed += [line] if line else []
                    progress.ended(part, line)
            for job in list(waiting):
                if not slots:
                    break
                if _is_locked(job):
                    continue
                waiting.remove(job)
                if job.is_finished():
                    for part in parts_of(job):
                        progress.ended(part)
                    continue
                slot = slots.pop(0)
                for part in parts_of(job):
                    progress.started(part)
                with uninterrupted():
                    running[slot] = job, start(job, _environment(gpus, slot))
            if waiting and not running and not told:
                told = True
                progress.say(f"{waiting[0].folder} is being trained by another process; waiting for it")
            progress.tick()
            time.sleep(0.05)
    except BaseException:
        stop([child for _, child in running.values()])
        raise
    return failed


def _is_locked(job: Job) -> bool:
    """Whether other processes do all of it."""
    for part in parts_of(job):
        with locked(part.folder) as lock:
            if lock is not None:
                return False
    return True


def _environment(gpus: Sequence[str], slot: int) -> dict[str, str]:
    own = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    # Processes, not threads, share the cores.
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **own}


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises ``KeyboardInterrupt`` in the block."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class RunsFailed(Exception):
    """Some of many runs failed."""


def runs_status(work: Callable[[], None]) -> int:
    """As ``exit_status``, and 1 with a line where runs failed."""
    status = 0

    def tried() -> None:
        nonlocal status
        try:
            work()
        except RunsFailed as error:
            print(f"error: {error}", file=sys.stderr)
            status = 1

    return exit_status(tried) or status
