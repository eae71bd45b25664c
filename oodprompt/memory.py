"""Memory that runs out ends in one line: what was being done, and what to lower."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

from oodprompt.errors import UserError

CLOSE = "Close other programs that use it, or take smaller batches or a smaller backbone"
_SIGNS = re.compile(r"out of memory|can't allocate memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE)
_ASKED = re.compile(r"(?:tried to|unable to) allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)

Text = str | Callable[[], str]


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that a GPU's memory or the machine's has run out."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_SIGNS.search(str(error))))


@contextlib.contextmanager
def memory_for(what: Text = "", remedy: Text = CLOSE) -> Iterator[None]:
    """``UserError`` where memory runs out in the block: ``what`` was being done, as in "while testing", and a ``remedy``.

    Functions are called when they are needed. What is done in a block inside says so itself.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        what, remedy = (text if isinstance(text, str) else text() for text in (what, remedy))
        raise UserError(
            f"{_whose(str(error))} ran out{_asked_for(str(error))}{what and ' ' + what}. {remedy}"
        ) from error


def _whose(text: str) -> str:
    return "the GPU's memory" if re.search("cuda|cublas|cudnn", text, re.IGNORECASE) else "memory"


def _asked_for(text: str) -> str:
    if (asked := _ASKED.search(text)) is None:
        return ""
    number, unit = float(asked[1]), asked[2]
    return f" (asked for {number / 2**30:.2f} GiB)" if unit == "bytes" else f" (asked for {asked[1]} {unit})"
