"""Times the text encoder on the fast and on the general path: ``python speed/backbone_paths.py``.

One JSON line per case: a forward and a backward pass of CoOp's prompts for ``--classes`` names of one to four words, with
``--n-ctx`` context vectors. Weights are random; the two of a pair have the same, and take turns.

    fast          ViT-B/16's text encoder (width 512, 12 blocks, 77 tokens) in our code, which computes the shared start once
    general       the same weights in OpenCLIP's own module, which takes every prompt at full length
    cut           a RoBERTa of the size of SigLIP's text encoder (width 768, 12 blocks, 64 tokens, attention both ways, with
                  an attention mask), without columns that are padding in all prompts
    uncut         the same with all 64 tokens

    forward_s, step_s  seconds for the forward pass, and for it with the backward pass; medians. ``spread`` is the largest
                       step less the smallest
    cpu_s         seconds of processors for the step, which other programs disturb less; median
    kept_mib      memory of what the forward pass keeps for the backward pass, weights left out
    off           largest difference of the gradient of the context vectors within the pair, over its largest value
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn

from oodprompt.backbones import CLIP
from oodprompt.backbones.general import GeneralCLIP, Towers
from oodprompt.backbones.open_clip_models import adapt
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.backbones.tokenizer import LibraryTokenizer, OpenAITokenizer
from oodprompt.backbones.tokenizer import encode as words_to_ids
from oodprompt.methods.prompts import ContextPrompts, initial_context
from oodprompt.terminal import exit_status

sys.path.insert(0, str(Path(__file__).resolve().parent))
import one_case  # noqa: E402

PIXELS = Preprocessing((32, 32), (0.5,) * 3, (0.2,) * 3)
START, PAD, END = 49409, 49408, 49407  # of the RoBERTa: the words have OpenAI's ids


def names(n: int) -> list[str]:
    """``n`` class names of one to four words."""
    words = " ".join(one_case.class_names(3 * n)).split()
    result, at = [], 0
    for i in range(n):
        result.append(" ".join(words[at : at + 1 + i % 4]))
        at += 1 + i % 4
    return result


class _NoImages(nn.Module):
    """In the place of an image encoder, which is not timed."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.nothing.expand(len(images), 1)


def own_module(module: Any) -> GeneralCLIP:
    """OpenCLIP's ``module`` as the general path has it."""
    return GeneralCLIP(
        Towers(
            image=_NoImages(),
            text=module,
            encode_text=module.encode_text,
            embedding=module.token_embedding,
            tokenizer=OpenAITokenizer(module.context_length),
            preprocessing=PIXELS,
            scale=1.0,
            embed_dim=512,
        )
    ).requires_grad_(False)


def paths(layers: int) -> dict[str, CLIP]:
    """The text encoder of ViT-B/16 on both paths, with the same weights."""
    settings = open_clip.get_model_config("ViT-B-16")
    settings["vision_cfg"] = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 64}
    settings["text_cfg"]["layers"] = layers
    module = open_clip.CLIP(**settings).eval()
    fast = adapt(module, OpenAITokenizer(), PIXELS, "ViT-B-16")
    return {"fast": fast, "general": own_module(module)}


def lengths(layers: int) -> dict[str, CLIP]:
    """A text encoder that reads both ways, with and without padding."""
    config = transformers.RobertaConfig(
        vocab_size=START + 1,
        num_hidden_layers=layers,
        max_position_embeddings=PAD + 66,  # positions are counted from the id of padding
        pad_token_id=PAD,
    )
    text: Any = HFTextEncoder("", 768, config, pooler_type="mean_pooler").eval()

    def call(texts: Sequence[str], length: int) -> Tensor:
        rows = torch.full((len(texts), length), PAD)
        for row, ids in zip(rows, map(words_to_ids, texts), strict=True):
            row[: len(ids) + 2] = torch.tensor([START, *ids, END])
        return rows

    towers = Towers(
        image=_NoImages(),
        text=text,
        encode_text=text,
        embedding=text.transformer.get_input_embeddings(),
        tokenizer=LibraryTokenizer(call, words_to_ids, 64),
        preprocessing=PIXELS,
        scale=1.0,
        embed_dim=768,
        pad=PAD,
    )
    return {
        "cut": GeneralCLIP(towers).requires_grad_(False),
        "uncut": GeneralCLIP(replace(towers, pad=None)).requires_grad_(False),
    }


def kept_for_backward(clip: CLIP, prompts: ContextPrompts) -> float:
    """MiB of the tensors that a forward pass keeps, weights left out."""
    weights = {value.untyped_storage().data_ptr() for value in clip.parameters()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        features = prompts.text_features()
    del features
    return sum(kept.values()) / 2**20


def time_pair(pair: dict[str, CLIP], classes: int, n_ctx: int, repeats: int) -> list[dict[str, Any]]:
    """Steps of the two in turns; a row each."""
    classnames, prompts = names(classes), {}
    words, context = initial_context(next(iter(pair.values())), "--n-ctx", n_ctx)
    weights = torch.randn(classes, next(iter(pair.values())).shape.embed_dim)
    for name, clip in pair.items():
        prompts[name] = ContextPrompts(nn.Module(), clip, classnames, words, context.clone())
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in pair}
    for repeat in range(repeats + 1):
        for name, own in prompts.items():
            own.holder.ctx.grad = None
            began, of_processors = time.perf_counter(), time.process_time()
            features = own.text_features()
            forward = time.perf_counter() - began
            (weights * features).sum().backward()
            if repeat:  # the first one warms up
                now, own_time = time.perf_counter(), time.process_time() - of_processors
                seconds[name].append((forward, now - began, own_time))
    gradients = [own.holder.ctx.grad for own in prompts.values()]
    off = ((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()).item()
    rows = []
    for name, clip in pair.items():
        forward, step, cpu = zip(*seconds[name], strict=True)
        rows.append(
            {
                "case": name,
                "forward_s": round(median(forward), 3),
                "step_s": round(median(step), 3),
                "spread": round(max(step) - min(step), 3),
                "cpu_s": round(median(cpu), 3),
                "kept_mib": round(kept_for_backward(clip, prompts[name])),
                "off": float(f"{off:.1e}"),
                "classes": classes,
                "n_ctx": n_ctx,
                "repeats": repeats,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    return rows


def run(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100, help="default %(default)s")
    parser.add_argument("--n-ctx", type=int, default=16, help="context vectors, default %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each, default %(default)s")
    parser.add_argument("--layers", type=int, default=12, help="blocks, for quick trials; default %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads, torch's default otherwise")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    for pair in (paths, lengths):
        for row in time_pair(pair(args.layers), args.classes, args.n_ctx, args.repeats):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(exit_status(run))
