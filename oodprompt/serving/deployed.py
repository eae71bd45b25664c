"""The deployed model: from pixels to probabilities, built from tensors and a frozen CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.backbones import CLIP
from oodprompt.methods.contracts import PromptLearner
from oodprompt.methods.heads import Head


class Deployed(nn.Module):
    """uint8 pixels [B, 3, R, R] of resized and cut RGB images -> probabilities [B, C] in float32.

        x = (pixels / 255 - mean) / std        z = l2norm(image tower(x, visual prompts))        softmax(head(z))

    ``visual_prompts`` are those of ``PromptLearner.visual_prompts``. ``mean`` and ``std`` have three numbers, or none
    where images are not normalised; ``instance_norm`` then makes each channel of an image of mean 0 and variance 1.
    ``learner`` is given where the text features depend on the image; it computes them, with the text tower of ``clip``.
    """

    mean: Tensor  # [3, 1, 1]
    std: Tensor
    prompts: Tensor  # [M, width]

    def __init__(
        self,
        clip: CLIP,
        head: Head,
        visual_prompts: Sequence[Any] = (),
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        instance_norm: bool = False,
        learner: PromptLearner | None = None,
    ) -> None:
        super().__init__()
        self.visual = clip.visual
        if learner is not None:
            self.text_towers = clip  # moved with this module
        self.__dict__["clip"] = clip  # its text tower may have no weights
        self.learner = learner
        self._head = {name: f"head_{name.replace('.', '_')}" for name in head.tensors()}
        self.members, self.aggregate, self.instance_norm = head.members, head.aggregate, instance_norm
        for name, value in head.tensors().items():
            self.register_buffer(self._head[name], value)
        self.has_prompts = bool(visual_prompts) and visual_prompts[0] is not None
        self.depth = len(visual_prompts[1]) if self.has_prompts and len(visual_prompts) > 1 else 0
        if self.has_prompts:
            self.register_buffer("prompts", visual_prompts[0].detach().float())
            for i in range(self.depth):
                self.register_buffer(f"deep_{i}", visual_prompts[1][i].detach().float())
        self.normalises = bool(mean)
        if mean:
            self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
            self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    @property
    def clip(self) -> CLIP:
        """The CLIP whose towers are used."""
        return self.__dict__["clip"]

    @property
    def head(self) -> Head:
        """The head, on the device of this module."""
        return Head.of({name: getattr(self, own) for name, own in self._head.items()}, self.members, self.aggregate)

    @property
    def visual_prompts(self) -> tuple[Any, ...]:
        """What the image tower takes beside images."""
        deep = [getattr(self, f"deep_{i}") for i in range(self.depth)]
        return (self.prompts, deep) if self.has_prompts else ()

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(torch.float32) / 255
        if self.normalises:
            x = (x - self.mean) / self.std
        if self.instance_norm:
            x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1e-8)
        z = F.normalize(self.clip.encode_image(x, *self.visual_prompts).float(), dim=-1)
        text = self.learner(z).text_features if self.learner is not None else None
        return self.head.logits(z, text).softmax(dim=1)
