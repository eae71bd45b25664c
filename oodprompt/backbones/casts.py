"""Layers whose frozen weights are cast to the precision of autocast once, and not at every step.

Under autocast a linear layer casts its weights to half precision at every call; torch keeps a cast for the rest of the
step where a weight takes gradients, and a frozen one is cast again and again. What is computed is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ATTRIBUTE = "_casts"  # of a module: what it keeps, by name. Neither its state dict nor ``to`` knows of it.


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None outside of autocast."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def cast(module: nn.Module, name: str, factor: float = 1.0) -> Tensor:
    """The parameter ``name`` of ``module``, times ``factor``; under autocast in its dtype, kept where it is frozen.

    What is kept is made anew after the parameter was moved or written to.
    """
    value: Tensor = getattr(module, name)
    dtype = autocast_dtype(value.device)
    if dtype is None or value.requires_grad or value.is_inference():
        return value if factor == 1 else factor * value
    kept: dict[tuple[str, torch.dtype, float], tuple[tuple[int, int], Tensor]]
    kept = module.__dict__.setdefault(_ATTRIBUTE, {})
    state = value.data_ptr(), value._version
    found = kept.get((name, dtype, factor))
    if found is None or found[0] != state or found[1].device != value.device:
        with torch.no_grad(), torch.inference_mode(False):
            found = state, (value.detach() * factor).to(dtype)
        kept[name, dtype, factor] = found
    return found[1]


class Linear(nn.Linear):
    """``nn.Linear`` whose frozen weights are cast once."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, cast(self, "weight"), cast(self, "bias"))


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` without a bias, whose frozen weights are cast once."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, cast(self, "weight"), None)
