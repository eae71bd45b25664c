"""Weights that are cast once against autocast's own casts at every call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from oodprompt.backbones import CLIP, CLIPShape, model
from oodprompt.backbones import casts as casts_module
from oodprompt.backbones.casts import Linear, cast
from tests.helpers.clip_checks import random

VIT = CLIPShape(48, 32, 2, 128, 8, 32, 100, 128, 2, 3)
RESNET = CLIPShape(48, 32, (1, 1, 1, 1), 32, None, 32, 100, 128, 2, 3)


class Casts(TorchDispatchMode):
    """The parameters of a module that were cast."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in module.named_parameters()}
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.names:
            self.seen.add(self.names[args[0].data_ptr()])
        return func(*args, **(kwargs or {}))


def frozen_clip(shape: CLIPShape) -> CLIP:
    torch.manual_seed(0)
    return CLIP(shape).eval().requires_grad_(False)


def step(clip: CLIP) -> list[Tensor]:
    images, prefix = random(2, 3, 32, 32), (0.3 * random(4, 128)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z, w = clip.encode_image(images), clip.encode_prompts(prefix, 0.3 * random(3, 3, 128), (3, 2, 1))
    w.float().sum().backward()
    assert prefix.grad is not None
    return [z, w.detach(), prefix.grad]


@pytest.mark.parametrize("shape", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_frozen_weights_are_cast_once(shape: CLIPShape, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = frozen_clip(shape)
    first = step(clip)
    with Casts(clip) as casts:
        again = step(clip)
    assert not any(name.endswith("weight") or name.endswith("bias") for name in casts.seen), casts.seen
    assert not {"visual.proj", "text_projection"} & casts.seen
    for part in (model, casts_module):
        monkeypatch.setattr(part, "cast", lambda module, name: getattr(module, name))
    with Casts(clip) as casts:
        plain = step(clip)
    assert "text_projection" in casts.seen and "transformer.resblocks.0.mlp.c_fc.weight" in casts.seen
    for a, b, c in zip(first, again, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_cast_follows_its_weights() -> None:
    layer = Linear(4, 3).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        kept = cast(layer, "weight")
        assert kept.dtype == torch.bfloat16 and cast(layer, "weight") is kept
        layer.weight.mul_(2)
        assert torch.equal(cast(layer, "weight"), 2 * kept)
        layer.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
        assert cast(layer, "weight").eq(1).all()
        layer.weight.data = torch.full((3, 4), 5.0)
        assert cast(layer, "weight").eq(5).all()
        layer.requires_grad_(True)
        assert cast(layer, "weight") is layer.weight, "autocast sees to gradients itself"
    assert cast(layer.requires_grad_(False), "weight") is layer.weight
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_a_cast_made_in_inference_mode_serves_training() -> None:
    layer = Linear(4, 3).requires_grad_(False)
    x = random(2, 4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["values", "gradients"])
def test_quick_gelu_in_the_weights(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: no further from fp32 than twice what half precision is anyway."""
    mlp = frozen_clip(VIT).transformer.resblocks[0].mlp
    x = random(5, 7, 128).requires_grad_()

    def result() -> Tensor:
        y = mlp(x)
        return y.detach().float() if kind == "values" else torch.autograd.grad(y.float().square().sum(), x)[0]

    exact = result()
    with torch.autocast("cpu", torch.bfloat16):
        plain = result()
        monkeypatch.setattr(model, "queues_work", lambda device: True)
        silu = F.silu
        seen: list[torch.dtype] = []
        monkeypatch.setattr(F, "silu", lambda x: silu(seen.append(x.dtype) or x))
        folded = result()
    assert seen == [torch.bfloat16] and not torch.equal(folded, plain)
    assert (folded - exact).norm() < 2 * (plain - exact).norm() < 0.02 * exact.norm()


def test_modules_are_what_they_were() -> None:
    """Names and classes that others look for: nn.Linear, nn.Sequential, OpenAI's names."""
    clip = frozen_clip(VIT)
    block = clip.transformer.resblocks[0]
    assert isinstance(block.mlp, nn.Sequential) and isinstance(block.mlp.c_fc, nn.Linear)
    assert [name for name, _ in block.mlp.named_parameters()] == [
        "c_fc.weight",
        "c_fc.bias",
        "c_proj.weight",
        "c_proj.bias",
    ]
