"""RaVL's controlled evaluation: models that have learned a planted correlation, what finds it, and what mends it.

For every setting and seed, a CLIP is fine-tuned on captions. The setting is valid where it has learned the correlation with
every seed. Discovery and its baselines are scored by Precision@10. Where RaVL's discovery found something, each mitigation
trains anew with it. Every run is an ordinary run of ``train.py`` in a folder of its own.

Source: Varma et al., "RaVL", NeurIPS 2024, sections 3.2 and 4, appendices B to E.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oodprompt.errors import UserError
from oodprompt.runs.launch import RunsFailed, run_here, runs_status, sigterm_as_ctrl_c, unfinished
from oodprompt.runs.progress import Progress
from oodprompt.studies.coco import build_coco_setting, coco_pairs
from oodprompt.studies.controlled_tables import Key, write_tables
from oodprompt.studies.digits import build_setting, class_index, kind_of
from oodprompt.studies.evaluation import METHODS, Plan, teach_backbone
from oodprompt.studies.metrics import is_valid
from oodprompt.studies.part import Part
from oodprompt.terminal import Parser

DESCRIPTION = """RaVL's controlled evaluation on planted correlations: discovery and mitigation beside their baselines, in one table.

    python scripts/ravl/controlled_eval.py --root DIGITS --out output/ravl_controlled [--targets nine three] [--v 0.95 0.99]

DIGITS holds the idx files of MNIST (or FashionMNIST with --kind fashion): DIGITS/MNIST/raw/*, or the files themselves;
--download fetches them. A setting is a class (the target) that a red rectangle goes with, by Cramer's V. With --kind coco,
--root is COCO's folder (annotations, train2017, val2017) and a setting is a label that another category is seen with;
--backbone and --config-file then name a CLIP that knows the words, such as RN50.

For each setting, the CLIP is fine-tuned on captions with every seed. Where the correlation was learned with all seeds (eps1,
eps2 > 10 points), discovery is scored by Precision@10 and mitigations are trained. Rerun the same command to skip what is
finished and resume what is not. Writes results.json, table.md and settings.png.
"""


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``UserError`` for what makes no sense."""
    parser = Parser(prog="controlled_eval.py", description=DESCRIPTION)
    parser.add_argument("--root", type=Path, required=True, help="folder of the idx files, or of COCO")
    parser.add_argument("--out", type=Path, default=Path("output/ravl_controlled"))
    parser.add_argument("--kind", choices=("mnist", "fashion", "coco"), default="mnist")
    parser.add_argument("--targets", nargs="+", help="classes that the rectangle goes with; default: all ten")
    parser.add_argument("--pairs", type=int, help="coco: how many pairs of label and feature are drawn; default 10")
    parser.add_argument(
        "--min-images",
        type=int,
        default=50,
        help="coco: images that each label has at least, with and without the feature; a fifth of it for evaluation",
    )
    parser.add_argument("--v", type=float, nargs="+", default=[0.95], help="Cramer's V of feature and class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--mitigation-seeds", type=int, nargs="+", help="seeds of the mitigations; default: --seeds")
    parser.add_argument("--train", type=int, default=2000, help="images of a fine-tuning set")
    parser.add_argument("--evaluation", type=int, default=1000, help="images for discovery, and again for testing")
    parser.add_argument("--methods", nargs="+", help="mitigations; default: all")
    parser.add_argument("--config-file", default="configs/trainers/RaVL/tiny_controlled.yaml")
    parser.add_argument("--backbone", default="tiny")
    parser.add_argument("--download", action="store_true", help="fetch the idx files where they are missing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at the same time")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys of all runs, e.g. OPTIM.MAX_EPOCH 5")
    args = parser.parse_intermixed_args(argv)
    if args.jobs < 1:
        raise UserError("--jobs: give 1 or more")
    args.methods = args.methods or [name for name in METHODS if name != "standard"]
    for name in args.methods:
        if name not in METHODS or name == "standard":
            raise UserError(f"--methods: {name!r} is none of {', '.join(list(METHODS)[1:])}")
    args.mitigation_seeds = args.mitigation_seeds or args.seeds
    if not set(args.mitigation_seeds) <= set(args.seeds):
        raise UserError("--mitigation-seeds must be among --seeds: a mitigation starts from the model of its seed")
    if args.kind == "coco" and (args.targets or args.download):
        raise UserError("--kind coco: pairs are drawn and files are not fetched; leave out --targets and --download")
    if args.kind != "coco" and args.pairs is not None:
        raise UserError("--pairs: only for --kind coco; give --targets")
    return args


def settings_of(args: argparse.Namespace) -> dict[Key, Path]:
    """(target, V) -> the folder of the setting, built where it is missing."""
    sizes = {"n_train": args.train, "n_val": args.evaluation, "n_test": args.evaluation}
    place = args.out / "settings"
    if args.kind == "coco":
        annotations = args.root / "annotations"
        files = [annotations / f"{name}2017.json" for name in ("instances_train", "captions_train", "instances_val")]
        captions = files[1] if files[1].is_file() else None
        fewest = {"min_images": args.min_images, "min_evaluation": args.min_images // 5}
        pairs = coco_pairs(files[0], captions, files[2], args.pairs or 10, **fewest)
        return {
            (f"{pair.label} with {pair.feature}", v): build_coco_setting(args.root, place, pair, v, **sizes)
            for pair, v in itertools.product(pairs, args.v)
        }
    classes = kind_of(args.kind).classes
    targets = [classes[class_index(args.kind, target)] for target in args.targets or classes]
    return {
        (target, v): build_setting(args.kind, args.root, place, target, v, download=args.download, **sizes)
        for target, v in itertools.product(targets, args.v)
    }


def backbone_of(args: argparse.Namespace) -> tuple[str, str]:
    """Key and value of the backbone: of digits it is taught their words first, of COCO it knows them."""
    if args.kind == "coco":
        return "MODEL.BACKBONE.NAME", args.backbone
    torch.set_num_threads(1)  # a process that has computed with threads must not be forked
    file = args.out / f"{args.backbone.replace('/', '-')}-{args.kind}.pt"
    return "MODEL.BACKBONE.PATH", str(teach_backbone(args.backbone, args.kind, file))


def run(argv: Sequence[str] | None = None) -> None:
    """The whole evaluation; ``RunsFailed`` where parts of it failed."""
    args = read_arguments(argv)
    settings, seeds = settings_of(args), args.seeds
    plan = Plan(args.kind, args.config_file, backbone_of(args), tuple(args.opts))

    def part(key: Key, method: str, seed: int, found: Path | None = None) -> Part:
        name = f"{args.kind}-{key[0]}-v{key[1]:g}".replace(" ", "_")
        folder = args.out / "runs" / name / method / f"seed{seed}"
        return Part(plan, settings[key], method, seed, folder, f"{method}, {key[0]}, V {key[1]:g}, seed {seed}", found)

    print(f"Fine-tuning and discovery: {len(settings) * len(seeds)} models", flush=True)
    standard = {(key, seed): part(key, "standard", seed) for key in settings for seed in seeds}
    models = _together(standard, args.jobs)
    valid = [key for key in settings if is_valid([models[key, seed]["eps"] for seed in seeds])]
    ready = [(key, seed) for key in valid for seed in args.mitigation_seeds if models[key, seed]["found"]]
    print(f"Mitigation: {len(ready) * len(args.methods)} models", flush=True)
    mitigated = {
        (key, seed, name): part(key, name, seed, standard[key, seed].folder)
        for key, seed in ready
        for name in args.methods
    }
    write_tables(args.out, valid, settings, models, _together(mitigated, args.jobs), ready, args.methods, seeds)


def _together(parts: dict[Any, Part], at_once: int) -> dict[Any, dict[str, Any]]:
    """What was measured of each part; ``RunsFailed`` where one failed, when the others have ended."""
    todo = unfinished(list(parts.values()))
    progress = Progress(len(todo), at_once)
    try:
        with sigterm_as_ctrl_c():
            failed = run_here(todo, at_once, [], progress)
    finally:
        progress.close()
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if failed:
        raise RunsFailed(f"{len(failed)} of {len(parts)} runs failed; rerun the same command to try them again")
    return {key: part.measured() or {} for key, part in parts.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; exit status 0, 1 where runs failed or were interrupted, 2 for a user's error."""
    # Read by OpenMP when torch is first imported: see oodprompt.cli.main. Processes, not threads, share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return runs_status(lambda: run(argv))
