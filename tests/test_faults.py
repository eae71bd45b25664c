"""Runs that are killed, or find the disk full, and are repeated end where the undisturbed run ends."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.forks import Forks
from tests.helpers.kills import METHODS, Killer, differences


@pytest.fixture
def killer(forks: Forks, tmp_path: Path, data_root: Path) -> Killer:
    return Killer(forks, tmp_path, data_root)


def test_killed_ahead_of_a_write_and_repeated_equals_undisturbed(killer: Killer) -> None:
    tally = killer.at_writes("CoOp", lambda number: number % 31 == 0)
    assert tally.problems == [] and tally.kills >= 3


def test_disk_full_from_a_write_on_and_repeated_equals_undisturbed(killer: Killer, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    tally, ends = killer.full_at_writes("CoOp", tmp_path / "disk", lambda number: number % 37 == 0)
    assert tally.problems == [] and tally.kills >= 2
    assert all("No space left" in line or "disk is full" in line for lines in ends.values() for line in lines)


def test_differences_of_two_runs_are_found(killer: Killer, tmp_path: Path) -> None:
    """What the other tests rest on."""
    place, _ = killer.undisturbed("GroupDRO")
    other = tmp_path / "other"
    shutil.copytree(place, other)
    assert differences(place, other) == []
    pointers = sorted(other.glob("out/*/checkpoint"))
    checkpoint = pointers[0].with_name("model.pth.tar-3")
    content = bytearray(checkpoint.read_bytes())
    at = content.index(b"\xcd\xcc\xcc\x3d") if b"\xcd\xcc\xcc\x3d" in content else len(content) // 2
    content[at] ^= 1
    pointers[0].unlink()
    (other / "out" / "x").touch()
    results = other / "out" / "results.json"
    results.write_text(results.read_text().replace('"seed": 1', '"seed": 2'))
    assert [line.split()[0].rstrip(":") for line in differences(place, other)] == [
        str(pointers[0].relative_to(other)),
        "out/x",
        "out/results.json",
    ]


@pytest.mark.slow  # last run: never
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.timeout(3600)
def test_killed_ahead_of_every_write(method: str, killer: Killer) -> None:
    tally = killer.at_writes(method)
    assert tally.problems == [] and tally.kills > 80


@pytest.mark.slow  # last run: never
@pytest.mark.timeout(3600)
def test_killed_at_fifty_random_moments(killer: Killer) -> None:
    tally = killer.at_random(list(METHODS), 50, seed=1)
    assert tally.problems == [] and tally.kills >= 50


@pytest.mark.slow  # last run: never
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS)
def test_disk_full_from_every_write_on(method: str, killer: Killer, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    tally, _ = killer.full_at_writes(method, tmp_path / "disk", lambda number: number % 3 == 0)
    assert tally.problems == []
