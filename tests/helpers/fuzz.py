"""Inputs that make no sense, and what reads them: a ``UserError`` is the only error that may come out.

Inputs are whole files with parts changed, lines made of words that the readers know, and any bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from oodprompt.backbones.state_dicts import read_state_dict
from oodprompt.config.keys import check_values, declared_keys, get_cfg_default, merge_file, merge_opts, set_key
from oodprompt.data.dataset import build_dataset
from oodprompt.data.images import read_image
from oodprompt.engine import checkpoint
from oodprompt.errors import UserError
from oodprompt.reports.results import finished_results
from oodprompt.runs.grid_file import read_grid
from oodprompt.runs.reading import log_metrics

PATIENCE = 20.0  # seconds that an input may take, also on a busy machine
Strategy = st.SearchStrategy[Any]


@dataclass(frozen=True)
class Target:
    """What reads an input in a folder, and the inputs."""

    read: Callable[[Path, Any], object]
    inputs: Strategy
    whole: Any  # an input that makes sense


class TooLong(Exception):
    """An input took longer than ``PATIENCE``."""


def _stop(*_: object) -> None:
    raise TooLong


# --- inputs ----------------------------------------------------------------------------------------------------------


def _changed(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """``content`` with parts overwritten, inserted, cut out, doubled or cut off."""
    for how, place, piece in changes:
        at = int(place * len(content))
        if how == "write":
            content = content[:at] + piece + content[at + len(piece) :]
        elif how == "insert":
            content = content[:at] + piece + content[at:]
        elif how == "cut":
            content = content[:at] + content[at + 1 + 7 * len(piece) :]
        elif how == "double":
            content = content[:at] + content[at : at + 20] * 2 + content[at + 20 :]
        else:
            content = content[:at]
    return content


def changed(*contents: bytes) -> Strategy:
    """One of the contents with up to five changes."""
    places = st.floats(0, 1, exclude_max=True)
    signs = st.text(st.characters(min_codepoint=9, max_codepoint=126), max_size=6).map(str.encode)
    change = st.tuples(
        st.sampled_from(("write", "insert", "cut", "double", "end")), places, st.binary(max_size=6) | signs | signs
    )
    return st.builds(_changed, st.sampled_from(contents), st.lists(change, min_size=1, max_size=5))


def lines(words: tuple[str, ...], separators: tuple[str, ...], first: tuple[str, ...] = ("",)) -> Strategy:
    """Text whose lines are ``words``, and any others, between ``separators``."""
    word = st.one_of(st.sampled_from(words), st.sampled_from(words), st.text(max_size=5))
    line = st.builds(lambda by, row: by.join(row), st.sampled_from(separators), st.lists(word, max_size=6))
    body = st.builds(lambda head, rows: "\n".join([head, *rows]), st.sampled_from(first), st.lists(line, max_size=8))
    return body.map(lambda text: text.encode("utf-8", "surrogatepass"))


def any_of(*strategies: Strategy) -> Strategy:
    return st.one_of(*strategies, st.binary(max_size=60))


# --- files that make sense -------------------------------------------------------------------------------------------


def picture(kind: str, mode: str = "RGB") -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    stream = io.BytesIO()
    image = Image.fromarray(values[:, :, 0] if mode != "RGB" else values).convert(mode)
    image.save(stream, kind)
    return stream.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


_CSV = b"image,label,split,attribute,caption\na.png,cat,train,sea,x\nb.png,dog,train,,y\na.png,cat,test,sea,\nb.png,dog,test,land,\n"
_BIRDS = b"img_id,img_filename,y,split,place\n" + b"".join(
    f"{i},{'ab'[i % 2]}.png,{i % 2},{i // 4},{i // 2 % 2}\n".encode() for i in range(12)
)
_FACES = b"6\nBlond_Hair Male\n" + b"".join(f"{i}.png {1 - 2 * (i % 2)} -1\n".encode() for i in range(6))
_PARTS = b"".join(f"{i}.png {i // 2}\n".encode() for i in range(6))
_YAML = b"DATASET:\n  NAME: CSV\n  CSV: {LABEL: y}\nOPTIM:\n  LR: 1e-3\n  STEPSIZE: [3, 5]\nINPUT:\n  SIZE: (48, 48)\nSEED: 1\n"
_GRID = (
    b"config: a.png\ncommon: OPTIM.LR 0.1\nseeds: [1, 2]\nsettings: {'0.9': X 1, '0.5': X 2}\n"
    b"methods: {CoOp: --trainer CoOp, B: {args: --trainer B, keys: {OPTIM.LR: [1, 2]}}}\nrank: true\npage: p.md\n"
)
_STATE = {"state_dict": {"ctx": torch.ones(2, 3)}, "epoch": 3, "optimizer": None, "val_result": 1.5}
_RESULTS = json.dumps({"accuracy": 0.5, "gap": None, "worst_group_accuracy": 0.25, "groups": [{"accuracy": 1.0}]})
_VALUES = (
    "1",
    "-1",
    "1e400",
    "nan",
    "(1,2)",
    "()",
    "[]",
    "{}",
    "None",
    "True",
    "''",
    "a",
    "0.5",
    "(48, 'a')",
    "1" * 50,
)


def _dataset(name: str, **keys: Any) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        cfg = get_cfg_default()
        for key, value in {"DATASET.NAME": name, "DATASET.ROOT": str(folder), "SEED": 1, **keys}.items():
            set_key(cfg, key, value, "fuzz")
        return build_dataset(cfg)

    return read


def _file(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """Write an input into a file of the folder, and read the file, or the folder where it is that of a data set."""

    def go(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return go


def _words(folder: Path, words: list[str]) -> None:
    cfg = get_cfg_default()
    merge_opts(cfg, words)
    check_values(cfg)


def _yaml(file: Path) -> None:
    cfg = get_cfg_default()
    merge_file(cfg, file)
    check_values(cfg)


def targets() -> dict[str, Target]:
    """All readers, by name."""
    keys = tuple(declared_keys())
    numbers = (
        "0",
        "1",
        "2",
        "-1",
        "1.0",
        "nan",
        "",
        "a.png",
        "b.png",
        "../a.png",
        "1e9",
        "99999999999999999999",
        '"',
        "\x00",
    )
    table = (",", ";", "\t", " , ")
    csv, birds, faces = _dataset("CSV"), _dataset("Waterbirds"), _dataset("CelebA")
    words = ("cat", "dog", "train", "test", "val", "sea", *numbers)
    pictures = [picture(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")]
    pictures += [picture("PNG", "I;16"), picture("TIFF", "F"), picture("PNG", "P"), picture("TIFF", "1")]
    found = {
        "csv": Target(
            _file("metadata.csv", lambda file: csv(file.parent)),
            any_of(changed(_CSV), lines(words, table, ("image,label,split,attribute", "image;label;split"))),
            _CSV,
        ),
        "waterbirds": Target(
            _file("waterbirds/metadata.csv", lambda file: birds(file.parents[1])),
            any_of(changed(_BIRDS), lines(numbers, table, ("img_id,img_filename,y,split,place",))),
            _BIRDS,
        ),
        "celeba attributes": Target(
            _file("celeba/list_attr_celeba.txt", lambda file: faces(file.parents[1])),
            any_of(changed(_FACES), lines(("Blond_Hair", "Male", *numbers), (" ",), ("6\nBlond_Hair Male", "2"))),
            _FACES,
        ),
        "celeba splits": Target(
            _file("celeba/list_eval_partition.txt", lambda file: faces(file.parents[1])),
            any_of(changed(_PARTS), lines(numbers, (" ",))),
            _PARTS,
        ),
        "yaml": Target(
            _file("config.yaml", _yaml),
            any_of(
                changed(_YAML),
                lines(
                    (*keys[::5], *_VALUES, "OPTIM:", "  LR:", "- ", "*a", "&a", "!!python/name:os.system", "? "),
                    (" ", ": "),
                ),
            ),
            _YAML,
        ),
        "key value": Target(
            _words,
            st.lists(st.one_of(st.sampled_from(keys), st.sampled_from(_VALUES), st.text(max_size=8)), max_size=6)
            | st.builds(
                lambda key, value: [key, value], st.sampled_from(keys), st.sampled_from(_VALUES) | st.text(max_size=8)
            ),
            ["OPTIM.LR", "0.1"],
        ),
        "grid": Target(
            _file("grid.yaml", read_grid),
            any_of(
                changed(_GRID),
                lines(("config:", "methods:", "seeds:", "a.png", "  CoOp:", "{", "[1]", "null", '"'), (" ",)),
            ),
            _GRID,
        ),
        "image": Target(_file("x.png", lambda file: read_image(str(file))), any_of(changed(*pictures)), pictures[0]),
        "checkpoint": Target(
            _file("model.pth.tar-1", checkpoint.load),
            any_of(changed(saved(_STATE), saved(_STATE, _use_new_zipfile_serialization=False))),
            saved(_STATE),
        ),
        "pointer": Target(
            _file("model/checkpoint", lambda file: checkpoint.newest_epoch(file.parents[1], ["model"])),
            any_of(changed(b"model.pth.tar-12\n")),
            b"model.pth.tar-12\n",
        ),
        "weights": Target(
            _file("w.pt", read_state_dict),
            any_of(changed(saved(_STATE["state_dict"]), gzip.compress(saved(_STATE), mtime=0))),
            saved(_STATE["state_dict"]),
        ),
        "results": Target(
            _file("results.json", lambda file: finished_results(file.parent)),
            any_of(changed(_RESULTS.encode())),
            _RESULTS.encode(),
        ),
        "log": Target(
            _file("log.txt", log_metrics), any_of(changed(b"Finish training\n* accuracy: 51.5%\n")), b"* accuracy: 1%"
        ),
    }
    return found


# --- all of it -------------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """What the readers need beside the inputs."""
    for place in (folder, folder / "waterbirds", folder / "celeba/img_align_celeba", folder / "model"):
        place.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", *(f"{i}.png" for i in range(6))):
        for place in ("", "waterbirds", "celeba/img_align_celeba"):
            (folder / place / name).write_bytes(picture("PNG"))
    (folder / "celeba/list_attr_celeba.txt").write_bytes(_FACES)
    (folder / "celeba/list_eval_partition.txt").write_bytes(_PARTS)


def _listed(folder: Path) -> set[str]:
    return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names}


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check(target: Target, folder: Path, content: Any) -> str:
    """Read one input: "read" or "refused". Whatever else comes out is raised."""
    outcome = "read"
    with _within(PATIENCE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(folder, content)
        except UserError as error:
            assert str(error).strip(), "an error without words"
            outcome = "refused"
    return outcome


def fuzz(target: Target, folder: Path, number: int, start: int | None = None) -> dict[str, int]:
    """Read ``number`` inputs, always the same ones unless ``start`` is a seed; returns how many were read and refused."""
    prepare(folder)
    before, counts = _listed(folder), {"read": 0, "refused": 0}

    @settings(
        max_examples=number,
        derandomize=start is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(target.inputs)
    def one(content: Any) -> None:
        counts[check(target, folder, content)] += 1

    place = os.getcwd()
    os.chdir(folder)
    try:
        assert check(target, folder, target.whole) == "read", "an input that makes sense is refused"
        (one if start is None else seed(start)(one))()
    finally:
        os.chdir(place)
    written = _listed(folder) - before
    assert len(written) <= 1, f"more than the input is there now: {written}"
    return counts
