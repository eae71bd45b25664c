"""Runs as rows over seeds: means, spreads, base to new, paired differences.

Runs whose paths differ in the part ``seed<N>`` alone make one row; ``train_base`` and ``test_new`` of the same path make
one row of a base-to-new table. All values are in per cent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from oodprompt.errors import UserError, nearest
from oodprompt.runs.reading import ALIASES, Run, read_runs, seed_of, unlike

# metric -> its name in tables; those that a table has when none are asked for
LABELS = {"accuracy": "accuracy", "worst_group_accuracy": "worst group", "gap": "gap"}
_SIDES = {"train_base": "base", "test_base": "base", "test_new": "new"}


@dataclass
class Row:
    """A method under a setting: ``values`` metric -> seed -> value, ``cells`` metric -> (mean, spread or None).

    ``parts`` is the path of its runs without the seed; ``dataset`` is empty where unknown; ``average`` marks a row that
    averages others and has no seeds of its own.
    """

    parts: tuple[str, ...]
    dataset: str = ""
    values: dict[str, dict[int | str, float]] = field(default_factory=dict)
    cells: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    average: bool = False
    name: str = ""

    @property
    def seeds(self) -> int:
        """How many seeds it is over."""
        return max((len(by_seed) for by_seed in self.values.values()), default=0)


@dataclass
class Tree:
    """What a folder of outputs holds: ``rows`` of plain runs, ``base2new`` rows, and what is wrong, a line each."""

    rows: list[Row]
    base2new: list[Row]
    problems: list[str]
    spread: str = "std"

    @property
    def all_rows(self) -> list[Row]:
        """Those of plain runs, then those of base-to-new."""
        return [*self.rows, *self.base2new]


@dataclass(frozen=True)
class Difference:
    """Paired differences ``row - baseline`` of a metric over ``pairs`` common seeds.

    ``low`` and ``high`` bound the 95 % interval of ``mean``; ``p`` is of the two-sided paired t-test. None: undefined.
    """

    pairs: int
    mean: float
    low: float | None
    high: float | None
    p: float | None


def upstream_summary(values: Sequence[float], ci95: bool) -> tuple[float, float]:
    """Mean and population standard deviation s, or with ``ci95`` 1.96 s / sqrt(n), as upstream's script has them."""
    deviation = np.std(values)  # numpy as there: its rounding shows where a printed digit is a tie
    return float(np.mean(values)), float(1.96 * deviation / np.sqrt(len(values)) if ci95 else deviation)


def collect(
    root: Path,
    keywords: Sequence[str] = (),
    *,
    evaluation: bool = False,
    ci95: bool = False,
    average: bool = False,
    only: Iterable[Path] | None = None,
) -> Tree:
    """The rows of all finished runs under ``root``.

    ``keywords`` are the metrics wanted (none: accuracy, worst-group accuracy and gap where known). ``evaluation``: logs
    are of evaluations, not of training. A spread is the sample standard deviation (n - 1), or with ``ci95`` half the
    95 % interval of the mean, t_{0.975, n-1} s / sqrt(n). ``average`` adds a row that averages all others. ``only``
    keeps the runs in these folders. ``UserError`` where nothing is finished or no run has a keyword.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}; give a folder of outputs")
    runs, problems = read_runs(root, evaluation)
    if only is not None:
        kept = {seed_of(folder.relative_to(root).parts) for folder in only}
        runs = [run for run in runs if (run.parts, run.seed) in kept]
    if not runs:
        more = f"; {len(problems)} unfinished: {problems[0]}" if problems else ""
        raise UserError(f"{root} has no finished runs{more}")
    problems += unlike(runs)
    plain: dict[tuple[str, ...], Row] = {}
    sides: dict[tuple[str, ...], dict[str, Row]] = {}
    metrics = _metrics(runs, keywords, root)
    for run in _one_of_each_seed(runs, problems):
        side = next((part for part in run.parts if part in _SIDES), None)
        if side is None:
            row, wanted = plain.setdefault(run.parts, Row(run.parts, run.dataset)), metrics
        else:
            parts = tuple(part for part in run.parts if part not in (side, "base2new"))
            row = sides.setdefault(parts, {}).setdefault(side, Row(parts, run.dataset))
            wanted = metrics if keywords else ["accuracy"]
        for metric in wanted:
            if metric in run.metrics:
                row.values.setdefault(metric, {})[run.seed] = run.metrics[metric]
    rows = list(plain.values())
    pairs = [_pair(parts, of, problems) for parts, of in sides.items()]
    for row in [*rows, *pairs]:
        row.name = "/".join(row.parts) or root.resolve().name
        row.cells |= {m: cell_of(list(v.values()), ci95) for m, v in row.values.items() if v and m not in row.cells}
    return Tree(
        rows + ([_average("average", rows)] if average and len(rows) > 1 else []),
        pairs + _averages_over_datasets(pairs),
        problems,
        "ci95" if ci95 else "std",
    )


def in_order(tree: Tree, names: Sequence[str]) -> Tree:
    """The rows that ``names`` call, in their order: a row's name, or a part (or parts) of its path.

    ``UserError`` for a name that no row has.
    """
    chosen: dict[int, Row] = {}
    for name in names:
        rows = [row for row in tree.all_rows if name == row.name or _place(row.parts, Path(name).parts) is not None]
        if not rows:
            parts = {part for row in tree.all_rows for part in (*row.parts, row.name)}
            raise UserError(f"NAME: no row is of {name!r}: {nearest(name, parts)}")
        chosen |= {id(row): row for row in rows if id(row) not in chosen}
    ordered = list(chosen.values())
    plain, pairs = ([row for row in ordered if any(row is one for one in rows)] for rows in (tree.rows, tree.base2new))
    return Tree(plain, pairs, tree.problems, tree.spread)


def _one_of_each_seed(runs: Iterable[Run], problems: list[str]) -> list[Run]:
    found: dict[Any, Run] = {}
    for run in runs:
        if found.setdefault((run.parts, run.seed), run) is not run:
            problems.append(f"{'/'.join(run.parts)}: two runs of seed {run.seed}; the first counts")
    return list(found.values())


def _metrics(runs: Sequence[Run], keywords: Sequence[str], root: Path) -> list[str]:
    known = {metric for run in runs for metric in run.metrics}
    wanted = [ALIASES.get(keyword, keyword) for keyword in keywords]
    for keyword in wanted:
        if keyword not in known:
            raise UserError(f"--keyword: no run in {root} has {keyword!r}: {nearest(keyword, known)}")
    return wanted or [metric for metric in LABELS if metric in known]


def cell_of(values: Sequence[float], ci95: bool) -> tuple[float, float | None]:
    if len(values) < 2:
        return values[0], None
    deviation = statistics.stdev(values)
    return statistics.fmean(values), _half_interval(deviation, len(values)) if ci95 else deviation


def _half_interval(deviation: float, n: int) -> float:
    """Half the 95 % interval of a mean: t_{0.975, n-1} s / sqrt(n)."""
    from scipy.stats import t  # here: it takes most of a second

    return float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def harmonic_mean(a: float, b: float) -> float:
    """2 a b / (a + b); 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def _pair(parts: tuple[str, ...], sides: dict[str, Row], problems: list[str]) -> Row:
    """The row of base, new and H of a path.

    Of the base classes an evaluation (``test_base``) goes before training's own test (``train_base``), seed by seed. Where
    both sides have runs, seeds that have only one are left out and named. The cell of H is the harmonic mean of the two
    means, as published tables have it.
    """
    row = Row(parts, next((of.dataset for of in sides.values() if of.dataset), ""))
    metrics = dict.fromkeys(metric for of in sides.values() for metric in of.values)
    for metric in metrics:
        prefix = "" if len(metrics) == 1 else f"{LABELS.get(metric, metric)} "
        base, new = (
            {
                seed: value
                for name in names
                if name in sides
                for seed, value in sides[name].values.get(metric, {}).items()
            }
            for names in (("train_base", "test_base"), ("test_new",))
        )
        if base and new:
            for seed in sorted(set(base) ^ set(new), key=str):
                side = "base" if seed not in base else "new"
                problems.append(f"{'/'.join(parts)}: seed {seed} has no finished run of {side}; left out")
            base, new = ({s: v for s, v in of.items() if s in base and s in new} for of in (base, new))
        both = {seed: harmonic_mean(base[seed], new[seed]) for seed in base if seed in new}
        row.values |= {f"{prefix}{k}": v for k, v in (("base", base), ("new", new), ("H", both)) if v}
        if both:
            row.cells[f"{prefix}H"] = (
                harmonic_mean(statistics.fmean(base.values()), statistics.fmean(new.values())),
                None,
            )
    return row


def _average(name: str, rows: Sequence[Row]) -> Row:
    """A row of the means of the cells of others; H anew from them."""
    cells: dict[str, tuple[float, float | None]] = {}
    for column in columns_of(rows):
        means = [row.cells[column][0] for row in rows if column in row.cells]
        cells[column] = (statistics.fmean(means), None)
        if column == "H" or column.endswith(" H"):
            base, new = (cells[column[:-1] + side][0] for side in ("base", "new"))
            cells[column] = (harmonic_mean(base, new), None)
    return Row((name,), cells=cells, average=True, name=name)


def _averages_over_datasets(rows: Sequence[Row]) -> list[Row]:
    """Per method, the average over data sets (the first part of the path), of those rows that have every column."""
    methods: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if set(row.cells) == set(columns_of(rows)):
            methods.setdefault(row.parts[1:], []).append(row)
    return [_average("/".join((f"average of {len(r)}", *m)), r) for m, r in methods.items() if len(r) > 1]


def columns_of(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(c for row in rows for c in (*row.values, *row.cells) if c in row.cells))


# --- paired differences ----------------------------------------------------------------------------------------


def paired_difference(ours: dict[Any, float], theirs: dict[Any, float]) -> Difference | None:
    """Differences over the seeds that both have; None where there are none.

    d_s = ours_s - theirs_s; the interval is mean(d) +- t_{0.975, n-1} s_d / sqrt(n), the test statistic mean(d) / (s_d /
    sqrt(n)). Interval and p are undefined for one pair, p also where all differences are the same.
    """
    common = [seed for seed in ours if seed in theirs]
    if not common:
        return None
    differences = [ours[seed] - theirs[seed] for seed in common]
    mean = statistics.fmean(differences)
    if len(common) == 1:
        return Difference(1, mean, None, None, None)
    if max(differences) - min(differences) < 1e-9:
        return Difference(len(common), mean, mean, mean, None)
    from scipy.stats import ttest_rel

    half = _half_interval(statistics.stdev(differences), len(common))
    p = ttest_rel([ours[seed] for seed in common], [theirs[seed] for seed in common]).pvalue
    return Difference(len(common), mean, mean - half, mean + half, float(p))


def _place(parts: tuple[str, ...], method: tuple[str, ...]) -> int | None:
    """Where ``method`` lies in a path; None where it does not."""
    return next((i for i in range(len(parts)) if parts[i : i + len(method)] == method), None)


def baselines(rows: Sequence[Row], method: str) -> dict[str, Row]:
    """Name of a row -> the row of ``method`` (a part, or parts, of the path) that it is compared with.

    It is of the same data set where known, its path is the same up to the method, and of several it has the most parts
    in common. ``UserError`` where no row is of the method or where the choice is open.
    """
    rows = [row for row in rows if not row.average]
    wanted = tuple(Path(method).parts)
    theirs = [(row, i) for row in rows if (i := _place(row.parts or (row.name,), wanted)) is not None]
    if not theirs:
        parts = {part for row in rows for part in (*row.parts, row.name)}
        raise UserError(f"--baseline: no row is of {method!r}: {nearest(method, parts)}")
    chosen: dict[str, Row] = {}
    for row in rows:
        if any(row is base for base, _ in theirs):
            continue
        near = [
            base
            for base, i in theirs
            if base.parts[:i] == row.parts[:i] and (base.dataset == row.dataset or not (base.dataset and row.dataset))
        ]
        common = {base.name: len(set(base.parts) & set(row.parts)) for base in near}
        best = [base for base in near if common[base.name] == max(common.values())]
        if len(best) > 1:
            raise UserError(f"--baseline: for {row.name} both {best[0].name} and {best[1].name} are {method}; say more")
        if best:
            chosen[row.name] = best[0]
    return chosen


def differences(rows: Sequence[Row], method: str) -> dict[str, tuple[Row, dict[str, Difference]]]:
    """Name of a row -> its baseline, and metric -> paired differences to it."""
    named = {row.name: row for row in rows}
    result = {}
    for name, base in baselines(rows, method).items():
        values = {m: paired_difference(v, base.values.get(m, {})) for m, v in named[name].values.items()}
        result[name] = (base, {metric: value for metric, value in values.items() if value is not None})
    return result
