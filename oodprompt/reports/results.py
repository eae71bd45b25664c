"""The results of a run: ``results.json``, ``results.md`` and ``groups.png``."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from oodprompt.config.free_keys import FREE_KEYS
from oodprompt.files import write_atomically
from oodprompt.log import optional
from oodprompt.reports.style import BLUE, GREY, RED, bar_axis, draw, literal, markdown_table, new_figure, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "results.json"
FRACTIONS = ("accuracy", "macro_f1", "worst_group_accuracy", "adjusted_average_accuracy", "gap")


def write_results(results: dict[str, Any], directory: str | Path) -> list[Path]:
    """Write ``results.json``, then ``results.md`` and ``groups.png``; returns the paths of what was written.

    ``results`` is the outcome of an evaluation; accuracies are fractions from 0 to 1, and None where there are no
    groups. Raises ``UserError`` where ``results.json`` cannot be written; a line says which other file is missing.
    """
    directory = Path(directory)
    files = [directory / RESULTS]
    write_atomically(files[0], json.dumps(results, indent=2) + "\n")
    with optional("results.md"):
        write_atomically(directory / "results.md", results_markdown(results))
        files.append(directory / "results.md")
    return files + draw(directory / "groups.png", lambda: groups_figure(results))


def method_title(results: dict[str, Any]) -> str:
    """The method of a run in words: "CoOpOOD + DebiasedPT over MaPLe"."""
    over = f" over {results['base']}" if results["base"] not in ("", results["trainer"]) else ""
    return " + ".join([results["trainer"], *results["stack"]]) + over


def results_markdown(results: dict[str, Any]) -> str:
    """The results as tables in Markdown, accuracies in per cent: the run, its groups, its classes, and what else there is."""
    title = method_title(results)
    head = [
        ("data set", f"{results['dataset']} ({results['split']}, {results['num_samples']:,} images)"),
        ("backbone", results["backbone"]),
        ("seed", results["seed"]),
        ("accuracy", percent(results["accuracy"])),
        ("worst-group accuracy", percent(results["worst_group_accuracy"])),
        ("gap", percent(results["gap"])),
        ("adjusted average accuracy", percent(results["adjusted_average_accuracy"])),
        ("macro F1", percent(results["macro_f1"])),
        ("checkpoint", results["checkpoint"] or "none"),
    ]
    parts = [f"# {title}\n", markdown_table(("", ""), head)]
    if results.get("notes"):
        parts += ["\n## What to mind\n", *(f"- {note}" for note in results["notes"])]
    outside = without_attribute(results)
    if results["groups"]:
        rows: list[Sequence[Any]] = [
            (g["class"], g["attribute"], f"{g['num_train']:,}", f"{g['num_samples']:,}", percent(g["accuracy"]))
            for g in results["groups"]
        ]
        parts += [
            "\n## Groups\n",
            *([f"{outside} and in no group.\n"] if outside else []),
            markdown_table(("class", "attribute", "training images", "images", "accuracy"), rows),
        ]
    else:
        parts.append(f"\n{NO_GROUPS}.")
    parts += _quality(results.get("group_quality") or {})
    rows = [(c["class"], f"{c['num_samples']:,}", percent(c["accuracy"])) for c in results["classes"]]
    parts += ["\n## Classes\n", markdown_table(("class", "images", "accuracy"), rows)]
    if results.get("other_predictions"):
        rows = [
            (name, percent(m["accuracy"]), percent(m["worst_group_accuracy"]))
            for name, m in results["other_predictions"].items()
        ]
        header = ("prediction", "accuracy", "worst-group accuracy")
        parts += ["\n## Other predictions of the same model\n", markdown_table(header, rows)]
    if results.get("selections"):
        parts += ["\n## Which epoch\n", selections_table(results["selections"])]
    return "\n".join(parts) + "\n"


def _quality(quality: dict[str, dict[str, Any]]) -> list[str]:
    """A table of how far the training's groups agree with the attribute labels; nothing if this is not known."""
    if not quality:
        return []
    rows = []
    for split, row in quality.items():
        information = row["adjusted_mutual_information"]
        rows.append(
            (
                row["source"],
                split,
                row["num_groups"],
                percent(row["agreement"]),
                percent(row["worst_group_agreement"]),
                "" if information is None else f"{information:.2f}",
            )
        )
    header = (
        "groups by",
        "split",
        "groups",
        "agree with the labels",
        "in the worst group",
        "adjusted mutual information",
    )
    return ["\n## Groups that training used\n", markdown_table(header, rows)]


NO_GROUPS = (
    "No image of this split has an attribute label, so there are no groups and no worst group. `oodprompt audit --model-dir "
    "RUN --split test` shows accuracies with and without each suspected shortcut"
)


def without_attribute(results: dict[str, Any]) -> str:
    """How many of the images of the groups' split are in none; empty where all are, or where there are no groups."""
    unknown = results.get("num_without_attribute", 0)
    if not unknown or not results["groups"]:
        return ""
    return f"{unknown:,} of {results['num_samples']:,} images {'is' if unknown == 1 else 'are'} without an attribute"


def selections_table(selections: Sequence[dict[str, Any]]) -> str:
    """The epoch that each criterion on validation data would have chosen, with its accuracies on the tested split.

    Each selection has ``criterion``, ``epoch``, ``validation`` (the criterion's value), ``accuracy`` and
    ``worst_group_accuracy``; all values are fractions.
    """
    rows = [
        (
            s["criterion"].replace("_", " "),
            s["epoch"],
            percent(s["validation"]),
            percent(s["accuracy"]),
            percent(s["worst_group_accuracy"]),
        )
        for s in selections
    ]
    return markdown_table(("epoch chosen by", "epoch", "its value", "accuracy", "worst-group accuracy"), rows)


def groups_figure(results: dict[str, Any], most: int = 60) -> Figure:
    """Accuracy in per cent of each group, or of each class of a data set without attributes, as bars.

    The worst bar is red, and a line marks the average. Of more than ``most`` groups the worst are drawn.
    """
    rows = results["groups"] or results["classes"]
    count = len(rows)
    if count > most:
        rows = sorted(rows, key=lambda row: row["accuracy"])[:most]
    names = [f"{r['class']} / {r['attribute']}" if "attribute" in r else r["class"] for r in rows]
    if results["groups"]:
        names = [f"{name}\n{r['num_train']:,} in training" for name, r in zip(names, rows, strict=True)]
    names = [literal(name) for name in names]
    values = [100 * r["accuracy"] for r in rows]
    figure = new_figure(7, 1.2 + 0.5 * len(rows))
    axes = figure.add_subplot()
    worst = min(values)
    bars = axes.barh(names, values, color=[RED if v == worst else BLUE for v in values])
    # In the bar where there is room, so that the line of the average crosses no number.
    for inside, padding, colour in ((True, -34, "white"), (False, 3, "black")):
        labels = [f"{value:.1f}" if (value > 15) == inside else "" for value in values]
        axes.bar_label(bars, labels, padding=padding, color=colour)
    axes.axvline(
        100 * results["accuracy"], color=GREY, linestyle="--", label=f"average {100 * results['accuracy']:.1f}"
    )
    bar_axis(axes, "accuracy, %")
    title = f"{method_title(results)}\n{results['dataset']} ({results['split']}, seed {results['seed']})"
    further = [f"the {most} worst of {count:,}"] if count > most else []
    further += [f"{outside}, in no bar"] if (outside := without_attribute(results)) else []
    axes.set_title("\n".join([literal(title), *further]))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35 / (0.5 * len(rows) + 0.4)), frameon=False)
    return figure


def finished_results(folder: Path) -> dict[str, Any] | None:
    """The content of a run's ``results.json``; None where it is missing, cut short or not one of ours."""
    try:
        content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("accuracy") is None:
        return None
    values = [content[key] for key in FRACTIONS if content.get(key) is not None]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return content if numbers and all(map(math.isfinite, values)) else None


def keys_of(folder: Path) -> dict[str, Any]:
    """The keys of a run of ours that say what it computes, by their dotted names; none where they cannot be read."""
    file = folder / "config.yaml"
    found: dict[str, Any] = {}
    if not file.is_file():
        return found

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif f"{prefix}{key}" not in FREE_KEYS:
                found[f"{prefix}{key}"] = value

    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
        walk(yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), "")
    return found
