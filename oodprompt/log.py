"""Messages of the package: the logger ``oodprompt``, whose lines are the bare messages.

A command calls ``show_messages`` once. A library's user attaches handlers of their own, or calls it too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

from tqdm import tqdm

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


def show_messages() -> None:
    """Send messages to standard output from now on; a second call changes nothing."""
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
