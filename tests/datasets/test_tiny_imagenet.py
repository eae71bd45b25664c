"""Tiny ImageNet in its published layout, and its download."""

from __future__ import annotations

import hashlib
import io
import urllib.error
from collections import Counter
from pathlib import Path

import pytest
from oodprompt.datasets import tiny_imagenet

from oodprompt.errors import UserError
from tests.helpers.trees.tiny_imagenet import NUMBERS, TESTS, tree, zipped
from tests.helpers.trees.writing import MakeDataset, paths, write

SOME = ("n02123045", "n01443537", "n09193705")


def test_the_published_layout(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path, SOME)
    data = build("TinyImageNet", VAL_PERCENT=0.25)
    assert data.classnames == ["goldfish", "tabby cat", "mountain"] and data.template == "a photo of a {}."
    assert Counter(d.label for d in data.train_x) == dict.fromkeys(range(3), 6)
    assert Counter(d.label for d in data.val) == dict.fromkeys(range(3), 2) and not data.has_attributes
    assert paths(data.test, tmp_path / "tiny-imagenet-200") == [f"val/images/val_{i}.JPEG" for i in (1, 4, 0, 3, 2, 5)]
    assert all(f"/{sorted(SOME)[d.label]}/images/" in d.impath for d in data.train_x + data.val)
    assert len({d.impath for d in data.train_x + data.val}) == 3 * len(NUMBERS)


def test_names_are_told_apart(tmp_path: Path) -> None:
    lines = ["a\tbolt, lightning bolt", "b\tbolt", "c\tdrake, duck", "d\tduck", "e\tdrake", "n03126707\tcrane", "f\t"]
    write(tmp_path / "words.txt", *lines[:-1])
    wnids = [line.partition("\t")[0] for line in lines[:-1]]
    names = ["lightning bolt", "bolt (b)", "drake (c)", "duck", "drake (e)", "construction crane"]
    assert list(tiny_imagenet.class_names(tmp_path, wnids).values()) == names
    with pytest.raises(UserError, match=r"words\.txt has no line of f, a class of wnids\.txt; fetch the archive again"):
        tiny_imagenet.class_names(tmp_path, [*wnids, "f"])
    assert len(set(tiny_imagenet.NAMES.values())) == len(tiny_imagenet.NAMES)


@pytest.mark.parametrize("part", ["wnids.txt", "words.txt", "train", "val/images", "val/val_annotations.txt"])
def test_a_part_that_lacks(build: MakeDataset, tmp_path: Path, part: str) -> None:
    folder = tree(tmp_path, SOME)
    (folder / part).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"^TinyImageNet: no {part} in {folder}; expected") as error:
        build("TinyImageNet")
    assert "\n  ROOT/tiny-imagenet-200/\n    wnids.txt " in str(error.value)
    assert str(error.value).endswith("\nget it from http://cs231n.stanford.edu/tiny-imagenet-200.zip")


def test_a_class_without_photographs(build: MakeDataset, tmp_path: Path) -> None:
    folder = tree(tmp_path, SOME)
    (folder / "train/n02123045/images").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no image in .*n02123045/images, the folder of the class 'tabby cat'"):
        build("TinyImageNet")
    write(folder / "wnids.txt", *SOME, SOME[0])
    with pytest.raises(UserError, match=r"wnids\.txt, line 4: 'n02123045' comes twice"):
        build("TinyImageNet")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("val_0.JPEG\tn02123045\t1\t1\t9", r"expected a file name and 5 columns behind it, with tabs between"),
        ("val_0.JPEG\tn02123045\t1\t1\t9\t9.5", r"a box has four whole numbers"),
        ("val_0.JPEG\tn02123045\t9\t1\t3\t9", r"the box 9 1 3 9 ends before it begins"),
        ("0.JPEG\tn02123045\t1\t1\t9\t9", r"'0.JPEG' is no name of the form val_<number>.JPEG"),
        ("val_99.JPEG\tn02123045\t1\t1\t9\t9", r"names .*val_99.JPEG, which is missing; fetch the archive again"),
    ],
)
def test_wrong_lines(build: MakeDataset, tmp_path: Path, line: str, problem: str) -> None:
    path = write(tree(tmp_path, SOME) / "val/val_annotations.txt", line)
    with pytest.raises(UserError, match=f"^{path}, line 1:? {problem}"):
        build("TinyImageNet")


# --- the download ----------------------------------------------------------------------------------------------------


class _Response(io.BytesIO):
    headers: dict[str, str] = {}


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes of an archive of the miniature tree, which the address serves; ROOT is left empty."""
    tree(tmp_path / "source", SOME)
    content = zipped(tmp_path / "source", tmp_path / "made.zip").read_bytes()
    monkeypatch.setattr(tiny_imagenet, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr("urllib.request.urlopen", lambda address, timeout: _Response(content))
    return content


def left(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} - {"source", "made.zip"}


def test_the_archive_is_downloaded_once(
    build: MakeDataset, tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(build("TinyImageNet").test) == 3 * TESTS
    assert left(tmp_path) == {"tiny-imagenet-200", "tiny-imagenet-200.zip"}
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("downloaded again"))
    assert len(build("TinyImageNet").train_x) == 3 * (len(NUMBERS) - 1)


def test_an_archive_that_is_not_the_published_one(
    build: MakeDataset, tmp_path: Path, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda address, timeout: _Response(archive[:-1]))
    with pytest.raises(UserError, match="the download of Tiny ImageNet from http.* has not the SHA256"):
        build("TinyImageNet")
    assert left(tmp_path) == set()
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(archive[:-1])
    with pytest.raises(UserError, match=r"tiny-imagenet-200\.zip has not the SHA256 .*; delete it and run again, or"):
        build("TinyImageNet")


def test_no_network(build: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=r"^cannot get Tiny ImageNet \(no route\): download http.* and unpack it into"):
        build("TinyImageNet")
    assert left(tmp_path) == set()
