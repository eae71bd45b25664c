"""MetaShift in SubpopBench's build, with and without its list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.metashift import BUILD, COUNTS, tree
from tests.helpers.trees.writing import MakeDataset, groups, paths, write


@pytest.mark.parametrize("place", ["metashift", "."])
def test_the_rule_on_sorted_names(build: MakeDataset, tmp_path: Path, place: str) -> None:
    pool = tree(tmp_path / place)
    data = build("MetaShift")
    random = np.random.RandomState(42)
    order = random.permutation(39)  # drawing without replacement is a permutation cut short
    test = set(order[:9].tolist())  # a quarter of 39
    left = np.array([i for i in range(39) if i not in test])
    val = set(left[random.permutation(30)[:3]].tolist())  # a tenth of 39
    expected = ([i for i in range(39) if i not in test | val], sorted(val), sorted(test))
    for split, indices in zip((data.train_x, data.val, data.test), expected, strict=True):
        assert paths(split, tmp_path / place / BUILD) == [pool[i][0] for i in indices]
        assert [(d.label, d.attribute) for d in split] == [pool[i][1] for i in indices]
    assert data.classnames == ["dog", "cat"] and data.attribute_names == ("outdoor", "indoor")
    assert "outdoors" in data.attribute_prompts[0][0] and "indoors" in data.attribute_prompts[1][0]


def test_sizes_of_the_official_build() -> None:
    from oodprompt.datasets.metashift import random_split

    test, val = random_split(3499)
    assert (3499 - len(test) - len(val), len(val), len(test)) == (2276, 349, 874)
    assert not set(test) & set(val)


def test_the_list_of_another_machine(build: MakeDataset, tmp_path: Path) -> None:
    pool = tree(tmp_path / "metashift")
    rows = [
        f"/home/someone/data/metashift/{BUILD}/{name},{y},{a},{i % 3}" for i, (name, (y, a)) in enumerate(pool[::-1])
    ]
    rows[0] = f"/x/{BUILD}/{BUILD}/{pool[-1][0]},0,1,0"  # the last folder of that name counts
    rows[2] = f"{BUILD}/{pool[-3][0]},0,1,2"
    rows[1] = f"C:\\data\\metashift\\{BUILD}\\".replace("/", "\\") + pool[-2][0].replace("/", "\\") + ",0,1,1"
    write(tmp_path / "metashift/metadata_metashift.csv", "filename,y,a,split", *rows)
    data = build("MetaShift")
    for split, number in ((data.train_x, 0), (data.val, 1), (data.test, 2)):
        assert paths(split, tmp_path / "metashift" / BUILD) == [name for name, _ in pool[::-1][number::3]]
        assert [(d.label, d.attribute) for d in split] == [pair for _, pair in pool[::-1][number::3]]
    assert groups(data.test)[1, 1] == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("/data/cats/1.jpg,0,1,0", f": the image's path has no folder {BUILD}"),
        (f"/x/{BUILD}/train/cat/cat(indoor)/none.jpg,1,1,0", " names .*none.jpg, which is missing"),
        (f"/x/{BUILD}/train/cat/cat(indoor)/37.jpg,2,1,0", ": y 2, split 0, a 1 are out of range .y below 2"),
        (f"/x/{BUILD}/train/cat/cat(indoor)/37.jpg,1,2,0", ": y 1, split 0, a 2 are out of range .*a below 2"),
        (f"/x/{BUILD}/train/cat/cat(indoor)/37.jpg,1,1,3", ": y 1, split 3"),
        (f"/x/{BUILD}/train/cat/cat(indoor)/37.jpg,1,1,train", ": y, split and a must be whole numbers"),
    ],
)
def test_corrupt_lists(build: MakeDataset, tmp_path: Path, row: str, message: str) -> None:
    tree(tmp_path / "metashift")
    path = write(tmp_path / "metashift/metadata_metashift.csv", "filename,y,a,split", row)
    with pytest.raises(UserError, match=f"^{path}, line 2{message}"):
        build("MetaShift")


def test_list_without_a_column(build: MakeDataset, tmp_path: Path) -> None:
    tree(tmp_path / "metashift")
    path = write(tmp_path / "metashift/metadata_metashift.csv", "filename,y,attribute,split")
    with pytest.raises(UserError, match=f"^{path}: column a is missing; expected filename, y, split, a"):
        build("MetaShift")


@pytest.mark.parametrize("folder", COUNTS)
def test_missing_folders(build: MakeDataset, tmp_path: Path, folder: str) -> None:
    tree(tmp_path / "metashift")
    (tmp_path / "metashift" / BUILD / folder).rename(tmp_path / "gone")
    with pytest.raises(UserError) as error:
        build("MetaShift")
    text = str(error.value)
    assert text.startswith(f"MetaShift: no .jpg in {tmp_path}/metashift/{BUILD}/{folder}; expected")
    assert "ROOT/metashift/\n" in text and f"    {BUILD}/\n" in text and "dropbox.com/s/a7k65rlj4ownyr2" in text


def test_nothing_there(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"^MetaShift: no {BUILD} in {tmp_path} .looked in metashift, ROOT itself.; exp"
    ):
        build("MetaShift")
