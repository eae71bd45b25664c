"""The same trainer on the CPU and on a GPU, in one process."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import pytest
import torch
from accelerate import PartialState

# Set to cpu, it runs the tests that need a GPU on the CPU, so that what they say themselves has run.
STAND_IN = "OODPROMPT_GPU_TESTS"


def chooses_gpu_tests(marks: str) -> bool:
    """Whether the expression of ``pytest -m`` asks for the tests that need a GPU."""
    return re.search(r"(?<!not )\bgpu\b", marks) is not None


def device_of_tests() -> str:
    """``cuda``, or ``cpu`` where the variable above asks for it. Skips the test where there is no GPU."""
    if os.environ.get(STAND_IN) == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip(f"torch sees no GPU ({STAND_IN}=cpu runs this test on the CPU)")
    return "cuda"


@contextlib.contextmanager
def using(device: str) -> Iterator[None]:
    """Trainers that are built meanwhile are on ``device``; for ``cpu`` GPUs are hidden."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialState, "_shared_state", {})  # which is of one device for a whole process
        if device == "cpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
