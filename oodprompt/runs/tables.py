"""Rows over seeds as text (Markdown, LaTeX, csv) and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from oodprompt.reports.style import BLUE, GREEN, GREY, RED, markdown_table, new_figure
from oodprompt.runs.aggregate import LABELS, Difference, Row, Tree, cell_of, columns_of, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(tree: Tree, form: str = "markdown", baseline: str = "", digits: int = 1) -> str:
    """The rows as text: ``markdown``, ``latex`` (booktabs) or ``csv`` (one table, full precision, one column a number).

    With ``baseline``, paired differences to the rows of that method.
    """
    parts = [rows for rows in (tree.rows, tree.base2new) if rows]
    if form == "csv":
        return _csv(tree, differences(tree.all_rows, baseline) if baseline else {})
    text = []
    for rows in parts:
        columns = columns_of(rows)
        header = ["method", *(f"{LABELS.get(c, c)}, %" for c in columns), "seeds"]
        cells = [[r.name, *(text_of(r.cells.get(c), digits) for c in columns), r.seeds or "-"] for r in rows]
        text.append(_table(header, cells, form))
    if baseline:
        compared = differences(tree.all_rows, baseline)
        for rows in parts:
            columns = columns_of(rows)
            header = ["method", "against", *(f"{LABELS.get(c, c)}, points" for c in columns), "pairs"]
            cells = [
                [name, base.name, *(_difference_text(by.get(c), digits) for c in columns), _pairs(by)]
                for name, (base, by) in compared.items()
                if any(name == row.name for row in rows)
            ]
            text += [_table(header, cells, form)] if cells else []
    return "\n\n".join(text) + "\n"


def _pairs(by: dict[str, Difference]) -> int:
    return max((difference.pairs for difference in by.values()), default=0)


def text_of(cell: tuple[float, float | None] | None, digits: int) -> str:
    if cell is None:
        return "-"
    mean, spread = cell
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _difference_text(difference: Difference | None, digits: int) -> str:
    """Mean difference, its 95 % interval and p."""
    if difference is None:
        return "-"
    text = f"{difference.mean:+.{digits}f}"
    if difference.low is not None:
        text += f" [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    if difference.p is not None:
        text += ", p < 0.001" if difference.p < 0.001 else f", p = {difference.p:.3f}"
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> str:
    if form == "markdown":
        return markdown_table(header, rows)
    text = tabulate(
        [[str(cell) for cell in row] for row in rows], header, tablefmt="latex_booktabs", disable_numparse=True
    )
    return text.replace("±", r"$\pm$")


def _csv(tree: Tree, compared: dict[str, tuple[Row, dict[str, Difference]]]) -> str:
    columns = columns_of(tree.all_rows)
    header = ["method", "seeds", *(f"{c}_{what}" for c in columns for what in ("mean", tree.spread))]
    fields = ("pairs", "mean", "low", "high", "p")
    if compared:
        header += ["baseline", *(f"{c}_difference_{what}" for c in columns for what in fields)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([name.replace(" ", "_") for name in header])
    for row in tree.all_rows:
        line = [row.name, row.seeds or "", *(v for c in columns for v in row.cells.get(c, (None, None)))]
        if compared:
            base, by = compared.get(row.name, (Row(()), {}))
            line += [base.name, *(getattr(by.get(c), what, None) for c in columns for what in fields)]
        writer.writerow(line)
    return text.getvalue()


def figure(tree: Tree, title: str) -> Figure:
    """Bars of every row's means, spreads as lines on them; one panel for plain rows, one for base-to-new rows."""
    colours = (BLUE, RED, GREY, GREEN)
    panels = [rows for rows in (tree.rows, tree.base2new) if rows]
    count = sum(len(rows) * max(1, len(columns_of(rows))) for rows in panels)
    drawn = new_figure(8, 1.6 * len(panels) + 0.26 * count)
    for axes, rows in zip(drawn.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        columns = columns_of(rows)
        height = 0.8 / len(columns)
        for k, column in enumerate(columns):
            places = [i + height * (k - (len(columns) - 1) / 2) for i, row in enumerate(rows) if column in row.cells]
            cells = [row.cells[column] for row in rows if column in row.cells]
            bars = axes.barh(
                places,
                [mean for mean, _ in cells],
                0.95 * height,
                xerr=[spread or 0 for _, spread in cells],
                color=colours[k % len(colours)],
                label=LABELS.get(column, column),
                ecolor="black",
            )
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axes.set_yticks(range(len(rows)), [row.name.replace("$", r"\$") for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(right=max(114, axes.get_xlim()[1]))  # room for the label of a bar of 100
        axes.set_xlabel("%")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(columns), 4), frameon=False)
    drawn.suptitle(title)
    return drawn


def spread(values: Iterable[float], factor: float = 100, digits: int = 1) -> str:
    """``factor`` times values: mean ± sample standard deviation; the mean alone of one value, "-" of none."""
    values = [factor * value for value in values]
    return text_of(cell_of(values, ci95=False) if values else None, digits)
