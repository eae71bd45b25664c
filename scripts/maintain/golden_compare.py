"""Compare two folders of golden runs bit for bit: what ``golden.py compare`` does."""

from __future__ import annotations

import csv
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SHARED = ("data", "features")  # folders beside the runs that are no runs
FINISHED = "finished"  # the file that says that all commands of a run have succeeded
NOT_RESULTS = {
    "time",
    "train_seconds",
    "step_ms_median",
    "peak_memory_mib",
    "peak_memory_mib_sum",
    "environment",
    "imports",
}
WORDING = {"title", "facts"}  # entries of discovery.json that are sentences
METRIC_LINE = re.compile(r"\* |=> result|Finish training|Evaluate on the|epoch \[")
TIMING_FIELD = re.compile(r" (time \S+ \(\S+\)|data \S+|eta .*$)")


class _Stub:
    """Stands for an object of a checkpoint whose class is not here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return type(name, (_Stub,), {})


_PICKLE = SimpleNamespace(Unpickler=_Unpickler, load=pickle.load, __name__="pickle")


def read(file: Path, folder: Path) -> Any:
    """What a file of a run holds, without times; places are relative to ``folder``."""
    if ".pth.tar" in file.name:
        content: Any = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    elif file.suffix == ".npz":
        content = dict(np.load(file))
    elif file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".csv":
        content = list(csv.reader(file.read_text(encoding="utf-8").splitlines()))
    elif file.name == "log.txt":
        lines = file.read_text(encoding="utf-8").splitlines()
        content = [TIMING_FIELD.sub("", line) for line in lines if METRIC_LINE.match(line)]
    else:
        content = file.read_text(encoding="utf-8").splitlines()
    return _cleaned(content, str(folder))


def _cleaned(value: Any, folder: str) -> Any:
    if isinstance(value, str):
        return value.replace(folder, "FOLDER")
    if isinstance(value, dict):
        return {_cleaned(k, folder): _cleaned(v, folder) for k, v in value.items() if k not in NOT_RESULTS}
    if isinstance(value, (list, tuple)):
        return [_cleaned(v, folder) for v in value]
    return value


def differences(a: Any, b: Any, place: str, notes: set[str]) -> Iterator[tuple[int, str]]:
    """One pair per compared value: how many numbers it holds, and the difference ("" where it is equal)."""
    if isinstance(a, dict) and isinstance(b, dict):
        config = place.endswith((": oodprompt.config", ": oodprompt"))
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                which = "new" if key not in a else "gone"
                if config:
                    notes.add(f"{'config' if place.endswith('config') else 'checkpoint'} key {key} is {which}")
                else:
                    yield 1, f"{place}.{key} is {which}"
            elif place.endswith("discovery.json: ") and key in WORDING:
                if a[key] != b[key]:
                    notes.add(f"the wording of {key} in discovery.json differs")
            else:
                dot = "" if place.endswith(": ") else "."
                yield from differences(a[key], b[key], f"{place}{dot}{key}", notes)
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield 1, f"{place} has {len(a)} entries before, {len(b)} after"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from differences(x, y, f"{place}[{i}]", notes)
    else:
        yield _size(a), "" if same(a, b) else f"{place}: {_shown(a)} before, {_shown(b)} after"


def _size(value: Any) -> int:
    return value.numel() if isinstance(value, torch.Tensor) else value.size if isinstance(value, np.ndarray) else 1


def _shown(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}"
    return repr(value)[:80]


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit and of the same type."""
    if type(a) is not type(b):
        return type(a).__name__ == type(b).__name__ and isinstance(a, _Stub)
    if isinstance(a, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(*raw)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if type(a).__module__.startswith("torch.optim"):
        return True  # a pickled scheduler inside Dassl's: its numbers stand beside it
    return a == b or (a != a and b != b)


def files_of(run: Path) -> dict[str, Path]:
    """The files of a run that hold results, by their place in it."""
    patterns = ("results.json", "discovery.json", "discovery.npz", "model*.pth.tar*", "checkpoint", "predictions.csv")
    found = {path for pattern in (*patterns, "log.txt") for path in run.rglob(pattern) if path.is_file()}
    return {str(path.relative_to(run)): path for path in sorted(found)}


def common_epochs(a: list[str], b: list[str]) -> tuple[list[str], list[str]]:
    """The lines of two logs of a run that was killed, without epochs that only one of them tells of.

    The kill falls anywhere, also between a checkpoint and the line that says so.
    """
    epoch = re.compile(r"epoch \[\S+\]( batch \[\S+\])?")
    keys = [{m.group() for line in lines if (m := epoch.match(line))} for lines in (a, b)]
    both = keys[0] & keys[1]
    kept = []
    for lines in (a, b):
        told = [line for line in lines if not (m := epoch.match(line)) or m.group() in both]
        kept.append(list(dict.fromkeys(told)))
    return kept[0], kept[1]


def compare_run(before: Path, after: Path, killed: bool) -> tuple[int, int, str, set[str]]:
    """Files compared, values compared, the first difference ("" if there is none), and notes."""
    one, other, notes = files_of(before), files_of(after), set[str]()
    values, first = 0, "" if one or other else "there is nothing to compare"
    for which, run in (("before", before), ("after", after)):
        if not (run / FINISHED).is_file():
            first = first or f"the run {which} is not finished"
    for name in sorted({*one, *other}):
        if name not in one or name not in other:
            first = first or f"{name} is {'new' if name not in one else 'missing'}"
            continue
        try:
            a, b = read(one[name], before.parent), read(other[name], after.parent)
        except Exception as error:  # whatever damaged bytes make the readers say
            first = first or f"{name} cannot be read: {error}"
            continue
        if killed and name.endswith("log.txt"):
            a, b = common_epochs(a, b)
        for size, difference in differences(a, b, f"{name}: ", notes):
            values += size
            first = first or difference
    for table in before.rglob("table.md"):
        twin = after / table.relative_to(before)
        equal = twin.is_file() and twin.read_text() == table.read_text()
        notes.add("table.md is equal" if equal else "table.md differs in its text or is missing")
    return len({*one} & {*other}), values, first, notes


def compare(before: Path, after: Path, order: Sequence[str] = ()) -> bool:
    """Print the table, its rows in ``order``; True where everything is equal."""
    before, after = before.resolve(), after.resolve()
    names = {p.name for folder in (before, after) for p in folder.iterdir() if p.is_dir()} - set(SHARED)
    equal, notes = bool(names), dict[str, set[str]]()
    print("| run | files | values | result |\n|---|---|---|---|")
    for name in sorted(names, key=lambda n: (order.index(n) if n in order else len(order), n)):
        files, values, first, notes[name] = compare_run(before / name, after / name, name == "killed")
        result = first.replace("|", "\\|") or "equal"
        print(f"| {name} | {files} | {values:,} | {result} |")
        equal = equal and not first
    for note in sorted(set().union(*notes.values())):
        where = [name for name in notes if note in notes[name]]
        print(f"\nNote: {note} ({', '.join(where)})")
    return equal
