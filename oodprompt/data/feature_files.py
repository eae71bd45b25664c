"""Files of image features: ``.npz`` and ``.safetensors``, with labels, splits, attributes and names (docs/your_data.md).

Large tables are mapped from the file, not read: those of .safetensors, and those of .npz as ``numpy.savez`` writes it
(``savez_compressed`` has to be unpacked into memory).
"""

from __future__ import annotations

import json
import numbers
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from oodprompt.errors import UserError, nearest
from oodprompt.files import replacing, temporary_folder

FEATURES = "image_features"
ROWS = ("label", "split", "attribute", "domain", "image", "caption")  # one entry a row
LISTS = ("class_names", "attribute_names", "attribute_prompts")
WORDS = ("template", "backbone", "backbone_digest")
ENTRIES = (FEATURES, *ROWS, *LISTS, *WORDS)
ENDINGS = (".npz", ".safetensors")
_TEXTS = ("image", "caption")
_UNKNOWN = ("attribute", *_TEXTS)  # whose values may be missing in some rows
_LOCAL_HEADER = 30  # bytes of a zip's header of a member, ahead of its name


@dataclass
class FeatureFile:
    """What one file holds: ``features`` [N, d], ``rows`` (name -> [N]), ``lists`` of names, and ``words``."""

    path: Path
    features: Tensor
    rows: dict[str, np.ndarray]
    lists: dict[str, tuple[str, ...]]
    words: dict[str, str]

    def holds_what(self, other: FeatureFile) -> bool:
        """Whether ``other`` has the same features, rows, lists and words, bit by bit."""
        return (
            (self.lists, self.words, self.rows.keys()) == (other.lists, other.words, other.rows.keys())
            and self.features.dtype is other.features.dtype
            and torch.equal(self.features, other.features)
            and all(np.array_equal(values, other.rows[name]) for name, values in self.rows.items())
        )


def is_feature_file(path: Path) -> bool:
    """Whether the path ends as a file of features does."""
    return path.suffix.lower() in ENDINGS


def read_feature_file(path: Path) -> FeatureFile:
    """The file's content, its features mapped where that can be; ``UserError`` for what is not as it should be."""
    try:
        entries = _from_npz(path) if path.suffix.lower() == ".npz" else _from_safetensors(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError, struct.error) as error:
        reason = " ".join(str(error).split())[:200]
        pickled = (
            "; arrays of Python objects are not read, save texts as numpy.array(names)" if "pickle" in reason else ""
        )
        raise UserError(f"{path} cannot be read as {path.suffix}: {reason}{pickled}") from error
    return _checked(path, entries)


def _checked(path: Path, entries: dict[str, Any]) -> FeatureFile:
    for name in entries:
        if name not in ENTRIES:
            raise UserError(f"{path}: unknown entry {name!r}: {nearest(name, ENTRIES)}")
    if FEATURES not in entries:
        raise UserError(f"{path} has no entry {FEATURES!r} [N, d]; it has {', '.join(sorted(entries)) or 'none'}")
    features = entries.pop(FEATURES)
    if not features.is_floating_point() or features.ndim != 2 or 0 in features.shape:
        kind = str(features.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {FEATURES} must be floats [N, d], not {kind} {list(features.shape)}")
    rows = {name: np.asarray(entries[name]) for name in ROWS if name in entries}
    for name, values in rows.items():
        if values.shape != (len(features),):
            raise UserError(
                f"{path}: {name} must have one entry for each of the {len(features):,} rows of {FEATURES}, not the "
                f"shape {list(values.shape)}"
            )
    lists = {name: tuple(map(str, np.atleast_1d(entries[name]).tolist())) for name in LISTS if name in entries}
    words = {name: str(entries[name]) for name in WORDS if name in entries}
    return FeatureFile(path, features, rows, lists, words)


# --- npz ---------------------------------------------------------------------------------------------------------


def _from_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        entries = {name: file[name] for name in file.files if name != FEATURES}
        if FEATURES in file.files:
            values = _mapped(path, f"{FEATURES}.npy")
            entries[FEATURES] = _tensor_of(path, file[FEATURES] if values is None else values)
    return entries


def _tensor_of(path: Path, values: np.ndarray) -> Tensor:
    """Numbers as a tensor, in this machine's order of bytes; ``UserError`` for a type that torch lacks."""
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        raise UserError(f"{path}: {FEATURES} must be floats [N, d], not {values.dtype} {list(values.shape)}")
    native = values if values.dtype.isnative else values.astype(values.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written
        return torch.from_numpy(native if min(native.strides, default=0) >= 0 else native.copy())


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """The array of an .npz mapped from the file, privately; None where it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                return None
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
            header = file.tell()
    if dtype.hasobject or 0 in shape:
        return None
    with path.open("rb") as raw:
        raw.seek(info.header_offset)
        lengths = struct.unpack("<HH", raw.read(_LOCAL_HEADER)[26:])
    start = info.header_offset + _LOCAL_HEADER + sum(lengths) + header
    return np.memmap(path, dtype, "c", start, shape, "F" if is_fortran else "C")


# --- safetensors -------------------------------------------------------------------------------------------------


def _from_safetensors(path: Path) -> dict[str, Any]:
    """Names and words are JSON in the metadata; ``image`` and ``caption`` are UTF-8 bytes, a line for each row."""
    with safe_open(path, "pt") as file:
        entries: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    for name, value in list(entries.items()):
        if name in _TEXTS:
            entries[name] = np.array(value.numpy().tobytes().decode("utf-8", "surrogateescape").split("\n"))
        elif name != FEATURES:
            entries[name] = value.numpy()
    for name in (*LISTS, *WORDS, *(name for name in ROWS if name not in _TEXTS)):
        if name in metadata:
            value = json.loads(metadata[name]) if name not in WORDS else metadata[name]
            entries[name] = value if name in WORDS else np.array(value)
    return entries


# --- writing -----------------------------------------------------------------------------------------------------


def write_features(path: str | Path, image_features: Any, **entries: Any) -> Path:
    """Write image features [N, d] and what is known of them to an ``.npz`` or ``.safetensors`` file; returns its path.

    ``label``, ``split``, ``attribute``, ``domain``, ``image`` and ``caption`` have an entry for each row; ``class_names``,
    ``attribute_names`` and ``attribute_prompts`` are lists; ``template``, ``backbone`` and ``backbone_digest`` are texts.
    ``UserError`` for anything else, and for lengths that do not fit. ``DATASET.NAME Features`` reads the file.
    """
    path = Path(path)
    if not is_feature_file(path):
        raise UserError(f"{path}: a file of image features ends in .npz or .safetensors")
    table = _table(path, image_features)
    given = {name: value for name, value in entries.items() if value is not None}
    content = _checked(path, {FEATURES: table, **{name: _plain(path, name, value) for name, value in given.items()}})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".npz":
            if table.dtype is torch.bfloat16:
                raise UserError(f"{path}: .npz has no bfloat16; write .safetensors, or give float16 or float32")
            with replacing(path) as file:
                arrays: dict[str, Any] = {FEATURES: table.numpy(), **content.rows, **content.lists, **content.words}
                np.savez(file, **arrays)
        else:
            _to_safetensors(content, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _table(path: Path, values: Any) -> Tensor:
    """Image features in any form: a tensor, an array, a DataFrame, a list of rows."""
    if not isinstance(values, Tensor):
        rows = list(values) if isinstance(values, (list, tuple)) else []
        if rows and all(isinstance(row, Tensor) for row in rows):
            if len({row.shape for row in rows}) > 1:
                raise UserError(f"{path}: the entries of {FEATURES} differ in length")
            return torch.stack(rows).detach().cpu()
        return _tensor_of(path, _array(path, FEATURES, values))
    return values.detach().cpu()


def _array(path: Path, name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise UserError(f"{path}: the entries of {name} differ in length") from error


def _plain(path: Path, name: str, value: Any) -> Any:
    """An entry as a text or as an array of numbers or texts; ``UserError`` for anything else in it."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, str):
        return value
    values = _array(path, name, value)
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "surrogateescape")
    if values.dtype.kind == "f":  # as pandas has whole numbers of which some are missing
        values = np.array([int(x) if x.is_integer() else x for x in values.ravel().tolist()], object).reshape(
            values.shape
        )
    return values if values.dtype != object else _of_objects(path, name, values)


def _of_objects(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    """A table column of Python objects: as whole numbers if all are such, else as texts."""
    entries = values.ravel().tolist()
    known = [not _is_missing(entry) for entry in entries]
    for row, (entry, is_known) in enumerate(zip(entries, known, strict=True)):
        if not is_known and name not in _UNKNOWN:
            raise UserError(f"{path}: entry {row:,} of {name} is missing; give a value, or take the row out")
        if is_known and not isinstance(entry, (str, numbers.Integral, PurePath)):
            raise UserError(
                f"{path}: entry {row:,} of {name} is a {type(entry).__name__}; give a word or a whole number"
            )
    given = [entry for entry, is_known in zip(entries, known, strict=True) if is_known]
    is_whole = all(isinstance(entry, numbers.Integral) and not isinstance(entry, bool) for entry in given)
    unknown: Any = -1 if is_whole and name == "attribute" else ""
    filled = [entry if there else unknown for entry, there in zip(entries, known, strict=True)]
    return np.array(filled, int if is_whole and name not in _TEXTS else str).reshape(values.shape)


def _is_missing(entry: Any) -> bool:
    """None, NaN, or what pandas has for a missing value."""
    return (
        entry is None or type(entry).__name__ in ("NAType", "NaTType") or (isinstance(entry, float) and entry != entry)
    )


def _to_safetensors(content: FeatureFile, path: Path) -> None:
    tensors = {FEATURES: content.features.contiguous()}
    metadata: dict[str, str] = {**content.words, **{k: json.dumps(list(v)) for k, v in content.lists.items()}}
    for name, values in content.rows.items():
        if name in _TEXTS:
            lines = [str(text).replace("\n", " ") for text in values.tolist()]
            block = "\n".join(lines).encode("utf-8", "surrogateescape")
            tensors[name] = torch.from_numpy(np.frombuffer(block, np.uint8).copy())
        elif values.dtype.kind in "iu":
            tensors[name] = torch.from_numpy(values.astype(np.int64))
        else:
            metadata[name] = json.dumps(values.tolist())
    with temporary_folder(path.parent) as folder:
        save_file(tensors, folder / path.name, metadata)
        (folder / path.name).replace(path)
