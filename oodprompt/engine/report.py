"""The one place where results are written: results.json, results.md, groups.png, training.png."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from oodprompt.files import write_atomically

_BLUE, _RED, _GREY, _GREEN = "#3465a4", "#cc3333", "#888888", "#4e9a06"


def write_results(results: dict[str, Any], directory: str | Path) -> list[Path]:
    """Write ``results.json``, ``results.md`` and ``groups.png``; returns their paths."""
    directory = Path(directory)
    files = [directory / "results.json", directory / "results.md"]
    write_atomically(files[0], json.dumps(results, indent=2) + "\n")
    write_atomically(files[1], results_markdown(results))
    files.append(directory / "groups.png")
    write_atomically(files[-1], _png(groups_figure(results)))
    return files


def method_title(results: dict[str, Any]) -> str:
    """The method of a run in words: "CoOpOOD + DebiasedPT over MaPLe"."""
    over = f" over {results['base']}" if results["base"] not in ("", results["trainer"]) else ""
    return " + ".join([results["trainer"], *results["stack"]]) + over


def results_markdown(results: dict[str, Any]) -> str:
    """The results as tables that a person reads."""
    title = method_title(results)
    head = [
        ("data set", f"{results['dataset']} ({results['split']}, {results['num_samples']:,} images)"),
        ("backbone", results["backbone"]),
        ("seed", results["seed"]),
        ("accuracy", _percent(results["accuracy"])),
        ("worst-group accuracy", _percent(results["worst_group_accuracy"])),
        ("gap", _percent(results["gap"])),
        ("adjusted average accuracy", _percent(results["adjusted_average_accuracy"])),
        ("macro F1", _percent(results["macro_f1"])),
        ("checkpoint", results["checkpoint"] or "none"),
    ]
    parts = [f"# {title}\n", markdown_table(("", ""), head)]
    if results["groups"]:
        rows = [
            (g["class"], g["attribute"], f"{g['num_train']:,}", f"{g['num_samples']:,}", _percent(g["accuracy"]))
            for g in results["groups"]
        ]
        parts += [
            "\n## Groups\n",
            markdown_table(("class", "attribute", "training images", "images", "accuracy"), rows),
        ]
    rows = [(c["class"], f"{c['num_samples']:,}", _percent(c["accuracy"])) for c in results["classes"]]
    parts += ["\n## Classes\n", markdown_table(("class", "images", "accuracy"), rows)]
    if results.get("other_predictions"):
        rows = [
            (name, _percent(m["accuracy"]), _percent(m["worst_group_accuracy"]))
            for name, m in results["other_predictions"].items()
        ]
        header = ("prediction", "accuracy", "worst-group accuracy")
        parts += ["\n## Other predictions of the same model\n", markdown_table(header, rows)]
    if results.get("selections"):
        parts += ["\n## Which epoch\n", selections_table(results["selections"])]
    return "\n".join(parts) + "\n"


def selections_table(selections: Sequence[dict[str, Any]]) -> str:
    """What each criterion on validation data would have chosen, and the accuracies of that epoch on the tested split."""
    rows = [
        (
            s["criterion"].replace("_", " "),
            s["epoch"],
            _percent(s["validation"]),
            _percent(s["accuracy"]),
            _percent(s["worst_group_accuracy"]),
        )
        for s in selections
    ]
    return markdown_table(("epoch chosen by", "epoch", "its value", "accuracy", "worst-group accuracy"), rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, cells as they are but for ``|``, which would end one."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(cells, headers=header, tablefmt="github", disable_numparse=True)


def groups_figure(results: dict[str, Any], most: int = 60) -> Figure:
    """Accuracy per group (or per class without attributes) as bars; the worst one in red, the average as a line.

    Of more than ``most`` groups the worst are drawn.
    """
    rows = results["groups"] or results["classes"]
    count = len(rows)
    if count > most:
        rows = sorted(rows, key=lambda row: row["accuracy"])[:most]
    names = [f"{r['class']} / {r['attribute']}" if "attribute" in r else r["class"] for r in rows]
    if results["groups"]:
        names = [f"{name}\n{r['num_train']:,} in training" for name, r in zip(names, rows, strict=True)]
    names = [name.replace("$", r"\$") for name in names]  # else two of them enclose a formula
    values = [100 * r["accuracy"] for r in rows]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    worst = min(values)
    bars = axes.barh(names, values, color=[_RED if v == worst else _BLUE for v in values])
    # In the bar where there is room, so that the line of the average crosses no number.
    for inside, padding, colour in ((True, -34, "white"), (False, 3, "black")):
        labels = [f"{value:.1f}" if (value > 15) == inside else "" for value in values]
        axes.bar_label(bars, labels, padding=padding, color=colour)
    axes.axvline(
        100 * results["accuracy"], color=_GREY, linestyle="--", label=f"average {100 * results['accuracy']:.1f}"
    )
    axes.set_xlim(0, 114)  # room for the label of a bar of 100
    axes.set_xlabel("accuracy, %")
    axes.invert_yaxis()
    axes.set_title(
        f"{method_title(results)}\n{results['dataset']} ({results['split']}, seed {results['seed']})"
        + (f"\nthe {most} worst of {count:,}" if count > most else "")
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35 / (0.5 * len(rows) + 0.4)), frameon=False)
    return figure


PSEUDO_ATTRIBUTES = "pseudo_attributes.json"


def write_pseudo_attributes(
    rows: dict[str, dict[str, Any]], new: Sequence[str], dataset: Any, noise: float, directory: str | Path
) -> list[str]:
    """Write ``pseudo_attributes.json`` and, where labels are known, ``pseudo_attributes.png``; returns lines to print.

    ``rows`` are ``evaluation.attribute_metrics`` by split; the lines are those of the splits ``new``.
    """
    names, directory = list(dataset.attribute_names), Path(directory)
    content = {"attributes": names, "prompts": [list(p) for p in dataset.attribute_prompts], "noise": noise}
    write_atomically(
        directory / PSEUDO_ATTRIBUTES,
        json.dumps(content | {"splits": rows}, indent=2, ensure_ascii=False) + "\n",
    )
    lines = []
    for split, row in ((split, rows[split]) for split in new):
        if row["accuracy"] is None:
            lines.append(f"Pseudo-attributes ({split}): no attribute labels to compare with")
            continue
        lines.append(f"Pseudo-attributes ({split}): {100 * row['accuracy']:.1f}% agree with the attribute labels")
        lines += [
            f"  {g['class']} / {g['attribute']}\ttotal: {g['num_samples']:,}\tagree: {100 * g['accuracy']:.1f}%"
            for g in row["groups"]
        ]
    known = {split: row for split, row in rows.items() if row["confusion"]}
    if known:
        write_figure(_confusions(known, names), directory / "pseudo_attributes.png")
    return lines


def _confusions(rows: dict[str, dict[str, Any]], names: Sequence[str]) -> Figure:
    """One square per split: how images of each attribute (row) were labelled (column), in per cent of the row."""
    side = 1.6 + 0.55 * max(len(names), 2)
    figure = Figure(figsize=(side * len(rows) + 0.8, side + 0.4), layout="constrained")
    for axes, (split, row) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        values = [[100 * share for share in line] for line in row["confusion"]]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100)
        places = range(len(names))
        for i in places:
            for j in places:
                colour = "white" if values[i][j] > 60 else "black"
                axes.text(j, i, f"{values[i][j]:.1f}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(list(places), names, rotation=30, ha="right")
        axes.set_yticks(list(places), names)
        axes.set_xlabel("what zero-shot CLIP sees")
        axes.set_ylabel("attribute label")
        axes.set_title(f"{split}: {100 * row['accuracy']:.1f} % right")
    return figure


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
    draw(losses, "loss", "total loss", _BLUE)
    losses.set_ylabel("loss")
    values = [row["loss"] for row in history]
    if min(values) > 0 and max(values) > 30 * min(values):
        losses.set_yscale("log")
    draw(rates, "lr", "learning rate", _GREY)
    rates.set_ylabel("learning rate")
    draw(accuracies, "acc", "training batches", _GREY)
    draw(accuracies, "val_accuracy", "validation", _BLUE, 100)
    draw(accuracies, "val_worst_group_accuracy", "validation, worst group", _RED, 100)
    draw(accuracies, "val_worst_pseudo_group_accuracy", "validation, worst pseudo-group", _GREEN, 100, "--")
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
    write_atomically(path, _png(figure))
    return path


def comparison_figure(rows: list[tuple[str, float, float]], title: str) -> Figure:
    """Average and worst-group accuracy of several methods side by side; rows of (name, average, worst), in [0, 1]."""
    figure = Figure(figsize=(7, 1.2 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    for offset, column, colour, label in ((-0.2, 1, _BLUE, "average"), (0.2, 2, _RED, "worst group")):
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


def write_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure as PNG, atomically."""
    write_atomically(path, _png(figure))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
