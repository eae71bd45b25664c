"""Writing files so that a reader, or the next run, never meets half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from oodprompt.errors import UserError


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write ``content`` to ``path`` whole or not at all: a temporary file beside it is renamed over it.

    Missing folders are made. Raises ``UserError`` (with the system's reason) when the place cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            # UTF-8 has no halves of undecodable file names: they are written as \udc...
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --output-dir"
        ) from error
    finally:  # also after an interruption from the keyboard; after success the temporary name is gone
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
