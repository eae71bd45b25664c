"""Small runs of the real command line: what makes them, stops them and compares them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = str(REPOSITORY / "configs" / "trainers" / "CoOpOOD" / "tiny_shapes.yaml")
SMALL = [
    *("DATASET.SHAPES.NUM_TRAIN", "80", "DATASET.SHAPES.NUM_VAL", "16", "DATASET.SHAPES.NUM_TEST", "24"),
    *("DATALOADER.TRAIN_X.BATCH_SIZE", "16", "OPTIM.MAX_EPOCH", "3", "DATASET.SHAPES.CORRELATION", "0.8"),
]


def command_line(root: Path, output: Path, trainer: str, *more: Any) -> list[str]:
    """The command line of a small run with data in ``root``, into the folder ``output``."""
    flags = ["--trainer", trainer, "--config-file", CONFIG, "--root", str(root), "--output-dir", str(output)]
    return [*flags, *SMALL, *map(str, more)]


@contextlib.contextmanager
def no_pictures() -> Iterator[None]:
    """Pictures that are written meanwhile are not drawn, which would take longer than a small run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", lambda canvas, file, **_: file.write(b"not drawn"))
        yield


def load_script(place: str) -> ModuleType:
    """The script at ``place`` in the repository, as a module, under its name also for processes that it starts."""
    path = REPOSITORY / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def interrupted_at(epoch: int, batch: int) -> Callable[[PromptTrainer, dict[str, Any]], dict[str, torch.Tensor]]:
    """``PromptTrainer.forward_backward``, but for a Ctrl-C at that batch."""
    step = PromptTrainer.forward_backward

    def interrupted(self: PromptTrainer, data: dict[str, Any]) -> dict[str, torch.Tensor]:
        if (self.epoch, self.batch_idx) == (epoch, batch):
            raise KeyboardInterrupt
        return step(self, data)

    return interrupted


Arguments = Callable[..., list[str]]
Run = Callable[..., dict[str, Any]]
Build = Callable[..., PromptTrainer]
METRICS = ("accuracy", "macro_f1", "worst_group_accuracy", "adjusted_average_accuracy", "gap", "groups", "classes")


def weights(directory: Path, epoch: int | None) -> dict[str, torch.Tensor]:
    """All that the models of a run hold."""
    files = sorted(directory.glob(f"*/{checkpoint.file_of('', '', epoch).name}"))
    return {f"{file.parent.name}.{k}": v for file in files for k, v in checkpoint.load(file)["state_dict"].items()}


def assert_same_outcome(one: Path, other: Path, epochs: Sequence[int | None]) -> None:
    a, b = (json.loads((d / "results.json").read_text()) for d in (one, other))
    assert {k: a[k] for k in METRICS} == {k: b[k] for k in METRICS}
    for epoch in epochs:
        first, second = weights(one, epoch), weights(other, epoch)
        assert first and first.keys() == second.keys()
        assert [k for k in first if not torch.equal(first[k], second[k])] == []
    files = [next(d.glob(f"*/model.pth.tar-{epochs[0]}")) for d in (one, other)]
    histories = [checkpoint.load(file)["oodprompt"]["history"] for file in files]
    assert histories[0] == histories[1]


def torchrun(processes: int, arguments: list[str], script: str = "train.py") -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--standalone", str(REPOSITORY / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
