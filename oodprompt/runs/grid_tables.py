"""The tables, the picture and the page of a grid file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from oodprompt.files import write_atomically
from oodprompt.reports.comparison import comparison_figure, grid_figure
from oodprompt.reports.results import finished_results
from oodprompt.reports.style import markdown_table, write_figure
from oodprompt.runs.aggregate import LABELS, Row, Tree, cell_of
from oodprompt.runs.grid import TrainingRun
from oodprompt.runs.grid_file import GridFile, Method
from oodprompt.runs.tables import spread, tables

Results = dict[tuple[str, Method], list[dict[str, Any]]]
TITLES = {
    "worst_group_accuracy": "Worst-group accuracy, %",
    "accuracy": "Average accuracy, %",
    "gap": "Gap, points",
}


def results_of(grid: GridFile, runs: Iterable[TrainingRun]) -> Results:
    """(setting, method) -> the results of its finished runs, by seed."""
    found: Results = {(setting, method): [] for setting in grid.settings for method in grid.methods}
    by_folder = {method.folder: method for method in grid.methods}
    for run in sorted(runs, key=lambda run: run.seed):
        if (results := finished_results(run.folder)) is not None:
            found[run.setting, by_folder[run.method]].append(results)
    return found


def write_tables(grid: GridFile, results: Results, out: Path) -> tuple[str, list[Path]]:
    """Write the tables of a grid, and without ``rank`` a picture, into ``out``; returns their text and the files.

    One setting makes ``comparison.md`` and ``comparison.png``, several and a sweep ``table.md`` (and ``table.png``).
    """
    name = "comparison" if len(grid.settings) == 1 and not grid.rank else "table"
    text, files = tables_text(grid, results), [out / f"{name}.md"]
    write_atomically(files[0], text)
    if not grid.rank and _has_groups(results):
        files.append(out / f"{name}.png")
        write_figure(
            _comparison_figure(grid, results) if name == "comparison" else _grid_figure(grid, results), files[1]
        )
    return text, files


def tables_text(grid: GridFile, results: Results) -> str:
    """One table of all metrics for one setting; one per metric, settings as columns; or, under ``rank``, one per section."""
    if grid.rank:
        return _ranked(grid, results)
    if len(grid.settings) == 1:
        return _comparison(grid, results)
    parts = []
    for key, title in TITLES.items():
        if not any(row.get(key) is not None for rows in results.values() for row in rows):
            continue
        rows = [[m.name, *(spread(_values(results[s, m], key)) for s in grid.settings)] for m in grid.methods]
        parts.append(f"**{title}**\n\n{markdown_table(['', *grid.settings], rows)}\n")
    return "\n".join(parts)


def headline(results: Results) -> str:
    """What the results of a grid with one setting are of."""
    rows = [row for rows in results.values() for row in rows]
    seeds = max(len(rows) for rows in results.values())
    parts = [
        *(str(rows[0][key]) for key in ("dataset", "backbone", "split")),
        f"{seeds} seed{'s' if seeds > 1 else ''}",
    ]
    return ", ".join(parts)


def page_text(grid: GridFile, text: str) -> str:
    """The page of a grid: its title, the first paragraph about it, the command, the other paragraphs, its tables."""
    first, _, rest = grid.about.partition("\n\n")
    command = f"python scripts/benchmark.py {grid.path} --seeds {' '.join(map(str, grid.seeds))}"
    parts = [f"# {grid.title or grid.path.stem}", first, f"```bash\n{command}\n```", rest, text]
    return "\n\n".join(part for part in parts if part)


def _comparison(grid: GridFile, results: Results) -> str:
    rows = []
    for (_, method), found in results.items():
        row = Row((method.name,), name=method.name)
        for key in LABELS:
            if values := _values(found, key):
                row.values[key] = {i: 100 * value for i, value in enumerate(values)}
        row.cells = {key: cell_of(list(by.values()), ci95=False) for key, by in row.values.items()}
        rows.append(row)
    return tables(Tree(rows, [], []))


def _ranked(grid: GridFile, results: Results) -> str:
    keys = ("worst_group_accuracy", "accuracy") if _has_groups(results) else ("accuracy",)
    parts = []
    for section in dict.fromkeys(m.section for m in grid.methods):
        mine = [m for m in grid.methods if m.section == section]
        mine.sort(key=lambda m: _over_settings(grid, results, m, keys[0]), reverse=True)
        rows = [
            [m.name, *(_mean(results[s, m], key) for s in grid.settings for key in keys)] for m in mine
        ]  # the order of the file where two are equal
        names = {"worst_group_accuracy": "worst group", "accuracy": "average"}
        header = ["", *(f"{s}: {names[key]}" if s else names[key] for s in grid.settings for key in keys)]
        parts.append(f"## {section or 'Others'}\n\n{markdown_table(header, rows)}\n")
    return "\n".join(parts)


def _over_settings(grid: GridFile, results: Results, method: Method, key: str) -> float:
    """What a method is ranked by: the mean over settings of its mean over seeds; last where a setting has no results."""
    values = [_values(results[setting, method], key) for setting in grid.settings]
    return statistics.fmean(map(statistics.fmean, values)) if all(values) else -1.0


def _values(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if row.get(key) is not None]


def _mean(rows: Sequence[dict[str, Any]], key: str) -> str:
    values = _values(rows, key)
    return f"{100 * statistics.fmean(values):.1f}" if values else "-"


def _has_groups(results: Results) -> bool:
    return any(_values(rows, "worst_group_accuracy") for rows in results.values())


def _means(rows: Sequence[dict[str, Any]], factor: float) -> tuple[float, float]:
    """Worst-group and average accuracy, means over seeds; not a number where there are none."""
    both = (_values(rows, key) for key in ("worst_group_accuracy", "accuracy"))
    worst, average = (factor * statistics.fmean(values) if values else float("nan") for values in both)
    return worst, average


def _comparison_figure(grid: GridFile, results: Results) -> Any:
    rows = [(method.name, *_means(found, 1)[::-1]) for (_, method), found in results.items() if found]
    return comparison_figure(rows, headline(results))


def _grid_figure(grid: GridFile, results: Results) -> Any:
    return grid_figure({m.name: [(s, *_means(results[s, m], 100)) for s in grid.settings] for m in grid.methods})
