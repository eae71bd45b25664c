"""``oodprompt cache`` lists and removes features that runs have kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oodprompt.cache import main
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.features.store import FeatureStore


@pytest.fixture
def folder(build: Callable[..., PromptTrainer], tmp_path: Path) -> Path:
    """Three files, last used today, 10 and 40 days ago, and one that was broken off."""
    folder = tmp_path / "cache"
    encoder = build("CoOp", "DATALOADER.FEATURE_CACHE", "disk", "DATALOADER.CACHE_DIR", folder).encoder
    for days, split in ((40, "test"), (10, "val"), (0, "train")):
        before = set(folder.glob("*.npy"))
        encoder.batches(split)
        (new,) = set(folder.glob("*.npy")) - before
        os.utime(new, (time.time() - days * 86_400,) * 2)
    (folder / ".abc.partial").write_bytes(b"begun")
    os.utime(folder / ".abc.partial", (1, 1))
    return folder


def names(folder: Path) -> list[str]:
    return [entry.facts["split"] for entry in FeatureStore(folder).entries()]


def test_files_are_listed_with_what_they_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["--dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ShapesOnScenes ")[1].split(",")[0] for line in lines[:3]] == ["train", "val", "test"]
    assert lines[0].startswith(time.strftime("%Y-%m-%d")) and "tiny fp32" in lines[0]
    assert lines[3].startswith("1 broken-off") and lines[4].startswith("3 files of image features")


@pytest.mark.parametrize(
    ("flags", "left", "broken"),
    [
        (("--days", "30"), ["train", "val"], False),
        (("--days", "5"), ["train"], False),
        (("--gib", "0.00005"), ["train", "val"], True),
        (("--all",), [], False),
    ],
)
def test_what_was_used_longest_ago_is_removed_first(
    flags: tuple[str, ...], left: list[str], broken: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["prune", "--dir", str(folder), *flags]) == 0
    assert names(folder) == left and (folder / ".abc.partial").exists() == broken
    assert f"; {len(left)} are left" in capsys.readouterr().out


def test_what_is_being_written_is_not_removed(folder: Path) -> None:
    store = FeatureStore(folder)
    with store.lock(store.entries()[0].path):
        assert main(["prune", "--dir", str(folder), "--all"]) == 0
    assert names(folder) == ["train"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune"], "say what to remove"),
        (["--days", "3"], "give `oodprompt cache prune`"),
        (["prune", "--days", "-1"], "numbers of 0 or more"),
        (["--dir", "/no/such"], "there is no folder /no/such"),
    ],
)
def test_wrong_words_take_one_line(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(words if "/no/such" in words else [*words, "--dir", str(folder)]) == 2
    assert message in capsys.readouterr().err
