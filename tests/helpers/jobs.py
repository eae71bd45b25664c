"""Jobs that train nothing, and what is looked at while jobs run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oodprompt.reports.results import finished_results

Line = Callable[..., list[str]]  # of tests/runs/conftest.py


@dataclass(frozen=True)
class Shell:
    """A job whose work is a line of bash, in its folder."""

    folder: Path
    line: str = "echo '{\"accuracy\": 0.5}' > results.json"
    name: str = "a job"
    arguments: Sequence[str] = ()

    @property
    def command(self) -> list[str]:
        return ["/bin/bash", "-c", f"cd {shlex.quote(str(self.folder))} && {self.line}"]

    @property
    def log(self) -> Path:
        return self.folder / "train.log"

    def work(self) -> int:
        os.execv(self.command[0], self.command)

    def is_finished(self) -> bool:
        return finished_results(self.folder) is not None

    def outcome(self) -> str:
        return ""


def results(out: Path) -> dict[str, dict[str, object]]:
    """Folder -> what does not depend on time."""
    keys = ("accuracy", "worst_group_accuracy", "macro_f1", "groups")
    files = {str(f.parent.relative_to(out)): json.loads(f.read_text()) for f in out.rglob("results.json")}
    return {name: {key: content[key] for key in keys} for name, content in files.items()}


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
