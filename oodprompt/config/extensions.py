"""Methods and data sets are extensions: ours, files that ``--import`` names, and installed packages.

Each registers its trainers, data sets and keys when it is imported. The package itself names none of them.

A file of your own registers its trainers, data sets and keys when it is imported (docs/your_method.md). ``--import FILE``
of ``train.py`` and of the scripts imports it ahead of everything else; ``OODPROMPT_IMPORT`` (paths or module names, with
``:`` between them) does the same without the flag, also in processes that are started. An installed package is
imported by an entry point in the group ``oodprompt``:

    setup(..., entry_points={"oodprompt": ["my_method = my_package.my_method"]})
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from oodprompt.errors import UserError

ENVIRONMENT = "OODPROMPT_IMPORT"
# What comes with the package. They are imported by name, as those of others are: nothing below depends on them.
OWN = ("oodprompt.config.defaults", "oodprompt.trainers", "oodprompt.datasets")
_done: set[str] = set()
_digests: dict[str, str] = {}  # of files, by their whole paths


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add ``--import`` to a command line, as ``args.imports``."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file (or module) with a method or data set of your own; may be given again",
    )


def add(names: Sequence[str]) -> None:
    """Have files (``.py``) and modules imported by ``load``, here and in processes that are started from here.

    ``UserError`` for a file that was imported and has been edited since: Python keeps the old code.
    """
    for name in names:
        if os.pathsep in name:
            raise UserError(f"--import {name}: a path with {os.pathsep!r} in it cannot be given; rename the folder")
        path = Path(_resolved(name))
        if str(path) in _done & _digests.keys() and path.is_file() and _digests[str(path)] != _digest(path):
            raise UserError(
                f"--import {name}: the file was edited after it was imported, and Python keeps the old code; restart the "
                "program (in a notebook: the kernel)"
            )
    os.environ[ENVIRONMENT] = os.pathsep.join(dict.fromkeys([*named(), *map(_resolved, names)]))


def register_all() -> None:
    """Import what registers trainers, data sets and keys: our own, and those of others."""
    for name in OWN:
        importlib.import_module(name)
    load()


def load() -> None:
    """Import what is named and was not imported yet; ``UserError`` for what is not there or takes a name that is taken."""
    for point in _entry_points(tuple((place, _modified(place)) for place in sys.path)):
        if f"{point.name}={point.value}" in _done:
            continue
        _done.add(f"{point.name}={point.value}")
        try:
            point.load()
        except Exception as error:  # a package that is not even wanted must not stop every run
            warnings.warn(f"the entry point {point.name} = {point.value} failed: {error!r}", stacklevel=2)
    for name in named():
        if name in _done:
            continue
        _done.add(name)  # first: a file may itself ask for the config
        try:
            _import_file(Path(name)) if name.endswith(".py") else _import_module(name)
        except BaseException as error:
            _done.discard(name)
            problem = _in_a_line(error)
            if problem is None:
                raise
            raise UserError(f"--import {name}: {problem}") from error


@functools.lru_cache(maxsize=1)
def _entry_points(places: tuple[tuple[str, float], ...]) -> tuple[importlib.metadata.EntryPoint, ...]:
    """The entry points of installed packages.

    Reading them takes longer than all else of a config. They are read anew only if ``places`` changed: the folders of
    packages and when each was modified.
    """
    return tuple(importlib.metadata.entry_points(group="oodprompt"))


def _modified(place: str) -> float:
    try:
        return os.stat(place or ".").st_mtime
    except OSError:
        return 0.0


def digests() -> dict[str, str]:
    """File name -> digest of what it held when it was imported, to notice that it was edited between two runs."""
    return {Path(path).name: digest for path, digest in _digests.items()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _in_a_line(error: BaseException) -> str | None:
    """What is wrong with a file, where it is no mistake in its code that a traceback shows better."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    if isinstance(error, ModuleNotFoundError):
        return f"it needs {error.name}, which is not installed"
    if isinstance(error, SystemExit):
        return "it ends the program when it is imported; take that out, or below `if __name__ == '__main__':`"
    if isinstance(error, KeyError) and "already registered" in str(error):
        return f"{error.args[0]}; give yours another name"
    return None


def _resolved(name: str) -> str:
    return str(Path(name).resolve()) if name.endswith(".py") else name


def named() -> list[str]:
    """What is imported beside the package, as ``--import`` takes it: absolute paths of files, and names of modules."""
    return [_resolved(name) for name in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if name]


def _import_module(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"--import {name}: give a file that ends in .py, or the name of a module")
    if importlib.util.find_spec(name.split(".")[0]) is None:
        raise UserError(f"--import: there is no module {name}; a file ends in .py")
    module = importlib.import_module(name)
    if getattr(module, "__file__", None) is None:
        raise UserError(f"--import {name}: this is a folder without __init__.py; give a file that ends in .py")


def _import_file(path: Path) -> None:
    """As ``python FILE`` would find it: its folder is on the path, behind all others."""
    if not path.is_file():
        raise UserError(f"--import: there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    _digests[str(path)] = _digest(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "Python knows how to load every .py file"
    module = importlib.util.module_from_spec(spec)
    # Known by its name, as what classes of it ask for; the name of another module is left to that.
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        raise
