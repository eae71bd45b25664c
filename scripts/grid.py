"""Train a grid of runs and tabulate it: ``python scripts/grid.py GRID.yaml [--seeds 1 2 3] [--out FOLDER] [--jobs 2]``.

GRID.yaml says what is trained, each method under each setting with each seed:

    config: configs/trainers/DebiasedPT/tiny_shapes.yaml
    common: TRAIN.VAL_FREQ 0                     # optional, added to every command line
    settings: {"0.95": DATASET.SHAPES.CORRELATION 0.95, "0.5": DATASET.SHAPES.CORRELATION 0.5}
    methods:
      CoOp: --trainer CoOp
      DebiasedPT: --trainer DebiasedPT
    rank: false                                  # optional; true: a sweep on validation data, best method first

Values are pieces of a ``train.py`` command line. Under ``rank``, a method may be a section of several:
``DebiasedPT: {args: --trainer DebiasedPT, keys: {TRAINER.DEBIASEDPT.ETA: [0.5, 1, 2]}}`` is every combination of its keys
(``keys`` may be a list of such mappings), the test split is not read, and rows are sorted by worst-group accuracy.

Runs are ordinary ones, in ``FOLDER/<setting>/<method>/seed<N>``, which share image features in ``FOLDER/features``;
finished ones are not trained again. Writes
``FOLDER/table.md`` and, without ``rank``, ``FOLDER/table.png``.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes, not threads, share the cores

import contextlib
import io
import itertools
import json
import multiprocessing
import re
import shlex
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from oodprompt.cli import Parser, exit_status
from oodprompt.errors import UserError, nearest
from oodprompt.files import write_atomically
from oodprompt.reports.comparison import grid_figure
from oodprompt.reports.style import markdown_table, write_figure
from oodprompt.runs.collecting import changed_keys, spread

_KEYS = ("config", "common", "settings", "methods", "rank")


@dataclass(frozen=True)
class Method:
    """A row: its section (a table of its own under ``rank``), its name there, and its part of the command line."""

    section: str
    name: str
    args: str

    @property
    def folder(self) -> str:
        return re.sub(
            r"[^\w.+=-]+", "_", self.name if self.section in ("", self.name) else f"{self.section}/{self.name}"
        )


def read_grid(path: Path) -> dict[str, Any]:
    """The grid file, with its methods as ``Method``s; ``UserError`` for what it must not hold."""
    if not path.is_file():
        raise UserError(f"no grid file at {path}")
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid yaml: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(grid, dict) or not all(
        isinstance(grid.get(k), dict) and grid[k] for k in ("settings", "methods")
    ):
        raise UserError(f"{path}: a grid needs the mappings settings and methods; see scripts/grid.py --help")
    for key in grid:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown entry {key!r}: {nearest(str(key), _KEYS)}")
    if not isinstance(grid.get("config"), str) or not Path(grid["config"]).is_file():
        raise UserError(f"{path}: config must name a config file, not {grid.get('config')!r}")
    methods = []
    for name, entry in grid["methods"].items():
        if isinstance(entry, str):
            methods.append(Method("", str(name), entry))
        elif grid.get("rank") and isinstance(entry, dict) and entry.keys() == {"args", "keys"}:
            methods += _combinations(path, str(name), entry)
        else:
            raise UserError(f"{path}: methods.{name} must be a command line (or, under rank, have args and keys)")
    pieces = {"common": grid.get("common"), **{f"settings.{k}": v for k, v in grid["settings"].items()}}
    for where, line in [*pieces.items(), *((f"methods.{m.name}", m.args) for m in methods)]:
        if line is not None and not isinstance(line, str):
            raise UserError(f"{path}: {where} must be a piece of a command line, not {line!r}")
        try:
            shlex.split(line or "")
        except ValueError as error:
            raise UserError(f"{path}: {where}: {error} in {line!r}") from error
    return {**grid, "methods": methods, "rank": bool(grid.get("rank")), "settings": dict(grid["settings"])}


def _combinations(path: Path, section: str, entry: dict[str, Any]) -> list[Method]:
    """Every combination of the ``keys`` of a section of a sweep."""
    methods = []
    for keys in entry["keys"] if isinstance(entry["keys"], list) else [entry["keys"]]:
        if not isinstance(keys, dict) or not all(isinstance(values, list) for values in keys.values()):
            raise UserError(
                f"{path}: methods.{section}.keys must be KEY: [value, value, ...], or a list of such mappings"
            )
        for values in itertools.product(*keys.values()):
            pairs = list(zip(keys, values, strict=True))
            label = ", ".join(f"{key.removeprefix('TRAINER.')} {value}" for key, value in pairs) or "as it is"
            line = " ".join(f"{key} {shlex.quote(str(value))}" for key, value in pairs)
            methods.append(Method(section, label, f"{entry['args']} {line}"))
    return methods


def train(command: list[str], output: str) -> str | None:
    """One run in this process; what went wrong, or None."""
    import torch

    from oodprompt import cli

    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.run([*command, "--output-dir", output])
        except Exception as error:  # of any kind: the other runs go on, and the end names it
            return f"{output}: {error}"
    return None


def commands(grid: dict[str, Any], seeds: list[int], out: Path, root: str) -> dict[Path, list[str]]:
    """Output folder -> command line, of every run of the grid."""
    runs = {}
    cache = ["DATALOADER.CACHE_MEMORY_MIB", "0", "DATALOADER.CACHE_DIR", str(out / "features")]
    for (setting, line), method, seed in itertools.product(grid["settings"].items(), grid["methods"], seeds):
        folder = out / str(setting) / method.folder / f"seed{seed}"
        flags = ["--config-file", grid["config"], "--root", root, "--seed", str(seed)]
        keys = [*shlex.split(grid.get("common") or ""), *shlex.split(line or ""), *shlex.split(method.args)]
        if folder in runs:
            raise UserError(f"two methods of the grid go to the folder {folder}: give one another name")
        runs[folder] = [*flags, *cache, *keys, *(["TEST.SPLIT", "val"] if grid["rank"] else [])]
    return runs


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return 100 * statistics.fmean(row[key] for row in rows)


def tables(grid: dict[str, Any], results: dict[tuple[str, Method], list[dict[str, Any]]]) -> str:
    """One table per quantity, settings as columns; or, under ``rank``, one per section with the best row first."""
    settings, methods = list(grid["settings"]), grid["methods"]
    if not grid["rank"]:
        parts = []
        for title, key in (
            ("Worst-group accuracy, %", "worst_group_accuracy"),
            ("Average accuracy, %", "accuracy"),
            ("Gap, points", "gap"),
        ):
            rows = [[m.name, *(spread(row[key] for row in results[s, m]) for s in settings)] for m in methods]
            parts.append(f"**{title}**\n\n{markdown_table(['', *map(str, settings)], rows)}\n")
        return "\n".join(parts)
    parts = []
    for section in dict.fromkeys(m.section for m in methods):
        mine = [m for m in methods if m.section == section]
        mine.sort(key=lambda m: -statistics.fmean(mean(results[s, m], "worst_group_accuracy") for s in settings))
        rows = [
            [m.name, *(f"{mean(results[s, m], k):.1f}" for s in settings for k in ("worst_group_accuracy", "accuracy"))]
            for m in mine
        ]
        header = ["", *(f"{s}: {k}" for s in settings for k in ("worst group", "average"))]
        parts.append(f"## {section or 'Others'}\n\n{markdown_table(header, rows)}\n")
    return "\n".join(parts)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, help="default: output/<name of the grid file>")
    parser.add_argument("--root", default="data", help="folder that holds the data sets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs trained at the same time")
    args = parser.parse_args()
    if args.jobs < 1:
        raise UserError("--jobs: give 1 or more")
    grid = read_grid(args.grid)
    out = args.out or Path("output") / args.grid.stem
    runs = commands(grid, args.seeds, out, args.root)
    missing = {folder: line for folder, line in runs.items() if not (folder / "results.json").is_file()}
    for folder in set(runs) - set(missing):
        if changed := changed_keys(folder, runs[folder]):
            raise UserError(f"{folder} is a run of another grid ({changed[0]}): delete it, or choose another --out")
    failed = []
    first = {folder.parts[len(out.parts)]: folder for folder in reversed(missing)}  # renders a setting's images once
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        with tqdm(total=len(missing), desc="Runs", unit="run", disable=None) as bar:
            for batch in (first.values(), [f for f in missing if f not in first.values()]):
                for done in as_completed([pool.submit(train, missing[folder], str(folder)) for folder in batch]):
                    failed += [done.result()] if done.result() else []
                    bar.update()
    if failed:
        raise UserError(f"{len(failed)} of {len(missing)} runs failed; the first is {failed[0]}")
    results = {
        (setting, method): [
            json.loads((out / str(setting) / method.folder / f"seed{seed}" / "results.json").read_text())
            for seed in args.seeds
        ]
        for setting in grid["settings"]
        for method in grid["methods"]
    }
    nameless = [f"{s}/{m.name}" for (s, m), rows in results.items() for r in rows if r["worst_group_accuracy"] is None]
    if nameless:
        raise UserError(
            f"{nameless[0]}: these results have no groups (no attributes in the data set), which tables need"
        )
    text = tables(grid, results)
    write_atomically(out / "table.md", text)
    wrote = [out / "table.md"]
    if not grid["rank"]:
        rows = {
            m.name: [
                (s, *(mean(results[s, m], k) for k in ("worst_group_accuracy", "accuracy"))) for s in grid["settings"]
            ]
            for m in grid["methods"]
        }
        write_figure(grid_figure(rows), out / "table.png")
        wrote.append(out / "table.png")
    print(f"\n{text}\nWrote {', '.join(map(str, wrote))}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
