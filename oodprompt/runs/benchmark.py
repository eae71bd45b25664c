"""The command that trains many runs and tabulates them (``scripts/benchmark.py``)."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oodprompt.config import extensions
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.runs import grid as grids
from oodprompt.runs import grid_file
from oodprompt.runs.aggregate import Row, baselines, collect
from oodprompt.runs.bundles import Bundle, bundled, on_gpu, saying, size_of
from oodprompt.runs.grid import TrainingRun
from oodprompt.runs.grid_file import GridFile, read_grid
from oodprompt.runs.grid_tables import headline, page_text, results_of, write_tables
from oodprompt.runs.launch import RunsFailed, parts_of, run_here, runs_status, sigterm_as_ctrl_c, unfinished
from oodprompt.runs.progress import Progress
from oodprompt.runs.slurm import run_on_slurm
from oodprompt.runs.tables import tables
from oodprompt.terminal import Parser, program

DESCRIPTION = """Train many runs and tabulate them: ``python scripts/benchmark.py GRID.yaml``, or a grid by flags.

    python scripts/benchmark.py scripts/grids/coop_ood.yaml --seeds 1 2 3 --out output/mine --jobs 2
    python scripts/benchmark.py --trainers CoOp CoOpOOD DebiasedPT --bases CoOp MaPLe --datasets waterbirds celeba \\
        --seeds 1 2 3 --root DATA --config-file CoOp=configs/trainers/CoOp/vit_b16_ep50_ctxv1.yaml ... --gpus 0 1

GRID.yaml says what is trained (its entries: --grid-help). Its runs are in ``OUT/[<setting>/]<method>/seed<N>``. By flags,
debiasers go over every base, prompt learners stand alone, and ``CoOpOOD+DebiasedPT`` is a stack. Those runs are in
``OUT/<data set>/<method>/seed<N>``. What a run prints is in ``train.log`` there.

Rerun the same command to skip what is finished and resume what is not. Ends in tables, which are also written into OUT.
"""
# Keys that --opts cannot change, and what does.
_OWN_KEYS = {
    "SEED": "give --seeds",
    "OUTPUT_DIR": "give --out",
    "RESUME": "runs are resumed by themselves",
    "TRAINER.NAME": "give --trainers",
    "TRAINER.BASE": "give --bases",
    "TRAINER.STACK": "give --trainers A+B",
}


class _GridHelp(argparse.Action):
    """Prints the entries of GRID.yaml."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print((grid_file.__doc__ or "").strip())
        parser.exit()


def build_parser() -> Parser:
    parser = Parser(prog=program("scripts/benchmark.py", "benchmark"), description=DESCRIPTION)
    parser.add_argument("grid", nargs="?", type=Path, metavar="GRID.yaml", help="what is trained; else --trainers ...")
    parser.add_argument("--trainers", nargs="+", default=[], metavar="NAME", help="names, or stacks as A+B")
    parser.add_argument("--bases", nargs="+", default=[], metavar="NAME", help="under debiasers; default: their own")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="NAME", help="files of configs/datasets, or paths")
    parser.add_argument(
        "--config-file", nargs="+", default=[], metavar="[TRAINER=]FILE", help="of all trainers, or of one"
    )
    parser.add_argument("--baseline", default="", metavar="METHOD", help="paired differences to this method")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of GRID.yaml, else 1 2 3")
    extensions.add_flag(parser)
    parser.add_argument("--root", default="data", help="folder that holds the data sets")
    parser.add_argument("--out", type=Path, help="default: output/<name of GRID.yaml>, else output/benchmark")
    add_run_flags(parser, "runs at the same time; default: one per GPU of --gpus, else one, of GRID.yaml one per core")
    parser.add_argument("--grid-help", action=_GridHelp, nargs=0, help="print what GRID.yaml may have, and end")
    return parser


def add_run_flags(parser: Parser, jobs: str) -> None:
    """How the runs of any grid are trained; ``jobs`` is the help of ``--jobs``."""
    parser.add_argument("--jobs", type=int, help=jobs)
    parser.add_argument(
        "--together", default="off", metavar="auto|N|off", help="up to N runs in one process (default: off)"
    )
    parser.add_argument("--gpus", nargs="+", default=[], metavar="ID", help="each run sees one of them")
    parser.add_argument("--slurm", default="", metavar="PARTITION", help="submit to Slurm (needs submitit)")
    parser.add_argument(
        "--slurm-opts", nargs="+", default=[], metavar="KEY=VALUE", help="submitit's parameters, e.g. timeout_min=600"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config keys for every run")


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``UserError`` for what makes no sense whatever the grid is."""
    args = build_parser().parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    by_flags = {"--" + n.replace("_", "-"): getattr(args, n) for n in ("trainers", "bases", "datasets", "config_file")}
    given = [flag for flag, value in by_flags.items() if value]
    if args.grid and given:
        raise UserError(f"{given[0]}: {args.grid} says what is trained; leave one of the two out")
    if args.grid and args.baseline:
        raise UserError("--baseline: tables of a grid file have none; run scripts/collect.py OUT --baseline METHOD")
    if not args.grid:
        for flag in ("--trainers", "--config-file"):
            if not by_flags[flag]:
                raise UserError(f"give GRID.yaml, or {flag}; see `oodprompt benchmark --help`")
    if args.jobs is not None and args.jobs < 1:
        raise UserError("--jobs: give 1 or more")
    size_of(args.together)
    if args.slurm and args.gpus:
        raise UserError("--gpus: Slurm gives each run a GPU of its own; leave it out with --slurm")
    if wrong := [pair for pair in args.slurm_opts if "=" not in pair]:
        raise UserError(f"--slurm-opts: KEY=VALUE expected, not {wrong[0]!r}; submitit's README lists the keys")
    if args.seeds and min(args.seeds) < 0:
        raise UserError("--seeds: give 0 or more; a negative seed is another one in every run")
    if taken := [f"{key}: {use}" for key, use in _OWN_KEYS.items() if key in args.opts[::2]]:
        raise UserError(
            f"--opts {taken[0]}" if not args.grid else f"--opts {taken[0].split(':')[0]}: {args.grid} says it"
        )
    for name in ("trainers", "bases", "datasets", "seeds"):
        values = getattr(args, name) or []
        if twice := [value for value in values if values.count(value) > 1]:
            raise UserError(f"--{name}: {twice[0]} is given twice")


def read_runs(args: argparse.Namespace) -> tuple[GridFile | None, list[TrainingRun], Path]:
    """The grid file, if it is one, all runs, and the folder that they are in."""
    extensions.add(args.imports)
    common = [word for name in args.imports for word in ("--import", name)] + ["--root", args.root]
    if args.grid:
        grid = read_grid(args.grid)
        out = args.out or Path("output") / args.grid.stem
        return grid, grids.file_runs(grid, args.seeds or grid.seeds or [1, 2, 3], common, args.opts, out), out
    out = args.out or Path("output/benchmark")
    runs = grids.flag_runs(
        args.trainers,
        args.bases or [""],
        args.datasets or [""],
        args.seeds or [1, 2, 3],
        args.config_file,
        common,
        args.opts,
        out,
    )
    if args.baseline:  # now, and not when all runs are finished
        places = dict.fromkeys((run.setting, run.method) for run in runs)
        baselines([Row(parts, name="/".join(parts)) for parts in places], args.baseline)
    return None, runs, out


def run(argv: Sequence[str] | None = None) -> None:
    """Train what is missing of a grid and tabulate it; ``RunsFailed`` where runs failed."""
    args = read_arguments(argv)
    grid, runs, out = read_runs(args)
    todo = unfinished(runs)
    if args.dry_run:
        for one in runs:
            print(("" if one in todo else "# finished: ") + shlex.join(["python", "train.py", *one.arguments]))
        return
    at_once = args.jobs or len(args.gpus) or (_cores() if grid else 1)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished already", flush=True)
    jobs = _jobs(args, todo, at_once)
    progress = Progress(len(todo), at_once * max([len(parts_of(job)) for job in jobs], default=1))
    try:
        with sigterm_as_ctrl_c():
            if args.slurm and todo:
                options = _slurm_options(args.slurm_opts, args.jobs)
                failed = run_on_slurm(todo, args.slurm, options, out / "slurm", progress)
            else:
                failed = run_here(jobs, at_once, args.gpus, progress)
    finally:
        progress.close()
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if len(failed) < len(runs):
        if grid:
            _report_file(args, grid, runs, out)
        else:
            _report_flags(args, runs, out)
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(runs)} runs failed; rerun the same command to try them again")


def _jobs(args: argparse.Namespace, todo: Sequence[TrainingRun], at_once: int) -> Sequence[TrainingRun | Bundle]:
    """What is done in a process each, and a line that says how runs go together or why not."""
    size = size_of(args.together)
    if size == 1:
        return todo
    why = (
        "Slurm gives each run a process of its own"
        if args.slurm
        else "a GPU computes backward passes in threads of its own"
        if args.gpus or on_gpu()
        else ""
    )
    if why and args.together != "auto":
        print(f"Note: --together {args.together} is for the CPU of this machine: {why}; runs train alone", flush=True)
    if why:
        return todo
    jobs = bundled(todo, size, at_once)
    if line := saying(jobs):
        print(line, flush=True)
    return jobs


def _report_flags(args: argparse.Namespace, runs: Sequence[TrainingRun], out: Path) -> None:
    tree = collect(out, only=[one.folder for one in runs])
    for problem in tree.problems:
        print(problem, file=sys.stderr)
    text = tables(tree, baseline=args.baseline)
    write_atomically(out / "table.md", text)
    print(f"\n{text}\nWrote {out / 'table.md'}")


def _report_file(args: argparse.Namespace, grid: GridFile, runs: Sequence[TrainingRun], out: Path) -> None:
    results = results_of(grid, runs)
    text, files = write_tables(grid, results, out)
    if grid.page:
        seeds = tuple(args.seeds or grid.seeds)
        if seeds == grid.seeds and not args.opts and all(one.is_finished() for one in runs):
            write_atomically(grid.page, page_text(grid, text))
            files.append(Path(grid.page))
        else:
            print(f"{grid.page} is left as it is: it takes all runs with the seeds of {grid.path}, and no --opts")
    title = grid.title or (headline(results) if len(grid.settings) == 1 else "")
    print((f"\n{title}\n" if title else "") + f"\n{text}\nWrote {', '.join(map(str, files))}")


def _slurm_options(pairs: Sequence[str], at_once: int | None) -> dict[str, Any]:
    words = (pair.split("=", 1) for pair in pairs)
    options: dict[str, Any] = {key: int(value) if value.isdigit() else value for key, value in words}
    return ({"slurm_array_parallelism": at_once} if at_once else {}) | options


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 0, 1 where runs failed or were interrupted, 2 for a user's error."""
    # Read by OpenMP when torch is first imported: see oodprompt.cli.main. Processes, not threads, share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return runs_status(lambda: run(argv))
