"""A recorder without a GPU: it writes down operations on tensors, and does them again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Written(TorchDispatchMode):
    """Operations with their arguments and results, in their order; those whose results a host would wait for are refused."""

    WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in self.WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **kwargs)
        returns = func._schema.returns
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in returns):  # views need nothing

            def plain(x: Any) -> Any:
                return x.detach() if isinstance(x, Tensor) else x

            self.lines.append((func, tree_map(plain, args), tree_map(plain, kwargs), tree_map(plain, out)))
        return out


class Tape:
    """As ``CudaRecorder``. What is replayed reads and writes the very tensors of the recording, as a CUDA graph does."""

    def __init__(self) -> None:
        self.warm_ups = self.replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.warm_ups += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        with _Written() as written:
            work()

        @torch.no_grad()
        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, out in written.lines:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay
