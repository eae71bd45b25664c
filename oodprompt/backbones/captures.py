"""CUDA graphs of what a training step repeats: a tower's forward and backward pass, each launched as one.

Shapes do not change within a run, so the kernels of a pass are the same at every step. They are recorded once, with the
memory that they read and write, and replayed: the host then launches one graph in place of hundreds of kernels.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oodprompt.backbones.casts import autocast_dtype
from oodprompt.log import logger

Work = Callable[[], None]
_WARM_UPS = 3  # passes ahead of a recording, in which libraries make their plans and workspaces
_AT_MOST = 4  # recordings of one CLIP; each keeps the memory of a pass


class Recorder(Protocol):
    """Records kernels. A recording reads and writes the memory that it read and wrote when it was made."""

    def warm_up(self, work: Work) -> None:
        """Do ``work`` once without recording."""

    def record(self, work: Work) -> Work:
        """Do ``work`` and return what does it again. What one recorder records shares memory, and is replayed in turn."""


class CudaRecorder:
    """Records on the current GPU."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            work()
        now.wait_stream(aside)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the watchdog of a process group, may go on asking the GPU.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Capture:
    """Forward and backward pass of ``function`` (tensors -> one tensor), recorded for inputs of one kind."""

    output: Tensor

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], recorder: Recorder) -> None:
        self._inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self._sources: list[Tensor | None] = [None] * len(inputs)  # frozen inputs that have been copied
        self._versions = [0] * len(inputs)
        self._learned = [x for x in self._inputs if x.requires_grad]
        self._turn = self._ready = 0  # of the forward pass whose values are there for a backward pass; 0: of none
        with _without_autocast_cache():
            for _ in range(_WARM_UPS):
                recorder.warm_up(lambda: self._once(function))
            self._replay_forward = recorder.record(lambda: self._forward(function))
            self._gradient = torch.zeros_like(self.output)
            self._replay_backward = recorder.record(self._backward)
        self.output = self.output.detach()

    def _once(self, function: Callable[..., Tensor]) -> None:
        output = function(*self._inputs)
        torch.autograd.grad(output, self._learned, torch.zeros_like(output), allow_unused=True)

    def _forward(self, function: Callable[..., Tensor]) -> None:
        self.output = function(*self._inputs)

    def _backward(self) -> None:
        gradients = torch.autograd.grad(self.output, self._learned, self._gradient, allow_unused=True)
        self._used = [g is not None for g in gradients]
        self._gradients = torch.cat([g.flatten() for g in gradients if g is not None])

    def forward(self, inputs: Sequence[Tensor]) -> int:
        """Compute ``output`` of ``inputs``; returns the number of this pass."""
        for i, (own, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if own.requires_grad:
                own.detach().copy_(given)
                continue
            source = self._sources[i]
            if source is None or source.data_ptr() != given.data_ptr() or self._versions[i] != given._version:
                own.copy_(given)
                # Held, so that its memory cannot become another tensor's, which would look like it.
                self._sources[i], self._versions[i] = given, given._version
        self._replay_forward()
        self._turn += 1
        self._ready = self._turn
        return self._turn

    def backward(self, turn: int, inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor | None]:
        """Gradients of all inputs for that of the output of pass ``turn``; None where there is none.

        A recorded backward pass uses up the values of the forward pass. Where these are of another pass, or used up,
        the forward pass is replayed on its ``inputs``.
        """
        if self._ready != turn:
            self.forward(inputs)
        self._gradient.copy_(gradient)
        self._replay_backward()
        self._ready = 0
        used = [x for x, is_used in zip(self._learned, self._used, strict=True) if is_used]
        parts = iter(self._gradients.clone().split([x.numel() for x in used]))
        have = iter(self._used)
        return [next(parts).view_as(x) if x.requires_grad and next(have) else None for x in self._inputs]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, capture: Capture, *inputs: Tensor) -> Tensor:
        ctx.capture = capture
        ctx.save_for_backward(*inputs)
        ctx.turn = capture.forward(inputs)
        return capture.output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.capture.backward(ctx.turn, ctx.saved_tensors, gradient)


class Captures:
    """Records functions that come again and again with inputs of the same kind, and replays them.

    ``after``: how often a function is computed as it is before it is recorded, so that short runs do not pay for what
    they do not use. A function that cannot be recorded is computed as it is from then on, which a line says.
    """

    def __init__(self, after: int, recorder: Callable[[], Recorder] = CudaRecorder) -> None:
        self.after, self._recorder = after, recorder
        self._seen: Counter[Hashable] = Counter()
        self._made: dict[Hashable, Capture] = {}

    def __call__(self, what: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """``function(*inputs)``. ``what`` says which function it is; its weights must be frozen."""
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            return function(*inputs)
        kinds = tuple((x.shape, x.dtype, x.requires_grad) for x in inputs)
        key = what, autocast_dtype(inputs[0].device), kinds
        capture = self._made.get(key) or self._make(key, function, inputs)
        return function(*inputs) if capture is None else _Replay.apply(capture, *inputs)

    def _make(self, key: Hashable, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Capture | None:
        self._seen[key] += 1
        if self._seen[key] <= self.after or len(self._made) >= _AT_MOST:
            return None
        try:
            self._made[key] = Capture(function, inputs, self._recorder())
        except RuntimeError as error:
            self.after = 1 << 62
            reason = " ".join(str(error).split())[:200]
            logger.warning(f"Note: the towers are not captured as CUDA graphs, and steps take longer: {reason}")
        return self._made.get(key)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """What autocast keeps of a pass is freed with it, and a recording would go on reading it."""
    was = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was)
