"""Published numbers with their sources, and the table of our runs beside them."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from oodprompt.errors import UserError
from oodprompt.reports.style import markdown_table
from oodprompt.runs.tables import spread

TRUST = {
    "P": "the paper's text",
    "C": "the authors' code or README",
    "F": "a figure of the authors",
    "S": "second-hand",
}
_NUMBER = re.compile(r"\+?\d{1,3}(\.\d+)?")
WHOLE_NETWORK = "ImageNet RN50"
MEASURES = ("worst_group_accuracy", "accuracy", "adjusted_average_accuracy")


@dataclass(frozen=True)
class Published:
    """A published result: accuracies in per cent as they are printed, a gain over zero-shot CLIP with its sign.

    ``labels`` says who knows the attribute, training images / validation images. ``ours`` is our name of the same method, or
    empty. ``trust`` is a key of ``TRUST``; it says where the number was read, ``read_in`` says so in words.
    """

    dataset: str
    method: str
    backbone: str
    worst_group: str
    average: str
    labels: str
    ours: str
    source: str
    read_in: str
    trust: str
    remark: str


@dataclass(frozen=True)
class OurRow:
    """A method of ours on a backbone: its results, a list over seeds, each a mapping of measures to fractions or None."""

    method: str
    backbone: str
    labels: str
    name: str
    seeds: Sequence[dict[str, float | None]]


def read_published(path: Path, dataset: str) -> list[Published]:
    """The rows of a data set; ``UserError`` for a row that has no source or no number."""
    columns = [field.name for field in fields(Published)]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != columns:
            raise UserError(f"{path}: the columns must be {','.join(columns)}")
        rows = [(reader.line_num, row) for row in reader]
    found = []
    for line, row in rows:
        if None in row or None in row.values():
            raise UserError(f"{path}, line {line} has not {len(columns)} fields; put quotes around those with a comma")
        one = Published(**row)
        if not one.source.strip() or not one.read_in.strip() or one.trust not in TRUST:
            raise UserError(
                f"{path}, line {line}: {one.method} has no source; give source, read_in and trust ({', '.join(TRUST)})"
            )
        numbers = [value for value in (one.worst_group, one.average) if value]
        if not one.worst_group or not all(_NUMBER.fullmatch(value) for value in numbers):
            raise UserError(f"{path}, line {line}: {numbers} must be accuracies in per cent, as 86.4 (a gain as +3.5)")
        found.append(one)
    return [one for one in found if one.dataset == dataset]


def over_targets(results: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """One seed's results on several test sets as one: the worst of the worst groups, the means of the averages."""
    combined: dict[str, float | None] = {}
    for key in MEASURES:
        values = [result[key] for result in results if result.get(key) is not None]
        whole = len(values) == len(results)
        combined[key] = (min(values) if key == MEASURES[0] else statistics.fmean(values)) if whole else None
    return combined


def beside_published(rows: Sequence[OurRow], published: Sequence[Published]) -> str:
    """Two tables in Markdown: our rows with the published numbers of the same method, and all published numbers."""
    own = []
    for row in rows:
        cells = [spread(v for seed in row.seeds if (v := seed[key]) is not None) for key in MEASURES]
        beside = [_same(row.name, backbone, published) for backbone in (row.backbone, WHOLE_NETWORK)]
        own.append([row.method, row.backbone, row.labels, *cells, len(row.seeds) or "-", *beside])
    header = ["method", "backbone", "attribute labels", "worst group, %", "average, %", "adjusted average, %", "seeds"]
    header += ["published: worst group / average", f"published, {WHOLE_NETWORK}"]
    others = [
        [f"[{i}]", p.method, p.backbone, p.labels, p.worst_group, p.average, p.ours, p.source, *_reading(p)]
        for i, p in enumerate(published, 1)
    ]
    others = [[cell or "-" for cell in line] for line in others]
    names = [
        "",
        "method",
        "backbone",
        "attribute labels",
        "worst group, %",
        "average, %",
        "ours",
        "source",
        "read in",
        "remark",
    ]
    parts = [
        "## Our runs\n\n" + markdown_table(header, own),
        "## Published numbers\n\n" + (markdown_table(names, others) if others else "We know none with a source."),
        _NOTES,
    ]
    return "\n\n".join(parts) + "\n"


_NOTES = """Our numbers are means ± standard deviations over seeds. *Attribute labels*: who knows the attribute of training images \
/ of validation images; "names" stands for the names of its values. *Adjusted average* weighs each group by its share of the \
training images; papers print one or the other average. *ours* is our name of the same method.

Published numbers differ in prompts, weights, splits and in what chose the epoch. Zero-shot numbers of one backbone differ by \
several points from paper to paper. "ImageNet RN50" is a whole network that is trained and is no CLIP. A number with a plus sign \
is a gain over zero-shot CLIP. *Second-hand* numbers were not read in the paper: look there before you quote them."""


def _same(name: str, backbone: str, published: Sequence[Published]) -> str:
    """The published numbers of the methods that we call ``name`` on a backbone, with the numbers of their rows."""
    found = [(i, p) for i, p in enumerate(published, 1) if p.ours == name and p.backbone == backbone]
    return "; ".join(f"{p.worst_group} / {p.average or '-'} [{i}]" for i, p in found) or "-"


def _reading(one: Published) -> tuple[str, str]:
    return f"{one.read_in}{', second-hand' if one.trust == 'S' else ''}", one.remark
