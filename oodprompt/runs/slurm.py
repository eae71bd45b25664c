"""Many jobs on a cluster, by Slurm."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oodprompt.errors import UserError
from oodprompt.runs.launch import Job, failure
from oodprompt.runs.progress import Progress

LOOK = 1.0  # seconds between two looks at which jobs have ended


def train_on_node(command: list[str], log: str) -> int:
    """One run on a node of the cluster; its exit status."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode


def run_on_slurm(
    todo: Sequence[Job], partition: str, options: dict[str, Any], folder: Path, progress: Progress
) -> list[str]:
    """Submit all jobs as one array and wait for them; returns what failed, a line each.

    ``options`` are submitit's parameters, ``folder`` is where it writes. Raises ``UserError`` where it is missing.
    """
    try:
        import submitit  # here: only clusters have it
    except ModuleNotFoundError as error:
        raise UserError("--slurm: submitit is missing; run `pip install submitit`") from error
    executor = submitit.AutoExecutor(folder=str(folder))
    parameters: dict[str, Any] = {"name": "benchmark", "gpus_per_node": 1, "cpus_per_task": 8, "timeout_min": 24 * 60}
    executor.update_parameters(**parameters | {"slurm_partition": partition} | options)
    submitted = executor.map_array(train_on_node, [job.command for job in todo], [str(job.log) for job in todo])
    waiting, failed = list(zip(todo, submitted, strict=True)), []
    try:
        while waiting:
            for job, handle in list(waiting):
                if not handle.done():
                    continue
                waiting.remove((job, handle))
                try:
                    line = failure(job, handle.result())
                except Exception as error:  # submitit's, of several kinds: the other runs go on, and the end names it
                    line = f"{job.folder}: {' '.join(str(error).split())[-200:]}"
                failed += [line] if line else []
                progress.ended(job, line)
            progress.tick()
            time.sleep(LOOK if waiting else 0)
    except BaseException:
        for handle in submitted:
            handle.cancel()
        raise
    return failed
