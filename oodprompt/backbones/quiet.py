"""Libraries work in silence: what they say while they load a model is held back."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

_TALKERS = ("timm", "transformers")  # what open_clip says goes to the root logger


@contextlib.contextmanager
def quiet(package: str) -> Iterator[None]:
    """Without the log lines of libraries and without transformers' progress bars, while ``package`` is at work.

    Errors are told by what is raised. Lines of ours and bars of downloads stay. All settings are afterwards what they
    were. So are the handlers of the root logger: open_clip would set up one, which would show our lines a second time.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module(package)  # first, as libraries set up their loggers when they are imported
    root = logging.root
    handlers, silent = list(root.handlers), logging.NullHandler()
    talkers = [logging.getLogger(name) for name in _TALKERS if name in sys.modules]
    levels = [talker.level for talker in talkers]
    root.addFilter(_nothing)  # of lines that are written to the root logger itself
    root.addHandler(silent)
    for talker in talkers:
        talker.setLevel(logging.CRITICAL)
    try:
        with _no_bars():
            yield
    finally:
        for talker, level in zip(talkers, levels, strict=True):
            talker.setLevel(level)
        root.removeFilter(_nothing)
        root.handlers[:] = handlers


def _nothing(record: logging.LogRecord) -> bool:
    return False


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Transformers' own bars are not drawn, where it is in use and can be told so."""
    settings: Any = sys.modules.get("transformers.utils.logging")
    if not hasattr(settings, "set_tqdm_hook"):
        yield
        return
    before = settings.set_tqdm_hook(_undrawn)
    try:
        yield
    finally:
        settings.set_tqdm_hook(before)


def _undrawn(factory: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return factory(*positional, **{**named, "disable": True})
