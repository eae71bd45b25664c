"""Times runs that train together beside the same runs one after the other: ``python speed/together.py --classes 2 10``.

The runs are CoOp, CoOpOOD (plain and anchored), DebiasedPT and GroupDRO with several seeds, by their whole command lines:
set-up, training with kept features, validation, checkpoints and test. ``tiny`` trains on rendered images. The other
backbones have random weights, drawn once ahead of all runs, and random image features, so that nothing is downloaded.

One JSON line per case and way; speed/README.md explains its columns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from oodprompt.config.packaged import configs
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum
from oodprompt.engine import assembly, checkpoint
from oodprompt.features import views
from oodprompt.runs.bundles import Bundle
from oodprompt.runs.grid import TrainingRun
from oodprompt.runs.launch import Job, run_here
from oodprompt.runs.progress import Progress
from oodprompt.terminal import Parser, exit_status

sys.path.insert(0, str(Path(__file__).resolve().parent))
from one_case import class_names, random_backbone  # noqa: E402

METHODS = (
    ("CoOp",),
    ("CoOpOOD",),
    ("CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_ALPHA", "0.1"),
    ("DebiasedPT",),
    ("GroupDRO", "TRAINER.GROUPS", "true"),
)
_RENDERED = ("DATASET.SHAPES.NUM_TRAIN", "160", "DATASET.SHAPES.NUM_VAL", "32", "DATASET.SHAPES.NUM_TEST", "48")


def build_parser() -> Parser:
    parser = Parser(prog="speed/together.py", description=__doc__)
    parser.add_argument("--backbone", default="ViT-B/16", help="tiny, or an architecture with random weights")
    parser.add_argument("--classes", type=int, nargs="+", default=[2], help="numbers of classes; tiny has 2")
    parser.add_argument("--runs", type=int, default=16, help="runs in all")
    parser.add_argument("--together", type=int, nargs="+", default=[16], help="runs in a process, one case each")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time")
    parser.add_argument("--n-ctx", type=int, default=16, help="context vectors; tiny has 4")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="steps in an epoch")
    parser.add_argument("--batch", type=int, default=32)
    return parser


def command_line(args: argparse.Namespace, out: Path, data: Path, i: int) -> list[str]:
    """The i-th run: methods in turns, then seeds."""
    trainer, *keys = METHODS[i % len(METHODS)]
    words = ["--trainer", trainer, "--seed", str(1 + i // len(METHODS)), "--output-dir", str(out / f"run{i}")]
    words += ["--root", str(data), *keys, "OPTIM.MAX_EPOCH", str(args.epochs), "TRAIN.VAL_FREQ", "1"]
    words += ["DATALOADER.TRAIN_X.BATCH_SIZE", str(args.batch)]
    if args.backbone == "tiny":
        return ["--config-file", str(configs() / "trainers/CoOpOOD/tiny_shapes.yaml"), *words, *_RENDERED]
    words += ["MODEL.BACKBONE.NAME", args.backbone, "DATASET.NAME", "Together", "INPUT.TRANSFORMS", "['normalize']"]
    return [*words, "TRAINER.COOP.N_CTX", str(args.n_ctx), "DATALOADER.NUM_WORKERS", "0", "OPTIM.NAME", "sgd"]


@contextlib.contextmanager
def made_up(args: argparse.Namespace, classes: int, folder: Path) -> Iterator[None]:
    """A data set, a backbone and image features that are random while this lasts."""
    if args.backbone == "tiny":
        yield
        return
    names = class_names(classes)

    def images(split: str, number: int) -> list[Datum]:
        file = folder / f"{split}.png"
        Image.fromarray(np.full((8, 8, 3), len(split), np.uint8)).save(file)
        kinds = ((i % classes, i // classes % 2) for i in range(number))
        return [Datum(str(file), label, classname=names[label], attribute=attribute) for label, attribute in kinds]

    class Together(DatasetBase):
        attribute_names = ("land", "water")
        attribute_prompts = (("a photo of land.",), ("a photo of water.",))

        def __init__(self, cfg: Any) -> None:
            number, rest = max(args.batch * args.steps, 2 * classes), 2 * classes
            super().__init__(cfg, *(images(*split) for split in (("train", number), ("val", rest), ("test", rest))))

    backbone = random_backbone(args.backbone)
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(4096, backbone.shape.embed_dim, generator=generator), dim=-1)

    def train(data: Any, encode: Any, number: int, *rest: Any, **more: Any) -> torch.Tensor:
        return features[: len(data.dataset.train_x)].expand(number, -1, -1)

    def evaluated(split: str, loader: Any, *rest: Any, **more: Any) -> torch.Tensor:
        return features[None, : len(loader.dataset)]

    DATASET_REGISTRY.register()(Together)
    try:
        with (
            mock.patch.object(assembly, "load_backbone", lambda *names, **more: backbone),
            mock.patch.object(views, "train_views", train),
            mock.patch.object(views, "evaluation_view", evaluated),
        ):
            yield
    finally:
        DATASET_REGISTRY._objects.pop("Together")


def timed(jobs: Sequence[Job], at_once: int) -> dict[str, Any]:
    """Seconds by the clock and of all cores that the jobs take, and the peak of the largest process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        failed = run_here(jobs, at_once, [], Progress(99, at_once))
    if failed:
        raise RuntimeError(failed[0])
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "cpu_s": round(cpu, 1)}


def outcome(out: Path, runs: int) -> list[dict[str, Any]]:
    """Of each run: its results without times, its peak, and all that its models hold in the end."""
    found = []
    for i in range(runs):
        folder = out / f"run{i}"
        results = json.loads((folder / "results.json").read_text())
        models = {}
        for file in sorted(folder.glob("*/model.pth.tar-*")):
            models |= {f"{file.parent.name}.{k}": v for k, v in checkpoint.load(file)["state_dict"].items()}
        kept = {k: results[k] for k in ("accuracy", "macro_f1", "worst_group_accuracy", "groups", "classes")}
        found.append({"results": kept, "peak": results["peak_memory_mib"], "models": models})
    return found


def measure(args: argparse.Namespace, classes: int, size: int, folder: Path) -> dict[str, Any]:
    """All runs, ``size`` in a process; what they took and where they lie."""
    out = folder / f"{classes}_{size}"
    runs = [
        TrainingRun(out / f"run{i}", tuple(command_line(args, out, folder / "data", i)), name=f"run {i}")
        for i in range(args.runs)
    ]
    jobs: list[Job] = [
        Bundle(tuple(runs[i : i + size])) if len(runs[i : i + size]) > 1 else runs[i] for i in range(0, args.runs, size)
    ]
    took = timed(jobs, args.jobs)
    found = outcome(out, args.runs)
    return {**took, "peak_mib": round(max(one["peak"] for one in found)), "found": found}


def run(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    with TemporaryDirectory() as place:
        folder = Path(place)
        for classes in [2] if args.backbone == "tiny" else args.classes:
            with made_up(args, classes, folder):
                alone = measure(args, classes, 1, folder)
                for size in [1, *args.together]:
                    this = alone if size == 1 else measure(args, classes, size, folder)
                    print(json.dumps(compared(args, classes, size, alone, this)), flush=True)


def compared(args: argparse.Namespace, classes: int, size: int, alone: Any, this: Any) -> dict[str, Any]:
    """The columns of a line."""
    pairs = list(zip(alone["found"], this["found"], strict=True))
    apart = [
        (a["models"][key].float() - b["models"][key].float()).abs().max().item()
        for a, b in pairs
        for key in a["models"]
    ]
    return {
        "backbone": args.backbone,
        "classes": classes,
        "runs": args.runs,
        "together": size,
        "jobs": args.jobs,
        "steps": args.epochs * args.steps,
        **{key: this[key] for key in ("seconds", "cpu_s", "peak_mib")},
        "ratio": round(alone["seconds"] / this["seconds"], 2),
        "cpu_ratio": round(alone["cpu_s"] / this["cpu_s"], 2),
        "equal_results": sum(a["results"] == b["results"] for a, b in pairs),
        "largest_difference": max(apart),
    }


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run()))
