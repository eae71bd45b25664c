"""Figures that compare methods."""

from __future__ import annotations

from matplotlib.figure import Figure

from oodprompt.reports.style import BLUE, RED


def comparison_figure(rows: list[tuple[str, float, float]], title: str) -> Figure:
    """Average and worst-group accuracy of several methods side by side; rows of (name, average, worst), in [0, 1]."""
    figure = Figure(figsize=(7, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    for offset, column, colour, label in ((-0.2, 1, BLUE, "average"), (0.2, 2, RED, "worst group")):
        bars = axes.barh([p + offset for p in places], [100 * r[column] for r in rows], 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(list(places), [r[0] for r in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 114)
    axes.set_xlabel("test accuracy, %")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def grid_figure(rows: dict[str, list[tuple[str, float, float]]]) -> Figure:
    """Worst-group and average accuracy, in per cent, of methods (rows) under several settings (columns), as colours.

    ``rows``: method -> (setting, worst group, average) in the order of the settings.
    """
    settings = [point[0] for point in next(iter(rows.values()))]
    figure = Figure(figsize=(5.2 + 1.3 * len(settings), 1.4 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, title, column in zip(panels, ("worst group", "average"), (1, 2), strict=True):
        values = [[point[column] for point in points] for points in rows.values()]
        axes.imshow(values, cmap="RdYlGn", vmin=40, vmax=95, aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                axes.text(
                    j, i, f"{value:.1f}", ha="center", va="center", fontsize=8, color="white" if value < 45 else "black"
                )
        axes.set_xticks(range(len(settings)), settings)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_title(f"{title}, %")
    panels[0].set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in rows], fontsize=9)
    return figure
