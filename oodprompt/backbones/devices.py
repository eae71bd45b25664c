"""What the towers must know of a device."""

from __future__ import annotations

import torch


def queues_work(device: torch.device) -> bool:
    """Whether kernels are put into a queue, as on a GPU: a step then costs what its number of kernels costs the host."""
    return device.type == "cuda"
