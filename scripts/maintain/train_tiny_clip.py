"""Train the embedded CLIP named ``tiny`` from scratch, on images and captions rendered on the fly.

    python scripts/maintain/train_tiny_clip.py --work-dir output/tiny_clip --out oodprompt/backbones/tiny.pt.gz

One seed, one command. Checkpoints go to ``--work-dir`` and the run resumes from there after an interruption.
The result is a state dict in OpenAI's layout (fp16, gzip). Its open-prompt zero-shot accuracy on held-out renders,
with caption templates not seen in training, is printed and written to ``<work-dir>/zero_shot.json``.

Like photographs on the web, the training pictures have habits: a shape is found on its favourite scene more often
than on others (``FAVOURITE``), so the text of a shape leans a little towards that scene.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oodprompt.datasets.rendering import COLOURS, SCENES, SHAPES, Difficulty, render, visible_colours
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from oodprompt.backbones.model import CLIP, CLIPShape
from oodprompt.backbones.tokenizer import encode, tokenize
from oodprompt.backbones.weights import EMBEDDED
from oodprompt.files import write_atomically

SIZE = 48
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHAPE = EMBEDDED["tiny"]
FAVOURITE = 0.4  # the chance that a shape lies on its favourite scene
LONGEST = 24  # tokens of the longest training caption
UNKNOWN = 0  # compact id of every word that captions do not use
TEST_DIFFICULTY = Difficulty()


def train_difficulty(progress: float) -> Difficulty:
    """Easy pictures first (progress 0), all kinds from halfway on: small, faint, turned, partly hidden shapes too."""
    t = min(2 * progress, 1.0)
    return Difficulty(
        radius=(0.22 - 0.09 * t, 0.36),
        opacity=(0.9 - 0.4 * t, 1.0),
        noise=4 + 6 * t,
        rotation=8 + 12 * t,
        occlusion=0.1 * t,
    )


SCENE_WORDS = {
    "water": ["water", "the water", "a lake", "the sea", "the ocean"],
    "land": ["land", "grass", "a field", "a meadow", "the land"],
    "sky": ["the sky", "sky", "clouds"],
    "sand": ["sand", "the sand", "a desert", "a beach"],
    "snow": ["snow", "the snow", "ice"],
    "night": ["night", "the night sky", "darkness"],
    "forest": ["a forest", "the woods", "forest", "trees"],
    "brick": ["a brick wall", "bricks", "brick"],
}
SHAPE_WORDS = {shape: [shape] for shape in SHAPES} | {"circle": ["circle", "disc"], "ring": ["ring", "hoop"]}
TEMPLATES = [
    "{}", "{}.", "a photo of {}", "a photo of {}.", "a picture of {}.", "an image of {}", "there is {}.",
    "a drawing of {}", "a rendering of {}.", "the image shows {}", "a close-up photo of {}.", "a small photo of {}",
    "{} in the picture.", "one can see {}", "this is {}.", "a photo showing {}",
]  # fmt: skip
SCENE_TEMPLATES = [
    "{}", "a photo of {}", "a background of {}", "{} background", "a {} background.", "a picture of {}.",
    "this is {}.", "something on {}", "a shape on {}", "a photo taken on {}.", "an object in front of {}", "a {} scene",
]  # fmt: skip
HELD_OUT_TEMPLATES = [
    "an illustration of {}.", "a blurry snapshot of {}", "we are looking at {}.", "itap of {}.", "a low resolution view of {}.",
]  # fmt: skip
HELD_OUT_SCENE_TEMPLATES = [
    "this is a {} background.",
    "a snapshot taken near {}.",
    "itap of {}.",
    "a blurry view of {}",
]


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(rng: np.random.Generator, shape: str, colour: str, scene: str) -> tuple[str, tuple[bool, bool, bool]]:
    """A caption of the image and which of (shape, colour, scene) it names."""
    names = [(True, False, False), (False, False, True), (True, True, False), (True, False, True), (False, True, False),
             (False, True, True), (True, True, True)][rng.choice(7, p=[0.3, 0.2, 0.1, 0.2, 0.05, 0.05, 0.1])]  # fmt: skip
    place = SCENE_WORDS[scene][rng.integers(len(SCENE_WORDS[scene]))]
    if names == (False, False, True):
        text = SCENE_TEMPLATES[rng.integers(len(SCENE_TEMPLATES))].format(place)
        return text.replace("a the ", "the ").replace("a a ", "a "), names
    noun = (
        SHAPE_WORDS[shape][rng.integers(len(SHAPE_WORDS[shape]))]
        if names[0]
        else ["thing", "shape", "object"][rng.integers(3)]
    )
    words = f"{colour} {noun}" if names[1] else noun
    words = [article(words), f"the {words}", words][rng.choice(3, p=[0.6, 0.15, 0.25])]
    if names[2]:
        words += [" on ", " in front of ", " over ", ", background "][rng.integers(4)] + place
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(words), names


class Vocabulary:
    """Compact ids for the tokens that training captions use; every other token is ``UNKNOWN``."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        words = {"photo of a the an on in picture image"}
        words.update(w for options in (*SCENE_WORDS.values(), *SHAPE_WORDS.values()) for w in options)
        words.update(
            (*COLOURS, "thing shape object", ", background . on in front of over", *TEMPLATES, *SCENE_TEMPLATES)
        )
        words.update(caption(rng, s, c, b)[0] for s in SHAPES for c in COLOURS for b in SCENES for _ in range(3))
        start, end = int(tokenize("")[0, 0]), int(tokenize("")[0, 1])
        ids = {i for text in words for i in encode(text.replace("{}", ""))}
        self.tokens = [-1, start, *sorted(ids - {start, end}), end]
        self.compact = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def ids(self, rng: np.random.Generator, text: str) -> list[int]:
        """Compact ids with start and end; now and then a word is unknown or an unknown word is put in."""
        ids = [self.compact.get(i, UNKNOWN) for i in encode(text)]
        ids = [UNKNOWN if rng.random() < 0.03 else i for i in ids]
        for _ in range(rng.choice([0, 1, 2, 4], p=[0.6, 0.2, 0.1, 0.1])):
            ids.insert(rng.integers(len(ids) + 1), UNKNOWN)
        return [1, *ids[: LONGEST - 2], len(self) - 1]


class Renders(IterableDataset):
    """An endless stream of batches: pixels, compact token ids, the image's and the caption's attributes."""

    def __init__(self, seed: int, batch: int, start: int, steps: int) -> None:
        self.seed, self.batch, self.start, self.steps = seed, batch, start, steps

    def __iter__(self):
        vocabulary = Vocabulary()
        colours = {scene: visible_colours((scene,)) for scene in SCENES}
        names = list(COLOURS)
        for step in range(self.start, self.steps):
            difficulty = train_difficulty(step / self.steps)
            rng = np.random.default_rng([self.seed, step])
            images, tokens, truth, named = [], np.zeros((self.batch, LONGEST), np.int64), [], []
            for row in range(self.batch):
                s = int(rng.integers(len(SHAPES)))
                b = s % len(SCENES) if rng.random() < FAVOURITE else int(rng.integers(len(SCENES)))
                colour = str(rng.choice(colours[SCENES[b]]))
                images.append(render(rng, SHAPES[s], colour, SCENES[b], SIZE, difficulty))
                text, which = caption(rng, SHAPES[s], colour, SCENES[b])
                ids = vocabulary.ids(rng, text)
                tokens[row, : len(ids)] = ids
                truth.append((s, names.index(colour), b))
                named.append(which)
            yield (
                torch.from_numpy(np.stack(images)),
                torch.from_numpy(tokens),
                torch.tensor(truth),
                torch.tensor(named),
            )


def pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> normalised float [B, 3, H, W]."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(PIXEL_MEAN, device=x.device)[:, None, None]) / torch.tensor(PIXEL_STD, device=x.device)[
        :, None, None
    ]


def contrastive_loss(logits: Tensor, truth: Tensor, named: Tensor) -> Tensor:
    """CLIP's loss where a caption is true of every image that has all it names.

    ``logits`` [B images, B captions]; ``truth`` [B, 3] attributes of the images; ``named`` [B, 3] which of them
    caption j names.
    """
    return loss_of_true_pairs(logits, ((truth[:, None] == truth[None]) | ~named[None]).all(dim=2))


def loss_of_true_pairs(logits: Tensor, true: Tensor) -> Tensor:
    """CLIP's loss of ``logits`` [images, captions], with targets uniform over the ``true`` pairs, in both directions.

    Images of which no caption is true are left out of the direction from images to captions, and the other way round.
    """
    losses = []
    for scores, truth in ((logits, true), (logits.T, true.T)):
        known = truth.any(dim=1)
        truth = truth[known].float()
        losses.append((-(F.log_softmax(scores[known], 1) * truth).sum(1) / truth.sum(1)).mean())
    return (losses[0] + losses[1]) / 2


def optimizer_of(parts: Sequence[nn.Module], **options: Any) -> torch.optim.AdamW:
    """AdamW with weight decay for matrices and kernels alone."""
    trained = [p for part in parts for p in part.parameters()]
    decay, rest = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **options)


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int, warm_up: int) -> None:
    """The learning rate of a step: it rises for ``warm_up`` steps to ``rate`` and falls as a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * (step / steps)))


def resumed(checkpoint: Path, steps: int, **parts: Any) -> int:
    """The number of steps done, 0 without a checkpoint; ``parts`` (model, heads, optimizer) get their states of then."""
    if not checkpoint.exists():
        return 0
    saved = torch.load(checkpoint, weights_only=True, map_location="cuda" if torch.cuda.is_available() else "cpu")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    print(f"resumed from {checkpoint} at step {saved['step']} of {steps}", flush=True)
    return int(saved["step"])


def save(checkpoint: Path, step: int, **parts: Any) -> None:
    """Write what ``resumed`` reads."""
    buffer = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, buffer)
    write_atomically(checkpoint, buffer.getvalue())


def openai_state_dict(model: nn.Module, tokens: Sequence[int], longest: int = LONGEST) -> dict[str, Tensor]:
    """The trained model in OpenAI's layout: the full vocabulary, all positions, fp16.

    ``tokens``: those of the compact ids from 0, ``UNKNOWN``, on; ``longest``: tokens of the longest training caption.
    """
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    compact = state["token_embedding.weight"]
    full = compact[UNKNOWN].repeat(SHAPE.vocab_size, 1)
    full[torch.tensor(tokens[1:])] = compact[1:]
    state["token_embedding.weight"] = full
    # Positions beyond the longest training caption act like its last one.
    state["positional_embedding"][longest:] = state["positional_embedding"][longest - 1]
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


@torch.no_grad()
def zero_shot(state: dict[str, Tensor], seed: int = 12345, per_group: int = 10) -> dict[str, float]:
    """Accuracy of scene and shape on held-out renders, ``per_group`` of every shape on every scene, by template."""
    model = CLIP.from_state_dict(state).eval()
    rng = np.random.default_rng(seed)
    truth = [(s, b) for b in range(len(SCENES)) for s in range(len(SHAPES)) for _ in range(per_group)]
    images = np.stack(
        [
            render(rng, SHAPES[s], str(rng.choice(visible_colours((SCENES[b],)))), SCENES[b], SIZE, TEST_DIFFICULTY)
            for s, b in truth
        ]
    )
    z = torch.cat([F.normalize(model.encode_image(pixels(x)), dim=1) for x in torch.from_numpy(images).split(200)])
    result: dict[str, float] = {"images": len(truth)}
    for kind, names, templates, column in (
        ("shape", [article(s) for s in SHAPES], HELD_OUT_TEMPLATES, 0),
        ("scene", SCENES, HELD_OUT_SCENE_TEMPLATES, 1),
    ):
        label = torch.tensor([t[column] for t in truth])
        scores = []
        for template in templates:
            w = F.normalize(model.encode_text(tokenize([template.format(n) for n in names])), dim=1)
            scores.append(((z @ w.T).argmax(1) == label).float().mean().item())
            result[f"{kind}: {template}"] = round(scores[-1], 4)
        result[f"{kind} mean"], result[f"{kind} worst template"] = (
            round(float(np.mean(scores)), 4),
            round(min(scores), 4),
        )
    return result


def save_gzip(state: dict[str, Tensor], path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, gzip.compress(buffer.getvalue(), 9, mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("output/tiny_clip"))
    parser.add_argument("--out", type=Path, default=Path("oodprompt/backbones/tiny.pt.gz"))
    parser.add_argument("--samples", type=int, default=600_000, help="image-caption pairs in all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="rendering processes")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    vocabulary = Vocabulary()
    model = CLIP(CLIPShape(**{**SHAPE.__dict__, "vocab_size": len(vocabulary)})).to(device)
    # For the first part of the training, linear heads on the image features help the image tower to see what captions
    # will talk about; they fade out by 60 % and are not kept.
    heads = torch.nn.ModuleList(
        torch.nn.Linear(SHAPE.embed_dim, n) for n in (len(SHAPES), len(COLOURS), len(SCENES))
    ).to(device)
    trained = [*model.parameters(), *heads.parameters()]
    optimizer = optimizer_of([model, heads], lr=args.lr)
    steps = args.samples // args.batch
    checkpoint = args.work_dir / "checkpoint.pt"
    start = resumed(checkpoint, steps, model=model, heads=heads, optimizer=optimizer)

    stream = DataLoader(
        Renders(args.seed, args.batch, start, steps),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=8 if args.workers else None,
    )
    began, running = time.time(), None
    bar = tqdm(stream, total=steps, initial=start, desc="tiny CLIP", unit="step", disable=None)
    for step, (images, tokens, truth, named) in enumerate(bar, start):
        progress = step / steps
        set_rate(optimizer, args.lr, step, steps, warm_up=100)
        tokens, truth, named = tokens.to(device), truth.to(device), named.to(device)
        with torch.autocast(device, torch.bfloat16):
            z = model.encode_image(pixels(images.to(device))).float()
            w = model.encode_text(tokens).float()
        logits = model.logit_scale.exp() * F.normalize(z, dim=1) @ F.normalize(w, dim=1).T
        loss = contrastive_loss(logits, truth, named)
        fade = max(0.0, 1 - progress / 0.6)
        if fade:
            loss = loss + fade * sum(F.cross_entropy(head(z), truth[:, i]) for i, head in enumerate(heads))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(100)))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
        done = step + 1
        if done % args.save_every == 0 or done == steps:
            save(checkpoint, done, model=model, heads=heads, optimizer=optimizer)
            rate = (done - start) * args.batch / (time.time() - began)
            scores = zero_shot(openai_state_dict(model, vocabulary.tokens))
            print(
                f"step {done}/{steps}  loss {running:.3f}  {rate:.0f} pairs/s  scale {model.logit_scale.exp().item():.1f}  "
                f"held-out shape {scores['shape mean']:.3f}  scene {scores['scene mean']:.3f}",
                flush=True,
            )
    state = openai_state_dict(model, vocabulary.tokens)
    save_gzip(state, args.out)
    scores = zero_shot(state)
    write_atomically(args.work_dir / "zero_shot.json", json.dumps(scores, indent=2).encode())
    print(json.dumps(scores, indent=2))
    print(f"wrote {args.out}, {os.path.getsize(args.out) / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
