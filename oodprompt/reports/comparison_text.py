"""A comparison in Markdown and as a picture, and all of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodprompt.files import write_atomically
from oodprompt.reports.comparison_page import COLOURS, comparison_page
from oodprompt.reports.comparison_runs import MEASURES
from oodprompt.reports.style import BLUE, RED, bar_axis, draw, epoch_axis, literal, markdown_table, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_IN_PICTURE = 3  # curves


def write_comparison(content: dict[str, Any], output: Path) -> list[Path]:
    """Write comparison.html, comparison.md and comparison.png; returns their paths. ``content`` is ``comparison``'s."""
    page, text = output / "comparison.html", output / "comparison.md"
    write_atomically(page, comparison_page(content))
    write_atomically(text, comparison_markdown(content))
    return [page, text, *draw(output / "comparison.png", lambda: comparison_picture(content))]


def comparison_markdown(content: dict[str, Any]) -> str:
    """The runs, their groups, and the settings that differ, as tables."""
    runs = content["runs"]
    rows = [
        (run["number"], run["method"], run["name"], run["seed"], *(percent(run[key]) for key, _, _ in MEASURES))
        for run in runs
    ]
    header = ("", "method", "run", "seed", *(name for _, name, _ in MEASURES))
    parts = [f"# Comparison of {len(runs)} runs\n", *(f"{line}\n" for line in content["warnings"])]
    parts.append(markdown_table(header, rows))
    for title, entries in (("Groups", content["groups"]), ("Classes", content["classes"])):
        if entries:
            numbers = [run["number"] for run in runs]
            table = []
            for entry in entries:
                values = {row["number"]: percent(row["accuracy"]) for row in entry["rows"]}
                table.append((entry["name"], " or ".join(entry["tested"]), *(values.get(n, "-") for n in numbers)))
            parts += [f"\n## {title}\n", markdown_table(("", "images", *(f"run {n}" for n in numbers)), table)]
    parts.append("\n## Settings that differ\n")
    if content["settings"]:
        settings = []
        for setting in content["settings"]:
            by_run = {number: value["value"] for value in setting["values"] for number in value["runs"]}
            settings.append((setting["key"], *(by_run[run["number"]] for run in runs)))
        parts.append(markdown_table(("key", *(f"run {run['number']}" for run in runs)), settings))
    else:
        parts.append("All runs have the same settings.")
    return "\n".join(parts) + "\n"


def comparison_picture(content: dict[str, Any]) -> Figure:
    """Average and worst group of each run as bars, and the first curves by epoch beside them."""
    runs, curves = content["runs"], content["curves"][:_IN_PICTURE]
    figure = new_figure(6.5 + 4 * len(curves), max(3.2, 1.3 + 0.55 * len(runs)))
    panels = figure.subplots(1, 1 + len(curves), squeeze=False, width_ratios=[1.6] + [1] * len(curves))[0]
    bars, places = panels[0], range(len(runs))
    shown = [(-0.2, "accuracy", BLUE, "average"), (0.2, "worst_group_accuracy", RED, "worst group")]
    if all(run["worst_group_accuracy"] is None for run in runs):
        shown = shown[:1]
    for offset, key, colour, label in shown:
        values = [100 * run[key] if run[key] is not None else 0.0 for run in runs]
        drawn = bars.barh([place + offset for place in places], values, 0.38, color=colour, label=label)
        labels = [f"{value:.1f}" if run[key] is not None else "" for value, run in zip(values, runs, strict=True)]
        bars.bar_label(drawn, labels, padding=3)
    bars.set_yticks(
        list(places), [literal(f"{run['number']}  {run['method']}\n{run['name']}") for run in runs], fontsize=8
    )
    bar_axis(bars, f"{runs[0]['split']} accuracy, %")
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    for axes, curve in zip(panels[1:], curves, strict=True):
        for line in curve["lines"]:
            number = line["number"]
            style = {"color": f"C{(number - 1) % COLOURS}", "linestyle": "-" if number <= COLOURS else "--"}
            axes.plot(*zip(*line["points"], strict=True), marker=".", label=f"run {number}", **style)
        axes.set_title(curve["title"], fontsize=10)
        epoch_axis(axes)
    if curves:
        handles, labels = max((axes.get_legend_handles_labels() for axes in panels[1:]), key=lambda pair: len(pair[0]))
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    return figure
