"""Runs that are disturbed and repeated, and what differs from the undisturbed run.

They are killed at random moments, or ahead of a write, or the disk is full from that write on.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from oodprompt.engine import checkpoint
from tests.helpers.forks import Done, Forks
from tests.helpers.runs import CONFIG

# Relative to the folder in which a run starts, so that two runs in two folders have the same command line.
OUT, CACHE = "out", "cache"
DISK = ["DATALOADER.FEATURE_CACHE", "disk", "DATALOADER.CACHE_DIR", CACHE]
BEST = ["TEST.FINAL_MODEL", "best_val", "TRAIN.VAL_FREQ", "1"]
CROPS = ["INPUT.TRANSFORMS", "('random_resized_crop', 'random_flip', 'normalize')"]
# Between them: cached features and none, one model and two, the best epoch, group weights, a first stage, pseudo-attributes.
METHODS = {
    "CoOp": ["CoOp", *DISK, *BEST],
    "CoOpOOD over MaPLe": [
        *("CoOpOOD", "--base", "MaPLe", "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_ALPHA", "0.1"),
        *("TRAIN.CHECKPOINT_FREQ", "2"),
        *(*CROPS, *BEST),
    ],
    "DebiasedPT": ["DebiasedPT", *DISK, *BEST, "TEST.SELECTION", "auto"],
    "GroupDRO": ["GroupDRO", "TRAINER.GROUPS", "true", *DISK],
    "JTT": ["JTT", "TRAINER.JTT.FIRST_EPOCHS", "2", *DISK],
}
SIZE = [
    *("DATASET.SHAPES.NUM_TRAIN", "32", "DATASET.SHAPES.NUM_VAL", "16", "DATASET.SHAPES.NUM_TEST", "16"),
    *("DATALOADER.TRAIN_X.BATCH_SIZE", "16", "OPTIM.MAX_EPOCH", "3", "DATASET.SHAPES.CORRELATION", "0.8"),
]
UNDRAWN = """
from matplotlib.backends.backend_agg import FigureCanvasAgg
FigureCanvasAgg.print_png = lambda canvas, file, **_: file.write(b"not drawn")
"""
# An audit hook hears of whatever changes the folder of the run, ahead of the system. At the n-th it disturbs the run, and
# writes into a file what it was that came next.
_AT_WRITE = """
import errno, os, signal, sys

def kill(place):
    os.kill(os.getpid(), signal.SIGKILL)

def fill(place):
    with open(os.path.join(place, "filler"), "ab", buffering=0) as file:
        for size in (2**16, 2**10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass

full = False

def refuse(place):
    global full
    full = True

def watch(number, place, disturb, answer):
    seen = 0
    def count(event, path):
        nonlocal seen
        if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(place + os.sep):
            return
        seen += 1
        what = f"{event} {os.path.relpath(os.fsdecode(path), place)}"
        if seen == number or isinstance(number, str) and what.startswith(number):
            with open(answer, "w") as file:
                file.write(what)
            disturb(place)
        if full and event != "os.remove":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    def hook(event, arguments):
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            count(event, arguments[0])
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link"):
            count(event, arguments[0])
    sync = os.fsync
    def fsync(descriptor):
        count("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)
    os.fsync = fsync
    sys.addaudithook(hook)
"""
# Kept out of the comparison: times, and the machine.
_FREE = ("time", "peak_memory_mib", "peak_memory_mib_sum", "environment", "seconds")
_FREE_STATE = ("train_seconds", "step_ms_median")
_APPENDED = ("log.txt", "tensorboard")  # a repeated run goes on in them


@dataclass
class Tally:
    """What many killed runs came to: kills that hit, runs that were repeated, and what differed, a line each."""

    kills: int = 0
    runs: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Killer:
    """Runs a method in folders below ``folder``, with data in ``root``; ``draws``: whether pictures are drawn."""

    def __init__(self, forks: Forks, folder: Path, root: Path, size: Sequence[str] = SIZE, draws: bool = False) -> None:
        self.forks, self.folder, self.root, self.size, self.draws = forks, folder, root, size, draws
        self.answer = folder / "answer"

    def command(self, method: str) -> list[str]:
        trainer, *more = METHODS[method]
        flags = ["--trainer", trainer, "--config-file", CONFIG, "--root", str(self.root), "--output-dir", OUT]
        return ["train.py", *flags, *self.size, *more]

    def place(self, method: str, name: str) -> Path:
        """A new folder for a run."""
        place = self.folder / method.replace(" ", "_") / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def run(
        self,
        method: str,
        place: Path,
        kill_at: int | str = 0,
        kill_after: float | None = None,
        full_at: int = 0,
        fills: bool = False,
    ) -> Done:
        """Run to the end, or to a SIGKILL ahead of the ``kill_at``-th write, or after ``kill_after`` seconds.

        ``kill_at`` may also be the beginning of what comes next: "open out/results.json".

        From the ``full_at``-th write on there is no room: ``fills`` the file system of ``place``, or every file that is
        opened there is refused.
        """
        first = "" if self.draws else UNDRAWN
        self.answer.unlink(missing_ok=True)
        if number := kill_at or full_at:
            how = "kill" if kill_at else "fill" if fills else "refuse"
            first += f"{_AT_WRITE}\nwatch({number!r}, {str(place)!r}, {how}, {str(self.answer)!r})\n"
        process = self.forks.start(self.command(method), place, first=first)
        if kill_after is not None:
            until = time.monotonic() + kill_after
            while time.monotonic() < until:
                if (done := self.forks.ended(process)) is not None:
                    return done
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
        return self.forks.wait(process)[0]

    def undisturbed(self, method: str) -> tuple[Path, float]:
        """A run from beginning to end: its folder and its seconds."""
        place, began = self.place(method, "undisturbed"), time.monotonic()
        done = self.run(method, place)
        assert done.returncode == 0, done.stderr[-3000:]
        return place, time.monotonic() - began

    def at_writes(self, method: str, chosen: Callable[[int], bool] = lambda number: True) -> Tally:
        """Kill ahead of every write of a run, or of those that are ``chosen`` by number, and repeat it each time."""
        whole, _ = self.undisturbed(method)
        tally, number, began = Tally(), 0, time.monotonic()
        while True:
            number += 1
            if not chosen(number):
                continue
            place = self.place(method, "killed")
            done = self.run(method, place, kill_at=number)
            if done.returncode == 0:  # it has fewer writes
                break
            tally.kills += 1
            self._repeat(method, whole, place, f"{method}, ahead of write {number}", done, tally)
        tally.seconds = time.monotonic() - began
        return tally

    def full_at_writes(
        self, method: str, disk: Path, chosen: Callable[[int], bool] = lambda number: True, fills: bool = False
    ) -> tuple[Tally, dict[str, Counter[str]]]:
        """No room on ``disk``, a folder, from each write of a run on; then there is room again, and it is repeated.

        ``fills``: it is a small file system of its own, which is filled.

        Also returns what was written next -> how the runs ended, as often as they did.
        """
        whole, _ = self.undisturbed(method)
        tally, number, began = Tally(), 0, time.monotonic()
        ends: dict[str, Counter[str]] = defaultdict(Counter)
        while True:
            number += 1
            if not chosen(number):
                continue
            for part in disk.iterdir():
                shutil.rmtree(part)
            place = disk / "run"
            place.mkdir()
            done = self.run(method, place, full_at=number, fills=fills)
            if not self.answer.is_file():  # it has fewer writes
                break
            tally.kills += 1
            what = _kind(self.answer.read_text())
            (place / "filler").unlink(missing_ok=True)
            ends[what][f"status {done.returncode}: {_brief(done, place)}"] += 1
            where = f"{method}, disk full ahead of write {number} ({what})"
            if "Traceback" in done.stderr or done.returncode not in (0, 2):
                tally.problems.append(f"{where}: status {done.returncode}: {done.stderr[-300:]}")
            if done.returncode == 2 or differences(whole, place):
                self._repeat(method, whole, place, where, Done(0, "", ""), tally)
        tally.seconds = time.monotonic() - began
        return tally, ends

    def ahead_of(self, method: str, *writes: str) -> Tally:
        """Kill ahead of the first write that begins with each of ``writes``, and repeat."""
        whole, _ = self.undisturbed(method)
        tally = Tally()
        for write in writes:
            place = self.place(method, "killed")
            done = self.run(method, place, kill_at=write)
            tally.kills += done.returncode == -signal.SIGKILL
            self._repeat(method, whole, place, f"{method}, ahead of {write}", done, tally)
        return tally

    def at_random(self, methods: Sequence[str], kills: int, seed: int, most: int = 2) -> Tally:
        """Kill at ``kills`` random moments, up to ``most`` of them in a row before a run may end."""
        rng, tally, began = random.Random(seed), Tally(), time.monotonic()
        whole = {method: self.undisturbed(method) for method in methods}
        while tally.kills < kills:
            method = methods[tally.kills % len(methods)]
            folder, seconds = whole[method]
            place, after = self.place(method, "killed"), []
            done = Done(0, "", "")
            for _ in range(rng.randint(1, most)):
                moment = rng.uniform(0, seconds)
                done = self.run(method, place, kill_after=moment)
                if done.returncode == 0:
                    break
                tally.kills += 1
                after.append(f"{moment:.2f}")
            if after:
                self._repeat(method, folder, place, f"{method}, after {' and '.join(after)} s", done, tally)
        tally.seconds = time.monotonic() - began
        return tally

    def _repeat(self, method: str, whole: Path, place: Path, where: str, killed: Done, tally: Tally) -> None:
        if killed.returncode != -signal.SIGKILL and killed.returncode != 0:
            tally.problems.append(f"{where}: ended with status {killed.returncode}: {killed.stderr[-300:]}")
        done = self.run(method, place)
        tally.runs += 1
        if done.returncode:
            tally.problems.append(f"{where}: repeated with status {done.returncode}: {done.stderr[-300:]}")
        tally.problems += [f"{where}: {line}" for line in differences(whole, place)]


def _kind(answer: str) -> str:
    """What was written, without the numbers and digests in its name."""
    event, _, name = answer.partition(" ")
    name = re.sub(r"/\.(.*)\.[0-9a-f]{8}\.part", r"/\1", name)
    name = re.sub(r"[0-9a-f]{64}", "FEATURES", name)
    name = re.sub(r"events\.out\.tfevents.*", "events", re.sub(r"tar-\d+", "tar-N", name))
    return name if event != "os.remove" else f"deleting {name}"


def _brief(done: Done, place: Path) -> str:
    """The error of a run, or its notes on what it lacks, without what differs from run to run."""
    notes = [line for line in done.stdout.splitlines() if line.startswith("Note:")]
    text = done.stderr.strip() if done.returncode else "; ".join(dict.fromkeys(notes))
    text = re.sub(r"[0-9a-f]{64}", "FEATURES", text.replace(f"{place}/", ""))
    return re.sub(r"tar-\d+", "tar-N", text)


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the folders of two runs, apart from times and what a repeated run adds to; a line each."""
    names = [_files(place) for place in (one, other)]
    lines = [f"{name} is missing" for name in sorted(names[0] - names[1])]
    lines += [f"{name} is left over" for name in sorted(names[1] - names[0])]
    for name in sorted(names[0] & names[1]):
        a, b = one / name, other / name
        if ".pth.tar" in name:
            lines += [f"{name}: {line}" for line in _unequal(_state(a), _state(b))]
        elif a.suffix == ".json":
            first, second = (
                {k: v for k, v in json.loads(file.read_text()).items() if k not in _FREE} for file in (a, b)
            )
            lines += [f"{name}: {line}" for line in _unequal(first, second)]
        elif a.read_bytes() != b.read_bytes():
            lines.append(f"{name} differs")
    return lines


def _files(place: Path) -> set[str]:
    """All files but those that grow with every run, empty locks, and what the cache says of its files for people."""
    files = (file.relative_to(place) for file in place.rglob("*") if file.is_file())
    described = (f for f in files if not (f.parts[0] == CACHE and f.suffix in (".json", ".lock")))
    return {str(f) for f in described if not set(f.parts) & set(_APPENDED)}


def _state(file: Path) -> dict[str, Any]:
    content = checkpoint.load(file)
    engine = {k: v for k, v in content["oodprompt"].items() if k not in _FREE_STATE}
    return {**content, "oodprompt": engine}


def _unequal(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [f"{name} differs"]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{name} has other keys"]
        return [line for key in a for line in _unequal(a[key], b[key], f"{name}.{key}".strip("."))]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b, strict=True)) for line in _unequal(*pair, f"{name}[{i}]")]
    return [] if a == b else [f"{name} is {b!r}, not {a!r}"[:200]]
