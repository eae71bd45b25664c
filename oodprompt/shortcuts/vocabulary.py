"""The words that an audit looks for in images: ours, a file's, or those of captions."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from oodprompt.errors import UserError

SENSITIVE = "sensitive"  # what the name of a section begins with whose words describe people by group
_MOST_OF_CAPTIONS = 1500
# Words of captions that name nothing to see.
_FILLERS = frozenset(
    """a an and are as at be been being but by can could did do does for from had has have he her him his i in into is it its
    me my no not of off on one or other our out over she so some than that the their them then there these they this those
    to too two under up upon us very was we were what when where which while who whose will with would you your image images
    photo photos picture pictures shows showing shown showed appears seen""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Vocabulary:
    """``words`` with the ``sections`` that they are from, both [W]; ``left_out`` sensitive words were not asked for."""

    words: tuple[str, ...]
    sections: tuple[str, ...]
    source: str
    left_out: int = 0


def read_vocabulary(choice: str = "", sensitive: bool = False, captions: Iterable[str] = ()) -> Vocabulary:
    """The built-in words for "", the words of ``captions`` for "captions", else those of the file ``choice``.

    A section is sensitive if its name begins with "sensitive", in any case. Its words are there only where they are
    asked for. Words of captions are left out if our own sensitive sections hold them. ``UserError`` for a file that is
    missing, no text, or empty, and where no image has a caption.
    """
    if choice == "captions":
        return _of_captions(captions, sensitive)
    if not choice:
        return _chosen(_built_in(), "the built-in words", sensitive)
    path = Path(choice).expanduser()
    try:
        found = _parsed(path.read_text(encoding="utf-8-sig"))  # which may begin with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--vocabulary: cannot read {path} ({reason}); give a text file with a word a line") from error
    if not found:
        raise UserError(f"--vocabulary: {path} has no words; give a text file with a word a line")
    return _chosen(found, str(path), sensitive)


@cache
def _built_in() -> tuple[tuple[str, str], ...]:
    return tuple(_parsed(files(__package__).joinpath("vocabulary.txt").read_text(encoding="utf-8")))


def _parsed(text: str) -> list[tuple[str, str]]:
    """(word, section) of a text: ``[section]`` lines, ``#`` comments, words between commas and ends of lines.

    Of words that differ in case alone the first is taken.
    """
    section, found = "", dict[str, tuple[str, str]]()
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif not line.startswith("#"):
            for word in filter(None, (" ".join(part.split()) for part in line.split(","))):
                found.setdefault(word.casefold(), (word, section))
    return list(found.values())


def _is_sensitive(section: str) -> bool:
    return section.casefold().startswith(SENSITIVE)


def _chosen(found: Iterable[tuple[str, str]], source: str, sensitive: bool) -> Vocabulary:
    pairs = list(found)
    kept = [(word, section) for word, section in pairs if sensitive or not _is_sensitive(section)]
    if not kept:
        raise UserError(f"--vocabulary: all words of {source} are sensitive; add --sensitive to look for them")
    words, sections = zip(*kept, strict=True)
    return Vocabulary(words, sections, source, len(pairs) - len(kept))


def words_of_caption(caption: str) -> set[str]:
    """The different words of a caption in small letters, but for those that name nothing to see."""
    text = unicodedata.normalize("NFC", caption.lower()).translate(_LETTERS)
    return {word for part in text.split() if len(word := part.strip("'-")) > 1 and word not in _FILLERS}


class _Letters(dict[int, str]):
    """For ``str.translate``: letters of any script, with their marks, apostrophes and hyphens; the rest are blanks."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = character in "'-" or unicodedata.category(character)[0] in "LM"
        self[code] = character if kept else "'" if character == "’" else " "
        return self[code]


_LETTERS = _Letters()


def _of_captions(captions: Iterable[str], sensitive: bool) -> Vocabulary:
    """The most frequent words, of five captions at least."""
    count: Counter[str] = Counter()
    for caption in captions:
        count.update(words_of_caption(caption))
    withheld = set() if sensitive else {word for word, section in _built_in() if _is_sensitive(section)}
    frequent = [word for word, times in sorted(count.items(), key=lambda item: (-item[1], item[0])) if times >= 5]
    words = [word for word in frequent if word not in withheld][:_MOST_OF_CAPTIONS]
    if not words:
        raise UserError(
            "--vocabulary captions: no word is in five captions of training images; give a file of words, or leave it out"
        )
    return Vocabulary(
        tuple(words), ("captions",) * len(words), "the captions", sum(word in withheld for word in frequent)
    )
