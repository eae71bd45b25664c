"""Tables as spreadsheets, pandas and other systems write them, and what their cells mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from oodprompt.data.tables import missing, normalised, portable, read_lines, read_rows, whole
from oodprompt.errors import UserError

COLUMNS, PLAIN = ("image", "label", "split"), "image,label,split\na/1.jpg,cow,train\nb/2.jpg,old horse,test\n"
ROWS = [(2, ["a/1.jpg", "cow", "train"]), (3, ["b/2.jpg", "old horse", "test"])]
SPREADSHEET = "image,label,split,,\na/1.jpg,cow,train\nb/2.jpg,old horse,test,,\n , ,,,\n,,,,,,\n"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (PLAIN, "utf-8"),
        (PLAIN, "utf-8-sig"),
        (PLAIN, "utf-16"),
        (PLAIN, "utf-32"),
        (PLAIN.replace("\n", "\r\n"), "utf-8-sig"),
        (PLAIN.replace("\n", "\r\n"), "utf-16"),
        (PLAIN.replace("\n", "\r"), "utf-8"),
        (PLAIN.replace(",", ";"), "utf-8"),
        (PLAIN.replace(",", "\t"), "utf-8"),
        (PLAIN.replace(",", "|"), "utf-8"),
        (PLAIN.replace(",", ", "), "utf-8"),
        ('"image", "label" ,"split"\n"a/1.jpg", "cow", "train"\n"b/2.jpg", "old horse", "test"\n', "utf-8"),
        (PLAIN.removesuffix("\n"), "utf-8"),
        (SPREADSHEET, "utf-8"),
    ],
)
def test_every_form_of_a_list_gives_the_same_rows(tmp_path: Path, content: str, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode(encoding))
    assert list(read_rows(path, COLUMNS)) == ROWS


def test_utf16_of_the_other_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xfe\xff" + PLAIN.encode("utf-16-be"))
    assert list(read_rows(path, COLUMNS)) == ROWS
    assert list(read_lines(path))[1] == (2, "a/1.jpg,cow,train")


@pytest.mark.parametrize("start", ["\n\n", "sep=;\n\n", '"sep=;"\n,,\n'])
def test_what_stands_before_the_header_is_passed_over(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(start + "image;label, or name;split\na;x;train\n\nb;y;test\n")
    assert list(read_rows(path, ("image", "split"))) == [(4, ["a", "train"]), (6, ["b", "test"])]


def test_the_separator_is_the_one_that_finds_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b,c,d;image;label\n1,2,3,4;x,y;z\n")
    assert list(read_rows(path, ("image", "label"))) == [(2, ["x,y", "z"])]


def test_a_row_of_several_lines_is_called_by_its_first(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('image,"the\nlabel",caption\na,cow,"two\nlines"\nb,dog,"three\nmore\nlines"\n')
    assert list(read_rows(path, ("image", "caption"))) == [(3, ["a", "two\nlines"]), (5, ["b", "three\nmore\nlines"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PLAIN.encode() + "c/3.jpg,kühe,test\n".encode("cp1252"), "line 4 holds the byte 0xfc; save it as UTF-8"),
        (PLAIN.encode("utf-16-le"), "line 1 holds a zero byte; is it UTF-16 without a byte order mark"),
        (PLAIN.encode() + b"\0\0\0", "line 4 holds a zero byte"),
        (PLAIN.encode("utf-16")[:-1], "truncated data"),
        (b"PK\x03\x04rest", "it is a zip archive or an Excel workbook; give the csv file itself"),
        (b"\x1f\x8brest", "it is compressed with gzip"),
        (PLAIN.encode() + b'x,"' + b"y" * 140_000, "field larger than field limit .131072. in the row from line 4 on"),
        (PLAIN.encode() + b'x,y,"test\nz,y,test\nu,v,test\n', "line 4 opens a double quote that is not closed"),
        (
            PLAIN.encode() + b'x,"y,test\nz,y,test\n',
            "line 4 to 5 has 2 fields and the header 3; close every double quote",
        ),
        (PLAIN.replace(",", ";").encode() + b"1;2;3;4\n", "line 4 has 4 fields .* hold a semicolon in double quotes"),
        (b"image,label,split,label\n1,2,3,4\n", "has two columns of the name label; rename one"),
        (b"", "expected image, label, split, found nothing"),
    ],
)
def test_what_is_no_table_is_refused_with_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}.*{message}"):
        list(read_rows(path, COLUMNS))


def test_lines_that_are_no_text_are_refused_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a 1\nb\xe9 2\n")
    with pytest.raises(UserError, match=f"^{path} is not a text file in UTF-8: line 2 holds the byte 0xe9"):
        list(read_lines(path))


def test_what_counts_as_missing() -> None:
    assert all(map(missing, ("", "  ", "nan", "NaN", " NA ", "N/A", "n/a", "null", "NULL", "None", "<NA>")))
    assert not any(map(missing, ("na", "none", "NAN", "0", "no", "Nonesuch", "-")))


@pytest.mark.parametrize("text", ["7", " 7 ", "7.0", "7.00", "7.", "7e0", "0.7e1", "+7", "07"])
def test_a_whole_number_in_any_form(text: str) -> None:
    assert whole(text) == 7
    assert whole(f"-{text.strip().lstrip('+')}") == -7


@pytest.mark.parametrize("text", ["", "0.5", "one", "1_0", "nan", "inf", "1e400", "9007199254740993.0", "1,0", "0x1"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        whole(text)


def test_a_column_of_floats_that_are_integers_holds_integers() -> None:
    assert normalised(["0.0", " 1.0", "nan", "2"]) == {"0.0": "0", " 1.0": "1", "nan": "", "2": "2"}
    assert normalised(["1e5", "1.0", "cow "]) == {"1e5": "1e5", "1.0": "1.0", "cow ": "cow"}
    assert normalised(["0.5", "1.0"]) == {"0.5": "0.5", "1.0": "1.0"}
    assert normalised(["01", "2"]) == {"01": "01", "2": "2"}


def test_backslashes_are_those_of_windows_unless_the_file_has_them(tmp_path: Path) -> None:
    (tmp_path / "odd\\name.jpg").touch()
    assert portable(r"photos\a\1.jpg", tmp_path) == "photos/a/1.jpg"
    assert portable("odd\\name.jpg", tmp_path) == "odd\\name.jpg"
    assert portable("photos/1.jpg") == "photos/1.jpg"
