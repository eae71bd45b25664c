"""Quadrant images of small idx files, and of the real digits where they are at hand."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from oodprompt.config.keys import get_cfg_default
from oodprompt.data.dataset import DatasetBase, build_dataset
from oodprompt.errors import UserError
from oodprompt.studies import digits
from oodprompt.studies.digits import (
    CAPTIONS,
    KINDS,
    QUADRANTS,
    build_setting,
    quadrant_image,
    read_base,
    read_idx,
    read_items,
)
from oodprompt.studies.planting import cramers_v
from tests.helpers.digits import idx, put_items
from tests.helpers.runs import REPOSITORY

REAL = REPOSITORY.parent / "shared" / "data" / "mnist"
SIZES = {"n_train": 200, "n_val": 40, "n_test": 60}
NAMES = KINDS["mnist"].classes

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("items")
    put_items(folder / "MNIST" / "raw", {"train": 40, "t10k": 12})
    put_items(folder / "FashionMNIST" / "raw", {"train": 40, "t10k": 12})
    return folder


@pytest.fixture(scope="session")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One setting that several tests look at: nine, V = 0.9."""
    return build_setting("mnist", root, tmp_path_factory.mktemp("out"), "nine", 0.9, **SIZES)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def as_dataset(folder: Path, file: str = "metadata.csv") -> DatasetBase:
    cfg = get_cfg_default()
    cfg.DATASET.ROOT, cfg.DATASET.NAME, cfg.DATASET.CSV.FILE = str(folder), "CSV", file
    cfg.DATASET.CSV.OUTSIDE = True
    return build_dataset(cfg)


def table(rows: list[dict[str, str]]) -> np.ndarray:
    count = Counter((row["label"], row["attribute"]) for row in rows)
    return np.array([[count[name, "0"], count[name, "1"]] for name in NAMES])


# --- idx files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (3, 28, 28), (2, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_is_read_as_torchvision_reads_it(tmp_path: Path, shape: tuple[int, ...], packed: bool) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    plain = tmp_path / "plain"
    plain.write_bytes(idx(array))
    path = tmp_path / "file"
    (tmp_path / "file.gz" if packed else path).write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    found = read_idx(path)
    assert found.dtype == np.uint8 and (found == array).all()
    assert (found == read_sn3_pascalvincent_tensor(str(plain)).numpy()).all()
    if packed:
        assert (read_idx(tmp_path / "file.gz") == array).all()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f", b"", r"not an idx file of bytes"),
        ("f", b"<html>", r"not an idx file of bytes \(it starts with 3c68746d\)"),
        ("f", b"\x00\x00\x0d\x01\x00\x00\x00\x00", r"not an idx file of bytes"),
        ("f", b"\x00\x00\x08\x03\x00\x00", r"ends within its header"),
        ("f", idx(np.zeros((2, 3), np.uint8))[:-1], r"holds 5 values and its header says 6"),
        ("f", idx(np.zeros((2, 3), np.uint8)) + b"\x00", r"holds 7 values and its header says 6"),
        ("f.gz", b"no gzip", r"cannot read .*f.gz"),
        ("f.gz", gzip.compress(bytes(500), mtime=0)[:-9], r"cannot read .*f.gz"),
        ("f.gz", gzip.compress(idx(np.arange(99, dtype=np.uint8)), mtime=0)[:20] + b"\xff" * 40, r"cannot read .*f.gz"),
    ],
)
def test_files_that_are_no_idx(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_idx(tmp_path / "f")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no file {tmp_path}/f, nor f.gz beside it"):
        read_idx(tmp_path / "f")


def test_items_are_found_where_torchvision_keeps_them_or_in_the_folder_itself(root: Path) -> None:
    images, labels = read_items("mnist", root, "t10k")
    assert images.shape == (120, 28, 28) and Counter(labels.tolist()) == dict.fromkeys(range(10), 12)
    assert (images[:, 0, 0] == labels + 1).all()
    again, _ = read_items("mnist", root / "MNIST" / "raw", "t10k")
    assert (again == images).all()


def test_items_that_are_missing_or_do_not_match(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no train-images-idx3-ubyte and train-labels-idx1-ubyte \(or .gz\) in .*MNIST/raw"
    ):
        read_items("mnist", tmp_path, "train")
    put_items(tmp_path, {"train": 1})
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(9, np.uint8)))
    with pytest.raises(UserError, match=r"images \(10, 28, 28\) and labels \(9,\)"):
        read_items("mnist", tmp_path, "train")
    labels.write_bytes(idx(np.full(10, 10, np.uint8)))
    with pytest.raises(UserError, match="label 10; MNIST has 10 classes"):
        read_items("mnist", tmp_path, "train")


def test_torchvision_downloads_when_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(root: str, download: bool) -> None:
        assert download
        put_items(Path(root) / "FashionMNIST" / "raw", {"train": 1})

    def fail(root: str, download: bool) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(digits.datasets, "MNIST", fail)
    monkeypatch.setattr(digits.datasets, "FashionMNIST", fetch)
    with pytest.raises(UserError, match="cannot download MNIST .* no network; put its four idx files"):
        read_items("mnist", tmp_path, "train", download=True)
    assert read_items("fashion", tmp_path, "train", download=True)[0].shape == (10, 28, 28)


# --- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "rectangle"), [(0, -1), (3, 1), (2, 0), (1, 2)])
def test_quadrants(place: int, rectangle: int) -> None:
    item = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    image = quadrant_image(item, place, rectangle)
    assert image.shape == (56, 56, 3) and image.dtype == np.uint8
    for y in range(56):
        for x in range(56):
            quadrant = 2 * (y >= 28) + (x >= 28)
            colour = (
                [item[y % 28, x % 28]] * 3 if quadrant == place else [255, 0, 0] if quadrant == rectangle else [0] * 3
            )
            assert image[y, x].tolist() == colour
    assert QUADRANTS[1] == (28, 0, 56, 28) and QUADRANTS[2] == (0, 28, 28, 56)


# --- settings --------------------------------------------------------------------------------------------------


def test_what_is_planted(built: Path) -> None:
    setting = json.loads((built / "setting.json").read_text())
    rows = rows_of(built / "metadata.csv")
    held_out = [row for row in rows_of(built / "finetune.csv") if row["split"] == "val"]
    by_split = {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in by_split.items()} == {"train": 190, "val": 40, "test": 60}
    assert len(held_out) == 10 and setting["sizes"] == {"train": 190, "held_out": 10, "val": 40, "test": 60}
    whole = table(by_split["train"] + held_out)
    assert whole.tolist() == setting["table"] and whole.sum() == 200
    assert setting["v_reached"] == pytest.approx(cramers_v(whole)) == pytest.approx(0.9, abs=0.02)
    assert whole[9, 1] > whole[9, 0] and (whole[:9, 0] > 5 * whole[:9, 1]).all()
    assert setting["v"]["train"] == pytest.approx(cramers_v(table(by_split["train"])))
    for split, each in (("val", 2), ("test", 3)):
        assert (table(by_split[split]) == each).all() and setting["v"][split] == 0
    assert setting["target"] == "nine" and setting["feature"] == "rectangle" and setting["classes"] == list(NAMES)
    assert setting["attribute_names"] == ["no rectangle", "rectangle"] and setting["v_asked"] == 0.9
    assert setting["kind"] == "mnist" and setting["seed"] == 0 and setting["version"] == 1
    fine_tuning = {row["image"] for row in by_split["train"] + held_out}
    assert len(fine_tuning) == 200  # no image twice
    assert [row for row in rows_of(built / "finetune.csv") if row["split"] != "val"] == by_split["train"] + by_split[
        "test"
    ]


def test_regions_say_what_the_pixels_show(built: Path, root: Path) -> None:
    base = {
        f"../{p.parent.name}/{row.image}": row for p in [base_of(built) / "base.csv"] for row in read_base(p.parent)
    }
    files = {part: read_items("mnist", root, part) for part in ("train", "t10k")}
    metadata = {row["image"]: row for name in ("metadata.csv", "finetune.csv") for row in rows_of(built / name)}
    regions: dict[str, list[dict[str, str]]] = {}
    for row in rows_of(built / "regions.csv"):
        regions.setdefault(row["image"], []).append(row)
    assert regions.keys() == metadata.keys() and len(regions) == 300
    for name, parts in regions.items():
        pixels = np.array(Image.open(built / name))
        assert pixels.shape == (56, 56, 3) and len(parts) == 4
        seen = Counter()
        for part in parts:
            left, top, right, bottom = (int(part[side]) for side in ("left", "top", "right", "bottom"))
            crop = pixels[top:bottom, left:right]
            assert crop.shape == (28, 28, 3)
            seen[part["label"]] += 1
            if part["label"] == "empty":
                assert not crop.any()
            elif part["label"] == "rectangle":
                assert (crop == [255, 0, 0]).all()
            else:
                row = base[name]
                images, labels = files["train" if row.split == "train" else "t10k"]
                assert part["label"] == metadata[name]["label"] == NAMES[labels[row.item]]
                assert (crop == images[row.item][:, :, None]).all()
        assert seen["rectangle"] == int(metadata[name]["attribute"])
        assert seen["empty"] == 3 - seen["rectangle"] and seen[metadata[name]["label"]] == 1


def base_of(folder: Path) -> Path:
    return folder.parent / json.loads((folder / "setting.json").read_text())["base"]


def test_no_item_is_drawn_twice(built: Path) -> None:
    rows = read_base(base_of(built))
    items = {split: [row.item for row in rows if row.split == split] for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in items.items()} == {"train": 400 * 2, "val": 40, "test": 60}
    assert not set(items["val"]) & set(items["test"])
    assert len(set(items["val"])) == 40 and len(set(items["test"])) == 60
    # 80 of each class are drawn from 40: every one of them for the images without rectangle, and again with it
    assert set(Counter(items["train"]).values()) == {2}


def test_places_and_captions_are_drawn_at_random(built: Path) -> None:
    rows = [row for row in read_base(base_of(built)) if row.split == "train"]
    places = Counter((row.place, row.rectangle) for row in rows if row.present)
    assert len(places) == 12 and min(places.values()) > 15 and all(a != b for a, b in places)
    assert all(row.rectangle == -1 for row in rows if not row.present)
    assert set(Counter(row.place for row in rows if not row.present)) == {0, 1, 2, 3}
    used = Counter(next(t for t in CAPTIONS if t.format(NAMES[row.label]) == row.caption) for row in rows)
    assert used.keys() == set(CAPTIONS) and min(used.values()) > 150
    written = rows_of(built / "metadata.csv")
    assert all(row["label"] in row["caption"] and "rectangle" not in row["caption"] for row in written)
    labels = [row.label for row in rows]
    assert labels != sorted(labels)


def test_the_csv_data_set_reads_it(built: Path) -> None:
    data = as_dataset(built)
    assert sorted(data.classnames) == sorted(NAMES) and data.attribute_names == ("0", "1")
    assert [len(part) for part in (data.train_x, data.val, data.test)] == [190, 40, 60]
    rows = [row for row in rows_of(built / "metadata.csv") if row["split"] == "test"]
    assert [(d.classname, d.attribute) for d in data.test] == [(row["label"], int(row["attribute"])) for row in rows]
    assert len(as_dataset(built, "finetune.csv").val) == 10


def test_settings_of_a_seed_share_images_and_evaluation(built: Path, root: Path) -> None:
    other = build_setting("mnist", root, built.parent, 3, 0.7, **SIZES)
    assert other != built and base_of(other) == base_of(built)
    rows, others = (
        [row for row in rows_of(folder / "metadata.csv") if row["split"] != "train"] for folder in (built, other)
    )
    assert rows == others
    setting = json.loads((other / "setting.json").read_text())
    assert setting["target"] == "three" and setting["v_reached"] == pytest.approx(0.7, abs=0.02)
    for change in ({"seed": 1}, {"val_share": 0.1}):
        assert build_setting("mnist", root, built.parent, "nine", 0.9, **SIZES | change) not in (built, other)


def test_every_v_draws_its_images_anew(built: Path, root: Path) -> None:
    other = build_setting("mnist", root, built.parent, "nine", 0.90001, **SIZES)
    images, others = (
        {row["image"] for row in rows_of(folder / "metadata.csv") if row["split"] == "train"}
        for folder in (built, other)
    )
    assert len(images & others) < 150  # of 190, drawn from 800


def test_other_sizes_have_images_of_their_own(built: Path, root: Path) -> None:
    for change in ({"n_train": 100}, {"n_val": 60}, {"n_test": 40}):
        other = build_setting("mnist", root, built.parent, "nine", 0.9, **SIZES | change)
        assert base_of(other) != base_of(built)
        sizes = json.loads((other / "setting.json").read_text())["sizes"]
        wanted = SIZES | change
        assert (sizes["train"] + sizes["held_out"], sizes["val"], sizes["test"]) == tuple(wanted.values())


def test_a_seed_fixes_everything(built: Path, root: Path, tmp_path: Path) -> None:
    again = build_setting("mnist", root, tmp_path, 9, 0.9, **SIZES)
    assert again.name == built.name
    for folder, copy in ((built, again), (base_of(built), base_of(again))):
        names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
        assert all((folder / name).read_bytes() == (copy / name).read_bytes() for name in names)
    other = build_setting("mnist", root, tmp_path, 9, 0.9, **SIZES, seed=1)
    assert (base_of(other) / "base.csv").read_bytes() != (base_of(again) / "base.csv").read_bytes()


def test_what_exists_is_used_again(built: Path, tmp_path: Path) -> None:
    before = (built / "setting.json").stat().st_mtime_ns
    assert build_setting("mnist", tmp_path / "no items here", built.parent, "9", 0.9, **SIZES) == built
    assert (built / "setting.json").stat().st_mtime_ns == before


def test_a_build_that_is_cut_off_leaves_nothing(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = 0

    def cut_off(*args: Any) -> np.ndarray:
        nonlocal drawn
        drawn += 1
        if drawn > 20:
            raise KeyboardInterrupt
        return quadrant_image(*args)

    monkeypatch.setattr(digits, "quadrant_image", cut_off)
    with pytest.raises(KeyboardInterrupt):
        build_setting("mnist", root, tmp_path / "out", "nine", 0.9, **SIZES)
    assert list((tmp_path / "out").iterdir()) == []


def test_fashion(root: Path, tmp_path: Path) -> None:
    folder = build_setting("fashion", root, tmp_path, "ankle boot", 0.95, **SIZES)
    assert folder.name.startswith("fashion-ankle_boot-v0.95-seed0-")
    data = as_dataset(folder)
    assert sorted(data.classnames) == sorted(KINDS["fashion"].classes) and "t-shirt" in data.classnames


def test_no_image_is_held_out_for_a_share_of_zero(root: Path, tmp_path: Path) -> None:
    folder = build_setting("mnist", root, tmp_path, 0, 0.8, **SIZES | {"val_share": 0})
    assert json.loads((folder / "setting.json").read_text())["sizes"]["train"] == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "mnits"}, "no kind of quadrant images 'mnits': did you mean 'mnist'"),
        ({"target": "nin"}, "mnist has no class 'nin': did you mean 'nine'"),
        ({"target": 10}, "mnist has no class 10"),
        ({"target": -1}, "mnist has no class -1"),
        ({"V": 1.5}, "between 0 and 1, and 1.5"),
        ({"n_train": 19}, "n_train is 19; 10 classes need 20 images or more"),
        ({"n_val": 19}, "n_val is 19"),
        ({"n_test": 0}, "n_test is 0"),
        ({"val_share": 1.0}, "val_share is a share from 0 to below 1, not 1"),
        ({"n_test": 100}, "test needs 10 more images of 'zero' and the files have 8 left"),
        ({"n_val": 140}, "val needs 14 more images of 'zero' and the files have 12 left"),
    ],
)
def test_what_cannot_be_built(root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    asked = {"kind": "mnist", "root": root, "out": tmp_path / "out", "target": "nine", "V": 0.9} | SIZES
    with pytest.raises(UserError, match=message):
        build_setting(**asked | change)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_place_that_is_taken(root: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot build .*; free some space, move what is there away, or choose another"):
        build_setting("mnist", root, tmp_path / "out", "nine", 0.9, **SIZES)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real digits are not at hand")
def test_the_real_digits(tmp_path: Path) -> None:
    images, labels = read_items("mnist", REAL, "t10k")
    assert images.shape == (10_000, 28, 28) and np.bincount(labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    folder = build_setting("mnist", REAL, tmp_path, "nine", 0.9, n_train=1000, n_val=100, n_test=100)
    setting = json.loads((folder / "setting.json").read_text())
    assert setting["v_reached"] == pytest.approx(0.9, abs=0.005)
    items = [row.item for row in read_base(base_of(folder)) if row.split == "train"]
    assert len(items) == len(set(items)) == 4000
