"""RaVL's controlled evaluation on planted correlations: discovery and mitigation beside their baselines, in one table.

    python scripts/ravl/controlled_eval.py --root DIGITS --out output/ravl_controlled [--targets nine three] [--v 0.95 0.99]

DIGITS holds the idx files of MNIST (or FashionMNIST with --kind fashion): DIGITS/MNIST/raw/*, or the files themselves;
--download fetches them. A setting is a class (the target) that a red rectangle goes with, by Cramer's V. For each, the
embedded CLIP is fine-tuned on captions with every seed; where the correlation was learned with all seeds (eps1, eps2 > 10
points), discovery is scored by Precision@10 and mitigations are trained. Finished runs are kept, so that a stopped grid
goes on where it was. Writes results.json, table.md and settings.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from oodprompt.cli import Parser, exit_status
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.reports.style import markdown_table, write_figure
from oodprompt.runs.collecting import spread
from oodprompt.studies.evaluation import METHODS, Plan, part_of_grid, teach_backbone
from oodprompt.studies.metrics import TAU_EVAL, is_valid

Key = tuple[str, float]  # target, V


def together(pool: ProcessPoolExecutor, tasks: dict[Any, tuple[Any, ...]], title: str) -> dict[Any, dict[str, Any]]:
    """The results of tasks (name of a function of ``oodprompt.controlled.evaluation``, its arguments), by key."""
    futures = {pool.submit(part_of_grid, *task): key for key, task in tasks.items()}
    results = {}
    try:
        for future in tqdm(as_completed(futures), total=len(futures), desc=title, unit="run", disable=None):
            results[futures[future]] = future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return {key: results[key] for key in tasks}


def discovery_table(valid: Sequence[Key], models: dict[Any, dict[str, Any]], seeds: Sequence[int]) -> str:
    """Precision@10 of every method over all valid settings and by strength: the mean over seeds of each setting."""
    names = list(next(iter(models.values()))["precision"])

    def of(name: str, keys: Sequence[Key]) -> list[float]:
        return [statistics.fmean(models[key, seed]["precision"][name] for seed in seeds) for key in keys]

    strong = {tau: [key for key in valid if is_valid([models[key, s]["eps"] for s in seeds], tau)] for tau in TAU_EVAL}
    header = ["discovery", *(f"tau {100 * tau:.0f} ({len(keys)})" for tau, keys in strong.items())]
    return markdown_table(header, [[n, *(spread(of(n, keys), 1, 2) for keys in strong.values())] for n in names])


def mitigation_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracies of every method, mean ± standard deviation over settings and seeds, in per cent."""
    columns = ("image_worst_group", "image_overall", "region_worst_group", "region_overall")
    header = ["mitigation", *(column.replace("_", " ") for column in columns), "gain in image worst group"]
    base = [row["image_worst_group"] for row in rows["standard"]]
    table = []
    for name, measured in rows.items():
        gains = [row["image_worst_group"] - b for row, b in zip(measured, base, strict=True)]
        table.append([name, *(spread(row[c] for row in measured) for c in columns), spread(gains)])
    return markdown_table(header, table)


def figure(rows: dict[str, list[dict[str, Any]]], labels: Sequence[str]) -> Any:
    """Worst-group accuracy of every method in every setting and seed."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(max(7, 2.5 + 0.45 * len(labels)), 4.6), layout="constrained")
    axes = picture.add_subplot()
    for i, (name, measured) in enumerate(rows.items()):
        values = [100 * row["image_worst_group"] for row in measured]
        axes.plot(values, "o", color=f"C{i}", label=f"{name} (mean {statistics.fmean(values):.1f})", alpha=0.85)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("image worst-group accuracy, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    picture.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return picture


def run(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--out", type=Path, default=Path("output/ravl_controlled"))
    parser.add_argument("--kind", choices=("mnist", "fashion"), default="mnist")
    parser.add_argument("--targets", nargs="+", help="classes that the rectangle goes with; default: all ten")
    parser.add_argument("--v", type=float, nargs="+", default=[0.95], help="Cramer's V of rectangle and class")
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
    grid(args)


def grid(args: argparse.Namespace) -> None:
    from oodprompt.studies.digits import build_setting, class_index, kind_of

    if args.jobs < 1:
        raise UserError("--jobs: give 1 or more")
    methods = args.methods or [name for name in METHODS if name != "standard"]
    for name in methods:
        if name not in METHODS or name == "standard":
            raise UserError(f"--methods: {name!r} is none of {', '.join(list(METHODS)[1:])}")
    seeds, again = args.seeds, args.mitigation_seeds or args.seeds
    if not set(again) <= set(seeds):
        raise UserError("--mitigation-seeds must be among --seeds: a mitigation starts from the model of its seed")
    classes = kind_of(args.kind).classes
    targets = [classes[class_index(args.kind, target)] for target in args.targets or classes]
    backbone = teach_backbone(args.backbone, args.kind, args.out / f"{args.backbone.replace('/', '-')}-{args.kind}.pt")
    plan = Plan(args.kind, args.config_file, str(backbone), tuple(args.opts))
    folder: dict[Key, Path] = {
        (target, v): build_setting(
            args.kind,
            args.root,
            args.out / "settings",
            target,
            v,
            n_train=args.train,
            n_val=args.evaluation,
            n_test=args.evaluation,
            download=args.download,
        )
        for target, v in itertools.product(targets, args.v)
    }

    def place(key: Key, method: str, seed: int) -> Path:
        return args.out / "runs" / f"{args.kind}-{key[0]}-v{key[1]:g}".replace(" ", "_") / method / f"seed{seed}"

    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        models = together(
            pool,
            {
                (key, seed): ("standard", plan, path, seed, place(key, "standard", seed))
                for key, path in folder.items()
                for seed in seeds
            },
            "Fine-tuning and discovery",
        )
        valid = [key for key in folder if is_valid([models[key, seed]["eps"] for seed in seeds])]
        ready = [(key, seed) for key in valid for seed in again if models[key, seed]["found"]]
        tasks = {
            (key, seed, name): (
                "mitigated", plan, folder[key], name, seed, place(key, "standard", seed), place(key, name, seed),
            )
            for key, seed in ready
            for name in methods
        }  # fmt: skip
        mended = together(pool, tasks, "Mitigation")
    write(args.out, valid, folder, models, mended, ready, methods, seeds)


def write(
    out: Path,
    valid: Sequence[Key],
    folder: dict[Key, Path],
    models: dict[Any, dict[str, Any]],
    mended: dict[Any, dict[str, Any]],
    ready: Sequence[tuple[Key, int]],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> None:
    """The tables of a grid, printed and written."""
    rows = {"standard": [models[one] for one in ready]}
    rows |= {name: [mended[key, seed, name] for key, seed in ready] for name in methods}
    lines = [f"{len(valid)} of {len(folder)} settings are valid (eps1, eps2 > 10 points with every seed)."]
    settings = [
        [key[0], f"{key[1]:g}", *(spread(models[key, s]["eps"][i] for s in seeds) for i in (0, 1)),
         "yes" if key in valid else "no", spread((models[key, s]["precision"]["RaVL"] for s in seeds), 1, 2),
         ", ".join(str(models[key, s]["attribute"]) for s in seeds)]
        for key in folder
    ]  # fmt: skip
    header = ["target", "V", "eps1", "eps2", "valid", "Precision@10 of RaVL", "class found to be helped"]
    parts = [*lines, markdown_table(header, settings)]
    if valid:
        parts.append(discovery_table(valid, models, seeds))
    if ready:
        parts += [f"Mitigation in {len(ready)} models, where discovery found something:", mitigation_table(rows)]
        write_figure(figure(rows, [f"{t} {v:g}, seed {s}" for (t, v), s in ready]), out / "settings.png")
    text = "\n\n".join(parts) + "\n"
    write_atomically(out / "table.md", text)
    results = {
        "models": [{"target": k[0], "v": k[1], "seed": s, "valid": k in valid, **m} for (k, s), m in models.items()],
        "mitigations": [
            {"target": k[0], "v": k[1], "seed": s, "method": name, **m} for (k, s, name), m in mended.items()
        ],
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"{text}\nWrote {out / 'table.md'}, {out / 'results.json'}" + (f", {out / 'settings.png'}" if ready else ""))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the workers inherit it
    sys.exit(exit_status(run))
