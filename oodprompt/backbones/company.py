"""What runs of one process have in common: the backbone, and calls of its text tower.

A run alone has no company, and everything here then does what a plain call does. ``oodprompt.runs.together`` sets one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")


class Company(Protocol):
    """The runs beside this one, seen from it. Each run is a thread with a context of its own."""

    @property
    def size(self) -> int:
        """How many runs these are, this one included."""

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once for all runs that ask for ``key``. Nobody may change it."""

    def encode(self, clip: Any, prefix: Tensor, suffix: Tensor, lengths: tuple[int, ...]) -> Tensor | None:
        """``clip.encode_prompts`` for this run, computed with that of others; None where the run is to do it itself."""


COMPANY: ContextVar[Company | None] = ContextVar("company", default=None)


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` gives; with company, what it gave the first run that asked for ``key``."""
    company = COMPANY.get()
    return make() if company is None else company.shared(key, make)
