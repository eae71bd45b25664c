"""The command that tabulates a folder of outputs (``scripts/collect.py``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.reports.style import write_figure
from oodprompt.runs.aggregate import collect, in_order, upstream_summary
from oodprompt.runs.ranks import mean_ranks, ranks_figure, ranks_table
from oodprompt.runs.reading import ALIASES, LOG, subfolders, upstream_values
from oodprompt.runs.tables import figure, tables
from oodprompt.terminal import Parser, exit_status, program

DESCRIPTION = """Tables over seeds from a folder of outputs: ``python scripts/collect.py DIR [NAME ...] [--baseline CoOp]``.

DIR holds runs at any depth: ours (``results.json``) or those of CoOp, MaPLe and other projects on Dassl (``log.txt``).
One row for all runs whose paths differ in ``seed<N>`` alone, mean ± sample standard deviation (n - 1); base, new and
their harmonic mean where paths have ``train_base`` and ``test_new``. ``--baseline METHOD`` adds paired differences over
common seeds to the row with that part in its path, with a paired t-test. ``NAME`` ... are the rows that are wanted, in this
order. What is unfinished or broken is named on stderr.

``--ranks FILE`` adds each method's mean rank over data sets (DIR/DATA_SET/SETTING/METHOD/seed<N>), with its 95 % interval.

``--upstream`` prints what upstream's ``parse_test_res.py DIR`` finds: DIR's folders are the seeds (with ``--multi-exp``,
of each folder in DIR), from ``log.txt`` alone, with the population standard deviation.
"""


def _print_upstream(directory: Path, keyword: str, args: argparse.Namespace) -> float:
    """One experiment as upstream reads it; returns its mean."""
    values, unfinished = upstream_values(directory, keyword, args.test_log)
    for folder in unfinished:
        print(f"{folder}: no {keyword} in a finished {LOG}", file=sys.stderr)
    if not values:
        raise UserError(f"{directory}: no folder in it has a finished {LOG} with {keyword!r}")
    for folder, value in values.items():
        print(f"{folder / LOG}  {keyword}: {value:.2f}%")
    mean, spread = upstream_summary(list(values.values()), args.ci95)
    print(f"{directory}\n* {keyword}: {mean:.2f}% +- {spread:.2f}%")
    return mean


def _upstream(args: argparse.Namespace) -> None:
    for keyword in args.keyword or ["accuracy"]:
        if not args.multi_exp:
            _print_upstream(args.directory, keyword, args)
            continue
        means = [_print_upstream(folder, keyword, args) for folder in subfolders(args.directory)]
        print(f"Average of {len(means)}\n* {keyword}: {np.mean(means):.2f}%")


def build_parser() -> Parser:
    parser = Parser(prog=program("scripts/collect.py", "collect"), description=DESCRIPTION)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows, or parts of their paths, in the order wanted")
    parser.add_argument("--format", choices=("markdown", "latex", "csv"), default="markdown")
    parser.add_argument("--keyword", action="append", metavar="METRIC", help="a metric, e.g. macro_f1; may be repeated")
    parser.add_argument(
        "--ci95", action="store_true", help="half the 95%% interval of the mean in place of the deviation"
    )
    parser.add_argument("--test-log", action="store_true", help="logs are of evaluations (=> result), not of training")
    parser.add_argument("--multi-exp", action="store_true", help="add the average over all rows")
    parser.add_argument("--baseline", default="", metavar="METHOD", help="paired differences to the rows of METHOD")
    parser.add_argument("--digits", type=int, default=1, help="digits after the point")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bars of all rows, as PNG")
    parser.add_argument(
        "--ranks", type=Path, metavar="FILE", help="mean ranks of the methods of DIR/DATA_SET/SETTING/METHOD, as PNG"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there as well")
    parser.add_argument("--upstream", action="store_true", help="upstream's own numbers")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Print the tables of a folder of outputs."""
    args = build_parser().parse_intermixed_args(argv)
    if args.digits < 0:
        raise UserError("--digits: give 0 or more")
    if args.ranks and args.format != "markdown":
        raise UserError("--ranks: its table is in Markdown; leave out --format")
    if args.upstream:
        _upstream(args)
        return
    tree = collect(args.directory, args.keyword or (), evaluation=args.test_log, ci95=args.ci95, average=args.multi_exp)
    if args.names:
        tree = in_order(tree, args.names)
    for problem in tree.problems:
        print(problem, file=sys.stderr)
    text = tables(tree, args.format, args.baseline, args.digits)
    if args.ranks:
        keyword = args.keyword[0] if args.keyword else "worst_group_accuracy"
        metric = ALIASES.get(keyword, keyword)
        ranks, without = mean_ranks(tree.rows, metric)
        if without:
            print(f"without a rank, as a setting lacks them: {', '.join(without)}", file=sys.stderr)
        text = f"{text}\n{ranks_table(ranks)}"
        write_figure(ranks_figure(ranks), args.ranks)
    print(text, end="")
    if args.out:
        write_atomically(args.out, text)
    if args.plot:
        write_figure(figure(tree, str(args.directory)), args.plot)
        print(f"Wrote {args.plot}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
