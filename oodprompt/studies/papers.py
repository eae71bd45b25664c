"""Benchmarks of papers on CLIP weights that the user has: a grid of methods, then a table beside published numbers.

``settings.yaml`` says what is trained and which settings are published, ``published.csv`` holds the numbers. Runs are those
of ``scripts/benchmark.py``; their grid file is left beside them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from oodprompt.config.packaged import find_config
from oodprompt.data.dataset import build_dataset
from oodprompt.errors import UserError, nearest
from oodprompt.files import write_atomically
from oodprompt.reports.results import finished_results
from oodprompt.runs import benchmark
from oodprompt.runs.grid import config_of
from oodprompt.runs.grid_file import Method, read_grid
from oodprompt.runs.launch import RunsFailed, runs_status
from oodprompt.studies.published import OurRow, beside_published, over_targets, read_published
from oodprompt.terminal import Parser

DESCRIPTION = """Train methods on a benchmark of papers and print them beside published numbers.

    bash scripts/papers/waterbirds.sh DATA [--backbones RN50 ViT-L/14] [--seeds 1 2 3] [--learners CoOp KgCoOp]
        [--debiasers GroupDRO DebiasedPT] [--gpus 0 1]

Learners are trained alone, debiasers over every learner that is trained. Methods that train nothing or bring prompts
of their own run once. Rerun the same command to skip what is finished and resume what is not. The tables are in
OUT/published.md.
"""
Settings = dict[str, Any]


def read_arguments(settings: Settings, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``UserError`` for names that ``settings`` lacks."""
    kinds = {kind: list(settings[kind]) for kind in ("learners", "debiasers")}
    usual = {kind: [n for n in names if settings[kind][n].get("default", True)] for kind, names in kinds.items()}
    parser = Parser(prog="reproduce.py", description=DESCRIPTION)
    parser.add_argument("dataset", choices=list(settings["datasets"]), help="the benchmark; the scripts give it")
    parser.add_argument("root", metavar="DATA", help="folder that holds the data sets")
    parser.add_argument("--backbones", nargs="+", default=settings["backbones"], metavar="NAME", help="RN50 ViT-L/14")
    seeds = " ".join(map(str, settings["seeds"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=settings["seeds"], help=f"default: {seeds}")
    for kind, names in kinds.items():
        text = f"of {', '.join(names)}; default: {'all' if usual[kind] == names else ', '.join(usual[kind])}"
        parser.add_argument(f"--{kind}", nargs="*", default=usual[kind], metavar="NAME", help=text)
    parser.add_argument("--out", type=Path, help="default: output/papers/DATASET")
    benchmark.add_run_flags(parser, "runs at the same time; default: one per GPU of --gpus, else one")
    args = parser.parse_args(argv)
    args.out = args.out or Path("output/papers") / args.dataset
    for kind, names in kinds.items():
        for name in (given := getattr(args, kind)):
            if name not in names:
                raise UserError(f"--{kind}: no settings for {name!r}: {nearest(name, names)}")
            if given.count(name) > 1:
                raise UserError(f"--{kind}: {name} is given twice")
    for name in args.learners:
        only = settings["learners"][name].get("only")
        if only and (other := [b for b in args.backbones if b.startswith("RN")]):
            raise UserError(f"--learners: {name} prompts a {only}, not {other[0]}; give --backbones ViT-L/14")
    return args


def methods_of(settings: Settings, args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Every row of the grid -> the entries of ``settings`` that it is made of, the debiaser first."""
    learners, debiasers = settings["learners"], settings["debiasers"]
    rows: dict[str, tuple[str, ...]] = {name: (name,) for name in args.learners}
    bases = [name for name in args.learners if not learners[name].get("alone")]
    for name in args.debiasers:
        if debiasers[name].get("alone"):
            rows[name] = (name,)
        elif not bases:
            raise UserError(f"--debiasers: {name} needs a learner that is trained; give one, as --learners CoOp")
        else:
            rows |= {f"{name}-{base}": (name, base) for base in bases}
    if not rows:
        raise UserError("--learners, --debiasers: give at least one of the two a name")
    return rows


def grid_of(settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """The content of the grid file: backbones, with each test domain, are its settings."""
    data = settings["datasets"][args.dataset]
    entries, extra = settings["learners"] | settings["debiasers"], data.get("methods", {})
    methods = {}
    for row, parts in methods_of(settings, args).items():
        words = [word for part in parts[::-1] for word in (entries[part]["args"], *extra.get(part, []))]
        methods[row] = " ".join([*words, *(f"--base {base}" for base in parts[1:])])
    domain = {target: f" DATASET.TARGET_DOMAINS \"('{target}',)\"" for target in targets_of(data) if target}
    return {
        "config": settings["config"],
        "common": f"--dataset-config-file configs/datasets/{args.dataset}.yaml {data.get('args', '')}".strip(),
        "settings": {
            setting_of(backbone, target): f"--backbone {shlex.quote(backbone)}{domain.get(target, '')}"
            for backbone in args.backbones
            for target in targets_of(data)
        },
        "methods": methods,
    }


def targets_of(data: Mapping[str, Any]) -> list[str]:
    """The domains that are tested in turn; one without a name where the data set has a test split."""
    return data.get("targets", [""])


def setting_of(backbone: str, target: str) -> str:
    """The name of a setting, which is a folder: "ViT-L-14", "RN50_photo"."""
    return "_".join([re.sub(r"[^\w.-]+", "-", backbone), *([target] if target else [])])


def provenance(settings: Settings, args: argparse.Namespace) -> str:
    """Which settings are published and which are ours, of all that is trained."""
    data = settings["datasets"][args.dataset]
    entries = settings["learners"] | settings["debiasers"]
    used = dict.fromkeys(part for parts in methods_of(settings, args).values() for part in parts[::-1])
    lines = []
    for name, entry in [("all methods", settings), (args.dataset, data), *((name, entries[name]) for name in used)]:
        lines += [f"  {name}: {kind}: {entry[kind]}" for kind in ("paper", "ours") if entry.get(kind)]
    return "\n".join(["Settings (paper: published; ours: chosen by us):", *lines])


def check_tree(settings: Settings, args: argparse.Namespace) -> None:
    """Read the lists of the data set; ``UserError`` where its files are not as expected."""
    file = find_config(f"configs/datasets/{args.dataset}.yaml")
    line = ["--dataset-config-file", str(file), "--config-file", settings["config"], "--root", args.root]
    build_dataset(config_of([*line, "--trainer", "ZeroshotCLIP", "--seed", "1", *args.opts]))


def our_rows(settings: Settings, args: argparse.Namespace, grid: Path) -> list[OurRow]:
    """The rows of all methods on all backbones; a seed that lacks a test domain has no numbers."""
    entries = settings["learners"] | settings["debiasers"]
    targets = targets_of(settings["datasets"][args.dataset])
    methods: dict[str, Method] = {method.name: method for method in read_grid(grid).methods}
    rows = []
    for backbone in args.backbones:
        for row, parts in methods_of(settings, args).items():
            seeds = []
            for seed in args.seeds:
                folders = [
                    args.out / setting_of(backbone, target) / methods[row].folder / f"seed{seed}" for target in targets
                ]
                found = [results for folder in folders if (results := finished_results(folder)) is not None]
                if len(found) == len(targets):
                    seeds.append(over_targets(found))
            rows.append(OurRow(row, backbone, entries[parts[0]]["labels"], parts[0], seeds))
    return rows


def run(folder: Path, argv: Sequence[str] | None = None) -> None:
    """Train what is missing, write the tables; ``RunsFailed`` where runs failed."""
    settings: Settings = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    args = read_arguments(settings, argv)
    published = read_published(folder / "published.csv", args.dataset)
    content = yaml.safe_dump(grid_of(settings, args), sort_keys=False, width=1000)
    words = ["--seeds", *map(str, args.seeds), "--root", args.root, "--out", str(args.out)]
    words += ["--together", args.together]
    if args.jobs or not args.slurm:
        words += ["--jobs", str(args.jobs or len(args.gpus) or 1)]
    for flag in ("gpus", "slurm_opts", "opts"):
        if values := getattr(args, flag):
            words += [f"--{flag.replace('_', '-')}", *values]
    words += ["--slurm", args.slurm] if args.slurm else []
    said = provenance(settings, args)
    if args.dry_run:
        print("".join(f"# {line}\n" for line in said.splitlines()), end="")
        with tempfile.TemporaryDirectory() as temporary:
            grid = Path(temporary) / "grid.yaml"
            grid.write_text(content, encoding="utf-8")
            benchmark.run([str(grid), *words, "--dry-run"])
        return
    check_tree(settings, args)
    print(said, flush=True)
    grid = args.out / "grid.yaml"
    write_atomically(grid, content)
    failure = None
    try:
        benchmark.run([str(grid), *words])
    except RunsFailed as error:
        failure = error
    text = beside_published(our_rows(settings, args, grid), published)
    write_atomically(args.out / "published.md", text)
    print(f"\n{text}\nWrote {args.out / 'published.md'}")
    if failure:
        raise failure


def main(folder: Path, argv: Sequence[str] | None = None) -> int:
    """The command line, with the files in ``folder``; exit status 0, 1 where runs failed, 2 for a user's error."""
    return runs_status(lambda: run(folder, argv))
