"""Several processes as one: every process computes its part of the image side, then all see the whole batch.

Image features (and text features that depend on the image) are gathered with gradients, so the objective, with all
its batch statistics, is that of one process with the summed batch; parameters' gradients are then averaged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _GatherRows(torch.autograd.Function):
    """All processes' rows, in rank order; the gradient of the own rows is scaled so that averaging gives the sum."""

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        rank, longest = dist.get_rank(), max(sizes)
        ctx.start, ctx.end, ctx.world = sum(sizes[:rank]), sum(sizes[: rank + 1]), len(sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.start : ctx.end] * ctx.world, None


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, with gradients; the identity for one process.

    Every process must go on to compute the same loss from the result; parameters before the gathering then get the
    right gradient by averaging over processes (``average_gradients``).
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    sizes = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
    return _GatherRows.apply(rows.contiguous(), [int(size) for size in sizes])


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up ``values`` of all processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def leave_together() -> None:
    """End the process group once every process has come here; one that goes early can abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
