"""Files and words that make no sense: one clear ``UserError``, and no other error, in bounded time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.helpers import fuzz

TARGETS = fuzz.targets()


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_read_or_refused_in_words(name: str, tmp_path: Path) -> None:
    counts = fuzz.fuzz(TARGETS[name], tmp_path, 25)
    assert sum(counts.values()) >= 20


@pytest.mark.parametrize("error", [ValueError, MemoryError, fuzz.TooLong])
def test_other_errors_and_hangs_are_found(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other tests rest on."""
    monkeypatch.setattr(fuzz, "PATIENCE", 0.2)

    def read(folder: Path, content: object) -> None:
        if content == "whole":
            return
        if error is fuzz.TooLong:
            time.sleep(5)
        raise error

    with pytest.raises(error):
        fuzz.fuzz(fuzz.Target(read, TARGETS["csv"].inputs, "whole"), tmp_path, 1)


@pytest.mark.slow  # last run: 27 November 2026
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_ten_thousand_inputs(name: str, tmp_path: Path) -> None:
    fuzz.fuzz(TARGETS[name], tmp_path, 10_000 // len(TARGETS) + 1)
