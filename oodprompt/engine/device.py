"""Where a run computes: its processes and device, torch's global settings, and how much memory it took."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import resource
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones.company import COMPANY
from oodprompt.data.distributed import sum_over_processes
from oodprompt.errors import UserError
from oodprompt.log import logger

# How long a process waits for another at a barrier or in a collective. All wait while the main process downloads
# weights, renders images, waits for features that another run computes, or draws pictures; torch's 10 minutes under NCCL
# are too few. A process that ends with an error is no reason for a short time: torchrun ends the others at once.
_PATIENCE = datetime.timedelta(hours=12)
# cuBLAS sums in the same order each time if its workspaces are of one size; read when it starts.
_CUBLAS = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def join_processes(cfg: CfgNode) -> PartialState:
    """The processes of this run, one unless torchrun started more; ``.device`` is that of this process.

    Torch's global settings are those of ``cfg`` afterwards. ``UserError`` where there are fewer GPUs than processes.
    """
    if cfg.TRAIN.DETERMINISTIC:
        os.environ.setdefault(*_CUBLAS)
    takes_gpu = cfg.USE_CUDA and torch.cuda.is_available()
    if takes_gpu:
        _check_gpus()
    state = PartialState(cpu=not takes_gpu, timeout=_PATIENCE)
    if (state.device.type == "cuda") != takes_gpu:  # an earlier run of this process took the other kind
        if state.num_processes > 1:
            raise UserError(f"USE_CUDA {cfg.USE_CUDA}: these processes began on {state.device}; start new ones")
        PartialState._reset_state()
        state = PartialState(cpu=not takes_gpu, timeout=_PATIENCE)
    set_torch(cfg, state.device)
    return state


def _check_gpus() -> None:
    started = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0")) + 1)
    gpus = torch.cuda.device_count()
    if started > gpus:
        raise UserError(
            f"{started} processes were started on this machine, but it has {gpus} GPU{'s' if gpus > 1 else ''}, and each "
            f"takes one: give torchrun --nproc-per-node {gpus}, or USE_CUDA False to compute on the CPU"
        )


# --- torch's global settings -------------------------------------------------------------------------------------

_of_program: tuple[bool, bool, bool] | None = None  # what the program had set ahead of the first deterministic run


def set_torch(cfg: CfgNode, device: torch.device) -> None:
    """Set what torch has one of for all runs of a process: TRAIN.DETERMINISTIC and TRAIN.TF32. The CPU has neither.

    A run without TRAIN.DETERMINISTIC leaves what the program around it has set, also behind a run with it.
    """
    global _of_program
    if cfg.TRAIN.DETERMINISTIC and device.type == "cuda":
        if _of_program is None:
            warns, benchmark = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
            _of_program = torch.are_deterministic_algorithms_enabled(), warns, benchmark
        # Not with ``warn_only``, under which attention takes kernels that are not deterministic.
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    elif _of_program is not None:
        is_on, warns, torch.backends.cudnn.benchmark = _of_program
        torch.use_deterministic_algorithms(is_on, warn_only=warns)
        _of_program = None
    if device.type == "cuda":
        # These set torch's newer ``fp32_precision`` too. The other way round they would fail to be read, which
        # torch.compile does.
        torch.backends.cuda.matmul.allow_tf32 = cfg.TRAIN.TF32 == "all"
        torch.backends.cudnn.allow_tf32 = cfg.TRAIN.TF32 != "none"
        # cuDNN's attention gives NaN gradients under masks of some lengths (pytorch/pytorch#196678), and makes a plan for
        # every new shape, which RaVL's varying numbers of regions would pay for step by step.
        torch.backends.cuda.enable_cudnn_sdp(False)


@contextlib.contextmanager
def one_line_for_kernels() -> Iterator[None]:
    """``UserError`` for an operation in the block that TRAIN.DETERMINISTIC does not allow."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "does not have a deterministic implementation" in text:
            what = text.split(" does not have")[0].split()[-1]
            raise UserError(
                f"TRAIN.DETERMINISTIC: torch has no deterministic kernel for {what} on a GPU; set it to False, or compute "
                "on the CPU with USE_CUDA False"
            ) from error
        if _CUBLAS[0] in text:
            raise UserError(
                f"TRAIN.DETERMINISTIC: cuBLAS was started without {_CUBLAS[0]}; set {'='.join(_CUBLAS)} ahead of the program"
            ) from error
        raise


def describe(cfg: CfgNode, device: torch.device) -> None:
    """Say in one line what a GPU computes with."""
    if device.type == "cuda":
        tf32 = {"all": "convolutions and matrix products", "convolutions": "convolutions", "none": "nothing"}
        kernels = "the same bits every time" if cfg.TRAIN.DETERMINISTIC else "the fastest kernels"
        logger.info(
            f"GPU: {torch.cuda.get_device_name(device)}; fp32 is rounded to TF32 in {tf32[cfg.TRAIN.TF32]} (TRAIN.TF32); "
            f"{kernels} (TRAIN.DETERMINISTIC)"
        )


def environment(cfg: CfgNode, device: torch.device, precision: str) -> dict[str, Any]:
    """What the times and the last bits of a run depend on, for results.json."""
    cuda, company = device.type == "cuda", COMPANY.get()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({platform.machine()})",
        "precision": precision,
        "tf32": cfg.TRAIN.TF32 if cuda else "none",
        "deterministic": cfg.TRAIN.DETERMINISTIC or not cuda,
        "compile": cfg.TRAIN.COMPILE if cuda else "off",
        "together": company.size if company is not None else 1,
    }


# --- memory ------------------------------------------------------------------------------------------------------


def forget_peak(device: torch.device) -> None:
    """Count a GPU's peak memory from now on. Of the CPU it is that of the process from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(state: PartialState, device: torch.device) -> dict[str, float]:
    """Peak memory in MiB for results.json; all processes call it together.

    ``peak_memory_mib``: of the process with the most. ``peak_memory_mib_sum``: of all, where there are several.
    """
    peaks: Tensor = torch.zeros(state.num_processes, dtype=torch.float64, device=device)
    peaks[state.process_index] = _own_peak(device)
    peaks = sum_over_processes(peaks).cpu()
    total = {"peak_memory_mib_sum": peaks.sum().item()} if state.num_processes > 1 else {}
    return {"peak_memory_mib": peaks.max().item(), **total}


def _own_peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
