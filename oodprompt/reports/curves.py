"""Curves by epoch: ``training.png`` and ``groups_by_epoch.png``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodprompt.reports.style import BLUE, GREEN, GREY, RED, draw, epoch_axis, literal, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DOTTED = 60  # epochs: a line of fewer has a dot at each


def write_training_curves(history: Sequence[dict[str, Any]], directory: str | Path) -> list[Path]:
    """Write ``training.png`` and, where debiasers keep something by group, ``groups_by_epoch.png``.

    ``history`` has a row per epoch with ``epoch``, ``loss``, ``lr`` and, where they were measured, ``acc`` (in per
    cent), ``val_accuracy``, ``val_worst_group_accuracy``, ``val_worst_pseudo_group_accuracy`` (fractions) and
    ``by_group``. Returns the paths of what was drawn; a line says what could not be.
    """
    files = draw(Path(directory) / "training.png", lambda: _training_figure(history))
    return files + draw(Path(directory) / "groups_by_epoch.png", lambda: group_curves(history))


def _training_figure(history: Sequence[dict[str, Any]]) -> Figure:
    """Loss, learning rate, and accuracies in per cent, by epoch."""
    figure = new_figure(13, 3.2)

    def draw(axes: Axes, key: str, label: str, colour: str, factor: float = 1.0, line: str = "-") -> None:
        points = [(row["epoch"], factor * row[key]) for row in history if row.get(key) is not None]
        _plot(axes, points, dots=line == "-", label=label, color=colour, linestyle=line)

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
        epoch_axis(axes)
        if len(history) == 1:
            axes.set_xlim(0, 2)
    return figure


def group_curves(history: Sequence[dict[str, Any]], most: int = 12) -> Figure | None:
    """What debiasers keep by group, and validation accuracy by group, by epoch; None where there is nothing.

    A row's ``by_group`` maps the title of a panel to group -> value, in whatever unit the debiaser keeps. Of more than
    ``most`` groups those whose first quantity is largest in the last epoch are drawn.
    """
    rows = [row for row in history if row.get("by_group")]
    if not rows:
        return None
    titles = list(dict.fromkeys(title for row in rows for title in row["by_group"]))
    last = rows[-1]["by_group"][titles[0]]
    names = sorted(last, key=lambda name: -last[name])[:most] if len(last) > most else list(last)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: "-" if i < 10 else "--" for i, name in enumerate(names)}
    figure = new_figure(4.3 * len(titles), 3.6)
    for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        for name in names:
            points = [(r["epoch"], r["by_group"][title][name]) for r in rows if name in r["by_group"].get(title, {})]
            _plot(axes, points, color=colours[name], linestyle=styles[name], label=literal(name))
        axes.set_title(literal(title), fontsize=10)
        epoch_axis(axes)
        top = max((max(line.get_ydata(), default=0) for line in axes.get_lines()), default=0)
        axes.set_ylim(0, 1.05 * top if 0 < top < float("inf") else None)
    handles = {str(h.get_label()): h for axes in figure.axes for h in axes.get_lines()}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4), frameon=False
    )
    return figure


def _plot(axes: Axes, points: Sequence[tuple[float, float]], dots: bool = True, **style: Any) -> None:
    """Draw (epoch, value) as a line, with a dot at each epoch where they are few; nothing where there are none."""
    if points:
        axes.plot(*zip(*points, strict=True), marker="." if dots and len(points) < _DOTTED else None, **style)
