"""A file from an address: whole and checked by its SHA256, or not at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path

from oodprompt.errors import UserError
from oodprompt.files import replacing, sweep
from oodprompt.log import progress


def sha256_of(file: Path) -> str:
    """The SHA256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(address: str, file: Path, sha256: str, what: str, by_hand: str) -> Path:
    """Write what ``address`` serves to ``file``, with its progress; missing folders are made. Returns ``file``.

    Raises ``UserError`` where the address cannot be read, the place cannot be written, or the bytes have another SHA256.
    The error names ``what`` was to be downloaded. It ends with ``by_hand``: what the user can do without the download.
    """
    try:
        with urllib.request.urlopen(address, timeout=30) as source:
            file.parent.mkdir(parents=True, exist_ok=True)
            sweep(file.parent)  # what a killed download left
            size, read = source.headers.get("Content-Length") or "", hashlib.sha256()
            total = int(size) if size.isdigit() else None
            with replacing(file) as target, progress(total and total >> 20, file.name, "MiB") as bar:
                while block := source.read(1 << 20):
                    target.write(block)
                    read.update(block)
                    bar.update()
                if read.hexdigest() != sha256:
                    raise UserError(
                        f"the download of {what} from {address} has not the SHA256 {sha256}; run again, or {by_hand}"
                    )
        return file
    except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
        told = " ".join(str(error).split())[:300]
        reason = getattr(error, "reason", None) or ": ".join(filter(None, (type(error).__name__, told)))
        raise UserError(f"cannot get {what} ({reason}): {by_hand}") from error
