"""Programs in processes of their own, without the seconds that each would take to import torch.

One process has imported the engine and nothing else has happened in it. It forks for every program, and the child runs
the program as a script: exit status, streams, signals and environment are its own. What importing itself does is seen by
the few tests that start an interpreter.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.runs import REPOSITORY

_SERVER = """
import gc, json, os, runpy, sys
import torch
import oodprompt.cli, oodprompt.trainers, oodprompt.datasets, oodprompt.engine
import torch._dynamo, torchvision.transforms, torch.utils.tensorboard, matplotlib.backends.backend_agg  # on the way

torch.set_num_threads(1)
gc.freeze()
for line in sys.stdin:
    request = json.loads(line)
    if "ended" in request:
        pid, status = os.waitpid(request["ended"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else "no"
    else:
        answer = os.fork()
        if answer == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(request[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(request["environment"])
            os.chdir(request["folder"])
            sys.argv, status = request["argv"], 0
            try:
                exec(request["first"], {})
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as stop:
                status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
                if isinstance(stop.code, str):
                    print(stop.code, file=sys.stderr)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # taking torch down would take each child two seconds
    print(answer, flush=True)
"""


@dataclass(frozen=True)
class Process:
    """A program that was started, and the files of its streams."""

    pid: int
    out: Path
    err: Path


@dataclass(frozen=True)
class Done:
    """How a program ended: its exit status (minus the number of the signal that killed it), and its streams."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Starts programs; ``folder`` is for their streams."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )

    def _ask(self, request: dict[str, object]) -> str:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline().strip()

    def start(
        self,
        words: Sequence[str],
        folder: Path = REPOSITORY,
        environment: Mapping[str, str] | None = None,
        first: str = "",
    ) -> Process:
        """Start ``words``: a script below the repository and its arguments. The code ``first`` is run ahead of it."""
        self.started += 1
        out, err = (self.folder / f"{self.started}.{stream}" for stream in ("out", "err"))
        out.touch(), err.touch()  # also a program that is killed at once has streams
        argv = [str(REPOSITORY / words[0]), *words[1:]]
        request = {"argv": argv, "folder": str(folder), "environment": dict(environment or {}), "first": first}
        return Process(int(self._ask({**request, "out": str(out), "err": str(err)})), out, err)

    def ended(self, process: Process) -> Done | None:
        """How it ended; None while it runs. To be asked no more once it has ended."""
        answer = self._ask({"ended": process.pid})
        if answer == "no":
            return None
        return Done(int(answer), process.out.read_text(), process.err.read_text())

    def wait(self, *processes: Process, seconds: float = 240) -> list[Done]:
        """How each ended. All are killed where one fails, as ``torchrun`` does it, or where they take too long."""
        done: dict[int, Done] = {}
        deadline = time.monotonic() + seconds
        while len(done) < len(processes):
            for process in processes:
                if process.pid not in done and (end := self.ended(process)) is not None:
                    done[process.pid] = end
            late = time.monotonic() > deadline
            if late or any(end.returncode for end in done.values()):
                for process in processes:
                    if process.pid not in done:
                        os.kill(process.pid, signal.SIGKILL)
                deadline = math.inf
            time.sleep(0.01)
        return [done[process.pid] for process in processes]

    def run(
        self, words: Sequence[str], folder: Path = REPOSITORY, environment: Mapping[str, str] | None = None
    ) -> Done:
        return self.wait(self.start(words, folder, environment))[0]

    def together(self, processes: int, words: Sequence[str]) -> None:
        """Run ``words`` in as many processes as ``torchrun --nproc-per-node`` would start; all must end well."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        group["LOCAL_WORLD_SIZE"] = group["WORLD_SIZE"]
        started = [
            self.start(words, environment={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        failed = [done.stderr[-3000:] for done in self.wait(*started) if done.returncode]
        assert not failed, max(failed, key=len)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)
