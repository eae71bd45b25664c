"""Figures that compare methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from oodprompt.reports.style import BLUE, RED, bar_axis, literal, new_figure, write_in_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_figure(rows: Sequence[tuple[str, float, float]], title: str) -> Figure:
    """Average and worst-group test accuracy of several methods as pairs of bars, in per cent.

    ``rows`` are (name, average, worst group), the accuracies as fractions from 0 to 1; the first is drawn on top.
    """
    figure = new_figure(7, 1.2 + 0.6 * len(rows))
    axes = figure.add_subplot()
    places = range(len(rows))
    for offset, column, colour, label in ((-0.2, 1, BLUE, "average"), (0.2, 2, RED, "worst group")):
        bars = axes.barh([p + offset for p in places], [100 * r[column] for r in rows], 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(list(places), [literal(r[0]) for r in rows])
    bar_axis(axes, "test accuracy, %")
    axes.set_title(literal(title))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def grid_figure(rows: Mapping[str, Sequence[tuple[str, float, float]]]) -> Figure:
    """Worst-group and average accuracy of methods (rows) under several settings (columns), as two coloured tables.

    ``rows`` maps each method to its (setting, worst group, average), the accuracies in per cent, in the order of the
    settings. Colours run from 40 to 95 per cent.
    """
    settings = [point[0] for point in next(iter(rows.values()))]
    figure = new_figure(5.2 + 1.3 * len(settings), 1.4 + 0.3 * len(rows))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, column in zip(panels, ("worst group", "average"), (1, 2), strict=True):
        values = [[float(point[column]) for point in points] for points in rows.values()]
        axes.imshow(values, cmap="RdYlGn", vmin=40, vmax=95, aspect="auto")
        write_in_cells(axes, values, lambda value: value < 45, fontsize=8)
        axes.set_xticks(range(len(settings)), [literal(setting) for setting in settings])
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_title(f"{title}, %")
    panels[0].set_yticks(range(len(rows)), [literal(name) for name in rows], fontsize=9)
    return figure
