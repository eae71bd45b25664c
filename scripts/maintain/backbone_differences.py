"""How far are our backbones from the libraries' own modules? ``python scripts/maintain/backbone_differences.py [WORD ...]``.

The modules are those of scripts/maintain/architectures.py: random weights, few layers, small images; and models of
transformers from their config classes. Each goes through our door, and beside it the library's own module computes:

- features: of images and of texts, before they are normalised (CoCa: after, as its own call normalises them)
- logits: scale times cosine, for each image and text, without the logit bias
- gradients: of a random weighted sum of the logits, to the images and to four context vectors in the prompts

For the context vectors, a hook on the library's own token embedding puts them among the embeddings of a whole prompt; our
side has the prompts of CoOp. A difference is the largest one, divided by the largest value of the library. The table is
Markdown, a row per kind with the largest over its architectures.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import open_clip  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from oodprompt.backbones import CLIP, hugging_face, open_clip_models  # noqa: E402
from oodprompt.backbones.model import CLIP as OurCLIP  # noqa: E402
from oodprompt.backbones.preprocessing import Preprocessing  # noqa: E402
from oodprompt.methods.prompts import ContextPrompts  # noqa: E402
from oodprompt.reports.style import markdown_table  # noqa: E402
from tests.helpers.architectures import HUGGING_FACE, as_trained, build_small, family, tokenizer_of, words_of_hub  # noqa: E402

NAMES = ["water bird", "land bird", "cat"]
WORDS = "a photo of a"
PARTS = ("image features", "text features", "logits", "gradient to images", "gradient to context")


class Theirs:
    """The library's own module: what it computes from images and ids."""

    def __init__(
        self, image: Callable[[Tensor], Tensor], text: Callable[[Tensor], Tensor], embedding: nn.Module
    ) -> None:
        self.image, self.text, self.embedding = image, text, embedding
        self.scale = 1.0

    def with_context(self, ids: Tensor, context: Tensor, before: int) -> Tensor:
        """Text features of prompts whose tokens from ``before`` on have the embeddings ``context`` [M, e]."""

        def put(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            behind = output[:, before + len(context) :]
            return torch.cat([output[:, :before], context.expand(len(output), -1, -1), behind], dim=1)

        handle = self.embedding.register_forward_hook(put)
        try:
            return self.text(ids)
        finally:
            handle.remove()


def of_open_clip(module: Any) -> Theirs:
    text = getattr(module, "text", None) or module
    own = getattr(text, "token_embedding", None)
    theirs = Theirs(
        module.encode_image, module.encode_text, text.transformer.get_input_embeddings() if own is None else own
    )
    theirs.scale = module.logit_scale.exp()
    return theirs


def of_transformers(module: Any, pad: int | None) -> Theirs:
    def image(pixels: Tensor) -> Tensor:
        return module.get_image_features(pixel_values=pixels).pooler_output

    def text(ids: Tensor) -> Tensor:
        mask = None if pad is None else (ids != pad).long()
        return module.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    theirs = Theirs(image, text, getattr(module, "text_model", module).get_input_embeddings())
    theirs.scale = module.logit_scale.exp()
    return theirs


def off(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def differences(clip: CLIP, theirs: Theirs, size: tuple[int, int], normalises: bool) -> dict[str, float]:
    """The largest relative difference of each of ``PARTS``."""
    torch.manual_seed(1)
    images = torch.randn(3, 3, *size, requires_grad=True)
    ids = clip.tokenizer([f"{WORDS} {name}." for name in NAMES])
    finish = (lambda x: F.normalize(x, dim=-1)) if normalises else (lambda x: x)
    pairs = [(finish(clip.encode_image(images)), finish(theirs.image(images)))]
    with torch.no_grad():
        pairs.append((finish(clip.encode_text(ids)), finish(theirs.text(ids))))
    before = clip.tokenizer.before
    with torch.no_grad():
        context = theirs.embedding(ids)[0, before : before + len(WORDS.split())].clone()
    holder = nn.Module()
    prompts = ContextPrompts(holder, clip, NAMES, WORDS, context)
    of_theirs = context.clone().requires_grad_()
    sides = [
        (clip.logit_scale.exp(), pairs[0][0], prompts.text_features(), holder.ctx),
        (theirs.scale, pairs[0][1], theirs.with_context(ids, of_theirs, before), of_theirs),
    ]
    weights, logits, gradients = torch.randn(3, len(NAMES)), [], []
    for scale, image, text, leaf in sides:
        logits.append(scale.detach() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T)
        gradients.append(torch.autograd.grad((weights * logits[-1]).sum(), [images, leaf]))
    pairs += [(logits[0], logits[1]), *zip(*gradients, strict=True)]
    return {part: off(ours, own) for part, (ours, own) in zip(PARTS, pairs, strict=True)}


def is_asked_for(name: str, words: Sequence[str]) -> bool:
    """Whether the name holds one of ``words``, or is one that ends with $; all are where there are no words."""
    return not words or any(word in f"{name}$" for word in words)


def cases(words: Sequence[str]) -> Iterator[tuple[str, str, Callable[[], dict[str, float]]]]:
    """(kind, name, what computes the differences) of all that is compared."""

    def of_architecture(name: str, module: Any) -> dict[str, float]:
        theirs, own = copy.deepcopy(module), as_trained(module)
        clip = open_clip_models.adapt(module, tokenizer_of(name, module), own, f"open_clip:{name}")
        return differences(clip, of_open_clip(theirs.requires_grad_(False)), own.size, "coca" in name)

    def of_model(kind: str) -> tuple[str, Callable[[], dict[str, float]]]:
        torch.manual_seed(0)
        own = words_of_hub()
        module = transformers.AutoModel.from_config(HUGGING_FACE[kind]()).eval()
        theirs = copy.deepcopy(module).requires_grad_(False)
        size = Preprocessing((32, 32), (0.5,) * 3, (0.2,) * 3)
        clip = hugging_face.adapt(module, own, size, f"hf:{kind}")
        path = "fast" if type(clip) is OurCLIP else "general"
        reads_padding = kind.startswith("Siglip")
        reference = of_transformers(theirs, None if reads_padding else own.pad_token_id)
        return path, lambda: differences(clip, reference, (32, 32), False)

    for name in open_clip.list_models():
        if is_asked_for(name, words):
            module = build_small(name)
            kind = f"open_clip, {open_clip_models.path_of(module)}: {family(name)}"
            yield kind, name, lambda name=name, module=module: of_architecture(name, module)
    for kind in HUGGING_FACE:
        if is_asked_for(kind, words):
            path, compute = of_model(kind)
            yield f"transformers, {path}: {kind}", kind, compute


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="only modules whose name holds one of them; NAME$ ends there"
    )
    parser.add_argument("--limit", type=float, default=1e-5, help="exit status 1 above it (default %(default)g)")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {}
    for kind, name, compute in cases(args.words):
        values = compute()
        found.setdefault(kind, []).append(values)
        print(f"{name}: " + ", ".join(f"{part} {value:.1e}" for part, value in values.items()), file=sys.stderr)
    rows, worst = [], 0.0
    for kind, values in sorted(found.items()):
        largest = [max(value[part] for value in values) for part in PARTS]
        worst = max(worst, *largest)
        rows.append([kind, str(len(values)), *(f"{value:.1e}" for value in largest)])
    print(markdown_table(("kind", "modules", *PARTS), rows))
    print(f"\nThe largest difference is {worst:.1e}.")
    return int(worst > args.limit)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
