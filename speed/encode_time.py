"""Times the encoding of images: ``python speed/encode_time.py --backbone ViT-B/16 --precision amp --workers 0 4 8``.

One JSON line per measurement. ``what`` is ``matmul``: large matrix products, which set the limit of a card;
``pixels``: batches of decoded images in memory, through the engine's encoder; ``files``: the pass over a folder of
JPEG files that a run makes when it computes features, with reading, resizing and copying. The photographs are made up.

    images_s   images per second; of ``files`` from the first batch to the last
    pass_s     seconds of the whole pass over the files, the start of the workers included
    tflops     10^12 operations per second, from the operations that the image tower needs
    share      ``tflops`` over that of ``matmul`` in the same precision
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from oodprompt.backbones import CLIPShape
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.features import views
from oodprompt.terminal import exit_status

sys.path.insert(0, str(Path(__file__).resolve().parent))
import one_case  # noqa: E402
import step_time  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float16, "fp16": torch.float16}


def write_photographs(folder: Path, count: int, width: int = 400, height: int = 300) -> list[str]:
    """JPEG files about as smooth, and as large, as photographs."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (smooth + 10 * rng.standard_normal(smooth.shape)).clip(0, 255).astype(np.uint8)
        files.append(str(folder / f"{i}.jpg"))
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files


def flops_per_image(shape: CLIPShape) -> float:
    """Floating-point operations of a ViT's forward pass for one image: 2 for each multiplication with an addition."""
    if shape.vision_patch is None:
        raise UserError("encode_time.py counts the operations of a ViT; take ViT-B/16 or another ViT")
    width, patches = shape.vision_width, (shape.image_resolution // shape.vision_patch) ** 2
    tokens, square = patches + 1, 2 * shape.vision_width**2
    # q, k, v and the output are 4 squares for each token, the two layers after them 8; q k^T and w v join all tokens.
    block = tokens * 12 * square + 2 * 2 * tokens**2 * width
    last = tokens * 2 * square + 10 * square + 2 * 2 * tokens * width  # of which one token is wanted
    ends = patches * 2 * 3 * shape.vision_patch**2 * width + 2 * width * shape.embed_dim
    return (shape.vision_layers - 1) * block + last + ends


def rate(go: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Calls of ``go`` per second, after two that are not timed; ``go`` is called for about ``seconds``."""
    moments = one_case.Moments(device)
    for _ in range(2):
        began = time.perf_counter()
        go()
        moments.wait()
    number = max(3, int(seconds / (time.perf_counter() - began)))
    marks = [moments.now()]
    for _ in range(number):
        go()
        marks.append(moments.now())
    moments.wait()
    return 1 / median(moments.between(a, b) for a, b in itertools.pairwise(marks))


def matmul_tflops(dtype: torch.dtype, device: torch.device, size: int, seconds: float) -> float:
    """10^12 operations per second of products of square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return rate(lambda: a @ b, device, seconds) * 2 * size**3 / 1e12


def encode_pixels(trainer: PromptTrainer, seconds: float) -> float:
    """Images per second from pixels in memory: copied to the device, normalised, encoded."""
    batches = one_case.from_memory(trainer.dm.loader(trainer.dataset.train_x))
    size = len(next(batches)["img"])
    return size * rate(lambda: trainer.encoder.encode_frozen(next(batches)["img"]), trainer.device, seconds)


def encode_files(trainer: PromptTrainer) -> tuple[float, float]:
    """Images per second after the first batch, and seconds of the whole pass over the files."""
    marks: list[tuple[float, int]] = []
    moments = one_case.Moments(trainer.device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        z = trainer.encoder.encode_frozen(images)
        marks.append((time.perf_counter(), len(images)))
        return z

    began = time.perf_counter()
    z = views.extract(encode, trainer.dm.loader(trainer.dataset.train_x), "", show=False)
    moments.wait()
    end = time.perf_counter()
    if len(z) != len(trainer.dataset.train_x) or not torch.isfinite(z).all():
        raise UserError("the features of the photographs are not finite, or not all there")
    return sum(size for _, size in marks[1:]) / (end - marks[0][0]) if len(marks) > 1 else len(z) / (
        end - began
    ), end - began


def measurements(args: argparse.Namespace, files: list[str]) -> Iterator[dict[str, Any]]:
    """The lines, as they are measured."""
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    precisions = [p for p in args.precision if device.type == "cuda" or p != "amp"]
    limits = {}
    for precision in precisions:
        limits[precision] = matmul_tflops(DTYPES[precision], device, args.matmul, args.seconds)
        yield {"what": "matmul", "precision": precision, "tflops": limits[precision], **one_case.where(device)}
    for backbone, precision in itertools.product(args.backbone, precisions):
        yield measurement(args, files, backbone, precision, None, limits[precision])
    # Files in the first precision alone, and other backbones with the last number of workers: reading is the same.
    for backbone in args.backbone:
        for workers in args.workers if backbone == args.backbone[0] else args.workers[-1:]:
            yield measurement(args, files, backbone, precisions[0], workers, limits[precisions[0]])


def measurement(
    args: argparse.Namespace, files: list[str], backbone: str, precision: str, workers: int | None, limit: float
) -> dict[str, Any]:
    """One line: from files by so many workers, or from memory for None; ``limit`` is that of matrix products."""
    # More workers read more images, so that their start does not count for most of the time.
    epoch = args.images * (1 if workers is None else max(1, min(workers, args.repeat)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(args, backbone, precision, workers or 0, files, epoch, Path(folder))
        facts = {"backbone": backbone, "precision": precision, "batch": args.batch, "workers": workers}
        if workers is None:
            found: dict[str, Any] = {"images_s": encode_pixels(trainer, args.seconds)}
        else:
            found = dict(zip(("images_s", "pass_s"), encode_files(trainer), strict=True)) | {"images": epoch}
        tflops = found["images_s"] * flops_per_image(trainer.clip.shape) / 1e12
        found |= {"tflops": tflops, "share": tflops / limit}
        return {"what": "pixels" if workers is None else "files", **facts, **found, **one_case.where(trainer.device)}


def trainer_of(
    args: argparse.Namespace, backbone: str, precision: str, workers: int, files: list[str], epoch: int, folder: Path
) -> PromptTrainer:
    """A trainer over ``epoch`` photographs, with random weights."""
    words = ["--trainer", "CoOp", "--classes", "2", "--batch", str(args.batch), "--backbone", backbone]
    words += ["--device", args.device, "--precision", precision, "--cache", "off"]
    if args.layers is not None:
        words += ["--layers", str(args.layers)]
    keys = ["DATALOADER.NUM_WORKERS", str(workers)]
    (case,) = step_time.plan(step_time.parser().parse_args(words), keys)
    with contextlib.redirect_stdout(sys.stderr):
        return one_case.build(case | {"images": files, "epoch": epoch}, folder)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["ViT-B/16"], metavar="NAME", help="default: ViT-B/16")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "amp"), default=["fp32"], metavar="P")
    parser.add_argument("--workers", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="images at a time (default: 128)")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="files that are made up (default: 512)")
    parser.add_argument("--repeat", type=int, default=8, metavar="N", help="times a file is read, at most (default: 8)")
    parser.add_argument("--matmul", type=int, default=8192, metavar="N", help="size of the matrices (default: 8192)")
    parser.add_argument("--layers", type=int, metavar="L", help="blocks of each tower (default: the architecture's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="of each measurement (default: 1)")
    return parser


def run(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for line in measurements(args, write_photographs(Path(folder), args.images)):
            print(
                json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items()}), flush=True
            )


if __name__ == "__main__":
    sys.exit(exit_status(run))
