"""Run in two processes by test_distributed.py: what a step asks of the process group, under the rules of NCCL.

The argument is a JSON file with a list of (command line, collectives of a step, with which images are encoded or kept).
The device is seen on a CPU, see ``tests/helpers/calls.py``; the group is one of gloo.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from oodprompt import cli
from oodprompt.data.distributed import average_gradients, gather_rows, leave_together
from oodprompt.engine.trainer import build_trainer
from tests.helpers.calls import DeviceError, SeenDevice, as_on_a_gpu, first_steps, with_clusters

STEPS = 2


def steps_of(seen: SeenDevice, arguments: list[str], expected: dict[str, int]) -> list[str]:
    """What is wrong with the steps of a run."""
    trainer = with_clusters(build_trainer(cli.setup_cfg(cli.build_parser().parse_intermixed_args(arguments))))
    problems = []
    for step in first_steps(trainer, seen, STEPS):
        if step and seen.collectives != Counter(expected):  # the first may prepare what the others use
            problems.append(f"{dict(seen.collectives)} and not {expected}")
        if step and seen.waits:
            problems.append(f"it waits: {dict(seen.waits)}")
    return problems


def refuses_the_host() -> None:
    """A tensor of the CPU in a collective is an error, as NCCL has no backend for it."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    for collective in (lambda: gather_rows(torch.ones(3), 6), lambda: average_gradients([parameter])):
        with pytest.raises(DeviceError, match="tensor on the CPU"):
            collective()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, SeenDevice() as seen:
        as_on_a_gpu(patch)
        for number, (arguments, expected) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
            if problems := steps_of(seen, arguments, expected):
                raise SystemExit(f"{number}, {' '.join(arguments[:2])}: {'; '.join(problems)}")
        refuses_the_host()
    assert dist.get_world_size() == 2
    leave_together()
