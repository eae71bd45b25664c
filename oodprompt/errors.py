"""The one exception for what a user can mend, and the suggestion of the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. ``str(error)`` says in one line what is wrong, where, and what to do.

    Where files are missing, the tree that is expected follows on lines of its own. The command line prints this without
    a traceback and exits with status 2.
    """


def nearest(name: str, known: Iterable[str], listed_by: str = "python train.py --list") -> str:
    """A sentence that suggests the known name nearest to ``name``, and lists all when there are few.

    ``listed_by`` is the command that lists them.
    """
    known = sorted(known)
    lowered = {k.lower(): k for k in known}
    match = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    hint = f"did you mean {lowered[match[0]]!r}? " if match else ""
    listing = ", ".join(known) if len(known) <= 40 else f"{len(known)} names, see `{listed_by}`"
    return f"{hint}known: {listing}"
