"""PhotosOnPlaces: animals cut out of real photographs, on photographs of places."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from oodprompt.datasets import photos_on_places
from oodprompt.datasets.cutting import soft_mask
from oodprompt.datasets.tiny_imagenet import HELD_OUT_FROM
from PIL import Image

from oodprompt.config.keys import check_values, get_cfg_default, set_key
from oodprompt.data.dataset import DatasetBase, build_dataset
from oodprompt.errors import UserError
from tests.helpers.trees.tiny_imagenet import tree
from tests.helpers.trees.writing import groups, write

SMALL = {"NUM_TRAIN": 40, "NUM_VAL": 8, "NUM_TEST": 12, "CORRELATION": 0.8, "SIZE": 96}
FEW = {"NUM_TRAIN": 4, "NUM_VAL": 4, "NUM_TEST": 4}


def photos(root: Path, **keys: object) -> DatasetBase:
    cfg = get_cfg_default()
    for key, value in {"ROOT": str(root), "NAME": "PhotosOnPlaces"}.items():
        set_key(cfg, f"DATASET.{key}", value, "test")
    for key, value in keys.items():
        set_key(cfg, f"DATASET.PHOTOS.{key}", value, "test")
    check_values(cfg)
    return build_dataset(cfg)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def built(source: Path) -> tuple[Path, DatasetBase]:
    """A folder ROOT, and the data set built there."""
    return source.parent, photos(source.parent, **SMALL)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(root: Path) -> list[dict[str, str]]:
    (path,) = root.glob("photos_on_places/*/metadata.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_same_settings_give_the_same_bytes(tmp_path: Path, built: tuple[Path, DatasetBase], source: Path) -> None:
    (tmp_path / source.name).symlink_to(source)
    photos(tmp_path, **SMALL)
    files = files_of(tmp_path / "photos_on_places")
    assert files == files_of(built[0] / "photos_on_places")
    assert len({content for name, content in files.items() if name.endswith(".png")}) == 60
    one, other = ([Path(d.impath).read_bytes() for d in photos(tmp_path, **FEW, BUILD_SEED=i).test] for i in (0, 1))
    assert set(one).isdisjoint(other)


def test_groups_and_what_the_data_set_says_of_itself(built: tuple[Path, DatasetBase]) -> None:
    data = built[1]
    assert groups(data.train_x) == {(0, 0): 16, (0, 1): 4, (1, 1): 16, (1, 0): 4}
    assert set(groups(data.val).values()) == {2} and set(groups(data.test).values()) == {3}
    assert data.classnames == ["dog", "cat"] and data.attribute_names == ("land", "water")
    assert [prompts[0] for prompts in data.attribute_prompts] == ["a photo of land.", "a photo of water."]
    assert {Image.open(d.impath).size for d in data.test} == {(96, 96)}
    assert all(d.impath.endswith(f"_{d.classname}_{('land', 'water')[d.attribute]}.png") for d in data.train_x)


def test_photographs_are_held_out_and_no_split_shares_one(built: tuple[Path, DatasetBase]) -> None:
    rows = rows_of(built[0])
    assert list(rows[0])[:5] == ["img_id", "img_filename", "y", "split", "place"]
    used = {
        s: {r[kind] for r in rows if r["split"] == s for kind in ("object_filename", "place_filename")} for s in "012"
    }
    numbers = [int(Path(name).stem.rpartition("_")[2]) for name in used["0"] | used["1"]]
    assert min(numbers) >= HELD_OUT_FROM == 400 and not used["0"] & used["1"]
    assert all(name.startswith("val_") for name in used["2"])
    assert not any(name.startswith("val_") for name in used["0"] | used["1"])
    left_out = {f"{wnid}_{number}.JPEG" for wnid, out in photos_on_places.LEFT_OUT.items() for number in out}
    assert not (used["0"] | used["1"]) & left_out
    turns = Counter(r["object_filename"] for r in rows if (r["split"], r["y"], r["place"]) == ("0", "1", "1"))
    assert set(turns.values()) == {1, 2} and len(turns) == 10  # 16 images of 10 photographs of cats


def test_images_are_built_once(
    tmp_path: Path, built: tuple[Path, DatasetBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos_on_places").symlink_to(built[0] / "photos_on_places")
    monkeypatch.setattr(photos_on_places, "compose", lambda *_: pytest.fail("built again"))
    assert Path(photos(tmp_path, **SMALL).train_x[3].impath).name == Path(built[1].train_x[3].impath).name


def test_a_photograph_that_cannot_be_read(tmp_path: Path) -> None:
    bad = tree(tmp_path) / "train/n02793495/images/n02793495_401.JPEG"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(UserError, match=f"cannot read the image {bad}: "):
        photos(tmp_path, **SMALL)
    assert list((tmp_path / "photos_on_places").iterdir()) == []


def test_animals_that_are_too_small_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = tree(tmp_path) / "train/n02123045/n02123045_boxes.txt"
    lines = boxes.read_text().splitlines()
    write(boxes, *(line if "_400" in line else line.replace("53\t53", "53\t28") for line in lines))
    photos(tmp_path, **FEW)
    said = "PhotosOnPlaces is made from 62 photographs of dog and cat and 29 of land and water; in 4 others the dog or"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "numbers",
            r"has no photograph of 'cat' for the train split .train/<id>/images from number 400 on, of n02123045",
        ),
        ("boxes", r"there is no .*n02123394_boxes\.txt, the boxes of a class; fetch the archive again"),
        ("photograph", r"n02123394_boxes\.txt, line 3 names .*n02123394_400\.JPEG, which is missing"),
        ("name", r"n02123394_boxes\.txt, line 1: 'n02123394_x\.JPEG' is no name of the form n02123394_<number>\.JPEG"),
    ],
)
def test_trees_that_lack_something(tmp_path: Path, change: str, message: str) -> None:
    folder = tree(tmp_path) / "train"
    boxes = {wnid: folder / wnid / f"{wnid}_boxes.txt" for wnid in photos_on_places.OBJECTS["cat"]}
    if change == "numbers":
        for path in boxes.values():
            write(path, *path.read_text().splitlines()[:2])
    elif change == "boxes":
        boxes["n02123394"].unlink()
    elif change == "photograph":
        (folder / "n02123394/images/n02123394_400.JPEG").unlink()
    else:
        write(boxes["n02123394"], "n02123394_x.JPEG\t0\t0\t9\t9")
    with pytest.raises(UserError, match=message):
        photos(tmp_path, **FEW)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CLASSES", ("dog", "cow"), "CLASSES: there is no 'cow'"),
        ("PLACES", ("water",), "PLACES: .* two or more different names"),
        ("NUM_TEST", 3, "NUM_TEST is 3; there are 4 groups"),
        ("SCALE", (0.5, 1.5), r"SCALE is a range \(low, high\)"),
        ("SIZE", 80, "SIZE: unknown choice 80"),
    ],
)
def test_impossible_settings(tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"DATASET\.PHOTOS\.{message}"):
        photos(tmp_path, **{key: value})
    assert not (tmp_path / "photos_on_places").exists()


# --- the cut ---------------------------------------------------------------------------------------------------------


def test_colours_move_the_outline() -> None:
    """A red cross in its box on grass: the ellipse would take the grass between its arms along."""
    rows, columns = np.mgrid[:64, :64]
    cross = (abs(rows - 32) < 20) & (abs(columns - 32) < 6) | (abs(columns - 32) < 20) & (abs(rows - 32) < 6)
    noise = np.random.default_rng(0).normal(0, 5, (64, 64, 3))
    pixels = (np.where(cross[..., None], (200, 40, 40), (60, 140, 50)) + noise).astype(np.uint8)
    mask = soft_mask(pixels, (13, 13, 51, 51))
    far = cross & ((abs(rows - 32) > 14) | (abs(columns - 32) > 14)) & (abs(rows - 32) < 18) & (abs(columns - 32) < 18)
    between = (abs(rows - 32) > 10) & (abs(columns - 32) > 10)
    assert mask[far].min() > 0.5 and mask[between].max() < 0.3 and mask.min() >= 0 and mask.max() <= 1


def test_the_ellipse_stays_where_a_box_fills_its_photograph() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    mask = soft_mask(pixels, (0, 0, 63, 63))
    assert mask[8:56, 8:56].min() > 0.4 and mask[32, 32] == 1 and mask[0].max() < 0.2
    assert np.allclose(mask, mask[::-1]) and np.allclose(mask, mask[:, ::-1])
