"""Reading the user's tables: csv files with a header, and lists with an entry a line."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from oodprompt.errors import UserError


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text without blanks at its ends) of every line that is not empty; ``UserError`` if unreadable."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, text.strip()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file: {error}; fetch it again") from error


def read_rows(
    path: Path, columns: Sequence[str], optional: Sequence[str] = (), strict: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """(line number, values of ``columns`` and ``optional``) of every row of a csv file with a header.

    UTF-8 with or without a byte order mark. Absent ``optional`` columns read as "". ``UserError`` names the file (and
    line) for a missing column and, if ``strict``, for a row with more or fewer fields than the header; else what such
    a row lacks reads as "".
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            missing = [column for column in columns if column not in header]
            if missing:
                raise UserError(
                    f"{path}: column {', '.join(missing)} is missing; expected {', '.join(columns)}, "
                    f"found {', '.join(header)[:300] or 'nothing'}"
                )
            wanted = [header.index(c) if c in header else len(header) for c in (*columns, *optional)]
            for row in reader:
                if not row:
                    continue
                if strict and len(row) != len(header):
                    raise UserError(
                        f"{path}, line {reader.line_num} has {len(row)} fields and the header {len(header)}; "
                        "put values that hold a comma in double quotes"
                    )
                row = row[: len(header)] + [""] * (len(header) + 1 - len(row))  # one more, for absent columns
                yield reader.line_num, [row[i] for i in wanted]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a csv file: {error}") from error
