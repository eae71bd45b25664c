"""How far pseudo-attributes agree with the attribute labels: a file, a figure, and lines to print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodprompt.files import write_atomically
from oodprompt.reports.style import draw, literal, new_figure, write_in_cells

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PSEUDO_ATTRIBUTES = "pseudo_attributes.json"
GROUP_QUALITY = "group_quality.json"


def quality_line(split: str, row: dict[str, Any]) -> str:
    """The quality of a run's groups on a split (an entry of ``group_quality`` of results.json) in words."""
    information = row["adjusted_mutual_information"]
    shared = "" if information is None else f", adjusted mutual information {information:.2f}"
    return (
        f"Groups by {row['source']} ({split}): {100 * row['agreement']:.1f}% agree with the attribute labels, "
        f"{100 * row['worst_group_agreement']:.1f}% in the worst group{shared}; {row['num_groups']} groups"
    )


def write_pseudo_attributes(
    rows: dict[str, dict[str, Any]], new: Sequence[str], dataset: Any, noise: float, directory: str | Path
) -> list[str]:
    """Write ``pseudo_attributes.json`` and, where labels are known, ``pseudo_attributes.png``; returns lines to print.

    ``rows`` holds ``evaluation.attribute_metrics`` of each split; the lines are those of the splits ``new``.
    ``dataset`` gives ``attribute_names`` and ``attribute_prompts``. ``noise`` is the share of images whose
    pseudo-attribute was changed on purpose; the file records it. Raises ``UserError`` where the json cannot be written;
    a line says where the picture could not be drawn.
    """
    names, directory = list(dataset.attribute_names), Path(directory)
    content = {"attributes": names, "prompts": [list(p) for p in dataset.attribute_prompts], "noise": noise}
    write_atomically(
        directory / PSEUDO_ATTRIBUTES,
        json.dumps(content | {"splits": rows}, indent=2, ensure_ascii=False) + "\n",
    )
    known = {split: row for split, row in rows.items() if row["confusion"]}
    if known:
        draw(directory / "pseudo_attributes.png", lambda: _confusions(known, names))
    return [line for split in new for line in _lines(split, rows[split])]


def _lines(split: str, row: dict[str, Any]) -> list[str]:
    """The agreement of one split, overall and by group."""
    if row["accuracy"] is None:
        return [f"Pseudo-attributes ({split}): no attribute labels to compare with"]
    known, count = sum(g["num_samples"] for g in row["groups"]), sum(map(sum, row["counts"]))
    of = f" of the {known:,} images, of {count:,}, that have one" if known < count else ""
    lines = [f"Pseudo-attributes ({split}): {100 * row['accuracy']:.1f}% agree with the attribute labels{of}"]
    return lines + [
        f"  {g['class']} / {g['attribute']}\ttotal: {g['num_samples']:,}\tagree: {100 * g['accuracy']:.1f}%"
        for g in row["groups"]
    ]


def _confusions(rows: Mapping[str, dict[str, Any]], names: Sequence[str]) -> Figure:
    """One square per split: how images of each attribute (row) were labelled (column), in per cent of the row."""
    labels = [literal(name) for name in names]
    side = 1.6 + 0.55 * max(len(names), 2)
    figure = new_figure(side * len(rows) + 0.8, side + 0.4)
    for axes, (split, row) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        values = [[100 * share for share in line] for line in row["confusion"]]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100)
        write_in_cells(axes, values, lambda value: value > 60, fontsize=9)
        axes.set_xticks(list(range(len(names))), labels, rotation=30, ha="right")
        axes.set_yticks(list(range(len(names))), labels)
        axes.set_xlabel("what zero-shot CLIP sees")
        axes.set_ylabel("attribute label")
        axes.set_title(f"{split}: {100 * row['accuracy']:.1f} % right")
    return figure
