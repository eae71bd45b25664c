"""What torch.compile gives to a frozen text tower on the CPU: ``python speed/text_compile.py --classes 2 10``.

One step encodes the prompts of all classes and sends gradients to their context vectors. The tower has the shapes of the
backbone and random weights. Each number of classes gives one JSON line. It has the median milliseconds of a step as it
is and compiled, and the seconds that compiling took. It also has the steps after which compiling has paid, and the
largest difference of the features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from oodprompt.backbones import CLIP
from oodprompt.backbones.weights import SHAPES


def step_of(clip: CLIP, blocks: Callable[..., Tensor], classes: int, length: int) -> Callable[[], Tensor]:
    """A forward and a backward pass through the blocks ``blocks`` of the tower; returns the tower's output."""
    x = torch.randn(classes, length, clip.transformer.width).requires_grad_()

    def step() -> Tensor:
        x.grad = None
        y = blocks(x)
        y.square().sum().backward()
        return y.detach()

    return step


def median_ms(step: Callable[[], Tensor], count: int) -> float:
    """Median milliseconds of ``count`` steps."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def measure(backbone: str, classes: int, length: int, count: int) -> dict[str, float | int | str]:
    """One case, with the weights of seed 0."""
    torch.manual_seed(0)
    clip = CLIP(SHAPES[backbone]).eval().requires_grad_(False)
    torch.manual_seed(1)
    plain = step_of(clip, clip.transformer, classes, length)
    expected = plain()
    plain_ms = median_ms(plain, count)
    torch._dynamo.reset()
    torch.manual_seed(1)
    compiled = step_of(clip, torch.compile(clip.transformer), classes, length)
    began = time.perf_counter()
    found = compiled()
    compile_s = time.perf_counter() - began
    compiled_ms = median_ms(compiled, count)
    gain = plain_ms - compiled_ms
    return {
        "backbone": backbone,
        "classes": classes,
        "tokens": length,
        "threads": torch.get_num_threads(),
        "step_ms": round(plain_ms, 2),
        "compiled_ms": round(compiled_ms, 2),
        "compile_s": round(compile_s, 1),
        "steps_to_pay": round(1000 * compile_s / gain) if gain > 0 else "never",
        "difference": float((found - expected).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=tuple(SHAPES), default="ViT-B/16", metavar="NAME")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--tokens", type=int, default=24, help="of a prompt: start, context, name, end (default: 24)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way (default: 20)")
    args = parser.parse_args()
    for classes in args.classes:
        print(json.dumps(measure(args.backbone, classes, args.tokens, args.steps)), flush=True)


if __name__ == "__main__":
    main()
