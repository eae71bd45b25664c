"""What a GPU would be asked to do, seen on a CPU: calls, casts, copies, and what has the host wait for it.

``SeenDevice`` makes of ``cpu:0`` a device of its own, beside the CPU of every other tensor. Tensors come to it by ``to``,
by ``device=`` and from other tensors of it; they compute on the CPU. What CUDA refuses is refused: operations on tensors
of both, ``numpy()`` of the device's, and, as under NCCL, a tensor of the CPU in a collective.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from oodprompt.backbones import model, packing
from oodprompt.engine import assembly, device, optim
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.attributes import DiscoveredClusters
from tests.helpers.runs import REPOSITORY

DEVICE = torch.device("cpu", 0)
aten = torch.ops.aten
# What needs values, or their number, on the host.
_WAITS = {
    aten._local_scalar_dense.default: "a value",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.equal.default: "equal",
    aten.is_nonzero.default: "a truth value",
    aten._linalg_svd.default: "svd",
    aten._linalg_eigh.default: "eigh",
    aten._linalg_solve_ex.default: "solve",
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_COPIES = {aten._to_copy.default, aten.copy_.default}
# These check values on a CPU alone.
_CHECKED_ON_A_CPU = ("one_hot",)


class DeviceError(RuntimeError):
    """What CUDA or NCCL would not do."""


class SeenDevice:
    """A context in which ``DEVICE`` is seen; ``counted()`` says when it counts.

    ``calls`` is the number of kernels (operations that are not views), of which ``casts`` change the dtype alone;
    ``places`` has the calls by line. ``waits`` and ``copies`` count by what is done and where, ``collectives`` by name.
    """

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}  # kept alive, so that no other takes its place
        self._counts = False
        self._in_backward = False  # where torch's core makes tensors beside those that it has
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.calls, self.casts = 0, 0
        self.places: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """What happens in the block counts."""
        self._counts = True
        try:
            yield
        finally:
            self._counts = False

    def __enter__(self) -> SeenDevice:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operations(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def has(self, value: Any) -> bool:
        """Whether a tensor is on the device."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._storages

    def take(self, value: Any) -> Any:
        """Tensors of ``value``, one or several, are on the device from now on."""
        for tensor in _tensors([value]):
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = storage
        return value

    def note(self, kind: Counter[str], what: str) -> None:
        if self._counts:
            kind[f"{what} at {_place()}"] += 1


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _place() -> str:
    """File and line in the project that is being computed."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(REPOSITORY)) and "/tests/helpers/calls" not in name:
            return f"{name[len(str(REPOSITORY)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "the backward pass"


def _target(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that ``Tensor.to`` is given."""
    for value in (*args[1:], kwargs.get("device")):
        if isinstance(value, (str, torch.device)):
            return torch.device(value)
        if isinstance(value, Tensor):
            return value.device
    return None


class _Functions(TorchFunctionMode):
    """What Python asks of tensors: devices, and values on the host, of which a CPU's dispatcher sees nothing."""

    def __init__(self, seen: SeenDevice) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, seen = kwargs or {}, self.seen
        here = bool(args) and seen.has(args[0])
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return DEVICE if here else func(*args, **kwargs)
        if func is Tensor.to:
            return self._moved(here, args, kwargs)
        if func is Tensor.cpu and here:
            return self._moved(here, (args[0], torch.device("cpu")), {})
        if func is Tensor.tolist and here:
            seen.note(seen.waits, "tolist")
        if here and func in (Tensor.numpy, Tensor.__array__):
            raise DeviceError("can't convert a tensor of the device to numpy; copy it to the host first")
        if func in (Tensor.backward, torch.autograd.grad):
            seen._in_backward = True
            try:
                return func(*args, **kwargs)
            finally:
                seen._in_backward = False
        if name in _CHECKED_ON_A_CPU:
            waits, seen.waits = seen.waits, Counter()
            try:
                return func(*args, **kwargs)
            finally:
                seen.waits = waits
        result = func(*args, **kwargs)
        if name == "new_tensor" and here or name in ("tensor", "as_tensor") and kwargs.get("device") == DEVICE:
            seen.note(seen.waits, "a tensor of Python's numbers")
            seen.take(result)
        return result

    def _moved(self, here: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        """``Tensor.to``. On a CPU nothing would be moved."""
        seen, target = self.seen, _target(args, kwargs)
        if here and "/torch/optim/" in sys._getframe(2).f_code.co_filename:
            target = DEVICE  # it has grouped parameters by the devices that torch's core knows, which are all the CPU
        if target is None or (target == DEVICE) == here:
            elsewhere = [v for v in args[1:] if not isinstance(v, (str, torch.device, Tensor))]
            rest = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking", "copy")}
            elsewhere = [v for v in elsewhere if isinstance(v, torch.dtype)]
            return args[0].to(*elsewhere, **rest) if elsewhere or rest.get("dtype") else args[0]
        non_blocking = bool(kwargs.get("non_blocking")) or any(v is True for v in args[1:])
        if here or not non_blocking:
            seen.note(seen.waits, "copy to the host" if here else "copy to the device that is waited for")
        if not here:
            seen.note(seen.copies, "copy")
        dtype = next((v for v in (*args[1:], kwargs.get("dtype")) if isinstance(v, torch.dtype)), None)
        with torch._C.DisableTorchFunction():
            counts, seen._counts = seen._counts, False
            result = args[0].to(dtype or args[0].dtype, copy=True)
            seen._counts = counts
        if here:
            seen._storages.pop(result.untyped_storage()._cdata, None)
        return result if here else seen.take(result)


_IS_VIEW: dict[Any, bool] = {}


def _is_view(func: Any) -> bool:
    if func not in _IS_VIEW:
        returns = func._schema.returns
        _IS_VIEW[func] = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return _IS_VIEW[func]


class _Operations(TorchDispatchMode):
    """What reaches a device."""

    def __init__(self, seen: SeenDevice) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, seen = kwargs or {}, self.seen
        given = list(_tensors([*args, *kwargs.values()]))
        here = [seen.has(tensor) for tensor in given]
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_")
            if name != "barrier" and not all(here):
                raise DeviceError(f"{name} of a tensor on the CPU: the process group has no backend for it")
            if seen._counts:
                seen.collectives[name] += 1
        target = kwargs.get("device")
        made_here = target == DEVICE or not given and seen._in_backward
        if not any(here) and not made_here:
            return func(*args, **kwargs)
        if not all(here):
            self._check(func, args, given, here)
        if func in _WAITS:
            seen.note(seen.waits, _WAITS[func])
        if func in _INDEXING:
            masks = any(isinstance(t, Tensor) and t.dtype == torch.bool for t in args[1])
            if masks and not (func is not aten.index.Tensor and args[2].numel() == 1):
                seen.note(seen.waits, "index with a mask")
        if seen._counts and func.namespace == "aten" and not _is_view(func):
            seen.calls += 1
            seen.places[_place()] += 1
            seen.casts += func is aten._to_copy.default
        return seen.take(func(*args, **kwargs))

    def _check(self, func: Any, args: Any, given: list[Tensor], here: list[bool]) -> None:
        seen = self.seen
        if func in _COPIES:
            return
        if func in _INDEXING and seen.has(args[0]):
            if any(isinstance(t, Tensor) and not seen.has(t) for t in args[1]):
                seen.note(seen.waits, "index on the CPU")
            given = [] if func is aten.index.Tensor else [args[2]]  # what is put there
            here = [seen.has(value) for value in given]
        others = [tuple(tensor.shape) for tensor, is_here in zip(given, here, strict=True) if not is_here]
        if any(others):
            raise DeviceError(
                f"{func}: all tensors must be on the same device; on the CPU are those of shapes {others}"
            )


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Trainers that are built under ``SeenDevice`` are on ``DEVICE``, and choose what they would choose on a GPU."""
    join, way_of = device.join_processes, packing.way_of

    class OnDevice:
        """The processes of a run, with another device."""

        def __init__(self, state: Any) -> None:
            self._state, self.device = state, DEVICE

        def __getattr__(self, name: str) -> Any:
            return getattr(self._state, name)

    packing.pack.cache_clear()  # what it keeps is on the device of another test
    patch.setattr(device, "join_processes", lambda cfg: OnDevice(join(cfg)))
    patch.setattr(assembly, "COMPUTES_IN_FP16", ["cuda", "cpu"])
    patch.setattr(optim, "_are_on_gpu", lambda trained: True)
    patch.setattr(model, "way_of", lambda _, tokens, width: way_of(torch.device("cuda"), tokens, width))


def with_clusters(trainer: PromptTrainer) -> PromptTrainer:
    """The trainer, for which discovery has found every third region of training images, without a search."""
    regions = trainer.region_features.regions("train").owner
    found = DiscoveredClusters((1,), {"train": torch.arange(len(regions)) % 3}, {"train": regions})
    trainer.attributes.discovered._found = found
    return trainer


def first_steps(trainer: PromptTrainer, seen: SeenDevice, steps: int) -> Iterator[int]:
    """The number of each step, from 0, after it was counted alone, with the loading of its batch."""
    trainer._check_loss._waits = True
    trainer.before_train()
    trainer.epoch, trainer.num_batches = 0, steps + 1
    trainer.before_epoch()
    batches = trainer.encoder.batches("train")
    batches.set_epoch(0)
    loaded = iter(batches)
    for trainer.batch_idx in range(steps):
        seen.forget()
        with seen.counted():
            trainer.forward_backward(next(loaded))
        yield trainer.batch_idx
