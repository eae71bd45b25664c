"""Grids that the tests of many runs share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import Line
from tests.helpers.runs import CONFIG, SMALL

TINY = [*SMALL, "TRAIN.VAL_FREQ", "0", "OPTIM.MAX_EPOCH", "2"]


@pytest.fixture
def line(data_root: Path, tmp_path: Path) -> Line:
    """The arguments of a small grid: ``line("CoOp", "CoOpOOD", more=[...], opts=[...], out="out")``."""

    def build(*trainers: str, more: Any = (), opts: Any = (), out: str = "out", seeds: Any = (1, 2)) -> list[str]:
        flags = ["--trainers", *trainers, "--config-file", CONFIG, "--root", data_root, "--out", tmp_path / out]
        return [str(word) for word in (*flags, "--seeds", *seeds, *more, "--opts", *TINY, *opts)]

    return build


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore Ctrl-C, and so their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
