"""Reading the user's tables: csv files with a header, lists with an entry a line, and the values in them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from oodprompt.errors import UserError

# How a table names the splits of its rows, and their numbers.
SPLITS = {"train": 0, "0": 0, "val": 1, "valid": 1, "validation": 1, "1": 1, "test": 2, "2": 2}
SEPARATORS = (",", ";", "\t", "|")
# What pandas' read_csv takes for a missing value, by letter: "NA" and "None" are missing, "na" and "none" are values.
MISSING = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
    + ("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)
_BYTE_ORDER_MARKS = (  # UTF-32's begins with UTF-16's
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_ARCHIVES = {b"PK\x03\x04": "a zip archive or an Excel workbook", b"\x1f\x8b": "compressed with gzip"}
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def missing(value: str) -> bool:
    """Whether a cell says that its value is not known: blank, or one of ``MISSING``, which are those of pandas."""
    return value.strip() in MISSING


def whole(value: str) -> int:
    """The integer that a cell holds, also where a float is written: "1", " 1 ", "1.0", "1.00", "1e0" are 1.

    ``ValueError`` for any other text ("", "0.5", "one") and for floats that are not exact (from 2^53 on).
    """
    text = value.strip()
    if text.isdecimal():
        return int(text)
    number = float(text) if _NUMBER.fullmatch(text) else float("nan")
    if not (number.is_integer() and abs(number) < 2**53):
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def normalised(values: Iterable[str]) -> dict[str, str]:
    """What each distinct value of a column stands for: "" if it is missing, else its text without blanks at its ends.

    A column of whole numbers that are written as floats, as pandas writes integers with a gap, holds integers: "1.0"
    is "1". One value that is no whole number leaves all of them as they are, so that names like "1e5" stay.
    """
    texts = {value: "" if missing(value) else value.strip() for value in values}
    try:
        integers = {text: whole(text) for text in texts.values() if text}
    except ValueError:
        return texts
    return {
        value: text if not text or text.isdecimal() else str(integers[text])  # "01" stays the name that it may be
        for value, text in texts.items()
    }


def portable(name: str, folder: Path | str = "") -> str:
    """A path as this machine writes it: the backslashes of a list from Windows become "/".

    ``folder`` is what ``name`` is relative to. A file whose own name holds a backslash keeps it.
    """
    if "\\" not in name or os.path.exists(os.path.join(folder, name)):
        return name
    return name.replace("\\", "/")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text without blanks at its ends) of every line that is not empty; ``UserError`` if unreadable.

    UTF-8, with or without a byte order mark, or UTF-16 with one.
    """
    with _opened(path, "text") as lines:
        for line, text in enumerate(lines, 1):
            if stripped := text.strip():
                yield line, stripped


def read_header(path: Path) -> list[str]:
    """The names of the columns of a csv file; ``UserError`` where it cannot be read."""
    with _opened(path, "csv") as lines:
        _, first, separator = _first_line(lines, ())
        return _header(next(csv.reader(chain((first,), lines), delimiter=separator, skipinitialspace=True), []))


def read_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str] = (), strict: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """(first line's number, values of ``columns`` and ``optional``) of every row of a csv file with a header.

    UTF-8, with or without a byte order mark, or UTF-16 with one; any ends of lines. The separator is the one of
    ``SEPARATORS`` by which the header has the most of the columns. Values may be in double quotes, also after blanks.
    Blank rows, and blank cells beyond the header, count for nothing. Absent ``optional`` columns read as "".

    ``UserError`` names the file (and line) for text that cannot be read, for a missing column or one that is there
    twice and, if ``strict``, for a row with more or fewer fields than the header; else what such a row lacks reads as "".
    """
    with _opened(path, "csv") as lines:
        skipped, first, separator = _first_line(lines, (*columns, *optional))
        reader = csv.reader(chain((first,), lines), delimiter=separator, skipinitialspace=True)
        end = line = skipped
        try:
            header = _header(next(reader, []))
            wanted = _places(path, header, columns, optional)
            width, needed = len(header), wanted[0]
            end = line = skipped + reader.line_num
            for row in reader:
                line, end = end + 1, skipped + reader.line_num
                if len(row) != width or not row[needed]:
                    if not any(map(str.strip, row)):
                        continue
                    if strict and (len(row) < width or any(map(str.strip, row[width:]))):
                        raise _wrong_width(path, line, end, len(row), width, separator)
                    row[width:] = [""] * (width - len(row))
                row.append("")  # for absent columns
                yield line, [row[i] for i in wanted]
        except csv.Error as error:
            where = f"the row from line {end + 1} on"
            raise UserError(f"{path} is not a csv file: {error} in {where}; is a double quote not closed?") from error
    if end > line:  # the last row has several lines, as all that is left has after a quote without its second one
        _check_quotes(path, line, separator)


def _first_line(lines: Iterator[str], columns: Sequence[str]) -> tuple[int, str, str]:
    """(number of lines before the header, its first line, separator); Excel's line "sep=;" may come before it."""
    for skipped, text in enumerate(lines):
        bare = text.strip("".join((*SEPARATORS, ' "\r\n')))
        if bare and not bare.lower().startswith("sep="):
            found = {s: _header(next(csv.reader((text,), delimiter=s, skipinitialspace=True), [])) for s in SEPARATORS}
            return skipped, text, max(found, key=lambda s: (len({*columns} & {*found[s]}), len(found[s])))
    return 0, "", ","


def _header(row: Sequence[str]) -> list[str]:
    """The names of the columns, without the blank ones at the end."""
    names = [name.strip() for name in row]
    while names and not names[-1]:
        del names[-1]
    return names


def _places(path: Path, header: list[str], columns: Sequence[str], optional: Sequence[str]) -> list[int]:
    """The place of each column in a row; one behind the row for an ``optional`` one that is absent."""
    if lacking := [column for column in columns if column not in header]:
        raise UserError(
            f"{path}: column {', '.join(lacking)} is missing; expected {', '.join(columns)}, "
            f"found {', '.join(header)[:300] or 'nothing'}"
        )
    if twice := [column for column in (*columns, *optional) if header.count(column) > 1]:
        raise UserError(f"{path} has two columns of the name {twice[0]}; rename one")
    return [header.index(column) if column in header else len(header) for column in (*columns, *optional)]


def _wrong_width(path: Path, line: int, end: int, fields: int, width: int, separator: str) -> UserError:
    name = {",": "comma", ";": "semicolon", "\t": "tab"}.get(separator, separator)
    where = f"{path}, line {line}" + (f" to {end}" if end > line else "")
    remedy = "close every double quote" if end > line else f"put values that hold a {name} in double quotes"
    return UserError(f"{where} has {fields} fields and the header {width}; {remedy}")


def _check_quotes(path: Path, line: int, separator: str) -> None:
    """``UserError`` where the row from ``line`` to the end of the file opens a quote and does not close it."""
    with _opened(path, "csv") as lines:
        try:
            list(csv.reader(islice(lines, line - 1, None), delimiter=separator, skipinitialspace=True, strict=True))
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(f"{path}, line {line} opens a double quote that is not closed; close it") from error


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[Iterator[str]]:
    """The lines of a text file; ``UserError`` where it cannot be read or is none, also while they are read."""
    encoding = "utf-8"
    try:
        with path.open("rb") as raw:
            head = raw.peek(4)[:4]
            for start, what in _ARCHIVES.items():
                if head.startswith(start):
                    raise UserError(f"{path} is not a {kind} file: it is {what}; give the {kind} file itself")
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), encoding)
            with io.TextIOWrapper(raw, encoding, newline="") as text:
                yield _without_nul(path, kind, text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        where = str(error) if encoding.startswith("utf-16") else _where_not_utf8(path)
        raise UserError(
            f'{path} is not a {kind} file in UTF-8: {where}; save it as UTF-8 (Excel: "CSV UTF-8"; pandas: '
            'encoding="utf-8") or fetch it again'
        ) from error


def _without_nul(path: Path, kind: str, lines: Iterable[str]) -> Iterator[str]:
    for line, text in enumerate(lines, 1):
        if "\0" in text:
            raise UserError(
                f"{path} is not a {kind} file: line {line} holds a zero byte; is it UTF-16 without a byte order mark, or "
                "cut off by a full disk? Save it as UTF-8"
            )
        yield text


def _where_not_utf8(path: Path) -> str:
    with path.open("rb") as lines:
        for line, content in enumerate(lines, 1):
            try:
                content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                return f"line {line} holds the byte 0x{content[error.start]:02x}"
    return "it holds bytes that are none"


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a csv file in a folder that is being built; a file that others may read is written atomically."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path.write_text(table.getvalue(), encoding="utf-8")
