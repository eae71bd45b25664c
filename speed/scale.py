"""Times how a run starts on many images: ``python speed/scale.py --images 200000 --folder DIR``.

One JSON line per measurement; speed/README.md explains its columns. The images are hard links to 400 small drawings, so
a million of them take little space; the csv file is made once and used again. ``--part``:

    run          train.py twice, each for one epoch: from nothing, then with the features on disk
    start        train.py until its first step, then it is stopped; nothing but the list is new
    list         the csv file read and its files looked for, in this process
    evaluation   metrics of kept features of 1,000 classes, at a tenth of the images and at all of them
    audit        the statistics of an audit: features of images and of as many words as the built-in ones, all random

``--checkout`` names another checkout of the project whose train.py is run, to compare two states of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = "configs/trainers/CoOpOOD/tiny_shapes.yaml"
DRAWINGS = 400


def make_images(folder: Path, images: int, classes: int) -> None:
    """``folder``/metadata.csv and its images, once; 8 of 10 train, 1 validates, 1 tests."""
    table = folder / "metadata.csv"
    if table.is_file():
        return
    rng = np.random.default_rng(0)
    drawings = folder / "drawings"
    drawings.mkdir(parents=True)
    for i in range(DRAWINGS):
        squares = np.kron(rng.integers(0, 255, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(squares).save(drawings / f"{i}.jpg", quality=90)
    with table.with_suffix(".new").open("w") as rows:
        rows.write("image,label,split,attribute\n")
        for i in range(images):
            place = folder / f"images/{i // 1000:04d}"
            if i % 1000 == 0:
                place.mkdir(parents=True)
            os.link(drawings / f"{i % DRAWINGS}.jpg", place / f"{i:07d}.jpg")
            split = ("train", "val", "test")[max(10 * i // images - 7, 0)]
            background = ("beach", "meadow")[i // classes % 2]
            rows.write(f"images/{i // 1000:04d}/{i:07d}.jpg,class {i % classes:04d},{split},{background}\n")
    table.with_suffix(".new").rename(table)


def command(arguments: argparse.Namespace, run: str, *keys: str) -> list[str]:
    """train.py on the images: CoOp on the embedded CLIP, one epoch."""
    return [
        *(sys.executable, "train.py", "--config-file", CONFIG, "--trainer", "CoOp"),
        *("--root", str(arguments.folder), "--output-dir", str(arguments.folder / f"runs/{arguments.name}-{run}")),
        *("DATASET.NAME", "CSV", "OPTIM.MAX_EPOCH", "1", "DATALOADER.TRAIN_X.BATCH_SIZE", "128"),
        *("DATALOADER.TEST.BATCH_SIZE", "500", "DATALOADER.NUM_WORKERS", str(arguments.workers)),
        *("DATALOADER.CACHE_DIR", str(arguments.folder / f"cache-{arguments.name}"), "VERBOSE", "False"),
        *keys,
    ]


def follow(arguments: argparse.Namespace, words: list[str], until: str = "") -> dict[str, Any]:
    """Seconds, CPU seconds, memory and times of the lines of a command; with ``until`` it is stopped at such a line."""
    environment = os.environ | {"PYTHONPATH": str(arguments.checkout), "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        words, cwd=arguments.checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[tuple[float, str]] = []
    for line in process.stdout:
        lines.append((time.monotonic() - began, line.rstrip()))
        if until and re.match(until, line):
            process.send_signal(signal.SIGKILL)
            break
    process.stdout.read()
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    first = next((at for at, line in lines if re.match(r"epoch \[1/", line)), None)
    row = {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "first_step_s": None if first is None else round(first, 1),
        "longest_silence_s": round(max(b - a for (a, _), (b, _) in zip([(0.0, ""), *lines], lines, strict=False)), 1),
        "features": [line.split("Image features: ")[1][:60] for _, line in lines if "(disk cache" in line],
    }
    if first is None:
        row["last_lines"] = [line for _, line in lines[-3:]]
    return row


def whole_runs(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for run in ("first", "second"):
        yield {"part": f"run, {run}"} | follow(arguments, command(arguments, run, "TRAIN.PRINT_FREQ", "0"))


def starts(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    words = command(arguments, "start", "TRAIN.PRINT_FREQ", "1")
    yield {"part": "start"} | follow(arguments, words, until=r"epoch \[1/1\] batch \[1/")


def list_alone(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sys.path.insert(0, str(arguments.checkout))
    from oodprompt.config.keys import get_cfg_default
    from oodprompt.data.dataset import build_dataset, digest

    cfg = get_cfg_default()
    cfg.DATASET.NAME, cfg.DATASET.ROOT = "CSV", str(arguments.folder)
    before = resident()
    began = time.monotonic()
    data = build_dataset(cfg)
    read = time.monotonic()
    digest(cfg.DATASET.ROOT, data.train_x, data.val)
    yield {
        "part": "list",
        "read_and_looked_for_s": round(read - began, 1),
        "digest_s": round(time.monotonic() - read, 1),
        "bytes_per_image": round((resident() - before) * 1024 / arguments.images),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "before_mib": round(before / 1024),
    }


def resident() -> int:
    """KiB of memory that this process holds now."""
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("VmRSS")))


def evaluation(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch

    from oodprompt.backbones import load_backbone
    from oodprompt.config.keys import get_cfg_default
    from oodprompt.data.columns import Images, Texts
    from oodprompt.data.sampling import EpochBatches
    from oodprompt.engine.evaluation import Classification, Evaluation, evaluate
    from oodprompt.features.views import FeatureLoader

    cfg, classes, width = get_cfg_default(), 1000, load_backbone("tiny").shape.embed_dim
    cfg.DATALOADER.TEST.BATCH_SIZE = 500
    file = arguments.folder / "random_features.npy"
    kept = np.lib.format.open_memmap(file, "w+", np.float32, (arguments.images, width))
    rng = np.random.default_rng(0)
    for start in range(0, arguments.images, 100_000):
        kept[start : start + 100_000] = rng.standard_normal(kept[start : start + 100_000].shape, dtype=np.float32)
    kept.flush()
    del kept
    text = torch.randn(classes, width)
    for count in (arguments.images // 10, arguments.images):
        view = np.load(file, mmap_mode="r")[:count]
        numbers = np.arange(count)
        images = Images(
            Texts(map(str, range(count))), numbers, numbers % classes, numbers % 2, numbers % 2, numbers % classes,
            [f"class {c}" for c in range(classes)],
        )  # fmt: skip
        data: Any = argparse.Namespace(
            num_classes=classes, classnames=images.names, attribute_names=("beach", "meadow"), attribute_prompts=()
        )
        batches = FeatureLoader([view], images, EpochBatches(cfg, images, is_train=False))

        def new(data: Any = data) -> Classification:
            return Classification(cfg, data)

        before, began = private(), time.monotonic()
        found = Evaluation(new(), new)
        with torch.no_grad():
            evaluate(batches, lambda b: {"": b["image_features"] @ text.T}, found, images, torch.device("cpu"))
        yield {
            "part": "evaluation",
            "images": count,
            "classes": classes,
            "seconds": round(time.monotonic() - began, 1),
            "grown_mib": round((private() - before) / 1024, 1),
        }
    file.unlink()


def audit(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """From features of images and words, as wide as those of ViT-B/16, to the proposals of an audit."""
    import torch
    import torch.nn.functional as F

    from oodprompt.shortcuts.proposals import propose
    from oodprompt.shortcuts.vocabulary import read_vocabulary
    from oodprompt.shortcuts.words import Words

    vocabulary, draw = read_vocabulary(), torch.Generator().manual_seed(0)
    features, direction, classes = (
        F.normalize(torch.randn(count, 512, generator=draw), dim=-1)
        for count in (arguments.images, len(vocabulary.words), arguments.classes)
    )
    words = Words(vocabulary.words, vocabulary.sections, direction, direction)
    began, cpu = time.monotonic(), time.process_time()
    found = propose(words, vocabulary, features, np.arange(arguments.images) % arguments.classes, classes, show=False)
    yield {
        "part": "audit",
        "classes": arguments.classes,
        "words": found.tested,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def private() -> int:
    """KiB of memory of this process that is no mapped file."""
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("RssAnon")))


PARTS = {"run": whole_runs, "start": starts, "list": list_alone, "evaluation": evaluation, "audit": audit}
OF_FEATURES = {"evaluation", "audit"}  # parts that read no image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--folder", type=Path, required=True, help="where images, features and runs go")
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="default: run")
    parser.add_argument("--checkout", type=Path, default=REPOSITORY, help="the checkout whose train.py runs")
    parser.add_argument("--name", default="this", help="name of the runs and of their cache")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    arguments = parser.parse_args()
    arguments.folder, arguments.checkout = arguments.folder.resolve(), arguments.checkout.resolve()
    parts = arguments.part or ["run"]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not set(parts) <= OF_FEATURES:
        make_images(arguments.folder, arguments.images, arguments.classes)
    for part in parts:
        for row in PARTS[part](arguments):
            print(json.dumps({"name": arguments.name, "images": arguments.images, "load": os.getloadavg()[0]} | row))


if __name__ == "__main__":
    main()
