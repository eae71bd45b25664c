"""Several processes as one: every process computes its part of the image side, then all see the whole batch.

Image features (and text features that depend on the image) are gathered with gradients, so the objective, with all
its batch statistics, is that of one process with the summed batch; parameters' gradients are then averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oodprompt.backbones.devices import to_device

# One tensor for the rows of all processes; torch 2.14 gave it another name and warns of the former.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def number_of_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def part_sizes(total: int, parts: int) -> list[int]:
    """How many of ``total`` rows each of ``parts`` processes has, as ``np.array_split`` cuts them."""
    return [total // parts + (part < total % parts) for part in range(parts)]


class _GatherRows(torch.autograd.Function):
    """All processes' rows, in rank order; the gradient of the own rows is scaled so that averaging gives the sum."""

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        rank, longest = dist.get_rank(), max(sizes)
        ctx.start, ctx.end, ctx.world = sum(sizes[:rank]), sum(sizes[: rank + 1]), len(sizes)
        sent = rows.contiguous()
        if len(rows) < longest:  # every process must send as many
            sent = rows.new_zeros(longest, *rows.shape[1:])
            sent[: len(rows)] = rows
        received = rows.new_empty(len(sizes) * longest, *rows.shape[1:])
        _all_gather(received, sent)
        if min(sizes) == longest:
            return received
        parts = zip(received.split(longest), sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.start : ctx.end] * ctx.world, None


def gather_rows(rows: Tensor, total: int | None = None, sizes: list[int] | None = None) -> Tensor:
    """Concatenate the rows of all processes, with gradients; the identity for one process.

    ``total`` is the number of rows of all, cut as ``EpochBatches`` cuts a batch; or else ``sizes`` are those of each
    process. All must know it beforehand: to ask would have the host wait for the device. Raises ``ValueError`` where the
    own rows are others.

    Every process must go on to compute the same loss from the result; parameters before the gathering then get the
    right gradient by averaging over processes (``average_gradients``).
    """
    world = number_of_processes()
    if world == 1:
        return rows
    if sizes is None:
        assert total is not None, "one of the two says how many rows there are"
        sizes = part_sizes(total, world)
    if len(rows) != sizes[dist.get_rank()]:
        raise ValueError(f"process {dist.get_rank()} has {len(rows)} rows to gather, but {sizes} were agreed upon")
    return _GatherRows.apply(rows, sizes)


def gather_together(values: Sequence[Tensor], total: int) -> list[Tensor]:
    """``gather_rows`` of several tensors [b, ...] at once, those of one dtype in one call."""
    if number_of_processes() == 1:
        return list(values)
    gathered: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(value.dtype for value in values):
        mine = [i for i, value in enumerate(values) if value.dtype == dtype]
        columns = [values[i].flatten(1) for i in mine]
        rows = gather_rows(columns[0] if len(columns) == 1 else torch.cat(columns, dim=1), total)
        for i, part in zip(mine, rows.split([column.shape[1] for column in columns], dim=1), strict=True):
            part = part.view(total, *values[i].shape[1:])
            gathered[i] = part if values[i].requires_grad else part.detach()
    return [gathered[i] for i in range(len(values))]


def whole_index(batch: Mapping[str, Any]) -> Tensor:
    """The indices of the images of the batch of all processes, on the CPU, [B]."""
    return batch["whole"] if "whole" in batch else batch["index"]


def numbers_of_all(batch: Mapping[str, Any], device: torch.device) -> tuple[Tensor, ...]:
    """Label, attribute and index of the images of the batch of all processes, each [B], on ``device``.

    They go to the device in one copy, and between processes in one call.
    """
    numbers = [batch[key] for key in ("label", "attribute", "index")]
    alone = number_of_processes() == 1
    if any(number.device == device for number in numbers):
        numbers = [to_device(number, device) for number in numbers]
        if alone:
            return tuple(numbers)
    columns = to_device(torch.stack(numbers, dim=0 if alone else 1), device)
    if not alone:
        columns = gather_rows(columns, len(whole_index(batch))).T.contiguous()
    return columns.unbind()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, those of one dtype in one call.

    The same parameters must have a gradient in every process.
    """
    world = number_of_processes()
    if world == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        mine = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for gradient in mine])
        dist.all_reduce(flat)
        flat /= world
        parts = flat.split([gradient.numel() for gradient in mine])
        torch._foreach_copy_(mine, [part.view_as(gradient) for part, gradient in zip(parts, mine, strict=True)])


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up ``values`` of all processes, in place."""
    if number_of_processes() > 1:
        dist.all_reduce(values)
    return values


def leave_together() -> None:
    """End the process group once every process has come here; one that goes early can abort the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
