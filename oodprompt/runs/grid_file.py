"""The file of a grid: what is trained, each method under each setting.

    config: configs/trainers/DebiasedPT/tiny_shapes.yaml
    common: TRAIN.VAL_FREQ 0                     # optional, added to every command line
    seeds: [1, 2, 3]                             # optional; --seeds wins over it
    settings:                                    # optional; columns of the tables
      "0.95": DATASET.SHAPES.CORRELATION 0.95
      "0.5": DATASET.SHAPES.CORRELATION 0.5
    methods:                                     # rows of the tables
      CoOp: --trainer CoOp
      DebiasedPT: --trainer DebiasedPT
    rank: false                                  # optional; true: a sweep on validation data, best method first
    title: DebiasedPT, two correlations          # optional, heads the tables
    about: Accuracy on the test split.           # optional, paragraphs of the page
    page: docs/sweeps/mine.md                    # optional; title, about, command and tables are written there too

Values are pieces of a ``train.py`` command line. Under ``rank``, a method may be a section of several:
``DebiasedPT: {args: --trainer DebiasedPT, keys: {TRAINER.DEBIASEDPT.ETA: [0.5, 1, 2]}}`` is every combination of its keys
(``keys`` may be a list of such mappings). The test split is not read, and rows are sorted by worst-group accuracy.
"""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from oodprompt.config.packaged import find_config
from oodprompt.errors import UserError, nearest

ENTRIES = ("config", "common", "seeds", "settings", "methods", "rank", "title", "about", "page")
_OWN = ("--seed", "SEED", "--output-dir", "OUTPUT_DIR", "--resume", "RESUME")


@dataclass(frozen=True)
class Method:
    """A row: its section (a table of its own under ``rank``), its name there, and its part of the command line."""

    section: str
    name: str
    args: str

    @property
    def folder(self) -> str:
        """The path of its runs below the setting's."""
        whole = self.name if self.section in ("", self.name) else f"{self.section}/{self.name}"
        return re.sub(r"[^\w.+=-]+", "_", whole)


@dataclass(frozen=True)
class GridFile:
    """The content of a grid file; ``settings`` is one without a name where the file has none."""

    path: Path
    config: str
    methods: tuple[Method, ...]
    settings: dict[str, str]
    common: str = ""
    seeds: tuple[int, ...] = ()
    rank: bool = False
    title: str = ""
    about: str = ""
    page: str = ""


def read_grid(path: Path) -> GridFile:
    """The grid in a file; ``UserError`` for what it must not hold."""
    content = _read(path)
    for key in content:
        if key not in ENTRIES:
            raise UserError(f"{path}: unknown entry {key!r}: {nearest(str(key), ENTRIES)}")
    if not isinstance(content.get("methods"), dict) or not content["methods"]:
        raise UserError(f"{path}: a grid needs the mapping methods; see scripts/benchmark.py --help")
    settings = content.get("settings", {"": ""})
    if not isinstance(settings, dict) or not settings:
        raise UserError(f"{path}: settings must be a mapping of names to pieces of a command line, or be left out")
    if not isinstance(content.get("config"), str) or not find_config(content["config"]).is_file():
        raise UserError(f"{path}: config must name a config file, not {content.get('config')!r}")
    if content.get("page") and not content.get("seeds"):
        raise UserError(f"{path}: a page needs seeds, for which it is written")
    methods: list[Method] = []
    for name, entry in content["methods"].items():
        if isinstance(entry, str):
            methods.append(Method("", str(name), entry))
        elif content.get("rank") and isinstance(entry, dict) and entry.keys() == {"args", "keys"}:
            methods += _combinations(path, str(name), entry)
        else:
            raise UserError(f"{path}: methods.{name} must be a command line (or, under rank, have args and keys)")
    pieces = {"common": content.get("common"), **{f"settings.{k}": v for k, v in settings.items()}}
    for where, line in [*pieces.items(), *((f"methods.{m.name}", m.args) for m in methods)]:
        if line is not None and not isinstance(line, str):
            raise UserError(f"{path}: {where} must be a piece of a command line, not {line!r}")
        try:
            words = shlex.split(line or "")
        except ValueError as error:
            raise UserError(f"{path}: {where}: {error} in {line!r}") from error
        if taken := [word for word in words if word.split("=")[0] in _OWN]:
            raise UserError(f"{path}: {where}: {taken[0]} is set for each run by the runner; leave it out")
    return GridFile(
        path,
        content["config"],
        tuple(methods),
        {str(name): line or "" for name, line in settings.items()},
        content.get("common") or "",
        _seeds(path, content.get("seeds", [])),
        bool(content.get("rank")),
        **{key: _text(path, key, content.get(key)) for key in ("title", "about", "page")},
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no grid file at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid yaml: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a grid needs the mapping methods; see scripts/benchmark.py --help")
    return content


def _seeds(path: Path, seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{path}: seeds must be a list of whole numbers, 0 or more, not {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: one is given twice in {seeds!r}")
    return tuple(seeds)


def _text(path: Path, key: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path}: {key} must be a text, not {value!r}")
    return (value or "").strip()


def _combinations(path: Path, section: str, entry: dict[str, Any]) -> list[Method]:
    """Every combination of the ``keys`` of a section of a sweep."""
    methods = []
    for keys in entry["keys"] if isinstance(entry["keys"], list) else [entry["keys"]]:
        if not isinstance(keys, dict) or not all(isinstance(values, list) for values in keys.values()):
            raise UserError(
                f"{path}: methods.{section}.keys must be KEY: [value, value, ...], or a list of such mappings"
            )
        for values in itertools.product(*keys.values()):
            pairs = list(zip(keys, values, strict=True))
            label = ", ".join(f"{key.removeprefix('TRAINER.')} {value}" for key, value in pairs) or "as it is"
            line = " ".join(f"{key} {shlex.quote(str(value))}" for key, value in pairs)
            methods.append(Method(section, label, f"{entry['args']} {line}"))
    return methods
