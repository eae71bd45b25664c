"""Compare runs: ``python scripts/compare.py ROOT [NAME ...]`` reads ROOT/<name>/seed*/results.json.

Prints mean and standard deviation over seeds and writes ROOT/comparison.md and ROOT/comparison.png. Names give the
order of the rows; without names, all are taken in alphabetical order.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from oodprompt.cli import Parser, exit_status
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.reports.comparison import comparison_figure
from oodprompt.reports.style import markdown_table, write_figure
from oodprompt.runs.collecting import spread

METRICS = {"accuracy": "accuracy", "worst_group_accuracy": "worst group", "gap": "gap"}


def read_rows(root: Path, names: list[str]) -> dict[str, list[dict]]:
    """Results of every name, one per seed; ``UserError`` for names without results."""
    names = names or sorted({file.parent.parent.name for file in root.glob("*/seed*/results.json")})
    rows = {
        name: [json.loads(f.read_text()) for f in sorted(root.glob(f"{name}/seed*/results.json"))] for name in names
    }
    missing = [name for name, results in rows.items() if not results]
    if missing or not rows:
        raise UserError(f"no results in {root / (missing[0] if missing else '*')}/seed*/results.json; train first")
    for name, results in rows.items():
        if any(r["worst_group_accuracy"] is None for r in results):
            raise UserError(f"{root / name}: these results have no groups (no attributes in the data set)")
    return rows


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    rows = read_rows(args.root, args.names)
    seeds = {len(results) for results in rows.values()}
    table = [
        [name, *(spread([r[key] for r in results]) for key in METRICS), len(results)] for name, results in rows.items()
    ]
    header = ["method", *(f"{label}, %" for label in METRICS.values()), "seeds"]
    text = markdown_table(header, table)
    first = next(iter(rows.values()))[0]
    title = (
        f"{first['dataset']}, {first['backbone']}, {first['split']}, {max(seeds)} seed{'s' if max(seeds) > 1 else ''}"
    )
    means = [
        (name, *(statistics.fmean(r[key] for r in results) for key in list(METRICS)[:2]))
        for name, results in rows.items()
    ]
    write_atomically(args.root / "comparison.md", f"{text}\n")
    write_figure(comparison_figure(means, title), args.root / "comparison.png")
    print(f"\n{title}\n\n{text}\n\nWrote {args.root / 'comparison.md'}, {args.root / 'comparison.png'}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
