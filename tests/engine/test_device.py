"""Processes and devices, torch's global settings and peak memory; a GPU is pretended where one is asked for."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from oodprompt.engine import assembly, device
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from tests.helpers.forks import Forks
from tests.helpers.runs import Arguments, Run, weights
from tests.helpers.small_data import MakeCfg

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _settings_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test sets for the whole process is undone."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    monkeypatch.undo()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.use_deterministic_algorithms(False)
    device._of_program = None
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if PartialState().device != CPU:
        PartialState._reset_state()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``gpus(n)``: the machine seems to have so many."""

    def pretend(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return pretend


# --- processes and devices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", [{"LOCAL_WORLD_SIZE": "4"}, {"LOCAL_RANK": "3"}])
def test_more_processes_than_gpus_are_refused(
    variable: dict[str, str], make_cfg: MakeCfg, gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    gpus(2)
    with pytest.raises(UserError, match=r"4 processes .* has 2 GPUs.*--nproc-per-node 2, or USE_CUDA False"):
        device.join_processes(make_cfg())


def test_a_process_waits_for_hours_for_another(make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(device, "PartialState", lambda **words: given.append(words) or PartialState(cpu=True))
    device.join_processes(make_cfg())
    assert given[0]["timeout"] >= datetime.timedelta(hours=6)


def test_a_later_run_of_a_process_may_take_another_device(make_cfg: MakeCfg, gpus: Any) -> None:
    assert device.join_processes(make_cfg()).device == CPU
    gpus(1)
    assert device.join_processes(make_cfg()).device.type == "cuda"
    assert device.join_processes(make_cfg(USE_CUDA=False)).device == CPU


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "expected"), [("convolutions", (False, True)), ("all", (True, True)), ("none", (False, False))]
)
def test_tf32_is_set_by_its_key(choice: str, expected: tuple[bool, bool], make_cfg: MakeCfg) -> None:
    for before in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
        device.set_torch(make_cfg(TRAIN__TF32=choice), GPU)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == expected
    assert torch.get_float32_matmul_precision() == ("high" if choice == "all" else "highest")  # torch.compile reads it


def test_the_default_of_tf32_is_torchs(make_cfg: MakeCfg) -> None:
    """The other tests set nothing, so what torch has here is its default."""
    ours = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    device.set_torch(make_cfg(), GPU)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == ours


@pytest.mark.parametrize("programs", [(False, False, False), (True, True, True)], ids=["plain", "strict program"])
def test_determinism_ends_with_its_run(programs: tuple[bool, bool, bool], make_cfg: MakeCfg) -> None:
    def settings() -> tuple[bool, bool, bool]:
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns, torch.backends.cudnn.benchmark

    torch.use_deterministic_algorithms(programs[0], warn_only=programs[1])
    torch.backends.cudnn.benchmark = programs[2]
    device.set_torch(make_cfg(), GPU)
    assert settings() == programs
    for _ in range(2):
        device.set_torch(make_cfg(TRAIN__DETERMINISTIC=True), GPU)
        assert settings() == (True, False, False)
    device.set_torch(make_cfg(), GPU)
    assert settings() == programs


def test_cublas_is_told_ahead_of_its_start(make_cfg: MakeCfg) -> None:
    device.join_processes(make_cfg())
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    device.join_processes(make_cfg(TRAIN__DETERMINISTIC=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_determinism_changes_nothing_on_the_cpu(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("MaPLe", "plain", "OPTIM.MAX_EPOCH", 1)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: pytest.fail("set on the CPU"))
    results = run("MaPLe", "deterministic", "OPTIM.MAX_EPOCH", 1, "TRAIN.DETERMINISTIC", True)
    one, other = (weights(tmp_path / name, 1) for name in ("plain", "deterministic"))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert results["environment"]["deterministic"] and results["environment"]["tf32"] == "none"


def test_what_has_no_deterministic_kernel_is_named(make_cfg: MakeCfg) -> None:
    device.set_torch(make_cfg(TRAIN__DETERMINISTIC=True), GPU)
    with pytest.raises(UserError, match=r"TRAIN.DETERMINISTIC: torch has no deterministic kernel for put_ on a GPU"):
        with device.one_line_for_kernels():
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))


def test_cublas_that_was_started_before_is_named() -> None:
    text = "Deterministic behavior was enabled ... you must set CUBLAS_WORKSPACE_CONFIG=:4096:8 or"
    with pytest.raises(UserError, match="set CUBLAS_WORKSPACE_CONFIG=:4096:8 ahead of the program"):
        with device.one_line_for_kernels():
            raise RuntimeError(text)


def test_a_gpu_says_what_it_computes_with(
    make_cfg: MakeCfg, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda which: f"card {which.index}")
    second = torch.device("cuda", 1)
    device.describe(make_cfg(), second)
    device.describe(make_cfg(), CPU)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("GPU: card 1; fp32 is rounded to TF32 in convolutions (TRAIN.TF32)")
    assert device.environment(make_cfg(TRAIN__TF32="all"), second, "amp") == {
        "device": "card 1",
        "precision": "amp",
        "tf32": "all",
        "deterministic": False,
        "compile": "auto",
        "together": 1,
    }


# --- memory ----------------------------------------------------------------------------------------------------------


def test_peak_memory_of_a_gpu_counts_from_the_start_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", seen.append)
    device.forget_peak(CPU)
    device.forget_peak(GPU)
    assert seen == [GPU]


def test_peak_memory_is_forgotten_behind_the_loading(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for owner, name in ((assembly, "load_clip"), (device, "forget_peak"), (Encoder, "encode_image")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, name=name, plain=plain, **k: order.append(name) or plain(*a, **k))
    run("CoOp", "out", "OPTIM.MAX_EPOCH", 1)
    assert order[:3] == ["load_clip", "forget_peak", "encode_image"] and order.count("forget_peak") == 1


def test_peak_memory_of_one_process_is_one_number(run: Run) -> None:
    results = run("CoOp", "out", "OPTIM.MAX_EPOCH", 1)
    assert results["peak_memory_mib"] > 1 and "peak_memory_mib_sum" not in results


def test_peak_memory_of_several_is_the_largest_and_the_sum(arguments: Arguments, tmp_path: Path, forks: Forks) -> None:
    keys = ["OPTIM.MAX_EPOCH", 1, "DATASET.SHAPES.NUM_TRAIN", 16, "DATALOADER.TRAIN_X.BATCH_SIZE", 8]
    forks.together(2, ["train.py", *arguments("CoOp", "out", *keys)])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["peak_memory_mib"] < results["peak_memory_mib_sum"] <= 2 * results["peak_memory_mib"]
