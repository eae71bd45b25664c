"""Mean ranks of methods over data sets and settings, with intervals.

Folders are ``<data set>/<setting>/<method>/seed<N>``. In each setting the methods are ranked by their mean over seeds, the
best is 1 and equals share the mean of their ranks (Demsar, "Statistical Comparisons of Classifiers over Multiple Data
Sets", 2006). A method's mean rank is the mean over data sets of its mean over the settings of a data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from oodprompt.errors import UserError
from oodprompt.reports.style import BLUE, literal, markdown_table, new_figure
from oodprompt.runs.aggregate import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Rank:
    """The mean rank of a method; ``low`` and ``high`` bound its 95 % interval; ``by_data_set`` has the parts of the mean."""

    method: str
    mean: float
    low: float
    high: float
    by_data_set: Mapping[str, float]


def mean_ranks(rows: Iterable[Row], metric: str) -> tuple[list[Rank], list[str]]:
    """The methods by their mean rank, the best first, and those that are left out as they lack a setting.

    The interval is that of the bootstrap (percentiles, seed 0): data sets are drawn with replacement, then the settings of
    each. Raises ``UserError`` for fewer than two methods that every setting has.
    """
    from scipy.stats import rankdata  # here: it takes most of a second

    values: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        if not row.average and metric in row.cells:
            values.setdefault(row.parts[:-1], {})[row.parts[-1]] = row.cells[metric][0]
    methods = list(dict.fromkeys(name for found in values.values() for name in found))
    kept = [name for name in methods if all(name in found for found in values.values())]
    if len(kept) < 2:
        raise UserError(
            f"--ranks compares two or more methods that have {metric} in every setting, and there are {len(kept)}; the "
            "folders are DATA_SET/SETTING/METHOD/seed<N>"
        )
    ranks: dict[str, list[np.ndarray]] = {}
    for place, found in values.items():
        scores = np.round([found[name] for name in kept], 6)  # what rounding of sums alone tells apart is equal
        ranks.setdefault("/".join(place[:-1]) or "/".join(place), []).append(rankdata(-scores))
    means = {data_set: np.mean(columns, axis=0) for data_set, columns in ranks.items()}
    low, high = np.percentile(_resampled([np.array(columns) for columns in ranks.values()]), [2.5, 97.5], axis=0)
    overall = np.mean(list(means.values()), axis=0)
    all_ranks = [
        Rank(
            name.replace("_", " "),
            float(overall[i]),
            float(low[i]),
            float(high[i]),
            {d: float(m[i]) for d, m in means.items()},
        )
        for i, name in enumerate(kept)
    ]
    return sorted(all_ranks, key=lambda rank: rank.mean), [name for name in methods if name not in kept]


def _resampled(data_sets: Sequence[np.ndarray]) -> np.ndarray:
    """Mean ranks [_RESAMPLES, methods] of data sets [settings, methods] that are drawn anew, and settings within them."""
    rng = np.random.default_rng(0)
    means = np.stack(
        [ranks[rng.integers(len(ranks), size=(_RESAMPLES, len(data_sets), len(ranks)))].mean(2) for ranks in data_sets]
    )  # [data sets, resamples, times that it may be drawn, methods]: each draw of a data set has settings of its own
    drawn = rng.integers(len(data_sets), size=(_RESAMPLES, len(data_sets)))
    return means[drawn, np.arange(_RESAMPLES)[:, None], np.arange(len(data_sets))[None]].mean(1)


def ranks_table(ranks: Sequence[Rank]) -> str:
    """Mean rank, its interval and the mean rank on each data set, in Markdown."""
    names = list(ranks[0].by_data_set)
    several = names if len(names) > 1 else []
    rows = [
        [r.method, f"{r.mean:.1f}", f"{r.low:.1f} to {r.high:.1f}", *(f"{r.by_data_set[name]:.1f}" for name in several)]
        for r in ranks
    ]
    return markdown_table(["method", "mean rank", "95 % interval", *several], rows) + "\n"


def ranks_figure(ranks: Sequence[Rank]) -> Figure:
    """A point and an interval for each method, and small marks for its mean ranks on the data sets; the best on top."""
    figure = new_figure(8, 1.3 + 0.28 * len(ranks))
    axes = figure.add_subplot()
    places = np.arange(len(ranks))
    axes.hlines(places, [r.low for r in ranks], [r.high for r in ranks], color=BLUE, linewidth=2, label="95 % interval")
    axes.plot([r.mean for r in ranks], places, "o", color=BLUE, label="mean rank")
    names = list(ranks[0].by_data_set)
    for name, mark in zip(names if len(names) > 1 else [], "x+^v<>sd" * len(names), strict=False):
        axes.plot([r.by_data_set[name] for r in ranks], places, mark, color="black", markersize=5, label=literal(name))
    axes.set_yticks(places, [literal(r.method) for r in ranks], fontsize=9)
    axes.set_xlim(0.5, len(ranks) + 0.5)
    axes.set_xlabel("rank, 1 is best")
    axes.locator_params(axis="x", integer=True)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
