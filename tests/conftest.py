"""Fixtures of all tests: one thread, shared images, small runs of the real command line, small configs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from yacs.config import CfgNode

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test touches a network

import torch

from oodprompt import cli
from oodprompt.backbones import weights
from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.data.dataset import Datum
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.log import show_messages
from tests.helpers.devices import chooses_gpu_tests, using
from tests.helpers.forks import Forks
from tests.helpers.runs import command_line, no_pictures
from tests.helpers.small_data import TINY, MakeCfg, MakeData


def pytest_configure(config: pytest.Config) -> None:
    """Tests compute on the CPU, also where there is a GPU, unless ``-m gpu`` chooses those that need one.

    Nothing has asked CUDA for its devices yet; processes that tests start inherit the variable.
    """
    if not chooses_gpu_tests(config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests without the mark ``gpu`` compute on the CPU also where GPUs are there for those with it; so do fixtures."""
    hides = item.get_closest_marker("gpu") is None and torch.cuda.is_available()
    with using("cpu") if hides else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _features_of_tests_stay_among_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features that take long go to disk by themselves: not to that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("user_cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _messages() -> None:
    """Messages go to standard output, where ``capsys`` finds them, also of what no command of ours runs."""
    show_messages()


@pytest.fixture(scope="session", autouse=True)
def _embedded_weights_are_unpacked_once() -> Iterator[None]:
    """Every CLIP still gets tensors of its own."""
    read, embedded = weights.read_state_dict, [weights.embedded_file(name) for name in weights.EMBEDDED]
    tensors: dict[Path, dict[str, torch.Tensor]] = {}

    def kept(file: Path) -> dict[str, torch.Tensor]:
        if file not in embedded:
            return read(file)
        if file not in tensors:
            tensors[file] = read(file)
        return {name: value.clone() for name, value in tensors[file].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "read_state_dict", kept)
        yield


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for the rendered images of all tests, also of those in other processes of the same session."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "data"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Starts programs in processes of their own, which are there at once."""
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def undrawn() -> Iterator[None]:
    """Pictures are empty files."""
    with no_pictures():
        yield


@pytest.fixture
def arguments(data_root: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """The command line of a small run: ``arguments(trainer, output name, *more)``.

    Runs in this process draw no pictures, but in tests with the mark ``pictures``.
    """
    if request.node.get_closest_marker("pictures") is None:
        request.getfixturevalue("undrawn")

    def build(trainer: str, name: str, *more: Any) -> list[str]:
        return command_line(data_root, tmp_path / name, trainer, *more)

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


@pytest.fixture
def make_cfg(data_root: Path) -> MakeCfg:
    """A config of small ShapesOnScenes; keywords are keys with ``__`` for the dot: ``OPTIM__LR=0.1``."""

    def make(**keys: Any) -> CfgNode:
        cfg = get_cfg_default()
        changes = TINY | {"DATASET.ROOT": str(data_root)} | {k.replace("__", "."): v for k, v in keys.items()}
        for key, value in changes.items():
            set_key(cfg, key, value, "test")
        return cfg

    return make


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Images of random pixels: one for each label, with the domain and attribute given beside."""

    def make(labels: list[int], domains: list[int] | None = None, attributes: list[int] | None = None) -> list[Datum]:
        rng = np.random.default_rng(0)
        data = []
        for i, label in enumerate(labels):
            path = tmp_path / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
            domain, attribute = (column[i] if column else 0 for column in (domains, attributes))
            data.append(Datum(str(path), label, domain, f"class {label}", attribute))
        return data

    return make
