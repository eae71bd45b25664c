"""``oodprompt compare``: several finished runs on one page."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodprompt.errors import UserError
from oodprompt.log import logger, show_messages
from oodprompt.reports.comparison_runs import MEASURES, ComparedRun, comparison
from oodprompt.reports.comparison_text import comparison_markdown, write_comparison
from oodprompt.reports.results import RESULTS, finished_results, keys_of
from oodprompt.terminal import Parser, exit_status

if TYPE_CHECKING:
    from pandas import DataFrame

DESCRIPTION = """Show several runs side by side: ``oodprompt compare RUN RUN ... --output DIR``.

DIR/comparison.html has a table to sort, accuracies by group, training curves, the settings that differ, and links to the
runs. comparison.md and comparison.png show the same. A folder that is no run stands for all runs below it.
"""


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found: ``content`` as the reports show it, and the ``files`` that were written."""

    content: dict[str, Any]
    files: tuple[Path, ...] = ()

    @property
    def table(self) -> DataFrame:
        """A row per run: number, method, folder, seed, and accuracies as fractions from 0 to 1."""
        import pandas

        columns = ["number", "method", "name", "seed", *(key for key, _, _ in MEASURES), "train_s"]
        return pandas.DataFrame(self.content["runs"])[columns].set_index("number")

    def _repr_html_(self) -> str:
        return self.table.to_html()

    def __str__(self) -> str:
        return comparison_markdown(self.content)


def compare(folders: Sequence[str | Path], output: str | Path | None = None) -> Comparison:
    """Compare finished runs, and write the page, the table and the picture to ``output`` (None: nothing is written).

    ``folders`` are output folders of runs, or folders with runs below them. ``UserError`` where one has no finished run.
    """
    if isinstance(folders, str | Path):
        folders = [folders]
    found = {place: results for folder in folders for place, results in _runs_in(Path(folder))}
    runs = [ComparedRun(place, results, _history(place), keys_of(place)) for place, results in found.items()]
    if not runs:
        raise UserError("compare: no run is named; give the output folders of two runs or more")
    place = Path.cwd() if output is None else Path(output)
    content = comparison(runs, place)
    return Comparison(content, tuple(write_comparison(content, place)) if output is not None else ())


def _runs_in(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """``folder`` if it is a finished run, else the finished runs below it, with their results."""
    if not folder.is_dir():
        raise UserError(f"compare: there is no folder {folder}; give the output folder of a run")
    if (results := finished_results(folder)) is not None:
        return [(folder, results)]
    found, unfinished = list[tuple[Path, dict[str, Any]]](), []
    for at, inside, files in os.walk(folder):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if RESULTS in files and (results := finished_results(Path(at))) is not None:
            found.append((Path(at), results))
        elif "config.yaml" in files:
            unfinished.append(at)
    if not found:
        raise UserError(f"compare: {folder} has no finished run (no whole {RESULTS} in it or below it)")
    for place in unfinished:
        logger.warning(f"Note: {place} has no whole {RESULTS} and is left out")
    return found


def _history(folder: Path) -> list[dict[str, Any]]:
    """The rows by epoch of the run's newest checkpoint; none where it has no checkpoint."""
    from oodprompt.engine import checkpoint  # here: it takes PyTorch, for which --help does not wait

    for pointer in sorted(folder.glob("*/checkpoint")):
        with contextlib.suppress(UserError):
            epoch = checkpoint.newest_epoch(folder, [pointer.parent.name])
            content = checkpoint.load(checkpoint.file_of(folder, pointer.parent.name, epoch))
            if rows := content.get("oodprompt", {}).get("history"):
                return list(rows)
    return []


def build_parser() -> Parser:
    parser = Parser(prog="oodprompt compare", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of runs")
    parser.add_argument("--output", type=Path, default=Path("comparison"), help="folder that is written to")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Compare runs and print their table."""
    show_messages()
    args = build_parser().parse_args(argv)
    found = compare(args.runs, args.output)
    print(comparison_markdown(found.content).split("\n## ")[0].rstrip())
    print("Wrote " + ", ".join(map(str, found.files)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
