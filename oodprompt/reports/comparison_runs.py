"""Several finished runs side by side: what ``comparison.html``, ``comparison.md`` and ``comparison.png`` are made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from oodprompt.reports.results import method_title

# Columns of the table: entry of the results, its name, and which end is better (None: neither).
MEASURES = (
    ("worst_group_accuracy", "worst group", "high"),
    ("accuracy", "average", "high"),
    ("gap", "gap", "low"),
    ("adjusted_average_accuracy", "adjusted average", "high"),
)
# Curves by epoch: entry of a row, title, and whether it is a fraction, shown in per cent.
CURVES = (
    ("val_worst_group_accuracy", "validation, worst group, %", True),
    ("val_accuracy", "validation, average, %", True),
    ("val_worst_pseudo_group_accuracy", "validation, worst pseudo-group, %", True),
    ("acc", "training batches, %", False),
    ("loss", "loss", False),
)
_LINKED = ("results.md", "discovery.html", "training.png", "log.txt", "config.yaml")


@dataclass(frozen=True)
class ComparedRun:
    """A finished run: its folder, the content of results.json, a row per epoch, and its keys, by their dotted names."""

    folder: Path
    results: dict[str, Any]
    history: Sequence[dict[str, Any]] = ()
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """In words: "CoOpOOD over MaPLe"."""
        return method_title(self.results)


def comparison(runs: Sequence[ComparedRun], output: Path) -> dict[str, Any]:
    """What the reports show of the runs, in their order; links start from the folder ``output``."""
    names = _names([run.folder for run in runs])
    return {
        "runs": [
            {
                "number": i + 1,
                "method": run.method,
                "name": names[i],
                "dataset": run.results["dataset"],
                "backbone": run.results["backbone"],
                "seed": run.results["seed"],
                "split": run.results["split"],
                "num_samples": run.results["num_samples"],
                "train_s": (run.results.get("time") or {}).get("train_s"),
                **{key: run.results.get(key) for key, _, _ in MEASURES},
                "links": [(n, _address(run.folder / n, output)) for n in _LINKED if (run.folder / n).is_file()],
                "folder": _address(run.folder, output),
            }
            for i, run in enumerate(runs)
        ],
        "best": {key: _best(runs, key, end) for key, _, end in MEASURES},
        "groups": _by_group(runs, "groups"),
        "classes": _by_group(runs, "classes"),
        "curves": [curve for key, title, part in CURVES if (curve := _curve(runs, key, title, part))],
        "settings": differing(runs),
        "warnings": _warnings(runs),
    }


def differing(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """The keys in which the runs differ: ``key``, and its ``values`` with the numbers of the ``runs`` that have each."""
    found = []
    for key in sorted({key for run in runs for key in run.keys}):
        values: dict[str, list[int]] = {}
        for i, run in enumerate(runs):
            values.setdefault(_shown(run.keys[key]) if key in run.keys else "not there", []).append(i + 1)
        if len(values) > 1:
            found.append({"key": key, "values": [{"value": v, "runs": numbers} for v, numbers in values.items()]})
    return found


def _shown(value: Any) -> str:
    return str(value) if value != "" else "(empty)"


def _names(folders: Sequence[Path]) -> list[str]:
    """The paths of the folders from the folder that all of them lie in."""
    whole = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath([folder.parent for folder in whole]))
    return [folder.relative_to(common).as_posix() for folder in whole]


def _address(place: Path, output: Path) -> str:
    """A relative link, so that the folders may be moved together."""
    return quote(Path(os.path.relpath(place.resolve(), output.resolve())).as_posix())


def _best(runs: Sequence[ComparedRun], key: str, end: str) -> float | None:
    values = [run.results[key] for run in runs if run.results.get(key) is not None]
    return (max(values) if end == "high" else min(values)) if len(values) > 1 else None


def _by_group(runs: Sequence[ComparedRun], part: str) -> list[dict[str, Any]]:
    """The groups (or classes) of all runs: name, and a row for each run that has it."""
    found: dict[str, dict[str, Any]] = {}
    for i, run in enumerate(runs):
        for row in run.results.get(part) or []:
            name = f"{row['class']} / {row['attribute']}" if part == "groups" else row["class"]
            entry = found.setdefault(name, {"name": name, "tested": [], "trained": [], "rows": []})
            entry["rows"].append({"number": i + 1, "accuracy": row["accuracy"]})
            for kind, images in (("tested", row["num_samples"]), ("trained", row.get("num_train"))):
                if images is not None and f"{images:,}" not in entry[kind]:
                    entry[kind].append(f"{images:,}")  # of runs on other data there are several
    return sorted(found.values(), key=lambda entry: min(row["accuracy"] for row in entry["rows"]))


def _curve(runs: Sequence[ComparedRun], key: str, title: str, is_fraction: bool) -> dict[str, Any] | None:
    """A quantity by epoch: ``lines`` with the ``points`` of each run that has them; None where none has."""
    lines = []
    for i, run in enumerate(runs):
        rows = [row for row in run.history if row.get(key) is not None]
        points = [(int(row["epoch"]), (100 if is_fraction else 1) * float(row[key])) for row in rows]
        if points:
            lines.append({"number": i + 1, "points": points})
    return {"title": title, "lines": lines, "percent": title.endswith("%")} if lines else None


def _warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """What makes the numbers of the runs incomparable."""
    found = []
    for entry, what in (("dataset", "data sets"), ("split", "splits"), ("num_samples", "numbers of images")):
        values = list(dict.fromkeys(str(run.results[entry]) for run in runs))
        if len(values) > 1:
            found.append(f"The runs were evaluated on different {what}: {', '.join(values)}.")
    if without := [str(i + 1) for i, run in enumerate(runs) if not run.history]:
        found.append(f"No training curve is found for run{'s' if without[1:] else ''} {', '.join(without)}.")
    return found
