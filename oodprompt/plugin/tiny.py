"""The embedded CLIPs inside a checkout: ``MODEL.BACKBONE.NAME tiny`` and ``tiny-photo``, to try everything without a download.

Upstream's loaders ask the checkout's ``clip.clip`` for the address of a name (``_MODELS``) and for the file at an address
(``_download``). Learners that are written for the widths of ViT-B (MaPLe, PromptSRC) cannot use it.

These loaders take OpenAI's models alone. Names of other libraries' models end with a line that says what takes them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch
from dassl.engine import TrainerX

from oodprompt.backbones import hugging_face, load_backbone, open_clip_models
from oodprompt.backbones.weights import EMBEDDED, embedded_file
from oodprompt.errors import UserError
from oodprompt.files import write_atomically

_ADDRESSES = {name: f"oodprompt:{name}" for name in EMBEDDED}


def offer_tiny() -> None:
    """Let every trainer of Dassl's know the names, from when it is built: ``clip`` is imported by then. Again: nothing."""
    init = TrainerX.__init__
    if hasattr(init, "_offers_tiny"):
        return

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _add_to(sys.modules.get("clip.clip"))
        init(self, *args, **kwargs)

    setattr(__init__, "_offers_tiny", True)  # noqa: B010 (a function has no such attribute by its type)
    TrainerX.__init__ = __init__


class _Names(dict[str, str]):
    """Addresses by name. Asking for the name of another library's model raises ``UserError``."""

    def __missing__(self, name: str) -> str:
        if not name.startswith((open_clip_models.PREFIX, hugging_face.PREFIX)):
            raise KeyError(name)
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: the trainers of this checkout load OpenAI's models alone; our own engine takes this "
            f"name and has CoOp, MaPLe and others: python -m oodprompt train --backbone {name} ..., with the same flags and keys"
        )


def _add_to(module: Any) -> None:
    models, download = getattr(module, "_MODELS", None), getattr(module, "_download", None)
    if models is None or download is None or models.keys() >= EMBEDDED.keys():
        return
    module._MODELS = _Names(models | _ADDRESSES)

    def fetch(url: str, *args: Any, **kwargs: Any) -> str:
        embedded = [name for name, address in _ADDRESSES.items() if address == url]
        return str(state_dict_file(embedded[0])) if embedded else download(url, *args, **kwargs)

    module._download = fetch


def state_dict_file(name: str) -> Path:
    """An embedded CLIP as a state dict in OpenAI's layout, fp32; written once into ``~/.cache/oodprompt``."""
    version = hashlib.sha256(embedded_file(name).read_bytes()).hexdigest()[:8]
    path = Path(f"~/.cache/oodprompt/{name}-{version}.pt").expanduser()
    if not path.is_file():
        buffer = io.BytesIO()
        torch.save(dict(load_backbone(name).state_dict()), buffer)
        write_atomically(path, buffer.getvalue())
    return path
