"""Tensors out of files of others: nothing that a file holds is ever run.

Four forms: what ``torch.save`` writes (both formats), safetensors, TorchScript's archives (of which the tensors alone
are read, so that their code is not even compiled), and any of these in gzip. Whatever else a file holds becomes an
``Ignored``.
"""

from __future__ import annotations

import copyreg
import gzip
import io
import pickle
import re
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn


class _Kind(type):
    """The class of ``Ignored`` and its kinds, which are pickled by their ``kind``: checkpoints are written again."""

    kind: str


class Ignored(metaclass=_Kind):
    """Stands for an object that is neither a tensor nor plain data; it is never run. ``kind`` names its class."""

    kind = "?"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Ignored:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _one, (self.kind,)

    def _nothing(self, *args: Any) -> None:
        pass

    # What pickle calls to fill an object, a dict, a list or a set.
    __setstate__ = __setitem__ = append = extend = add = _nothing


@cache
def _ignored(kind: str) -> type[Ignored]:
    made: Any = _Kind("Ignored", (Ignored,), {"kind": kind})
    return made


copyreg.pickle(_Kind, lambda cls: (_ignored, (cls.kind,)))


def _one(kind: str) -> Ignored:
    return _ignored(kind)()


def _typed(build: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes of its own, which are left out."""
    return build(*arguments)


def _parameter(data: Tensor, requires_grad: bool, hooks: Any, state: Any) -> nn.Parameter:
    return nn.Parameter(data, requires_grad)


class TensorsOnly(pickle.Unpickler):
    """Unpickles tensors and plain containers; every other class becomes ``Ignored``, so no foreign code runs."""

    _ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
            ("torch.storage", "UntypedStorage"),
        }
    )
    # In the place of functions that would set whatever attributes a file names.
    _OURS = {
        ("torch._tensor", "_rebuild_from_type_v2"): _typed,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._OURS:
            return self._OURS[module, name]
        is_storage = module == "torch" and name.isidentifier() and name.endswith("Storage")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_storage or is_dtype or (module, name) in self._ALLOWED:
            return super().find_class(module, name)
        return _ignored(f"{module}.{name}")


def pickle_module(unpickler: type[pickle.Unpickler]) -> SimpleNamespace:
    """What ``torch.load`` asks of a pickle module, with ``unpickler`` in it."""

    def load(file: Any, **kwargs: Any) -> Any:
        return unpickler(file, **kwargs).load()

    return SimpleNamespace(Unpickler=unpickler, load=load, __name__=unpickler.__name__)


def load_tensors(source: Path | io.BytesIO) -> Any:
    """What ``torch.save`` wrote, on the CPU, with ``Ignored`` for all that is neither a tensor nor plain data.

    Whatever the bytes of a foreign or damaged file make torch and pickle raise is raised; TorchScript's archives are
    refused.
    """
    try:  # first, as this refuses archives of TorchScript, which would be run
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        return torch.load(source, map_location="cpu", weights_only=False, pickle_module=pickle_module(TensorsOnly))


def read_file(file: Path) -> Any:
    """The content of a file of weights in any form: a dict of tensors by name, or what ``torch.save`` was given.

    Whatever damaged bytes make unpicklers and unzippers raise is raised.
    """
    content = file.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    if content[8:9] == b"{" and int.from_bytes(content[:8], "little") <= len(content) - 8:
        return safetensors.torch.load(content)
    if _is_torchscript(content):
        return script_tensors(content)
    return load_tensors(io.BytesIO(content))


# ---- TorchScript's archives


def _is_torchscript(content: bytes) -> bool:
    """A TorchScript archive is a zip with a ``constants.pkl``; ``torch.save`` writes none."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


# The types of numbers by the names that archives have for them.
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Module:
    """A module of an archive: the values of its attributes by name, and the name of its class."""

    kind = ""

    def __init__(self, *args: Any) -> None:
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.values = state if isinstance(state, dict) else {}


class _ArchiveUnpickler(TensorsOnly):
    """``data.pkl`` of an archive whose files lie under ``root``; objects of its own classes become ``_Module``."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root = archive, root
        self._storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return type("_Module", (_Module,), {"kind": f"{module}.{name}"})
        return super().find_class(module, name)

    def persistent_load(self, saved: Any) -> Any:
        """The numbers of a tensor; ``saved`` is ("storage", type, name of the file, device, how many)."""
        _, kind, key, *_ = saved
        if key not in self._storages:
            numbers = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            untyped = (
                torch.frombuffer(numbers, dtype=torch.uint8).untyped_storage() if numbers else torch.UntypedStorage(0)
            )
            dtype = _DTYPES[kind.__name__]
            self._storages[key] = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return self._storages[key]


def script_tensors(content: bytes) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript archive, as ``torch.jit.load(...).state_dict()`` names them.

    ``torch.jit.load`` compiles the code of an archive and runs what that defines for loading, which may write files.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        constants = next(name for name in archive.namelist() if name.endswith("/constants.pkl"))
        root = constants.removesuffix("/constants.pkl")
        model = _ArchiveUnpickler(archive, root).load()
        found: dict[str, Tensor] = {}
        _collect(model, "", _declared(archive, root), found)
    if not found:
        raise ValueError("this TorchScript archive holds no tensors")
    return found


def _collect(module: _Module, prefix: str, declared: dict[str, set[str]], found: dict[str, Tensor]) -> None:
    for name, value in module.values.items():
        if isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", declared, found)
        elif isinstance(value, Tensor) and (module.kind not in declared or name in declared[module.kind]):
            found[f"{prefix}{name}"] = value


def _declared(archive: zipfile.ZipFile, root: str) -> dict[str, set[str]]:
    """Name of a class -> names of its parameters and buffers, as the archive's code lists them."""
    declared = {}
    for file in archive.namelist():
        if not (file.startswith(f"{root}/code/__torch__") and file.endswith(".py")):
            continue
        module = file.removeprefix(f"{root}/code/").removesuffix(".py").replace("/", ".")
        for part in re.split(r"^class ", archive.read(file).decode(), flags=re.MULTILINE)[1:]:
            lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", part, re.MULTILINE)
            if lists:
                declared[f"{module}.{part.split('(')[0]}"] = set(re.findall(r'"([^"]+)"', " ".join(lists)))
    return declared
