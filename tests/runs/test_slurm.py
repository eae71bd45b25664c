"""Runs on Slurm: what is submitted, what fails, what is cancelled."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oodprompt.errors import UserError
from oodprompt.runs import slurm
from oodprompt.runs.benchmark import main, run
from oodprompt.runs.grid import TrainingRun
from oodprompt.runs.progress import Progress
from tests.helpers.jobs import Line, Shell


class Handle:
    def __init__(self, work: Callable[[], int]) -> None:
        self.work, self.cancelled, self.looks = work, False, 0

    def done(self) -> bool:
        self.looks += 1
        return self.looks > 1

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
    monkeypatch.setattr(slurm, "LOOK", 0.0)
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    return Executor


def test_without_submitit(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="submitit is missing; run `pip install submitit`"):
        run(line("CoOp", more=["--slurm", "gpu"]))


def test_every_run_is_submitted(
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
    monkeypatch.setattr(TrainingRun, "command", property(lambda self: [sys.executable, "-c", code, str(self.folder)]))
    flags = ["--slurm", "gpu", "--jobs", 3, "--slurm-opts", "timeout_min=60", "mem_gb=8"]
    assert main(line("CoOp", more=flags)) == 1
    done = capsys.readouterr()
    assert "seed2: error: no GPU" in done.err and "| ShapesOnScenes/CoOp | 50.0" in done.out
    executor = submitit.made[0]
    assert executor.folder == str(tmp_path / "out" / "slurm") and len(executor.handles) == 2
    expected = {"slurm_partition": "gpu", "timeout_min": 60, "mem_gb": 8, "slurm_array_parallelism": 3}
    assert {k: executor.parameters[k] for k in expected} == expected and executor.parameters["gpus_per_node"] == 1
    assert (tmp_path / "out/ShapesOnScenes/CoOp/seed1/train.log").read_text() == "on the node\n"


def test_crashed_runs_are_named_and_interrupted_ones_cancelled(
    tmp_path: Path, submitit: type[Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [Shell(tmp_path / "seed1"), Shell(tmp_path / "seed2")]

    def crash(*_: Any) -> int:
        raise RuntimeError("the job\nwas preempted")

    monkeypatch.setattr(slurm, "train_on_node", crash)
    failed = slurm.run_on_slurm(jobs, "gpu", {}, tmp_path, Progress(2, 2))
    assert [text.split(": ", 1)[1] for text in failed] == ["the job was preempted"] * 2
    assert "slurm_array_parallelism" not in submitit.made[-1].parameters

    def ctrl_c(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "train_on_node", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        slurm.run_on_slurm(jobs, "gpu", {}, tmp_path, Progress(2, 2))
    assert [handle.cancelled for handle in submitit.made[-1].handles] == [True, True]
