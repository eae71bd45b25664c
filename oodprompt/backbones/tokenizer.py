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
from typing import Any, Protocol

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


class Tokenizer(Protocol):
    """From texts to the ids that a text encoder takes; each backbone has its own.

    ``before`` is how many special tokens stand ahead of a text.
    """

    context_length: int
    before: int

    def __call__(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        """Token ids, int64 [len(texts), context_length], as the text encoder takes them.

        ``UserError`` for a text that is longer than it takes; with ``truncate`` the rest is cut.
        """

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""

    def is_too_long(self, text: str) -> bool:
        """Whether ``text`` has more tokens than the text encoder takes."""

    def ends(self, tokens: Tensor) -> Tensor:
        """Where the end of text stands in each row of ids [n, L], from which a causal text encoder is read; [n]."""


class OpenAITokenizer:
    """That of OpenAI's models and of all that took over its vocabulary."""

    before = 1

    def __init__(self, context_length: int = 77) -> None:
        self.context_length = context_length

    def __call__(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        return tokenize(texts, self.context_length, truncate)

    def encode(self, text: str) -> list[int]:
        return encode(text)

    def is_too_long(self, text: str) -> bool:
        return is_too_long(text, self.context_length)

    def ends(self, tokens: Tensor) -> Tensor:
        return tokens.argmax(dim=-1)  # it has the highest id


class LibraryTokenizer:
    """A tokenizer of another library: ``call(texts, context_length)`` -> ids; ``plain(text)`` -> ids without special tokens."""

    def __init__(self, call: Any, plain: Any, context_length: int, end: int | None = None) -> None:
        """``end``: the id of the end of text; None: it has the highest id."""
        self._call, self._plain, self.context_length, self.end = call, plain, context_length, end
        word, row = plain("photo"), call(["photo"], context_length)[0].tolist()
        self.before = row.index(word[0])
        rest = row[self.before + len(word) :]
        self._special = self.before + max(self._behind(rest), int(rest[:1] == [end]))

    @staticmethod
    def _behind(rest: list[int]) -> int:
        """How many special tokens stand behind a text, which padding follows; none where padding is all there is."""
        return next((i for i in range(len(rest) - 1, -1, -1) if rest[i] != rest[-1]), -1) + 1

    def __call__(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not truncate:
            for text in texts:
                if self.is_too_long(text):
                    raise UserError(
                        f"the text {text[:60]!r}... has {len(self.encode(text)) + self._special} tokens, the text encoder "
                        f"takes {self.context_length}: shorten the class name, the template or TRAINER.*.N_CTX"
                    )
        return self._call(texts, self.context_length)

    def encode(self, text: str) -> list[int]:
        return list(self._plain(text))

    def is_too_long(self, text: str) -> bool:
        return len(self.encode(text)) + self._special > self.context_length

    def ends(self, tokens: Tensor) -> Tensor:
        return tokens.argmax(dim=-1) if self.end is None else (tokens == self.end).int().argmax(dim=-1)
