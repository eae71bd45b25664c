"""OpenAI's towers beside ours: random inputs, features with gradients, and their comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from types import ModuleType

import torch
from torch import Tensor, nn

from oodprompt.backbones import CLIP, CLIPShape

ALL = ("small ViT", "small RN", "ViT-B/16", "RN50")
SMALL = ("small ViT", "small RN")
TOLERANCE = 1e-5  # of the largest absolute value of the reference
Reference = Callable[[str], nn.Module]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(shape: CLIPShape, ends: list[int], seed: int = 0) -> Tensor:
    """Token ids [len(ends), context_length]: start token, words, the end token at ``ends``, then zeros."""
    vocab, length = shape.vocab_size, shape.context_length
    tokens = torch.randint(1, vocab - 2, (len(ends), length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = vocab - 2
    for row, end in zip(tokens, ends, strict=True):
        row[end] = vocab - 1
        row[end + 1 :] = 0
    return tokens


def run(features: Tensor, model: nn.Module, tower: Callable[[str], bool], **leaves: Tensor) -> dict[str, Tensor]:
    """The features, and the gradient of (features x fixed random).sum() for the tower's parameters and ``leaves``."""
    parameters = {name: value for name, value in model.named_parameters() if tower(name)}
    wanted = {**parameters, **leaves}
    gradients = torch.autograd.grad((features * random(*features.shape, seed=9)).sum(), list(wanted.values()))
    return {"features": features.detach(), **dict(zip(wanted, gradients, strict=True))}


def is_image(name: str) -> bool:
    return name.startswith("visual.")


def is_text(name: str) -> bool:
    return not is_image(name) and name != "logit_scale"


def is_text_but_tokens(name: str) -> bool:
    return is_text(name) and name != "token_embedding.weight"


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """All tensors equal within TOLERANCE, and none trivially so."""
    assert ours.keys() == reference.keys()
    deviations = {}
    for name, expected in reference.items():
        scale = expected.abs().max()
        if name.endswith("attnpool.k_proj.bias"):
            # A constant added to all keys shifts every softmax logit alike: the true gradient is 0, both are noise.
            scale = reference[name.replace("bias", "weight")].abs().max()
        assert scale > 0 and ours[name].isfinite().all(), name
        deviations[name] = ((ours[name] - expected).abs().max() / scale).item()
    worst = max(deviations, key=deviations.__getitem__)
    print(f"largest relative deviation: {deviations[worst]:.1e} in {worst}; features: {deviations['features']:.1e}")
    assert deviations[worst] < TOLERANCE, (worst, deviations[worst])


def pair(openai: ModuleType, shape: CLIPShape) -> tuple[CLIP, nn.Module]:
    """Our CLIP and OpenAI's with the same weights, none of them at an initial value such as 0 or 1."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        ours = CLIP(shape).eval()
        for parameter in ours.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        theirs = openai.CLIP(*astuple(shape)[:10]).float().eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs
