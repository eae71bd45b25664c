"""Small random towers, ours and OpenAI's, and a batch for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oodprompt.backbones import CLIP
from tests.helpers.towers import RESNET, SHAPE, Towers, random_clip


@pytest.fixture(scope="session")
def towers() -> Towers:
    """Our CLIP and OpenAI's with the same random weights."""
    theirs = random_clip(SHAPE)
    return CLIP.from_state_dict(theirs.state_dict()).eval().requires_grad_(False), theirs


@pytest.fixture(scope="session")
def resnet() -> CLIP:
    return CLIP(RESNET).eval().requires_grad_(False)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Images and labels."""
    images = torch.randn(
        5, 3, SHAPE.image_resolution, SHAPE.image_resolution, generator=torch.Generator().manual_seed(2)
    )
    return images, torch.tensor([0, 1, 2, 3, 1])
