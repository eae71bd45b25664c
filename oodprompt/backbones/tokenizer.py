"""OpenAI's byte-pair tokenizer, taken from the installed ``clip`` package.

Only ``simple_tokenizer.py`` and its vocabulary are used. They are loaded by file, because ``import clip`` fails
where setuptools is 82 or newer (``pkg_resources`` is gone), and because inside a CoOp or MaPLe checkout the name
``clip`` belongs to that checkout.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from oodprompt.errors import UserError

_DISTRIBUTIONS = ("clip-anytorch", "clip", "openai-clip")


def load_clip_file(name: str) -> ModuleType:
    """Import one file of OpenAI's ``clip`` package (``simple_tokenizer``, ``model``) without importing the package.

    Raises ``UserError`` when no installed distribution carries it.
    """
    for distribution in _DISTRIBUTIONS:
        try:
            path = Path(str(importlib.metadata.distribution(distribution).locate_file(f"clip/{name}.py")))
        except importlib.metadata.PackageNotFoundError:
            continue
        if path.is_file():
            spec = importlib.util.spec_from_file_location(f"_openai_clip_{name}", path)
            assert spec is not None and spec.loader is not None, "Python knows how to load every .py file"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise UserError(
        f"OpenAI's clip/{name}.py was not found in any of the distributions {', '.join(_DISTRIBUTIONS)}: "
        "install it with `pip install clip-anytorch`"
    )


@lru_cache(maxsize=1)
def _tokenizer():
    return load_clip_file("simple_tokenizer").SimpleTokenizer()


def encode(text: str) -> list[int]:
    """Token ids of ``text``, without start and end tokens."""
    return _tokenizer().encode(text)


def tokenize(texts: str | Sequence[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Token ids, int64 [len(texts), context_length]: start token, text, end token (the highest id), zeros.

    Raises ``UserError`` for a text of more than ``context_length`` tokens; with ``truncate`` its rest is cut and the end
    token kept, as in CLIP's own training.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    start, end = (_tokenizer().encoder[f"<|{word}oftext|>"] for word in ("start", "end"))
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(result, texts, strict=True):
        ids = [start, *encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise UserError(
                    f"the text {text[:60]!r}... has {len(ids)} tokens, the text encoder takes {context_length}: "
                    "shorten the class name, the template or TRAINER.*.N_CTX"
                )
            ids = [*ids[: context_length - 1], end]
        row[: len(ids)] = torch.tensor(ids)
    return result


def is_too_long(text: str, context_length: int = 77) -> bool:
    """Whether ``text`` has more than ``context_length`` tokens with its start and end."""
    if len(text.encode("utf-8", "replace")) <= context_length - 2:  # a token is a byte or more
        return False
    return len(encode(text)) + 2 > context_length
