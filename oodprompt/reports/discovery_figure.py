"""``discovery.png``: the clusters of a discovery as one figure, drawn from the content of ``discovery.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from oodprompt.reports.discovery_text import NEAREST, dropped, largest_gaps, survivors, verdict
from oodprompt.reports.pictures import is_small
from oodprompt.reports.style import BLUE, GREY, RED, listing, literal, new_figure, number, signed, whole_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_YELLOW = "#ffd93b"  # the outline of a region
_WIDTH, _PITCH_X, _PITCH_Y = 12.5, 1.72, 1.95  # of the figure, and from one picture in it to the next, in inches
_CLASSES = 10  # in the chart of one cluster


def discovery_figure(content: dict[str, Any], image: Callable[[int], Image.Image], most: int = 4) -> Figure:
    """The first ``most`` clusters, one below the other: regions on their images left, accuracy by class right.

    When nothing survives, the nearest candidates are drawn. ``image(i)`` gives image i of the split in RGB. Accuracies
    are in per cent, with the cluster and without.
    """
    clusters = (survivors(content) or dropped(content)[:NEAREST])[:most]
    charts = [largest_gaps(cluster, _CLASSES) for cluster in clusters]
    heights = [max(2 * _PITCH_Y, 0.9 + 0.34 * len(rows)) + 0.55 for rows in charts]
    height = sum(heights) + 0.85
    figure = new_figure(_WIDTH, height, layout=None)
    figure.text(0.25 / _WIDTH, 1 - 0.38 / height, _short(content["title"], 100), fontsize=15, fontweight="bold")
    outcome = verdict(content).split(". ")[0].rstrip(".")
    figure.text(0.25 / _WIDTH, 1 - 0.65 / height, literal(outcome), fontsize=11)
    top = height - 0.85
    for cluster, chart, part in zip(clusters, charts, heights, strict=True):
        _draw_cluster(figure, cluster, chart, image, top)
        top -= part
    return figure


def _short(name: str, most: int = 22) -> str:
    return literal(name if len(name) <= most else f"{name[: most - 1]}…")


def _draw_cluster(
    figure: Figure,
    cluster: dict[str, Any],
    chart: Sequence[dict[str, Any]],
    image: Callable[[int], Image.Image],
    top: float,
) -> None:
    """Draw a cluster below ``top``, in inches from the bottom of the figure."""
    height = figure.get_figheight()

    def place(x: float, y: float, wide: float, high: float) -> tuple[float, float, float, float]:
        """Inches from the left and from ``top`` -> fractions of the figure."""
        return x / _WIDTH, (top - y - high) / height, wide / _WIDTH, high / height

    figure.text(*place(0.25, 0.25, 0, 0)[:2], _heading(cluster), fontsize=10.5, fontweight="bold")
    for i, row in enumerate(cluster["regions"][:8]):
        corner = 0.25 + _PITCH_X * (i % 4), 0.42 + _PITCH_Y * (i // 4)
        axes = figure.add_axes(place(*corner, _PITCH_X - 0.2, _PITCH_X - 0.2), anchor="N")
        _draw_region(axes, row, image(row["index"]))
    if chart:
        _draw_bars(figure.add_axes(place(9.3, 0.65, _WIDTH - 9.6, 0.34 * len(chart))), chart)


def _heading(cluster: dict[str, Any]) -> str:
    words = [f"cluster {cluster['index']}", f"G {number(cluster['score'])}", f"H {number(cluster['influence'])}"]
    if cluster["helps"] is not None:
        words.append(f"helps “{_short(cluster['helps'])}”")
    if not cluster["survives"]:
        words.append(_short(f"dropped: {cluster['reason']}", 80))
    elif cluster["hurts"]:
        words.append("hurts " + listing([f"“{_short(name)}”" for name in cluster["hurts"]], 3))
    return " · ".join(words)


def _draw_region(axes: Axes, row: dict[str, Any], image: Image.Image) -> None:
    """Draw an image with its region outlined over the dimmed rest, and what it is and is taken for."""
    axes.axis("off")
    pixels = np.asarray(image, dtype=float) / 255
    height, width = pixels.shape[:2]
    left, top, right, bottom = row["box"]
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    inside = ((x >= left) & (x < right))[None, :] & ((y >= top) & (y < bottom))[:, None]
    axes.imshow(
        np.where(inside[..., None], pixels, 0.5 * pixels),
        extent=(0, 1, 1, 0),
        aspect=height / width,
        interpolation="nearest" if is_small(image) else "antialiased",
    )
    for colour, line in (("black", 3.5), (_YELLOW, 1.8)):
        from matplotlib.patches import Rectangle

        frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=line)
        frame.set_clip_on(False)
        axes.add_patch(frame)
    is_right = row["true"] == row["predicted"]
    true, predicted = _short(row["true"], 18), _short(row["predicted"], 18)
    caption = f"{true} ✓" if is_right else f"{true}\nsaid {predicted} ✗"
    colour = "black" if is_right else RED
    axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=colour)


def _draw_bars(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the accuracy of each class in per cent, with the cluster and without."""
    places = np.arange(len(rows))
    for offset, p, n, colour, words in (
        (-0.2, "p_in", "n_in", BLUE, "with the cluster"),
        (0.2, "p_out", "n_out", GREY, "without"),
    ):
        bars = axes.barh(places + offset, [100 * row[p] for row in rows], 0.38, color=colour, label=words)
        labels = [f"{whole_percent(row[p])} of {row[n]:,}" for row in rows]
        axes.bar_label(bars, labels=labels, padding=3, fontsize=7.5)
    axes.set_yticks(places, [f"{_short(row['class'])}  {signed(row['gap'])}" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 132)
    axes.set_xticks(range(0, 101, 25))
    axes.tick_params(labelsize=8.5)
    axes.set_xlabel("accuracy, % (beside each class: its gap)", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8.5, borderpad=0)
