"""The configuration tree: Dassl's keys and defaults, ours beside them, and errors that name the nearest key.

Every key is declared once, with its default and a line of documentation. Methods and data sets declare their own
beside their code with ``declare``; ``docs/config.md`` is written from these lines.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from oodprompt.config.extensions import register_all
from oodprompt.errors import UserError, nearest

_KEYS: dict[str, tuple[Any, str]] = {}


def declare(section: str, keys: dict[str, tuple[Any, str]]) -> None:
    """Add keys under ``section`` (dotted, "" for the top): name -> (default, one line of documentation)."""
    for name, (default, doc) in keys.items():
        _KEYS[f"{section}.{name}" if section else name] = (default, doc)


def declared_keys() -> dict[str, tuple[Any, str]]:
    """All keys: dotted name -> (default, documentation)."""
    register_all()
    return dict(_KEYS)


def get_cfg_default() -> CfgNode:
    """A fresh tree with every declared key at its default."""
    cfg = CfgNode()
    for name, (default, _) in declared_keys().items():
        *parents, leaf = name.split(".")
        node = cfg
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node[leaf] = default
    return cfg


def leaves(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """The tree as a flat dict: dotted name -> value."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update(leaves(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def set_key(cfg: CfgNode, name: str, raw: Any, source: str) -> None:
    """Set the dotted key ``name``; ``source`` (a file, "command line") is named in errors.

    Strings are read as Python literals where they are one ("1e-5", "(48, 48)"); the value must have the type of the
    default, where an int may stand for a float and a list for a tuple.
    """
    known = leaves(cfg)
    if name not in known:
        if any(key.startswith(f"{name}.") for key in known):
            raise UserError(f"{source}: {name!r} is a section, not a key")
        raise UserError(f"{source}: unknown config key {name!r}: {_nearest_key(name, known)}")
    value, default = _literal(raw), known[name]
    if isinstance(value, bool) and name.endswith(".CTX_INIT"):
        value = "True" if value else ""  # KgCoOp's and ProGrad's files say whether to start from words, not from which
    elif isinstance(value, bool) and name == "TRAINER.GROUPS":
        value = str(value).lower()  # yaml reads the choice "true" as a bool
    elif isinstance(default, str) and isinstance(raw, str) and not isinstance(value, str):
        value = "" if value is None else raw  # "{}", "1e5" and "True" are words where words are wanted
    elif isinstance(default, tuple) and value == "":
        value = ()
    elif isinstance(default, tuple) and isinstance(value, (list, str, int, float)):
        value = tuple(value) if isinstance(value, list) else (value,)
    elif isinstance(default, list) and isinstance(value, tuple):
        value = list(value)
    elif isinstance(default, float) and type(value) is int:
        value = float(value)
    elif isinstance(default, str) and type(value) in (int, float):
        value = str(value)
    elif isinstance(default, str) and value is None:
        value = ""
    if type(value) is not type(default):
        raise UserError(
            f"{source}: {name} takes a value of type {type(default).__name__} (default {default!r}), "
            f"not {raw!r} of type {type(value).__name__}"
        )
    *parents, leaf = name.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[leaf] = value


def _nearest_key(name: str, known: Iterable[str]) -> str:
    known = list(known)
    section = name.rsplit(".", 1)[0] + "."
    siblings = [key for key in known if key.startswith(section)]
    hint = nearest(name, known).split("known:")[0]
    if siblings:
        return f"{hint}({section[:-1]} has: {', '.join(key[len(section) :] for key in siblings)})"
    own = " (a key of a file of your own needs --import FILE)" if section.startswith("TRAINER.") else ""
    return (hint.strip() or "see docs/config.md") + own


def _literal(raw: Any) -> Any:
    if isinstance(raw, str):
        try:
            return ast.literal_eval(raw)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return raw
    return raw


def merge_file(cfg: CfgNode, path: str | Path) -> None:
    """Merge a yaml file, key by key. ``UserError`` for a missing or malformed file, unknown keys, wrong types."""
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"no config file at {path}" + (f"; that folder has: {', '.join(near)}" if near else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid yaml: {' '.join(str(error).split())[:300]}") from error
    if tree is None:
        return
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the top of the file must be a mapping of sections, not a {type(tree).__name__}")
    for name, value in _walk(tree):
        set_key(cfg, name, value, str(path))


def _walk(tree: dict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge ``KEY VALUE KEY VALUE ...`` from the command line."""
    if len(opts) % 2:
        raise UserError(f"command line: KEY VALUE pairs expected, but {opts[-1]!r} stands alone")
    for name, raw in zip(opts[::2], opts[1::2], strict=True):
        set_key(cfg, name, raw, "command line")
