"""Runs that are killed, or find the disk full, and are repeated end where the undisturbed run ends."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from oodprompt import cli
from oodprompt.data import loading
from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.errors import UserError
from tests.helpers.forks import Forks
from tests.helpers.kills import METHODS, UNDRAWN, Killer, differences
from tests.helpers.runs import CONFIG


@pytest.fixture
def killer(forks: Forks, tmp_path: Path, data_root: Path) -> Killer:
    return Killer(forks, tmp_path, data_root)


def test_killed_ahead_of_a_write_and_repeated_equals_undisturbed(killer: Killer) -> None:
    """Half a file; a checkpoint that nobody needs any more; nothing left to train, and no results."""
    model = "out/prompt_learner"
    writes = (f"os.rename {model}/.model.pth.tar-2.", f"os.remove {model}/model.pth.tar-1", "open out/.results.json.")
    tally = killer.ahead_of("DebiasedPT", *writes)
    assert tally.problems == [] and tally.kills == len(writes)


def test_disk_full_from_a_write_on_and_repeated_equals_undisturbed(killer: Killer, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    tally, ends = killer.full_at_writes("CoOp", tmp_path / "disk", lambda number: number % 61 == 0)
    assert tally.problems == [] and tally.kills >= 1
    assert all("No space left" in line or "disk is full" in line for lines in ends.values() for line in lines)


def test_differences_of_two_runs_are_found(killer: Killer, tmp_path: Path) -> None:
    """What the other tests rest on."""
    place, _ = killer.undisturbed("GroupDRO")
    other = tmp_path / "other"
    shutil.copytree(place, other)
    assert differences(place, other) == []
    pointers = sorted(other.glob("out/*/checkpoint"))
    trained = pointers[0].with_name("model.pth.tar-3")
    content = checkpoint.load(trained)
    key, value = next(iter(content["state_dict"].items()))
    content["state_dict"][key] = torch.nextafter(value, value + 1)
    checkpoint.save(content, trained)
    pointers[0].unlink()
    (other / "out" / "x").touch()
    results = other / "out" / "results.json"
    results.write_text(results.read_text().replace('"seed": 1', '"seed": 2').replace('"test_s": ', '"test_s": 1'))
    assert [line.split()[0].rstrip(":") for line in differences(place, other)] == [
        str(pointers[0].relative_to(other)),
        "out/x",
        str(trained.relative_to(other)),
        "out/results.json",
    ]


# --- two at once, and what changes meanwhile ---------------------------------------------------------------------------


def test_of_two_runs_in_one_folder_the_second_is_refused(killer: Killer, forks: Forks) -> None:
    whole, _ = killer.undisturbed("GroupDRO")
    place = killer.place("GroupDRO", "twice")
    slow = "import time\nfrom oodprompt.engine.trainer import PromptTrainer\ntrain = PromptTrainer.train\n"
    slow += "def slowly(self):\n    time.sleep(3)\n    train(self)\nPromptTrainer.train = slowly\n"
    first = forks.start(killer.command("GroupDRO"), place, first=UNDRAWN + slow)
    until = time.monotonic() + 60
    while not (place / "out" / "log.txt").is_file() and time.monotonic() < until:
        time.sleep(0.01)
    hasty = "from oodprompt import files\nfiles._PATIENCE = 0.1\n"
    (second,) = forks.wait(forks.start(killer.command("GroupDRO"), place, first=UNDRAWN + hasty))
    assert second.returncode == 2
    assert re.fullmatch(
        rf"error: another run \(process {first.pid} on .*\) writes to out: wait for its end, or choose another "
        r"--output-dir\n",
        second.stderr,
    )
    assert forks.wait(first)[0].returncode == 0
    assert differences(whole, place) == [] and "another run" not in (place / "out" / "log.txt").read_text()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a csv file of 24 images."""
    rng, rows = np.random.default_rng(0), ["image,label,split,attribute"]
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{('cat', 'dog')[i % 2]},{('train', 'val', 'test')[i // 8]},{('sea', 'land')[i // 2 % 2]}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def line(photos: Path, *more: str) -> list[str]:
    """The command of a small run on ``photos``, with files of features."""
    flags = ["--trainer", "CoOp", "--config-file", CONFIG, "--root", str(photos), "--output-dir", str(photos / "out")]
    keys = ["DATASET.NAME", "CSV", "OPTIM.MAX_EPOCH", "2", "DATALOADER.FEATURE_CACHE", "disk"]
    return [*flags, *keys, "DATALOADER.CACHE_DIR", str(photos / "cache"), *more]


def trainer(words: list[str]) -> PromptTrainer:
    return build_trainer(cli.setup_cfg(cli.build_parser().parse_intermixed_args(words)))


@pytest.mark.parametrize("cache", ["disk", "memory", "off"])
@pytest.mark.usefixtures("undrawn")
def test_an_image_that_goes_after_the_list_was_read_is_named(cache: str, photos: Path) -> None:
    built = trainer(line(photos, "DATALOADER.FEATURE_CACHE", cache))
    (photos / "3.png").unlink()
    with pytest.raises(UserError, match=r"3\.png"):
        built.train()
    assert not (photos / "out" / "results.json").exists()


@pytest.mark.usefixtures("undrawn")
def test_an_image_that_changes_while_features_are_computed_is_read_again_by_the_next_run(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, changed = loading.read_image, []

    def late(path: str, *arguments: Any) -> Image.Image:
        image = read(path, *arguments)
        if path.endswith("/3.png") and not changed:
            changed.append(path)
            Image.new("RGB", (48, 48), (200, 30, 30)).save(path)
        return image

    monkeypatch.setattr(loading, "read_image", late)
    cli.run(line(photos))
    shutil.move(photos / "out", photos / "before")
    cli.run(line(photos))
    after = [checkpoint.load(p)["state_dict"]["ctx"] for p in (photos / "out").glob("*/model.pth.tar-2")]
    shutil.rmtree(photos / "cache")
    shutil.rmtree(photos / "out")
    cli.run(line(photos))
    fresh = [checkpoint.load(p)["state_dict"]["ctx"] for p in (photos / "out").glob("*/model.pth.tar-2")]
    assert changed and after and all(torch.equal(a, b) for a, b in zip(after, fresh, strict=True))


@pytest.mark.usefixtures("undrawn")
def test_a_csv_file_that_changes_between_start_and_resume_is_refused(photos: Path) -> None:
    cli.run(line(photos))
    table = photos / "metadata.csv"
    table.write_text(table.read_text().replace("3.png,dog", "3.png,cat"))
    with pytest.raises(UserError, match="the training or validation data are others"):
        cli.run(line(photos))


def test_an_output_folder_that_cannot_be_written_is_refused_first(photos: Path) -> None:
    words = line(photos)
    words[words.index("--output-dir") + 1] = "/proc/out"
    with pytest.raises(UserError, match=r"cannot write /proc/out/log.txt: .*choose another --output-dir"):
        cli.run(words)


def test_a_home_that_cannot_be_written_stops_nothing(killer: Killer, forks: Forks) -> None:
    place = killer.place("GroupDRO", "homeless")
    words = killer.command("GroupDRO")
    words = words[: words.index("DATALOADER.CACHE_DIR")]
    words += ["DATALOADER.FEATURE_CACHE", "auto", "DATALOADER.CACHE_MEMORY_MIB", "0"]
    (done,) = forks.wait(forks.start(words, place, {"HOME": "/proc/nonexistent"}, first=UNDRAWN))
    assert done.returncode == 0, done.stderr
    assert (place / "out" / "results.json").is_file()


# --- all of it, for a long time ----------------------------------------------------------------------------------------


@pytest.mark.slow  # last run: 27 November 2026, of CoOp, CoOpOOD and DebiasedPT
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.timeout(3600)
def test_killed_ahead_of_every_write(method: str, killer: Killer) -> None:
    tally = killer.at_writes(method)
    assert tally.problems == [] and tally.kills > 80


@pytest.mark.slow  # last run: 27 November 2026
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
