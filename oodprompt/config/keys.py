"""The configuration tree: Dassl's keys and defaults, ours beside them, and errors that name the nearest key.

Every key is declared once, with its default, a line of documentation, and the values that it takes. Methods and data
sets declare their own beside their code with ``declare``; ``docs/config.md`` is written from these lines. ``set_key``
checks the type of a value, and ``check_values`` checks the values of a whole tree.
"""

from __future__ import annotations

import ast
import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from oodprompt.config.extensions import register_all
from oodprompt.config.packaged import find_config
from oodprompt.errors import UserError, nearest


@dataclass(frozen=True)
class Key:
    """A key: its default, one line of documentation, and the values that it takes (all of the default's type: any).

    ``choices`` are the possible values. ``above``, ``at_least``, ``below`` and ``at_most`` bound a number. For a tuple or
    a list both hold for each entry, and bounded entries are whole numbers where the default's are. ``test`` says whether
    a value is possible, where choices and bounds cannot say it.

    ``error`` takes the place of the usual message; {key}, {value} and {known} (the nearest choice, and all of them) in
    it are filled in. ``parse`` turns what a file or the command line says into a value, ahead of the check of its type.
    """

    default: Any
    doc: str
    _: KW_ONLY
    choices: Sequence[Any] = ()
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    test: Callable[[Any], bool] | None = None
    error: str = ""
    parse: Callable[[Any], Any] | None = None

    def problem(self, name: str, value: Any) -> str:
        """What is wrong with ``value`` for this key, which is called ``name``; "" for a value that it takes."""
        entries = value if isinstance(value, (tuple, list)) else (value,)
        for entry in entries if self.choices else ():
            if entry not in self.choices:
                return self._message(name, entry)
        possible = all(map(self._is_within, entries)) and (self.test is None or self.test(value))
        return "" if possible else self._message(name, value)

    @property
    def values(self) -> str:
        """The choices, or the bounds in words: "0 or more", "from 0 to below 1"; "" without either."""
        if self.choices:
            return ", ".join(str(choice) for choice in self.choices if choice != "")
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if high is None or high == math.inf:
            return "" if low is None else f"{low:g} or more" if self.above is None else f"above {low:g}"
        upper = f"below {high:g}" if self.at_most is None else f"{high:g}"
        if low is None:
            return upper if self.at_most is None else f"up to {upper}"
        if self.above is None:
            return f"from {low:g} to {upper}"
        return f"above {low:g} and " + (upper if self.at_most is None else f"up to {upper}")

    def _is_within(self, entry: Any) -> bool:
        """Whether a number is within the bounds; true of anything but NaN for a key without bounds."""
        if (self.above, self.at_least, self.below, self.at_most) == (None, None, None, None):
            return not (isinstance(entry, float) and math.isnan(entry))
        defaults = self.default if isinstance(self.default, (tuple, list)) else (self.default,)
        whole = bool(defaults) and all(type(value) is int for value in defaults)
        return (
            type(entry) in ((int,) if whole else (int, float))
            and (self.above is None or entry > self.above)
            and (self.at_least is None or entry >= self.at_least)
            and (self.below is None or entry < self.below)
            and (self.at_most is None or entry <= self.at_most)
        )

    def _message(self, name: str, value: Any) -> str:
        if self.choices:
            usual = "{key}: unknown choice {value!r}: {known}"
            known = nearest(str(value), [str(choice) for choice in self.choices if choice != ""])
        else:
            usual, known = "{key}: {value} is not possible", ""
            or_more, many = self.values.endswith("or more"), isinstance(self.default, (tuple, list))
            what = ("numbers of " if or_more else "numbers ") if many else "" if or_more else "a number "
            usual += f"; give {what}{self.values}" if self.values else ""
        return (self.error or usual).format(key=name, value=value, known=known)


_KEYS: dict[str, Key] = {}
_NO_LITERALS = {
    f"{sign}{word}" for sign in ("", "+", "-") for word in ("nan", "inf", "infinity")
}  # yet numbers to Python


def declare(section: str, keys: Mapping[str, Key | tuple[Any, str]]) -> None:
    """Add keys under ``section`` (dotted, "" for the top): name -> ``Key``, or (default, one line of documentation).

    Raises ``ValueError`` where a key does not take its own default.
    """
    for name, entry in keys.items():
        key = entry if isinstance(entry, Key) else Key(*entry)
        full = f"{section}.{name}" if section else name
        if problem := key.problem(full, key.default):
            raise ValueError(f"the default of a key must be possible: {problem}")
        _KEYS[full] = key


def declared_keys() -> dict[str, Key]:
    """All keys by their dotted names."""
    register_all()
    return dict(_KEYS)


def sections_of(top: str) -> set[str]:
    """The sections of keys under ``top``: "DATASET" has those of data sets, "TRAINER" those of methods."""
    return {name.split(".")[1] for name in declared_keys() if name.startswith(f"{top}.") and name.count(".") == 2}


def section_of(name: str, sections: Collection[str]) -> str:
    """The section of a method or data set: its name in capitals, or the longest section that the name begins with."""
    upper = name.upper()
    return upper if upper in sections else max((s for s in sections if upper.startswith(s)), key=len, default="")


def check_values(cfg: CfgNode, names: Iterable[str] | None = None) -> None:
    """``UserError`` for the first value of the tree that its key does not take; ``names``: of these keys alone.

    Keys of methods and data sets that are not in use are checked too, as their names and types are.
    """
    keys, values = declared_keys(), leaves(cfg)
    for name in keys if names is None else names:
        if name in values and (problem := keys[name].problem(name, values[name])):
            raise UserError(problem)


def get_cfg_default() -> CfgNode:
    """A fresh tree with every declared key at its default."""
    cfg = CfgNode()
    for name, key in declared_keys().items():
        *parents, leaf = name.split(".")
        node = cfg
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node[leaf] = key.default
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
    *parents, leaf = name.split(".")
    node: Any = cfg
    for parent in parents:
        node = node.get(parent) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or leaf not in node or isinstance(node[leaf], CfgNode):
        if isinstance(node, CfgNode) and leaf in node:
            raise UserError(f"{source}: {name!r} is a section, not a key")
        raise UserError(f"{source}: unknown config key {name!r}: {_nearest_key(name, leaves(cfg))}")
    value, default = _literal(raw), node[leaf]
    key = _KEYS.get(name)
    if key is not None and key.parse is not None:
        value = key.parse(value)
    if isinstance(default, str) and isinstance(raw, str) and not isinstance(value, str):
        value = "" if value is None else raw  # "{}", "1e5" and "True" are words where words are wanted
    elif isinstance(default, tuple) and value == "":
        value = ()
    elif isinstance(default, tuple) and isinstance(value, (list, str, int, float)):
        value = tuple(value) if isinstance(value, list) else (value,)
    elif isinstance(default, list) and isinstance(value, tuple):
        value = list(value)
    elif (
        isinstance(default, float)
        and type(value) is int
        or isinstance(default, float)
        and isinstance(value, str)
        and value.strip().lower() in _NO_LITERALS
    ):
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
    node[leaf] = value


def _nearest_key(name: str, known: Iterable[str]) -> str:
    known = list(known)
    section = name.rsplit(".", 1)[0] + "."
    siblings = [key for key in known if key.startswith(section)]
    if siblings:
        hint = nearest(name, known).split("known:")[0]
        return f"{hint}({section[:-1]} has: {', '.join(key[len(section) :] for key in siblings)})"
    # Of a section that nobody has declared only a key that is nearly the same can be meant.
    lowered = {key.lower(): key for key in known}
    match = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.8)
    hint = f"did you mean {lowered[match[0]]!r}? " if match else ""
    own = "a key of a file of your own needs --import FILE" if section.startswith(("TRAINER.", "DATASET.")) else ""
    return f"{hint}({own})" if hint and own else hint.strip() or own or "see docs/config.md"


def _literal(raw: Any) -> Any:
    if isinstance(raw, str):
        try:
            return ast.literal_eval(raw)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return raw
    return raw


def merge_file(cfg: CfgNode, path: str | Path) -> list[str]:
    """Merge a yaml file, key by key; returns the names of the keys that it gives. It is found by ``find_config``.

    ``UserError`` for a missing or malformed file, unknown keys, wrong types.
    """
    path = find_config(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"no config file at {path}" + (f"; that folder has: {', '.join(near)}" if near else ""))
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid yaml: {' '.join(str(error).split())[:300]}") from error
    if tree is None:
        return []
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the top of the file must be a mapping of sections, not a {type(tree).__name__}")
    given = list(_walk(tree))
    for name, value in given:
        set_key(cfg, name, value, str(path))
    return [name for name, _ in given]


def _walk(tree: dict, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    """Merge ``KEY VALUE KEY VALUE ...`` from the command line."""
    for name, raw in pairs_of(opts):
        set_key(cfg, name, raw, "command line")


def pairs_of(opts: Sequence[str]) -> list[tuple[str, str]]:
    """(KEY, VALUE) of the words ``KEY VALUE KEY VALUE ...``; ``UserError`` where one stands alone."""
    if len(opts) % 2:
        raise UserError(f"command line: KEY VALUE pairs expected, but {opts[-1]!r} stands alone")
    return list(zip(opts[::2], opts[1::2], strict=True))
