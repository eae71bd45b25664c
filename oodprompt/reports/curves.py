"""Curves by epoch: ``training.png`` and ``groups_by_epoch.png``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from oodprompt.files import write_atomically
from oodprompt.reports.style import BLUE, GREEN, GREY, RED, png, write_figure


def group_curves(history: Sequence[dict[str, Any]], most: int = 12) -> Figure | None:
    """What debiasers keep by group, and validation accuracy by group, by epoch; None where there is nothing.

    Of more than ``most`` groups those whose first quantity is largest in the last epoch are drawn.
    """
    rows = [row for row in history if row.get("by_group")]
    titles = list(dict.fromkeys(title for row in rows for title in row["by_group"]))
    if not rows:
        return None
    last = rows[-1]["by_group"][titles[0]]
    names = sorted(last, key=lambda name: -last[name])[:most] if len(last) > most else list(last)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: "-" if i < 10 else "--" for i, name in enumerate(names)}
    figure = Figure(figsize=(4.3 * len(titles), 3.6), layout="constrained")
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        for name in names:
            points = [(r["epoch"], r["by_group"][title][name]) for r in rows if name in r["by_group"].get(title, {})]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colours[name],
                    linestyle=styles[name],
                    label=name,
                    marker="." if len(points) < 60 else None,
                )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        top = max((max(line.get_ydata(), default=0) for line in axes.get_lines()), default=0)
        axes.set_ylim(0, 1.05 * top if 0 < top < float("inf") else None)
    handles = {h.get_label(): h for axes in figure.axes for h in axes.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    return figure


def write_training_curves(history: list[dict[str, Any]], directory: str | Path) -> Path:
    """Write ``training.png``: loss, learning rate, and accuracies by epoch; and ``groups_by_epoch.png`` where debiasers
    keep something by group.
    """
    curves = group_curves(history)
    if curves is not None:
        write_figure(curves, Path(directory) / "groups_by_epoch.png")
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]

    def draw(axes: Any, key: str, label: str, colour: str, factor: float = 1.0, line: str = "-") -> None:
        points = [(row["epoch"], factor * row[key]) for row in history if row.get(key) is not None]
        if points:
            dot = "." if len(points) < 60 and line == "-" else None
            axes.plot(*zip(*points, strict=True), label=label, color=colour, linestyle=line, marker=dot)

    losses, rates, accuracies = figure.subplots(1, 3)
    draw(losses, "loss", "total loss", BLUE)
    losses.set_ylabel("loss")
    values = [row["loss"] for row in history]
    if min(values) > 0 and max(values) > 30 * min(values):
        losses.set_yscale("log")
    draw(rates, "lr", "learning rate", GREY)
    rates.set_ylabel("learning rate")
    draw(accuracies, "acc", "training batches", GREY)
    draw(accuracies, "val_accuracy", "validation", BLUE, 100)
    draw(accuracies, "val_worst_group_accuracy", "validation, worst group", RED, 100)
    draw(accuracies, "val_worst_pseudo_group_accuracy", "validation, worst pseudo-group", GREEN, 100, "--")
    accuracies.set_ylabel("accuracy, %")
    accuracies.set_ylim(0, 103)
    accuracies.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for axes in (losses, rates, accuracies):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(epochs) == 1:
            axes.set_xlim(0, 2)
    path = Path(directory) / "training.png"
    write_atomically(path, png(figure))
    return path
