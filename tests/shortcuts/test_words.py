"""The vocabulary, and what the embedded CLIP knows of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.errors import UserError
from oodprompt.shortcuts.vocabulary import Vocabulary, read_vocabulary, words_of_caption
from oodprompt.shortcuts.words import known_words, read_words


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return load_backbone("tiny")


def vocabulary(*words: str) -> Vocabulary:
    return Vocabulary(words, ("",) * len(words), "a test")


def test_built_in_words_are_many_different_and_not_sensitive() -> None:
    plain, whole = read_vocabulary(), read_vocabulary(sensitive=True)
    assert len(plain.words) > 1300 and len(set(whole.words)) == len(whole.words)
    assert len(whole.words) - len(plain.words) == plain.left_out > 50 and whole.left_out == 0
    assert "woman" in whole.words and "woman" not in plain.words and "water" in plain.words
    assert {"body parts", "weather", "colors", "materials", "textures"} <= {
        part for section in plain.sections for part in (section, section.rpartition(" and ")[2])
    }


def test_words_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(
        "\ufeff# mine\nriver bank, desk\n[Sensitive: who]\nchild\n[places]\nshore\nDesk\n", encoding="utf-8"
    )
    found = read_vocabulary(str(file))
    assert found.words == ("river bank", "desk", "shore") and found.sections == ("", "", "places")
    assert found.left_out == 1 and read_vocabulary(str(file), sensitive=True).words[2] == "child"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no words"),
        (b"# nothing\n[a]\n", "has no words"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[sensitive]\nx", "--sensitive"),
    ],
)
def test_files_without_words_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_vocabulary(str(file))
    with pytest.raises(UserError, match="cannot read"):
        read_vocabulary(str(tmp_path / "none.txt"))


def test_words_of_captions_are_the_frequent_ones() -> None:
    captions = ["A photo of the red barn."] * 6 + ["a woman in the barn"] * 5 + ["once"] * 4
    found = read_vocabulary("captions", captions=captions)
    assert found.words == ("barn", "red") and found.left_out == 1
    assert read_vocabulary("captions", sensitive=True, captions=captions).words == ("barn", "red", "woman")
    assert words_of_caption("The barn's door") == {"barn's", "door"}
    several = words_of_caption("Ein Mädchen, 'red-brick' 2 CAFE\u0301S — वन 雪山, x")
    assert several == {"ein", "mädchen", "red-brick", "cafés", "वन", "雪山"}
    with pytest.raises(UserError, match="no word is in five captions"):
        read_vocabulary("captions", captions=["", "one"])


def test_unknown_words_are_seen_by_their_shared_embedding(clip: CLIP) -> None:
    assert known_words(clip, ["water", "brick wall", "kitchen", "red kitchen", "zebra"]) == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_words_that_name_a_class_are_left_out(clip: CLIP) -> None:
    found = read_words(
        clip, vocabulary("The Star", "the disc", "water", "square", "kitchen"), ["circle", "a star"], False
    )
    assert found.words == ("water", "square") and found.unknown == ("kitchen",)
    assert found.of_class == (("The Star", "a star"), ("the disc", "circle"))
    assert found.direction.shape == found.name.shape == (2, 128)


def test_a_vocabulary_without_a_word_to_look_for_is_refused(clip: CLIP) -> None:
    with pytest.raises(UserError, match="knows no word of a test"):
        read_words(clip, vocabulary("kitchen", "zebra"), ["circle", "star"], False)
    with pytest.raises(UserError, match="name a class"):
        read_words(clip, vocabulary("circle", "stars"), ["circle", "star"], False)
