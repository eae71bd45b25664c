"""Our tokenizer against OpenAI's, and that it is found wherever the software runs."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from oodprompt.backbones import encode, tokenize, tokenizer
from oodprompt.errors import UserError

TEXTS = [
    "",
    "a photo of a waterbird.",
    "X X X X X X X X X X X X X X X X black-footed albatross.",
    "A  Photo\tof a\n DOG ",
    "it's the dog's; they'll've 2024 cats!?",
    "caf\u00e9 na\u00efve \u6c34\u9ce5 \U0001f426",
    "&lt;b&gt; &amp;amp; sch\u00c3\u00b6n",  # HTML entities and mended mojibake
    "<|startoftext|>nested<|endoftext|>",
    "supercalifragilisticexpialidocious " * 3,
    "..." * 20,
]


@pytest.fixture(autouse=True)
def fresh_tokenizer() -> Iterator[None]:
    """The tokenizer is kept once loaded; what is tested here is the loading, too."""
    tokenizer._tokenizer.cache_clear()
    yield
    tokenizer._tokenizer.cache_clear()


def openai_tokenize(texts: list[str], context_length: int = 77, truncate: bool = False) -> torch.Tensor:
    """``clip.tokenize``, word for word but for its import of the whole package."""
    simple = tokenizer.load_clip_file("simple_tokenizer").SimpleTokenizer()
    sot_token, eot_token = simple.encoder["<|startoftext|>"], simple.encoder["<|endoftext|>"]
    all_tokens = [[sot_token] + simple.encode(text) + [eot_token] for text in texts]
    result = torch.zeros(len(all_tokens), context_length, dtype=torch.long)
    for i, tokens in enumerate(all_tokens):
        if len(tokens) > context_length:
            assert truncate
            tokens = tokens[:context_length]
            tokens[-1] = eot_token
        result[i, : len(tokens)] = torch.tensor(tokens)
    return result


def test_ids_are_openais() -> None:
    result = tokenize(TEXTS)
    assert result.dtype == torch.int64 and result.shape == (len(TEXTS), 77)
    assert torch.equal(result, openai_tokenize(TEXTS))


def test_known_ids() -> None:
    """The example of OpenAI's notebook, written out: both sides of the comparison above could be wrong together."""
    ids = [49406, 3306, 1002, 256, 49407]
    assert tokenize("Hello World!")[0, :5].tolist() == ids and not tokenize("Hello World!")[0, 5:].any()
    assert encode("Hello World!") == ids[1:4]


def test_one_text_or_many() -> None:
    assert torch.equal(tokenize("a dog"), tokenize(["a dog"])) and torch.equal(
        tokenize(("a dog",)), tokenize(["a dog"])
    )
    assert tokenize([]).shape == (0, 77)


def test_the_end_of_text_has_the_highest_id() -> None:
    """What ``encode_text`` relies on."""
    texts = [text for text in TEXTS if "<|" not in text]
    assert tokenize(texts).argmax(dim=1).tolist() == [len(encode(text)) + 1 for text in texts]


@pytest.mark.parametrize("length", [2, 5, 16, 77, 100])
def test_truncation(length: int) -> None:
    texts = [*TEXTS, "bird " * 200]
    result = tokenize(texts, length, truncate=True)
    assert torch.equal(result, openai_tokenize(texts, length, truncate=True))
    assert result[-1, -1] == 49407


@pytest.mark.parametrize(("words", "length"), [(76, 77), (200, 77), (4, 5)])
def test_a_text_that_is_too_long(words: int, length: int) -> None:
    text = "bird " * words
    with pytest.raises(UserError) as error:
        tokenize(["a dog", text], length)
    message = str(error.value)
    assert text[:30] in message and f"{words + 2} tokens" in message and f"takes {length}" in message
    assert "N_CTX" in message and len(message) < 300


def test_a_text_that_just_fits() -> None:
    assert tokenize("bird " * 75)[0, 76] == 49407


def test_a_module_called_clip_does_not_get_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a CoOp or MaPLe checkout ``clip`` is that checkout's, changed, package, and may be imported already."""
    expected = openai_tokenize(TEXTS)
    tokenizer._tokenizer.cache_clear()
    (tmp_path / "clip").mkdir()
    for file in ("__init__", "simple_tokenizer", "model", "clip"):
        (tmp_path / "clip" / f"{file}.py").write_text("raise ImportError('the wrong clip')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fake = ModuleType("clip")
    monkeypatch.setitem(sys.modules, "clip", fake)
    monkeypatch.setitem(sys.modules, "clip.simple_tokenizer", ModuleType("clip.simple_tokenizer"))
    assert torch.equal(tokenize(TEXTS), expected)
    assert sys.modules["clip"] is fake
    monkeypatch.delitem(sys.modules, "clip")
    monkeypatch.delitem(sys.modules, "clip.simple_tokenizer")
    tokenizer._tokenizer.cache_clear()
    assert torch.equal(tokenize(TEXTS), expected)
    assert "clip" not in sys.modules


def test_without_pkg_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setuptools 82 took it away, and OpenAI's ``clip/clip.py`` imports it."""
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    assert encode("a dog") == [320, 1929]
    assert hasattr(tokenizer.load_clip_file("model"), "CLIP")


def only_distribution(monkeypatch: pytest.MonkeyPatch, name: str | None, folder: Path) -> None:
    """Let ``name`` alone be installed, in ``folder``."""

    def distribution(asked: str) -> SimpleNamespace:
        if asked != name:
            raise importlib.metadata.PackageNotFoundError(asked)
        return SimpleNamespace(locate_file=lambda path: folder / path)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)


@pytest.mark.parametrize("name", [None, "clip"])
def test_not_installed(name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's ``clip`` is another software: it is installed, but has not the file."""
    only_distribution(monkeypatch, name, tmp_path)
    for use in (lambda: tokenize("a dog"), lambda: encode("a dog"), lambda: tokenizer.load_clip_file("model")):
        with pytest.raises(UserError, match="pip install clip-anytorch"):
            use()


@pytest.mark.parametrize("name", ["clip-anytorch", "clip", "openai-clip"])
def test_any_distribution_of_it_will_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "model.py").write_text("HERE = True")
    only_distribution(monkeypatch, name, tmp_path)
    assert tokenizer.load_clip_file("model").HERE
