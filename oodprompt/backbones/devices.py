"""What the code must know of a device: whether it queues its work, and how to get there without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def queues_work(device: torch.device) -> bool:
    """Whether kernels are put into a queue, as on a GPU: a step then costs what its number of kernels costs the host."""
    return device.type == "cuda"


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """``values`` on ``device``. To a GPU they go by way of pinned memory, so that the host need not wait for the copy."""
    device = torch.device(device)
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
