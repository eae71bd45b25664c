"""Messages of the package: the logger ``oodprompt``, whose lines are the bare messages; and how far long work is.

A command calls ``show_messages`` once. A library's user attaches handlers of their own, or calls it too.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import IO, Any, TypeVar

from tqdm import tqdm

_IS_QUIET: ContextVar[bool] = ContextVar("is_quiet", default=False)
_EVERY = 30.0  # seconds between lines of progress where there is no terminal
T = TypeVar("T")

logger = logging.getLogger("oodprompt")
logger.setLevel(logging.INFO)
logger.addHandler(logging.NullHandler())


def encodable(text: str, stream: Any) -> str:
    """``text`` with a question mark for every character that the encoding of ``stream`` lacks."""
    encoding = getattr(stream, "encoding", None) or "ascii"
    return text.encode(encoding, "replace").decode(encoding)


class Forgiving:
    """A text stream whose failures end nothing: it replaces what its encoding lacks, and is silent once its reader left."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream, self.is_open = stream, True

    def write(self, text: str) -> int:
        if self.is_open:
            try:
                try:
                    self.stream.write(text)
                except UnicodeEncodeError:
                    self.stream.write(encodable(text, self.stream))
            except (OSError, ValueError):  # a broken pipe, a full disk, a closed file
                self._leave()
        return len(text)

    def flush(self) -> None:
        if self.is_open:
            try:
                self.stream.flush()
            except (OSError, ValueError):
                self._leave()

    def _leave(self) -> None:
        """Write no more; what is still in a buffer goes nowhere, as Python would fail over it at the end."""
        self.is_open = False
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Terminal(logging.Handler):
    """Writes each message to standard output as it is at that moment, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        try:
            try:
                tqdm.write(text, file=sys.stdout)
            except UnicodeEncodeError:
                tqdm.write(encodable(text, sys.stdout), file=sys.stdout)
        except (OSError, ValueError):
            pass  # nobody reads any more; words end no run


@contextlib.contextmanager
def optional(what: str) -> Iterator[None]:
    """The block makes something that no result needs, as a picture: where it fails, one line says so."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        logger.warning(f"Note: {what} is missing: {reason}")


def shows_messages() -> bool:
    """Whether messages go to standard output."""
    return any(isinstance(handler, _Terminal) for handler in logger.handlers)


def show_messages() -> None:
    """Send messages to standard output from now on; a second call changes nothing."""
    if not shows_messages():
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In the block no progress is shown."""
    token = _IS_QUIET.set(True)
    try:
        yield
    finally:
        _IS_QUIET.reset(token)


class progress(AbstractContextManager["progress"]):  # called like a function
    """How far long work is: a bar in a terminal; elsewhere a line every 30 seconds, so that a log shows it too.

    ``total`` is how many of ``unit`` there are (None: not known), ``initial`` how many were done before. ``show``:
    whether this process shows anything; ``keep``: whether the finished bar stays.
    """

    def __init__(
        self, total: int | None, title: str, unit: str, show: bool = True, initial: int = 0, keep: bool = False
    ) -> None:
        self.total, self.title, self.unit, self.done, self._initial = total, title, unit, initial, initial
        show = show and not _IS_QUIET.get()
        self._bar = tqdm(
            total=total, desc=title, unit=unit, initial=initial, disable=None if show else True, leave=keep
        )
        self._speaks = show and self._bar.disable
        self._began = self._said = time.monotonic()

    def update(self, number: int = 1) -> None:
        """So many more are done."""
        self.done += number
        self._bar.update(number)
        if self._speaks and (now := time.monotonic()) - self._said >= _EVERY:
            self._said = now
            logger.info(self._line(now - self._began))

    def _line(self, seconds: float) -> str:
        plural = "" if self.unit in ("MiB", "K") else "es" if self.unit.endswith("ch") else "s"
        spent, unit = _minutes(seconds), self.unit + plural
        if self.total is None:
            return f"{self.title}: {self.done:,} {unit} after {spent}"
        left = seconds * (self.total - self.done) / max(self.done - self._initial, 1)
        share = self.done / max(self.total, 1)
        return f"{self.title}: {self.done:,} of {self.total:,} {unit} ({share:.0%}) after {spent}, about {_minutes(left)} left"

    def close(self) -> None:
        self._bar.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    @classmethod
    def over(
        cls, items: Iterable[T], title: str, unit: str, total: int | None = None, show: bool = True
    ) -> Iterator[T]:
        """``items``, whose number is ``total`` or their length, with their progress."""
        total = len(items) if total is None and isinstance(items, Sized) else total
        with cls(total, title, unit, show) as bar:
            for item in items:
                yield item
                bar.update()


def _minutes(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
