"""Small runs of the real command line that several test files share."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from oodprompt import cli
from oodprompt.engine.trainer import PromptTrainer, build_trainer

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = str(REPOSITORY / "configs" / "trainers" / "CoOpOOD" / "tiny_shapes.yaml")
SMALL = [
    *("DATASET.SHAPES.NUM_TRAIN", "80", "DATASET.SHAPES.NUM_VAL", "16", "DATASET.SHAPES.NUM_TEST", "24"),
    *("DATALOADER.TRAIN_X.BATCH_SIZE", "16", "OPTIM.MAX_EPOCH", "3", "DATASET.SHAPES.CORRELATION", "0.8"),
]


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


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the rendered images of all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def arguments(data_root: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a small run: ``arguments(trainer, output name, *more)``."""

    def build(trainer: str, name: str, *more: Any) -> list[str]:
        flags = ["--trainer", trainer, "--config-file", CONFIG, "--root", str(data_root)]
        return [*flags, "--output-dir", str(tmp_path / name), *SMALL, *map(str, more)]

    return build


@pytest.fixture
def run(arguments: Callable[..., list[str]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Train through the command line, in this process; returns the content of results.json."""

    def go(trainer: str, name: str, *more: Any) -> dict[str, Any]:
        cli.run(arguments(trainer, name, *more))
        return json.loads((tmp_path / name / "results.json").read_text())

    return go


@pytest.fixture
def build(arguments: Callable[..., list[str]]) -> Callable[..., PromptTrainer]:
    """A trainer that has not been trained: ``build(trainer, *more)``."""

    def make(trainer: str, *more: Any) -> PromptTrainer:
        args = cli.build_parser().parse_intermixed_args(arguments(trainer, "built", *more))
        return build_trainer(cli.setup_cfg(args))

    return make
