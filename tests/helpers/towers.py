"""The plain form of prompted towers, through OpenAI's own ``clip.model``, and what every prompt learner is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.backbones import CLIP, CLIPShape, tokenize
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.config.keys import check_values, get_cfg_default, set_key
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.contracts import PromptLearner
from tests.helpers.runs import Build

Towers = tuple[CLIP, nn.Module]
# Parameters by name, and images -> logits, and what the method adds to the cross-entropy.
Plain = Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor | float]]
CLASSES = ["circle", "traffic_light", "golden retriever", "tabby"]
NAMES = [name.replace("_", " ") for name in CLASSES]
# The image tower is deeper and wider than the text tower, and neither is as wide as the features.
SHAPE = CLIPShape(96, 32, 4, 128, 8, 77, 49408, 64, 1, 3)
RESNET = CLIPShape(96, 64, (1, 1, 1, 1), 8, None, 77, 49408, 64, 1, 3)


def random_clip(shape: CLIPShape) -> nn.Module:
    """OpenAI's CLIP of that shape with every parameter random, also those that start as 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = load_clip_file("model").CLIP(*astuple(shape)[:10]).float().eval().requires_grad_(False)
        for parameter in clip.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        clip.logit_scale.fill_(1.0)
    return clip


def make_learner(
    kind: type[PromptLearner], clip: CLIP, keys: dict[str, Any], template: str = "a photo of a {}."
) -> PromptLearner:
    """A prompt learner for ``CLASSES``; ``keys`` are dotted."""
    cfg = get_cfg_default()
    for key, value in keys.items():
        set_key(cfg, key, value, "test")
    check_values(cfg)
    torch.manual_seed(1)
    return kind(cfg, CLASSES, template, clip)


def word_embeddings(theirs: nn.Module, words: str, count: int) -> Tensor:
    """Embeddings of the first ``count`` tokens of ``words``, [count, e]."""
    return theirs.token_embedding(tokenize(words))[0, 1 : 1 + count]


def plain_text(theirs: nn.Module, words: str, name: str, ctx: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """Normalised text feature [d] of "``words`` ``name``." with its first tokens replaced by ``ctx`` [M, e].

    All 77 positions are computed; ``deep`` prompts replace tokens 1 to M ahead of blocks 1, 2, ....
    """
    tokens = tokenize(f"{words} {name}.")
    x = theirs.token_embedding(tokens)
    x = torch.cat([x[:, :1], ctx.unsqueeze(0), x[:, 1 + len(ctx) :]], dim=1) + theirs.positional_embedding
    x = _through_blocks(theirs.transformer, x, deep, first=1)
    return F.normalize(theirs.ln_final(x)[0, tokens.argmax()] @ theirs.text_projection, dim=-1)


def plain_texts(theirs: nn.Module, words: str, ctx: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """``plain_text`` of every class, one at a time, [C, d]."""
    return torch.stack([plain_text(theirs, words, name, ctx, deep) for name in NAMES])


def hand_written(theirs: nn.Module, *templates: str) -> Tensor:
    """l2norm of the mean over templates of each class's text feature, [C, d]."""
    prompts = [theirs.encode_text(tokenize([template.replace("{}", name) for name in NAMES])) for template in templates]
    return F.normalize(sum(prompts) / len(prompts), dim=-1)


def plain_image(
    theirs: nn.Module, images: Tensor, prompts: Tensor | None = None, deep: Sequence[Tensor] = ()
) -> Tensor:
    """Normalised image features [B, d]: ``prompts`` [M, width] behind the patches, ``deep`` ones in their place later."""
    tower = theirs.visual
    x = tower.conv1(images).flatten(2).permute(0, 2, 1)
    x = torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], dim=1) + tower.positional_embedding
    length = x.shape[1]
    if prompts is not None:
        x = torch.cat([x, prompts.expand(len(x), -1, -1)], dim=1)
    x = _through_blocks(tower.transformer, tower.ln_pre(x), deep, first=length)
    return F.normalize(tower.ln_post(x[:, 0]) @ tower.proj, dim=-1)


def _through_blocks(transformer: nn.Module, x: Tensor, deep: Sequence[Tensor], first: int) -> Tensor:
    x = x.permute(1, 0, 2)  # OpenAI's blocks take [L, B, width]
    for i, block in enumerate(transformer.resblocks):
        if 1 <= i <= len(deep):
            prompts = deep[i - 1].unsqueeze(1).expand(-1, x.shape[1], -1)
            x = torch.cat([x[:first], prompts, x[first + len(prompts) :]])
        x = block(x)
    return x.permute(1, 0, 2)


def deep_prompts(parameters: dict[str, Tensor], tower: str) -> list[Tensor]:
    """The prompts of blocks 1, 2, ... of ``image_encoder`` or ``text_encoder``."""
    names = [f"{tower}.transformer.resblocks.{i}.VPT_shallow" for i in range(1, 99)]
    return [parameters[name] for name in names if name in parameters]


def assert_close(value: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5, of: Tensor | None = None) -> None:
    """Within ``tolerance`` of the largest entry of the reference, or of ``of``, from which it is a small rest."""
    assert value.shape == expected.shape, f"{what}: {tuple(value.shape)}, not {tuple(expected.shape)}"
    largest, off = (expected if of is None else of).abs().max(), (value - expected).abs().max()
    assert off <= tolerance * largest, f"{what}: off by {off:.3g} where the largest is {largest:.3g}"


def assert_is_plain(
    model: PromptLearner, plain: Plain, theirs: nn.Module, batch: tuple[Tensor, Tensor], tolerance: float = 1e-5
) -> None:
    """Logits, loss and the gradient of every parameter are those of ``plain``, at random values of all parameters."""
    images, label = batch
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    copies = {name: p.detach().clone().requires_grad_(True) for name, p in model.named_parameters()}
    z = model.encode_image(images)
    assert z.requires_grad == model.trains_image_tower, "trains_image_tower must say whether image features change"
    alignment = model(z)
    if model.needs_frozen_features:
        alignment = replace(alignment, frozen_image_features=plain_image(theirs, images))
    penalty = model.penalty(alignment)
    loss = F.cross_entropy(alignment.logits, label) + (0 if penalty is None else penalty)
    logits, extra = plain(copies, images)
    expected = F.cross_entropy(logits, label) + extra
    assert_close(alignment.logits, logits, "logits", tolerance)
    assert_close(loss, expected, "loss", tolerance)
    model.backward(loss, alignment, lambda x: x)
    gradients = torch.autograd.grad(expected, list(copies.values()))
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.abs().max() > 0, f"{name} has no part in the plain form"
        assert_close(parameter.grad, gradient, name, tolerance)
    assert all(p.grad is None for p in model.clip.parameters()), "the frozen CLIP must not get gradients"


def training_step(trainer: PromptTrainer) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the first training batch, through the engine."""
    batch = next(iter(trainer.encoder.batches("train")))
    trainer.learner.train()
    alignment = trainer.encoder.align(batch)
    loss, _ = trainer.objective(alignment, batch)
    trainer.learner.backward(loss, alignment, trainer.trained.scaler.scale)
    assert all(p.grad is None for p in trainer.clip.parameters()), "the frozen CLIP must not get gradients"
    return alignment.logits.detach(), {name: p.grad for name, p in trainer.learner.named_parameters()}


def bf16_deviation(build: Build, trainer: str, *keys: Any) -> tuple[float, float]:
    """bf16 against fp32 on one batch of the embedded CLIP: largest difference of logits, smallest cosine of gradients."""
    keys = (*keys, "DATALOADER.FEATURE_CACHE", "off")
    logits, gradients = training_step(build(trainer, *keys, "TRAINER.PREC", "fp32"))
    half, rounded = training_step(build(trainer, *keys, "TRAINER.PREC", "bf16"))
    cosines = {name: F.cosine_similarity(g.flatten(), rounded[name].flatten(), dim=0) for name, g in gradients.items()}
    return (half - logits).abs().max().item(), min(cosines.values()).item()


def text_of(trainer: PromptTrainer, prompts: Sequence[str]) -> np.ndarray:
    """Normalised text features, one prompt at a time, in float64."""
    with torch.no_grad():
        rows = [trainer.clip.encode_text(tokenize(prompt))[0].double().numpy() for prompt in prompts]
    return np.stack([row / np.linalg.norm(row) for row in rows])


def gaussian(epochs: int, mean: float, std: float) -> list[float]:
    density = [math.exp(-(((e - mean) / std) ** 2) / 2) for e in range(1, epochs + 1)]
    return [value / sum(density) for value in density]
