"""Train the CLIP named ``tiny-photo`` from scratch, on Tiny ImageNet's photographs and captions made of its words.

    python scripts/maintain/train_tiny_photo.py --root data/tiny-imagenet-200 --work-dir output/tiny_photo \
        --out oodprompt/backbones/tiny-photo.pt.gz

One seed, one command. Checkpoints go to ``--work-dir`` and the run resumes from there after an interruption.
The result is a state dict in OpenAI's layout (a ModifiedResNet for 64 pixels, fp16, gzip). Its zero-shot accuracy on
the validation photographs is printed and written to ``<work-dir>/zero_shot.json``.

It sees the photographs 0 to 399 of every class's training folder. The others, and the validation photographs, are for
data sets that are made of photographs no training has seen.

A caption names the class, one of its kinds, the place, or both. A part of the pictures (``ON_PLACES``) are photographs
of things that are cut softly from their centre onto photographs of places, so that captions can name thing and place.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from oodprompt.datasets.tiny_imagenet import HELD_OUT_FROM
from photo_words import PLACES, kinds, names_of
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from train_tiny_clip import (
    UNKNOWN,
    article,
    loss_of_true_pairs,
    openai_state_dict,
    optimizer_of,
    pixels,
    resumed,
    save,
    save_gzip,
    set_rate,
)

from oodprompt.backbones.model import CLIP
from oodprompt.backbones.tokenizer import encode, tokenize
from oodprompt.backbones.weights import EMBEDDED
from oodprompt.files import write_atomically

SIZE, PER_CLASS = 64, HELD_OUT_FROM
SHAPE = EMBEDDED["tiny-photo"]
LONGEST = 20  # tokens of the longest training caption
ON_PLACES = 0.15  # share of pictures that are put together
TEMPLATES = [
    "{}", "{}.", "a photo of {}", "a photo of {}.", "a photo of {}.", "a picture of {}.", "an image of {}", "there is {}.",
    "the image shows {}", "a close-up photo of {}.", "a small photo of {}", "one can see {}", "this is {}.",
]  # fmt: skip
HELD_OUT_TEMPLATES = ["itap of {}.", "a snapshot of {}", "a low resolution photo of {}."]
WITH_PLACE = ["{} and {}", "{} at {}", "{} on {}", "{} in front of {}", "{} by {}", "{}, background {}"]


@dataclass(frozen=True)
class Stage:
    """A part of the training: ``steps`` of ``batch`` pictures, of which the first ``captions`` have a caption.

    The learning rate falls from ``lr`` as a cosine of length ``of``. The first ``half`` steps see pictures of half the
    size. Crops have at least ``crop`` of the area. ``text_alone``: the image tower stays as it is, and every picture
    is also compared with a caption of each class.
    """

    steps: int
    batch: int
    captions: int
    lr: float
    of: int
    half: int = 0
    crop: float = 0.45
    text_alone: bool = False


# Large batches of small pictures first; then small batches, whose many steps teach more per picture; then the words alone.
STAGES = (
    Stage(3900, 256, 128, 2e-3, of=4687, half=2813),
    Stage(12000, 64, 64, 1e-3, of=12000, crop=0.6),
    Stage(4800, 64, 32, 6e-4, of=4800, crop=0.6),
    Stage(800, 256, 64, 5e-4, of=800, crop=0.6, text_alone=True),
)


def stage_of(step: int) -> tuple[Stage, int]:
    """The stage that a step belongs to, and its number there."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise IndexError(step)


class Words:
    """What captions may say: every concept (a class, a kind or a place), the classes it is true of, and its words."""

    def __init__(self, root: Path) -> None:
        self.wnids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
        self.names = names_of(root, self.wnids)
        groups = [(names, {wnid}) for wnid, names in self.names.items()]
        groups += [([kind], members) for kind, members in kinds().items()]
        self.words = [names for names, _ in groups]
        self.true_of = np.array([[wnid in members for wnid in self.wnids] for _, members in groups])  # [K, 200]
        self.of_class = [np.flatnonzero(self.true_of[:, c]) for c in range(len(self.wnids))]
        self.places = [self.wnids.index(wnid) for wnid in PLACES if wnid in self.wnids]
        texts = [
            *TEMPLATES,
            *WITH_PLACE,
            *(f"{name} {article(name)} the {name}" for names in self.words for name in names),
        ]
        start, end = int(tokenize("")[0, 0]), int(tokenize("")[0, 1])
        ids = {i for text in texts for i in encode(text.replace("{}", ""))}
        self.tokens = [-1, start, *sorted(ids - {start, end}), end]
        self.compact = {token: i for i, token in enumerate(self.tokens)}

    def _name(self, rng: np.random.Generator, c: int, kind: float) -> tuple[int, str]:
        """A concept of class ``c``, a kind of it with this chance, and one of its names."""
        wider = self.of_class[c][1:]
        concept = int(rng.choice(wider)) if len(wider) and rng.random() < kind else c
        names = self.words[concept]
        name = names[0] if rng.random() < 0.4 else names[rng.integers(len(names))]
        if name.startswith(("the ", "a ")) or rng.random() < 0.25:
            return concept, name
        return concept, f"the {name}" if rng.random() < 0.15 else article(name)

    def caption(
        self, rng: np.random.Generator, thing: int, place: int, kind: float = 0.25
    ) -> tuple[list[int], list[int]]:
        """Compact token ids of a caption, and the concepts that it names. ``place``: a class, -1 for none."""
        said = [self._name(rng, thing, kind)]
        if place >= 0:
            where = self._name(rng, place, 0.4)
            said = [said, [where], [*said, where]][rng.choice(3, p=[0.4, 0.3, 0.3])]
        text = WITH_PLACE[rng.integers(len(WITH_PLACE))] if len(said) == 2 else "{}"
        text = TEMPLATES[rng.integers(len(TEMPLATES))].format(text.format(*(name for _, name in said)))
        ids = [UNKNOWN if rng.random() < 0.02 else self.compact.get(i, UNKNOWN) for i in encode(text)]
        for _ in range(rng.choice([0, 1, 2], p=[0.8, 0.1, 0.1])):
            ids.insert(rng.integers(len(ids) + 1), UNKNOWN)
        return [1, *ids[: LONGEST - 2], len(self.tokens) - 1], [concept for concept, _ in said]


def photographs(root: Path, words: Words, kept: Path) -> np.ndarray:
    """uint8 [200, 400, 64, 64, 3], read once and kept in ``kept``."""
    if not kept.exists():
        found = np.zeros((len(words.wnids), PER_CLASS, SIZE, SIZE, 3), np.uint8)
        for c, wnid in enumerate(tqdm(words.wnids, desc="photographs", disable=None)):
            for i in range(PER_CLASS):
                with Image.open(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG") as image:
                    found[c, i] = np.asarray(image.convert("RGB"))
        kept.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, found)
        write_atomically(kept, buffer.getvalue())
    return np.load(kept, mmap_mode="r")


def validation(root: Path, words: Words) -> tuple[Tensor, Tensor]:
    """The validation photographs, uint8 [10000, 64, 64, 3], and their classes."""
    rows = [line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    found = np.stack([np.asarray(Image.open(root / "val" / "images" / name).convert("RGB")) for name, _ in rows])
    return torch.from_numpy(found), torch.tensor([words.wnids.index(wnid) for _, wnid in rows])


def cut_out(rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """A soft ellipse about the centre, [size, size, 1] from 0 to 1."""
    at = (np.arange(size) + 0.5) / size * 2 - 1
    width, height = rng.uniform(0.55, 0.85, 2)
    x, y = (at - rng.uniform(-0.1, 0.1)) / width, (at - rng.uniform(-0.1, 0.1)) / height
    radius = np.sqrt(x[None] ** 2 + y[:, None] ** 2)
    return (1 / (1 + np.exp(12 * (radius - 1))))[..., None].astype(np.float32)


@dataclass(frozen=True)
class Pairs(Dataset):
    """Batch ``step`` of the training: pictures, token ids, classes, and the truth of captions [B pictures, captions]."""

    photos: np.ndarray
    words: Words
    seed: int

    def __len__(self) -> int:
        return sum(stage.steps for stage in STAGES)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rng, words, (stage, _) = np.random.default_rng([self.seed, step]), self.words, stage_of(step)
        classes = rng.integers(len(words.wnids), size=stage.batch)
        has = np.zeros((stage.batch, len(words.words)), bool)
        asks = []
        images = np.empty((stage.batch, SIZE, SIZE, 3), np.uint8)
        captions = []
        for row, c in enumerate(classes):
            image = self.photos[c, rng.integers(PER_CLASS)]
            has[row, words.of_class[c]] = True
            place = -1
            if rng.random() < ON_PLACES and c not in words.places:
                place = words.places[rng.integers(len(words.places))]
                mask, under = cut_out(rng), self.photos[place, rng.integers(PER_CLASS)]
                small = int(rng.integers(40, SIZE + 1))
                thing = np.asarray(Image.fromarray(image).resize((small, small), Image.Resampling.BICUBIC))
                left, top = rng.integers(SIZE - small + 1, size=2)
                mask = np.asarray(Image.fromarray(mask[..., 0]).resize((small, small)))[..., None]
                image = np.array(under)
                part = image[top : top + small, left : left + small]
                image[top : top + small, left : left + small] = mask * thing + (1 - mask) * part
                has[row, words.of_class[place]] = True
            images[row] = image
            if row < stage.captions:
                ids, said = words.caption(rng, int(c), place)
                captions.append(ids)
                asks.append(said)
        for c in range(len(words.wnids) if stage.text_alone else 0):
            ids, said = words.caption(rng, c, -1, kind=0)
            captions.append(ids)
            asks.append(said)
        tokens = np.zeros((len(captions), max(map(len, captions))), np.int64)
        for row, ids in enumerate(captions):
            tokens[row, : len(ids)] = ids
        true = torch.from_numpy(np.stack([has[:, said].all(1) for said in asks], axis=1))
        return torch.from_numpy(images), torch.from_numpy(tokens), torch.from_numpy(classes), true


def augmented(x: Tensor, generator: torch.Generator, size: int, crop: float) -> Tensor:
    """Random crops (at least ``crop`` of the area), mirror images, brightness, contrast: [B, 3, S, S] -> [B, 3, size, size]."""
    count = len(x)
    draw = lambda low, high: low + (high - low) * torch.rand(count, generator=generator)  # noqa: E731
    side, ratio = draw(crop, 1.0).sqrt(), torch.exp(draw(-0.2, 0.2))
    sx, sy = (side * ratio).clamp(max=1), (side / ratio).clamp(max=1)
    flip = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = sx * flip, sy
    theta[:, 0, 2], theta[:, 1, 2] = draw(-1, 1) * (1 - sx), draw(-1, 1) * (1 - sy)
    x = F.grid_sample(
        x, F.affine_grid(theta, [count, 3, SIZE, SIZE], False), padding_mode="reflection", align_corners=False
    )
    x = x if size == SIZE else F.avg_pool2d(x, SIZE // size)
    gain, shift = draw(0.75, 1.25), draw(-0.3, 0.3)
    return x * gain[:, None, None, None] + shift[:, None, None, None]


def image_features(model: nn.Module, x: Tensor) -> Tensor:
    """Image features [B, d]; the last map of small pictures is enlarged to that of full ones."""
    x = x.contiguous(memory_format=torch.channels_last)
    tower = model.visual
    x = tower.layer4(tower.middle_map(x))
    return tower.attnpool(F.interpolate(x, size=SIZE // 32))


@torch.no_grad()
def zero_shot(state: dict[str, Tensor], words: Words, images: Tensor, label: Tensor) -> dict[str, float]:
    """Top-1 over the classes, and place against place (mean and worst over pairs of places), on validation photographs."""
    model = CLIP.from_state_dict(state).eval()
    z = torch.cat([F.normalize(model.encode_image(pixels(x)), dim=1) for x in images.split(250)])

    def scores(names: list[str], template: str) -> Tensor:
        text = model.encode_text(tokenize([template.format(name) for name in names]))
        return z @ F.normalize(text, dim=1).T

    names = [words.names[wnid][0] for wnid in words.wnids]
    found = scores([article(name) for name in names], "a photo of {}.")
    result = {"top-1": (found.argmax(1) == label).float().mean().item()}
    result["top-5"] = (found.topk(5, dim=1).indices == label[:, None]).any(1).float().mean().item()
    for template in HELD_OUT_TEMPLATES:
        result[f"top-1: {template}"] = (
            (scores([article(n) for n in names], template).argmax(1) == label).float().mean().item()
        )
    result["top-1 of places"] = (
        (found[:, words.places].argmax(1) == torch.searchsorted(torch.tensor(words.places), label))[
            torch.isin(label, torch.tensor(words.places))
        ]
        .float()
        .mean()
        .item()
    )
    pairs = {}
    for i, a in enumerate(words.places):
        for b in words.places[i + 1 :]:
            rows = (label == a) | (label == b)
            pairs[f"{names[a]} / {names[b]}"] = (
                ((found[rows][:, [a, b]].argmax(1) == 1) == (label[rows] == b)).float().mean().item()
            )
    result |= {f"place: {pair}": value for pair, value in pairs.items()}
    water = scores(["water", "land"], "a photo of {}.")
    groups = kinds()
    rows = torch.tensor([words.wnids[c] in groups["water"] | groups["land"] for c in label])
    truth = torch.tensor([words.wnids[c] in groups["land"] for c in label])
    result["place: water / land"] = ((water[rows].argmax(1) == 1) == truth[rows]).float().mean().item()
    result["place mean"], result["place worst"] = sum(pairs.values()) / len(pairs), min(pairs.values())
    return {key: round(value, 4) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data/tiny-imagenet-200"))
    parser.add_argument("--work-dir", type=Path, default=Path("output/tiny_photo"))
    parser.add_argument("--out", type=Path, default=Path("oodprompt/backbones/tiny-photo.pt.gz"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=25_600, help="pictures between checkpoints")
    parser.add_argument("--workers", type=int, default=1, help="processes that read photographs")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    words = Words(args.root)
    photos = photographs(args.root, words, args.work_dir / "photographs.npy")
    images, labels = validation(args.root, words)
    model: nn.Module = CLIP(replace(SHAPE, vocab_size=len(words.tokens)))
    model = model.to(device, memory_format=torch.channels_last)
    # A linear head on the image features helps, most at first; it is not kept.
    head = nn.Linear(SHAPE.embed_dim, len(words.wnids)).to(device)
    optimizer = optimizer_of([model, head], lr=STAGES[0].lr, betas=(0.9, 0.98))
    pairs, checkpoint = Pairs(photos, words, args.seed), args.work_dir / "checkpoint.pt"
    steps = len(pairs)
    start = resumed(checkpoint, steps, model=model, head=head, optimizer=optimizer)

    loader = DataLoader(
        pairs,
        batch_size=None,
        sampler=range(start, steps),
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
    )
    began, seen, running = time.time(), 0, None
    bar = tqdm(loader, total=steps, initial=start, desc="tiny-photo", unit="step", disable=None)
    for step, (x, tokens, classes, true) in enumerate(bar, start):
        stage, at = stage_of(step)
        set_rate(optimizer, stage.lr, at, stage.of, warm_up=200)
        size = SIZE // 2 if at < stage.half else SIZE
        x = augmented(pixels(x), torch.Generator().manual_seed(args.seed * 1_000_003 + step), size, stage.crop)
        x, tokens, classes, true = (t.to(device) for t in (x, tokens, classes, true))
        model.train()
        model.visual.train(not stage.text_alone)
        model.visual.requires_grad_(not stage.text_alone)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            z = image_features(model, x).float()
            w = model.encode_text(tokens).float()
        logits = model.logit_scale.exp() * F.normalize(z, dim=1) @ F.normalize(w, dim=1).T
        loss = loss_of_true_pairs(logits[:, : stage.captions], true[:, : stage.captions])
        if stage.text_alone:
            loss = loss + loss_of_true_pairs(logits[:, stage.captions :], true[:, stage.captions :])
        else:
            loss = loss + max(0.3, 1 - step / STAGES[0].of) * F.cross_entropy(head(z), classes, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.3f}")
        done, seen = step + 1, seen + len(x)
        if (at + 1) * stage.batch % args.save_every == 0 or done == steps:
            save(checkpoint, done, model=model, head=head, optimizer=optimizer)
            rate = seen / (time.time() - began)
            model.eval()
            some = torch.arange(0, len(labels), 1 if done == steps else 5)
            scores = zero_shot(openai_state_dict(model, words.tokens, LONGEST), words, images[some], labels[some])
            print(
                f"step {done}/{steps}  loss {running:.3f}  {rate:.0f} pairs/s  scale {model.logit_scale.exp().item():.1f}  "
                f"top-1 {scores['top-1']:.3f}  places {scores['place mean']:.3f}",
                flush=True,
            )
    model.eval()
    state = openai_state_dict(model, words.tokens, LONGEST)
    save_gzip(state, args.out)
    scores = zero_shot(state, words, images, labels)
    write_atomically(args.work_dir / "zero_shot.json", json.dumps(scores, indent=2).encode())
    print(json.dumps(scores, indent=2))
    print(f"wrote {args.out}, {args.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
