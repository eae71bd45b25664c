"""Finished runs in folders: ours (``results.json``), and those of CoOp, MaPLe and other projects on Dassl (``log.txt``).

Metrics are in per cent.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oodprompt.config.free_keys import FREE_KEYS
from oodprompt.config.keys import get_cfg_default, leaves, merge_file
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.errors import UserError
from oodprompt.reports.results import FRACTIONS, RESULTS, finished_results, keys_of

LOG = "log.txt"
# upstream's name of a metric -> ours
ALIASES = {"worst_group": "worst_group_accuracy", "adjusted_average": "adjusted_average_accuracy"}
_TRAINED = ("Finish training", "Finished training")  # the latter: Dassl up to 0.5
_EVALUATED = "=> result"


def changed_keys(folder: Path, command: Sequence[str]) -> list[str]:
    """The keys in which the run in ``folder`` differs from ``train.py``'s command line of now, with both values.

    Keys that say where things are kept do not count.
    """
    old = get_cfg_default()
    merge_file(old, folder / "config.yaml")
    arguments = build_parser().parse_intermixed_args([*command, "--output-dir", str(folder)])
    new = leaves(setup_cfg(arguments, say=lambda line: None))
    return [f"{k} was {v!r}, is now {new[k]!r}" for k, v in leaves(old).items() if k not in FREE_KEYS and new[k] != v]


def last_line(log: Path) -> str:
    """The last line of a log that says something, cut to 200 characters; empty where there is none."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")[:200]


def log_metrics(log: Path, keyword: str = r"[\w ]+", evaluation: bool = False) -> dict[str, float]:
    """Metrics of a log in upstream's form: name -> the last ``* name: value%`` after the end of training.

    ``keyword`` is a pattern of names. The end is the line ``Finish training`` (``Finished training`` in old Dassl), or
    with ``evaluation`` a line ``=> result``. What comes before it, such as validation, does not count. Lines whose
    number is none are passed over.
    """
    line_of_metric = re.compile(rf"\* ({keyword}): ([.\deE+-]+)%")
    found: dict[str, float] = {}
    ended = False
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in map(str.strip, lines):
            ended = ended or (line.startswith(_EVALUATED) if evaluation else line in _TRAINED)
            if ended and (match := line_of_metric.search(line)):
                with contextlib.suppress(ValueError):
                    value = float(match.groups()[-1])
                    found.pop(match.group(1), None)  # so that the last line comes last
                    found[match.group(1)] = value
    return found


def upstream_values(directory: Path, keyword: str, test_log: bool) -> tuple[dict[Path, float], list[Path]]:
    """What upstream's ``parse_test_res.py`` reads: folder -> value of every folder in ``directory`` that has one.

    Beside it the folders that have none, which upstream's script passes over or dies of.
    """
    values: dict[Path, float] = {}
    folders = subfolders(directory)
    for folder in folders:
        found = log_metrics(folder / LOG, keyword, test_log) if (folder / LOG).is_file() else {}
        if found:
            values[folder] = list(found.values())[-1]
    return values, [folder for folder in folders if folder not in values]


def subfolders(directory: Path) -> list[Path]:
    try:
        return sorted(f for f in directory.iterdir() if f.is_dir() and not f.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}; give a folder of outputs") from error


@dataclass(frozen=True)
class Run:
    """A finished run: ``parts`` of its path without the seed, ``metrics`` in per cent, data set, and its ``keys``."""

    parts: tuple[str, ...]
    seed: int | str
    metrics: dict[str, float]
    dataset: str
    keys: dict[str, Any] = field(default_factory=dict)


def unlike(runs: Iterable[Run]) -> list[str]:
    """A line for each row whose runs have other keys than its first."""
    first: dict[tuple[str, ...], Run] = {}
    lines: dict[tuple[str, ...], str] = {}
    for run in runs:
        one = first.setdefault(run.parts, run)
        changed = sorted(k for k in run.keys if k in one.keys and run.keys[k] != one.keys[k])
        if changed and run.parts not in lines:
            values = ", ".join(f"{k} {one.keys[k]!r} and {run.keys[k]!r}" for k in changed[:3])
            more = f" and {len(changed) - 3} more keys" if len(changed) > 3 else ""
            place = "/".join(run.parts) or "these runs"
            lines[run.parts] = f"{place}: runs of seeds {one.seed} and {run.seed} differ in {values}{more}"
    return list(lines.values())


def seed_of(parts: tuple[str, ...]) -> tuple[tuple[str, ...], int | str]:
    """A path without its part ``seed<N>`` (the last one; else a number at the end), and the seed."""
    for pattern, places in ((r"seed_?(-?\d+)", range(len(parts))[::-1]), (r"s?(\d+)", range(len(parts))[-1:])):
        for i in places:
            if match := re.fullmatch(pattern, parts[i], re.IGNORECASE):
                return (*parts[:i], *parts[i + 1 :]), int(match.group(1))
    return parts, "-"


def _read_run(folder: Path, parts: tuple[str, ...], evaluation: bool) -> tuple[dict[str, float], str, str]:
    """Metrics in per cent, data set, and a note or nothing; ``ValueError`` says why a run does not count."""
    if (folder / RESULTS).is_file():
        results = finished_results(folder)
        if results is None:
            raise ValueError(f"broken {RESULTS}")
        metrics = {key: 100 * results[key] for key in FRACTIONS if results.get(key) is not None}
        return metrics | {"error": 100 - metrics["accuracy"]}, str(results.get("dataset", "")), ""
    if (folder / "config.yaml").is_file() or not (folder / LOG).is_file():
        raise ValueError(_unfinished(folder / LOG))
    head = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    if not evaluation:
        evaluation = any(part in ("test_base", "test_new") for part in parts)
        evaluation = evaluation or re.search(r"^\s*eval_only: True\s*$", head, re.MULTILINE) is not None
    dataset = re.search(r"^\s*dataset_config_file: \S*?([^/\s]+)\.ya?ml\s*$", head, re.MULTILINE)
    for log in [*sorted(folder.glob(f"{LOG}-*"), reverse=True), folder / LOG]:  # a run again in the same folder
        if found := log_metrics(log, evaluation=evaluation):
            note = f"{folder}: read from {log.name}, a later run in the same folder" if log.name != LOG else ""
            return {ALIASES.get(k, k): v for k, v in found.items()}, dataset.group(1) if dataset else "", note
    raise ValueError(_unfinished(folder / LOG))


def _unfinished(log: Path) -> str:
    line = last_line(log)
    return f"unfinished, its log ends in: {line}" if line else f"unfinished, neither {RESULTS} nor anything in {LOG}"


def read_runs(root: Path, evaluation: bool = False) -> tuple[list[Run], list[str]]:
    """All runs under ``root``, and a line for each that does not count."""
    runs, problems = [], []
    for at, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(at)
        parts = folder.relative_to(root).parts
        begun = not folders and bool(re.fullmatch(r"seed_?-?\d+", folder.name))
        if not begun and not {RESULTS, LOG} & set(files):
            continue
        try:
            metrics, dataset, note = _read_run(folder, parts, evaluation)
        except (ValueError, OSError) as error:
            problems.append(f"{folder}: {error}")
            continue
        problems += [note] if note else []
        keys = {key: value for key, value in keys_of(folder).items() if key != "SEED"}
        runs.append(Run(*seed_of(parts), metrics, dataset, keys))
    return runs, problems
