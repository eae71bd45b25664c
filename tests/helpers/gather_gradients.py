"""Run in several processes by test_distributed.py: gradients through ``gather_rows`` are those of one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from oodprompt.data.distributed import average_gradients, gather_rows, leave_together, sum_over_processes


def loss_of(x: torch.Tensor) -> torch.Tensor:
    """A loss that is no mean of per-row losses, like a batch covariance."""
    x = x - x.mean(0)
    return ((x.T @ x) ** 2).sum() + x[0].sum() * x[-1].sum()


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for rows in (8, 5, 1):  # even parts, uneven parts, a process with no row
        torch.manual_seed(0)
        data = torch.randn(rows, 4)
        before, after = nn.Linear(4, 3), nn.Linear(3, 3)
        parameters = [*before.parameters(), *after.parameters()]
        expected = torch.autograd.grad(loss_of(after(before(data))), parameters)
        mine = data.tensor_split(world)[rank]
        whole = gather_rows(before(mine), rows)
        torch.testing.assert_close(whole, before(data))
        loss_of(after(whole)).backward()
        average_gradients(parameters)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)
    assert sum_over_processes(torch.tensor([rank + 1])).item() == world * (world + 1) // 2
    leave_together()


if __name__ == "__main__":
    main()
