"""Folders of finished runs, ours or upstream's, as rows over seeds: means, spreads, paired differences, tables.

A run is a folder with ``results.json`` (ours) or ``log.txt`` (CoOp's, MaPLe's, Dassl's). Runs whose paths differ in the
part ``seed<N>`` alone make one row; ``train_base`` and ``test_new`` of the same path make one row of a base-to-new table.
All values are in per cent.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from oodprompt.config.free_keys import FREE_KEYS
from oodprompt.errors import UserError, nearest
from oodprompt.reports.results import FRACTIONS, RESULTS, finished_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG = "log.txt"
# metric -> its name in tables; those that a table has when none are asked for
LABELS = {"accuracy": "accuracy", "worst_group_accuracy": "worst group", "gap": "gap"}
_ALIASES = {"worst_group": "worst_group_accuracy", "adjusted_average": "adjusted_average_accuracy"}
_SIDES = {"train_base": "base", "test_base": "base", "test_new": "new"}
_TRAINED = ("Finish training", "Finished training")  # the latter: Dassl up to 0.5
_EVALUATED = "=> result"


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


# --- runs ------------------------------------------------------------------------------------------------------


def changed_keys(folder: Path, command: Sequence[str]) -> list[str]:
    """The keys in which the run in ``folder`` differs from ``train.py``'s command line of now, with both values.

    Keys that say where things are kept do not count.
    """
    from oodprompt import cli
    from oodprompt.config.keys import get_cfg_default, leaves, merge_file

    old = get_cfg_default()
    merge_file(old, folder / "config.yaml")
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = cli.build_parser().parse_intermixed_args([*command, "--output-dir", str(folder)])
        new = leaves(cli.setup_cfg(arguments))
    return [f"{k} was {v!r}, is now {new[k]!r}" for k, v in leaves(old).items() if k not in FREE_KEYS and new[k] != v]


def last_line(log: Path) -> str:
    """The last line of a log that says something, cut to 200 characters; empty where there is none."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line), "")[:200]


def log_metrics(log: Path, keyword: str = r"[\w ]+", evaluation: bool = False) -> dict[str, float]:
    """Metrics of a log in upstream's form: name -> the last ``* name: value%`` after the end of training.

    ``keyword`` is a pattern of names. The end is the line ``Finish training`` (``Finished training`` in old Dassl), or
    with ``evaluation`` a line ``=> result``. What comes before it, such as validation, does not count. Lines whose
    number is none are passed over.
    """
    line_of_metric = re.compile(rf"\* ({keyword}): ([.\deE+-]+)%")
    found: dict[str, float] = {}
    ended = False
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in map(str.strip, lines):
            ended = ended or (line.startswith(_EVALUATED) if evaluation else line in _TRAINED)
            if ended and (match := line_of_metric.search(line)):
                with contextlib.suppress(ValueError):
                    value = float(match.groups()[-1])
                    found.pop(match.group(1), None)  # so that the last line comes last
                    found[match.group(1)] = value
    return found


def upstream_values(directory: Path, keyword: str, test_log: bool) -> tuple[dict[Path, float], list[Path]]:
    """What upstream's ``parse_test_res.py`` reads: folder -> value of every folder in ``directory`` that has one.

    Beside it the folders that have none, which upstream's script passes over or dies of.
    """
    values: dict[Path, float] = {}
    folders = subfolders(directory)
    for folder in folders:
        found = log_metrics(folder / LOG, keyword, test_log) if (folder / LOG).is_file() else {}
        if found:
            values[folder] = list(found.values())[-1]
    return values, [folder for folder in folders if folder not in values]


def upstream_summary(values: Sequence[float], ci95: bool) -> tuple[float, float]:
    """Mean and population standard deviation s, or with ``ci95`` 1.96 s / sqrt(n), as upstream's script has them."""
    deviation = np.std(values)  # numpy as there: its rounding shows where a printed digit is a tie
    return float(np.mean(values)), float(1.96 * deviation / np.sqrt(len(values)) if ci95 else deviation)


def subfolders(directory: Path) -> list[Path]:
    try:
        return sorted(f for f in directory.iterdir() if f.is_dir() and not f.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}; give a folder of outputs") from error


@dataclass(frozen=True)
class _Run:
    parts: tuple[str, ...]
    seed: int | str
    metrics: dict[str, float]
    dataset: str
    keys: dict[str, Any] = field(default_factory=dict)


def _keys_of(folder: Path) -> dict[str, Any]:
    """The keys of a run of ours that say what it computes, but for its seed; none where they cannot be read."""
    file, found = folder / "config.yaml", {}
    if not file.is_file():
        return found

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            elif f"{prefix}{key}" not in (*FREE_KEYS, "SEED"):
                found[f"{prefix}{key}"] = value

    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
        walk(yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), "")
    return found


def _unlike(runs: Iterable[_Run]) -> list[str]:
    """A line for each row whose runs have other keys than its first."""
    first: dict[tuple[str, ...], _Run] = {}
    lines: dict[tuple[str, ...], str] = {}
    for run in runs:
        one = first.setdefault(run.parts, run)
        changed = sorted(k for k in run.keys if k in one.keys and run.keys[k] != one.keys[k])
        if changed and run.parts not in lines:
            values = ", ".join(f"{k} {one.keys[k]!r} and {run.keys[k]!r}" for k in changed[:3])
            more = f" and {len(changed) - 3} more keys" if len(changed) > 3 else ""
            place = "/".join(run.parts) or "these runs"
            lines[run.parts] = f"{place}: runs of seeds {one.seed} and {run.seed} differ in {values}{more}"
    return list(lines.values())


def _seed_of(parts: tuple[str, ...]) -> tuple[tuple[str, ...], int | str]:
    """A path without its part ``seed<N>`` (the last one; else a number at the end), and the seed."""
    for pattern, places in ((r"seed_?(-?\d+)", range(len(parts))[::-1]), (r"s?(\d+)", range(len(parts))[-1:])):
        for i in places:
            if match := re.fullmatch(pattern, parts[i], re.IGNORECASE):
                return (*parts[:i], *parts[i + 1 :]), int(match.group(1))
    return parts, "-"


def _read_run(folder: Path, parts: tuple[str, ...], evaluation: bool) -> tuple[dict[str, float], str, str]:
    """Metrics in per cent, data set, and a note or nothing; ``ValueError`` says why a run does not count."""
    if (folder / RESULTS).is_file():
        results = finished_results(folder)
        if results is None:
            raise ValueError(f"broken {RESULTS}")
        metrics = {key: 100 * results[key] for key in FRACTIONS if results.get(key) is not None}
        return metrics | {"error": 100 - metrics["accuracy"]}, str(results.get("dataset", "")), ""
    if (folder / "config.yaml").is_file() or not (folder / LOG).is_file():
        raise ValueError(_unfinished(folder / LOG))
    head = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    if not evaluation:
        evaluation = any(part in ("test_base", "test_new") for part in parts)
        evaluation = evaluation or re.search(r"^\s*eval_only: True\s*$", head, re.MULTILINE) is not None
    dataset = re.search(r"^\s*dataset_config_file: \S*?([^/\s]+)\.ya?ml\s*$", head, re.MULTILINE)
    for log in [*sorted(folder.glob(f"{LOG}-*"), reverse=True), folder / LOG]:  # a run again in the same folder
        if found := log_metrics(log, evaluation=evaluation):
            note = f"{folder}: read from {log.name}, a later run in the same folder" if log.name != LOG else ""
            return {_ALIASES.get(k, k): v for k, v in found.items()}, dataset.group(1) if dataset else "", note
    raise ValueError(_unfinished(folder / LOG))


def _unfinished(log: Path) -> str:
    line = last_line(log)
    return f"unfinished, its log ends in: {line}" if line else f"unfinished, neither {RESULTS} nor anything in {LOG}"


def _runs(root: Path, evaluation: bool) -> tuple[list[_Run], list[str]]:
    """All runs under ``root``, and a line for each that does not count."""
    runs, problems = [], []
    for at, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(at)
        parts = folder.relative_to(root).parts
        begun = not folders and bool(re.fullmatch(r"seed_?-?\d+", folder.name))
        if not begun and not {RESULTS, LOG} & set(files):
            continue
        try:
            metrics, dataset, note = _read_run(folder, parts, evaluation)
        except (ValueError, OSError) as error:
            problems.append(f"{folder}: {error}")
            continue
        problems += [note] if note else []
        runs.append(_Run(*_seed_of(parts), metrics, dataset, _keys_of(folder)))
    return runs, problems


# --- rows ------------------------------------------------------------------------------------------------------


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
    runs, problems = _runs(root, evaluation)
    if only is not None:
        kept = {_seed_of(folder.relative_to(root).parts) for folder in only}
        runs = [run for run in runs if (run.parts, run.seed) in kept]
    if not runs:
        more = f"; {len(problems)} unfinished: {problems[0]}" if problems else ""
        raise UserError(f"{root} has no finished runs{more}")
    problems += _unlike(runs)
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
        row.cells |= {m: _cell(list(v.values()), ci95) for m, v in row.values.items() if v and m not in row.cells}
    return Tree(
        rows + ([_average("average", rows)] if average and len(rows) > 1 else []),
        pairs + _averages_over_datasets(pairs),
        problems,
        "ci95" if ci95 else "std",
    )


def _one_of_each_seed(runs: Iterable[_Run], problems: list[str]) -> list[_Run]:
    found: dict[Any, _Run] = {}
    for run in runs:
        if found.setdefault((run.parts, run.seed), run) is not run:
            problems.append(f"{'/'.join(run.parts)}: two runs of seed {run.seed}; the first counts")
    return list(found.values())


def _metrics(runs: Sequence[_Run], keywords: Sequence[str], root: Path) -> list[str]:
    known = {metric for run in runs for metric in run.metrics}
    wanted = [_ALIASES.get(keyword, keyword) for keyword in keywords]
    for keyword in wanted:
        if keyword not in known:
            raise UserError(f"--keyword: no run in {root} has {keyword!r}: {nearest(keyword, known)}")
    return wanted or [metric for metric in LABELS if metric in known]


def spread(values: Iterable[float], factor: float = 100, digits: int = 1) -> str:
    """``factor`` times values: mean ± sample standard deviation; the mean alone of one value, "-" of none."""
    values = [factor * value for value in values]
    return _text(_cell(values, ci95=False) if values else None, digits)


def _cell(values: Sequence[float], ci95: bool) -> tuple[float, float | None]:
    if len(values) < 2:
        return values[0], None
    deviation = statistics.stdev(values)
    return statistics.fmean(values), _half_interval(deviation, len(values)) if ci95 else deviation


def _half_interval(deviation: float, n: int) -> float:
    """Half the 95 % interval of a mean: t_{0.975, n-1} s / sqrt(n)."""
    from scipy.stats import t

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
    for column in _columns(rows):
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
        if set(row.cells) == set(_columns(rows)):
            methods.setdefault(row.parts[1:], []).append(row)
    return [_average("/".join((f"average of {len(r)}", *m)), r) for m, r in methods.items() if len(r) > 1]


def _columns(rows: Iterable[Row]) -> list[str]:
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


# --- tables and picture ----------------------------------------------------------------------------------------


def tables(tree: Tree, form: str = "markdown", baseline: str = "", digits: int = 1) -> str:
    """The rows as text: ``markdown``, ``latex`` (booktabs) or ``csv`` (one table, full precision, one column a number).

    With ``baseline``, paired differences to the rows of that method.
    """
    parts = [rows for rows in (tree.rows, tree.base2new) if rows]
    if form == "csv":
        return _csv(tree, differences(tree.all_rows, baseline) if baseline else {})
    text = []
    for rows in parts:
        columns = _columns(rows)
        header = ["method", *(f"{LABELS.get(c, c)}, %" for c in columns), "seeds"]
        cells = [[r.name, *(_text(r.cells.get(c), digits) for c in columns), r.seeds or "-"] for r in rows]
        text.append(_table(header, cells, form))
    if baseline:
        compared = differences(tree.all_rows, baseline)
        for rows in parts:
            columns = _columns(rows)
            header = ["method", "against", *(f"{LABELS.get(c, c)}, points" for c in columns), "pairs"]
            cells = [
                [name, base.name, *(_difference_text(by.get(c), digits) for c in columns), _pairs(by)]
                for name, (base, by) in compared.items()
                if any(name == row.name for row in rows)
            ]
            text += [_table(header, cells, form)] if cells else []
    return "\n\n".join(text) + "\n"


def _pairs(by: dict[str, Difference]) -> int:
    return max((difference.pairs for difference in by.values()), default=0)


def _text(cell: tuple[float, float | None] | None, digits: int) -> str:
    if cell is None:
        return "-"
    mean, spread = cell
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _difference_text(difference: Difference | None, digits: int) -> str:
    """Mean difference, its 95 % interval and p."""
    if difference is None:
        return "-"
    text = f"{difference.mean:+.{digits}f}"
    if difference.low is not None:
        text += f" [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    if difference.p is not None:
        text += ", p < 0.001" if difference.p < 0.001 else f", p = {difference.p:.3f}"
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], form: str) -> str:
    if form == "markdown":
        from oodprompt.reports.style import markdown_table

        return markdown_table(header, rows)
    from tabulate import tabulate

    text = tabulate(
        [[str(cell) for cell in row] for row in rows], header, tablefmt="latex_booktabs", disable_numparse=True
    )
    return text.replace("±", r"$\pm$")


def _csv(tree: Tree, compared: dict[str, tuple[Row, dict[str, Difference]]]) -> str:
    columns = _columns(tree.all_rows)
    header = ["method", "seeds", *(f"{c}_{what}" for c in columns for what in ("mean", tree.spread))]
    fields = ("pairs", "mean", "low", "high", "p")
    if compared:
        header += ["baseline", *(f"{c}_difference_{what}" for c in columns for what in fields)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([name.replace(" ", "_") for name in header])
    for row in tree.all_rows:
        line = [row.name, row.seeds or "", *(v for c in columns for v in row.cells.get(c, (None, None)))]
        if compared:
            base, by = compared.get(row.name, (Row(()), {}))
            line += [base.name, *(getattr(by.get(c), what, None) for c in columns for what in fields)]
        writer.writerow(line)
    return text.getvalue()


def figure(tree: Tree, title: str) -> Figure:
    """Bars of every row's means, spreads as lines on them; one panel for plain rows, one for base-to-new rows."""
    from matplotlib.figure import Figure

    from oodprompt.reports.style import BLUE, GREEN, GREY, RED

    colours = (BLUE, RED, GREY, GREEN)
    panels = [rows for rows in (tree.rows, tree.base2new) if rows]
    count = sum(len(rows) * max(1, len(_columns(rows))) for rows in panels)
    drawn = Figure(figsize=(8, 1.6 * len(panels) + 0.26 * count), layout="constrained")
    for axes, rows in zip(drawn.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        columns = _columns(rows)
        height = 0.8 / len(columns)
        for k, column in enumerate(columns):
            places = [i + height * (k - (len(columns) - 1) / 2) for i, row in enumerate(rows) if column in row.cells]
            cells = [row.cells[column] for row in rows if column in row.cells]
            bars = axes.barh(
                places,
                [mean for mean, _ in cells],
                0.95 * height,
                xerr=[spread or 0 for _, spread in cells],
                color=colours[k % len(colours)],
                label=LABELS.get(column, column),
                ecolor="black",
            )
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        axes.set_yticks(range(len(rows)), [row.name.replace("$", r"\$") for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(right=max(114, axes.get_xlim()[1]))  # room for the label of a bar of 100
        axes.set_xlabel("%")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(columns), 4), frameon=False)
    drawn.suptitle(title)
    return drawn
