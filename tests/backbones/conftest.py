"""OpenAI's own ``clip.model`` on random weights: the slow reference that our towers are held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from types import ModuleType

import pytest
import torch
from torch import nn

from oodprompt.backbones import CLIPShape
from oodprompt.backbones.tokenizer import load_clip_file

# The order of the fields is that of the arguments of OpenAI's CLIP(...).
SHAPES: dict[str, CLIPShape] = {
    "small ViT": CLIPShape(48, 40, 2, 128, 8, 12, 100, 64, 1, 3),
    "small RN": CLIPShape(48, 64, (2, 1, 1, 2), 8, None, 12, 100, 128, 2, 2),
    "ViT-B/16": CLIPShape(512, 224, 2, 768, 16, 77, 1000, 512, 8, 2),
    "RN50": CLIPShape(1024, 224, (1, 1, 1, 1), 64, None, 77, 1000, 512, 8, 1),
}


@pytest.fixture(scope="session")
def openai() -> ModuleType:
    """The module ``clip.model`` of OpenAI's package."""
    return load_clip_file("model")


@pytest.fixture(scope="session")
def shapes() -> dict[str, CLIPShape]:
    return SHAPES


@pytest.fixture(scope="session")
def reference(openai: ModuleType) -> Callable[[str], nn.Module]:
    """Name of a shape -> OpenAI's CLIP of that shape, fp32, in evaluation mode. Every weight is random.

    OpenAI's initial biases are 0, norms are 1, bn3 is 0 and running statistics are 0 and 1: with those, a forgotten
    bias or a mixed-up norm would go unseen.
    """

    def build(name: str) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = openai.CLIP(*astuple(SHAPES[name])[:10])
            for key, value in [*model.named_parameters(), *model.named_buffers()]:
                if key.endswith("running_var"):
                    value.data.uniform_(0.5, 1.5)
                elif key.endswith(("running_mean", "bias")):
                    value.data.normal_(std=0.1)
                elif value.ndim == 1 and key.endswith("weight"):
                    value.data.normal_(mean=1.0, std=0.2)
        return model.float().eval()

    return build
