"""Splits as columns: the same images as a list of ``Datum``, at a fraction of the memory, and looked for in threads."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from oodprompt.data.columns import Images, Texts
from oodprompt.data.datum import Datum


@pytest.fixture
def data(tmp_path: Path) -> list[Datum]:
    made = []
    for i, name in enumerate(("a.jpg", "b/ä.jpg", "b/c.jpg", "d.jpg")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * i)
        made.append(Datum(str(path), i % 2, i, ("cat", "dog")[i % 2], i - 1, "a caption" if i == 2 else ""))
    return made


def test_columns_give_back_the_images_that_they_were_made_of(data: list[Datum]) -> None:
    images = Images.of(data)
    assert list(images) == data and images[-1] == data[-1] and list(images[1:3]) == data[1:3]
    assert images.attribute.tolist() == [-1, 0, 1, 2] and images.label.tolist() == [0, 1, 0, 1]
    assert list(pickle.loads(pickle.dumps(images))) == data
    with pytest.raises(IndexError):
        images[4]
    assert not Images.of([]) and Images.of(images) is images


def test_chosen_images_keep_what_is_known_of_them(data: list[Datum]) -> None:
    chosen = Images.of(data).take([3, 0], label=np.array([5, 6]))
    assert list(chosen) == [data[3].relabelled(5), data[0].relabelled(6)]


def test_paths_without_a_common_folder_and_absolute_ones() -> None:
    for paths in (["a.jpg"], ["a/b", "a//c"], ["/a/b", "c"], ["/x/1", "/x/2"], ["a\udcff/b", "a\udcff/c"]):
        assert list(Texts.of_paths(paths)) == paths
    assert list(Texts(["b.jpg", "/c.jpg"], prefix="/a/")) == ["/a/b.jpg", "/c.jpg"]


def test_files_that_are_not_there_are_found_and_changes_are_seen(data: list[Datum]) -> None:
    images = Images.of(data)
    assert images.stamps[:, 0].tolist() == [0, 1, 2, 3] and not len(images.missing())
    os.unlink(data[1].impath)
    Path(data[2].impath).write_bytes(b"longer")
    assert images.look_again()[:, 0].tolist() == [0, -1, 6, 3]
    assert images.take([1, 2]).stamps[:, 0].tolist() == [1, 2]  # as they were first seen
    os.mkdir(data[1].impath)
    assert Images.of(data).missing().tolist() == [1]


def test_a_million_images_would_take_less_than_300_bytes_each() -> None:
    count = 20_000
    tracemalloc.start()
    paths = Texts((f"n01440764/n01440764_{i}.JPEG" for i in range(count)), prefix="/data/imagenet/images/train/")
    zeros = np.zeros(count)
    images = Images(paths, np.arange(count), zeros, zeros, zeros, zeros, ["tench"])
    assert len(images.stamps) == count
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used / count < 100
