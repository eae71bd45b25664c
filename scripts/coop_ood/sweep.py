"""Choose CoOpOOD's own hyper-parameters on validation data: ``python scripts/coop_ood/sweep.py``.

Every setting trains on ShapesOnScenes with the embedded CLIP (configs/trainers/CoOpOOD/tiny_shapes.yaml) at the
tuning seeds; the test split is never read. Settings are ranked by worst-group accuracy on validation, mean over the
seeds (validation carries attribute labels, training uses none). The optimiser and the prompts stay as configured.
Writes docs/sweeps/coop_ood.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import contextlib
import io
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

from tqdm import tqdm

from oodprompt.cli import Parser, exit_status
from oodprompt.files import write_atomically
from oodprompt.reports.style import markdown_table

HERE = Path(__file__).resolve().parent.parent.parent
CONFIG = HERE / "configs" / "trainers" / "CoOpOOD" / "tiny_shapes.yaml"
DEFAULT_OUT = HERE / "docs" / "sweeps" / "coop_ood.md"
RATES = (1e-5, 1e-4, 1e-3)
GRIDS: dict[str, list[dict[str, object]]] = {
    "CoOp + one linear layer": [{"ALPHA": 0.0, "BETA": 0.0, "LR": lr} for lr in RATES],
    "L_s only": [{"ALPHA": a, "BETA": 0.0, "LR": lr} for a, lr in product((0.1, 1.0), RATES)],
    "CoOpOOD": [
        *({"ALPHA": a, "BETA": b, "LR": lr} for a, b, lr in product((0.1, 1.0), (1.0, 10.0), RATES)),
        *({"L_C": c, "ALPHA": 0.1, "BETA": 1.0, "LR": 1e-4} for c in ("xcov", "club", "contrast")),
        *({"PHASES": "alternating", "ALPHA": a, "BETA": 1.0, "LR": lr} for a, lr in product((0.1, 1.0), RATES)),
        {"INIT": "random", "ALPHA": 0.1, "BETA": 1.0, "LR": 1e-3},
    ],
    "CoOpOOD anchored, covariance": [
        {"ANCHOR": "attributes", "ANCHOR_L_C": "xcov", "ANCHOR_ALPHA": 0.0, "ANCHOR_BETA": b, "ANCHOR_LR": lr}
        for b, lr in product((10.0, 100.0, 1000.0), RATES[1:])
    ],
    "CoOpOOD anchored": [
        {"ANCHOR": "attributes", "ANCHOR_ALPHA": a, "ANCHOR_BETA": b, "ANCHOR_LR": lr}
        for a, b, lr in product((0.0, 0.1), (100.0, 300.0, 1000.0, 3000.0, 10000.0), RATES[1:])
    ],
}


# Over a base that trains the image tower; takes longer, so only when named by --rows.
TOWER_GRIDS: dict[str, list[dict[str, object]]] = {
    "CoOpOOD anchored over MaPLe": [
        {"TRAINER.BASE": "MaPLe", "OPTIM.MAX_EPOCH": 20, "ANCHOR": "attributes", "ANCHOR_BETA_TOWER": b}
        for b in (30.0, 100.0, 300.0)
    ],
}


# What a setting does not name; the rest are the defaults.
FIXED = {"PHASES": "joint", "L_C": "hsic", "INIT": "identity"}


def validate(job: tuple[dict[str, object], int, str]) -> tuple[float, float]:
    """Average and worst-group accuracy on validation data after training with the given keys and seed."""
    import torch

    from oodprompt import cli
    from oodprompt.engine.trainer import build_trainer

    torch.set_num_threads(1)
    keys, seed, root = job
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(io.StringIO()):
        flags = ["--trainer", "CoOpOOD", "--config-file", str(CONFIG), "--seed", str(seed), "--root", root]
        names = {key: key if "." in key else f"TRAINER.COOPOOD.{key}" for key in FIXED | keys}
        pairs = [str(x) for key, value in (FIXED | keys).items() for x in (names[key], value)]
        fixed = ["TEST.NO_TEST", "True", "TRAIN.VAL_FREQ", "0"]
        args = cli.build_parser().parse_intermixed_args([*flags, "--output-dir", output, *fixed, *pairs])
        trainer = build_trainer(cli.setup_cfg(args))
        trainer.train()
        metrics = trainer.evaluate("val")
    return metrics["accuracy"], metrics["worst_group_accuracy"]


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102], help="tuning seeds")
    parser.add_argument("--rows", nargs="+", choices=GRIDS | TOWER_GRIDS, default=list(GRIDS), help="which tables")
    parser.add_argument("--root", default="data")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="settings trained at the same time")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    if args.rows != list(GRIDS) and args.out == DEFAULT_OUT:
        parser.error(f"--rows needs --out: {DEFAULT_OUT.name} holds all tables")
    settings = [(row, keys) for row in args.rows for keys in (GRIDS | TOWER_GRIDS)[row]]
    validate(({}, args.seeds[0], args.root))  # renders the images once, before the workers start
    jobs = [(keys, seed, args.root) for _, keys in settings for seed in args.seeds]
    with ProcessPoolExecutor(args.jobs) as pool:
        scores = list(tqdm(pool.map(validate, jobs), total=len(jobs), desc="Sweep", unit="run", disable=None))
    rows = "" if args.rows == list(GRIDS) else f" --rows {shlex.join(args.rows)}"
    target = args.out.resolve()
    out = (
        ""
        if args.out == DEFAULT_OUT
        else f" --out {target.relative_to(HERE) if target.is_relative_to(HERE) else target}"
    )
    parts = [
        "# CoOpOOD: hyper-parameters on validation data\n",
        f"`python scripts/coop_ood/sweep.py{rows}{out} --seeds {' '.join(map(str, args.seeds))}`: accuracy on the validation split of "
        "ShapesOnScenes (correlation 0.95), %, mean over the seeds, best setting first. The test split was not read. "
        f"Where a setting does not say: {', '.join(f'{k} {v}' for k, v in FIXED.items())}.\n",
    ]
    for row in args.rows:
        lines = []
        for i, (name, keys) in enumerate(settings):
            if name == row:
                mine = scores[i * len(args.seeds) : (i + 1) * len(args.seeds)]
                worst, average = statistics.fmean(s[1] for s in mine), statistics.fmean(s[0] for s in mine)
                lines.append((worst, average, ", ".join(f"{k} {v}" for k, v in keys.items())))
        lines.sort(reverse=True)
        table = [(keys, f"{100 * worst:.1f}", f"{100 * average:.1f}") for worst, average, keys in lines]
        parts += [
            f"## {row}\n",
            markdown_table(("TRAINER.COOPOOD.", "worst group", "average"), table),
            "",
        ]
    write_atomically(args.out, "\n".join(parts))
    print("\n".join(parts))
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
