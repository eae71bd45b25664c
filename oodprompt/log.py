"""Messages of the package: the logger ``oodprompt``, whose lines are the bare messages.

A command calls ``show_messages`` once. A library's user attaches handlers of their own, or calls it too.
"""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm

logger = logging.getLogger("oodprompt")
logger.setLevel(logging.INFO)
logger.addHandler(logging.NullHandler())


class _Terminal(logging.Handler):
    """Writes each message to standard output as it is at that moment, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def show_messages() -> None:
    """Send messages to standard output from now on; a second call changes nothing."""
    if not any(isinstance(handler, _Terminal) for handler in logger.handlers):
        handler = _Terminal()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
