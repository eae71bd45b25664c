"""Backbones of one's own: any image encoder beside any text encoder, aligned in closed form where they are not one model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.backbones.model import CLIP
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.config.registry import BACKBONE_REGISTRY
from oodprompt.errors import UserError


class BackboneSource:
    """What ``@BACKBONE_REGISTRY.register()`` takes: MODEL.BACKBONE.NAME is the name of the class.

    ``preprocessing`` says what the image encoder takes; the keys of INPUT that nobody gave become it. None: not known.
    """

    preprocessing: Preprocessing | None = None

    def load(self, path: str) -> CLIP:
        """The backbone, in fp32 on the CPU: mostly ``GeneralCLIP(Towers(...))``. ``path`` is MODEL.BACKBONE.PATH, which may be empty.

        Raise ``UserError`` where something is missing.
        """
        raise NotImplementedError


def load_registered(name: str, path: str) -> CLIP:
    """The backbone of a registered source, in evaluation mode, with no gradients."""
    source = BACKBONE_REGISTRY.get(name)()
    clip = source.load(path)
    if not isinstance(clip, CLIP):
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: its load() gave a {type(clip).__name__}, not a CLIP such as GeneralCLIP"
        )
    clip.preprocessing = source.preprocessing or clip.preprocessing
    return clip.eval().requires_grad_(False)


def align(image_features: Tensor, text_features: Tensor, ridge: float = 1e-2) -> nn.Linear:
    """The linear map of images into the space of texts that fits n pairs best: ridge regression, in closed form.

        W, b = argmin  1/n sum_i |W x_i + b - t_i|^2 + ridge |W|^2
        W = T^T X (X^T X + n ridge I)^-1,   b = mean(t) - W mean(x)

    x_i [k] and t_i [d] are image and text features [n, k] and [n, d], L2-normalised; X and T have them in rows, centred.
    The layer takes image features as they are and normalises them itself.

    Source: Hoerl and Kennard, "Ridge regression", 1970.
    """
    x, t = (F.normalize(features.double(), dim=-1) for features in (image_features, text_features))
    if len(x) != len(t):
        raise ValueError(f"{len(x)} image features, but {len(t)} text features")
    mean_x, mean_t = x.mean(dim=0), t.mean(dim=0)
    X, T = x - mean_x, t - mean_t
    W = torch.linalg.solve(X.T @ X + len(X) * ridge * torch.eye(X.shape[1], dtype=X.dtype), X.T @ T).T
    layer = Normalised(x.shape[1], t.shape[1])
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.bias.copy_(mean_t - W @ mean_x)
    return layer


class Normalised(nn.Linear):
    """A linear layer over L2-normalised features [n, k] -> [n, d]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.normalize(input, dim=-1))
