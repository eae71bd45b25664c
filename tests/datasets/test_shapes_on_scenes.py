"""Data sets: the one that renders itself, and Waterbirds' file list."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from oodprompt.datasets import rendering
from oodprompt.datasets.metadata import read_metadata
from oodprompt.datasets.rendering import COLOURS, SCENES, SHAPES, Difficulty, render, visible_colours
from oodprompt.datasets.shapes_on_scenes import ShapesOnScenes, groups_of
from PIL import Image

from oodprompt.config.keys import check_values
from oodprompt.errors import UserError
from tests.helpers.small_data import MakeCfg

SETS = {  # keys below DATASET.SHAPES
    "two": {"NUM_TRAIN": 21, "NUM_VAL": 9, "NUM_TEST": 8, "CORRELATION": 0.9},
    "three of four": {
        "CLASSES": ("ring", "star", "heart"),
        "SCENES": ("night", "snow", "brick", "sky"),
        "NUM_TRAIN": 31,
        "NUM_VAL": 12,
        "NUM_TEST": 24,
        "CORRELATION": 0.5,
    },
}


def shapes(make_cfg: MakeCfg, root: Path, **keys: object) -> ShapesOnScenes:
    return ShapesOnScenes(make_cfg(DATASET__ROOT=str(root), **{f"DATASET__SHAPES__{k}": v for k, v in keys.items()}))


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SETS)
def test_same_settings_give_the_same_bytes(make_cfg: MakeCfg, tmp_path: Path, name: str) -> None:
    for root in ("a", "b"):
        shapes(make_cfg, tmp_path / root, **SETS[name])
    files = files_of(tmp_path / "a")
    assert files == files_of(tmp_path / "b")
    assert len({content for path, content in files.items() if path.endswith(".png")}) > 30
    shapes(make_cfg, tmp_path / "b", **SETS[name], RENDER_SEED=1)
    assert len(files_of(tmp_path / "b")) == 2 * len(files)
    assert not list((tmp_path / "b" / "shapes_on_scenes").glob(".*"))


def test_rendered_files_are_kept(make_cfg: MakeCfg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shapes(make_cfg, tmp_path)
    monkeypatch.setattr("oodprompt.datasets.shapes_on_scenes.render", lambda *_: pytest.fail("rendered again"))
    again = shapes(make_cfg, tmp_path)
    assert [d.impath for d in again.train_x] == [d.impath for d in first.train_x]


def test_an_interrupted_rendering_leaves_nothing(
    make_cfg: MakeCfg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("oodprompt.datasets.shapes_on_scenes.render", interrupt)
        with pytest.raises(KeyboardInterrupt):
            shapes(make_cfg, tmp_path)
    assert list((tmp_path / "shapes_on_scenes").iterdir()) == []
    assert len(shapes(make_cfg, tmp_path).train_x) == 22


def test_a_root_that_cannot_be_written(make_cfg: MakeCfg, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot render ShapesOnScenes into .*choose another --root"):
        shapes(make_cfg, tmp_path / "file")


@pytest.mark.parametrize(("correlation", "own"), [(0.95, 19), (0.5, 10), (0.0, 0), (1.0, 20)])
def test_training_groups_follow_the_correlation(make_cfg: MakeCfg, correlation: float, own: int) -> None:
    keys = make_cfg(DATASET__SHAPES__CORRELATION=correlation, DATASET__SHAPES__NUM_TRAIN=40).DATASET.SHAPES
    count = Counter(groups_of("train", keys))
    assert count == Counter({(0, 0): own, (1, 1): own, (0, 1): 20 - own, (1, 0): 20 - own})


@pytest.mark.parametrize("name", SETS)
def test_groups_of_the_splits(make_cfg: MakeCfg, data_root: Path, name: str) -> None:
    keys, dataset = SETS[name], shapes(make_cfg, data_root, **SETS[name])
    classes, scenes = len(dataset.classnames), len(dataset.attribute_names)
    train = Counter((d.label, d.attribute) for d in dataset.train_x)
    assert sum(train.values()) == keys["NUM_TRAIN"]
    for y in range(classes):
        mine = {a: train[y, a] for a in range(scenes)}
        assert mine.pop(y) == round(keys["CORRELATION"] * sum(train[y, a] for a in range(scenes)))
        assert max(mine.values()) - min(mine.values()) <= 1
    for split, total in ((dataset.val, keys["NUM_VAL"]), (dataset.test, keys["NUM_TEST"])):
        count = Counter((d.label, d.attribute) for d in split)
        assert len(count) == classes * scenes
        assert set(count.values()) == {total // (classes * scenes)}


def test_what_the_data_set_says_of_itself(make_cfg: MakeCfg, data_root: Path) -> None:
    dataset = shapes(make_cfg, data_root, **SETS["three of four"])
    assert dataset.classnames == ["ring", "star", "heart"]
    assert dataset.attribute_names == ("night", "snow", "brick", "sky")
    assert dataset.has_attributes
    assert [prompts[0] for prompts in dataset.attribute_prompts][1] == "a photo of snow."
    for datum in dataset.train_x[:5]:
        scene = dataset.attribute_names[datum.attribute]
        assert datum.impath.endswith(f"_{datum.classname}_{scene}.png")
        assert (datum.domain, Image.open(datum.impath).size) == (datum.attribute, (48, 48))


def test_file_list_has_waterbirds_columns(make_cfg: MakeCfg, data_root: Path) -> None:
    dataset = shapes(make_cfg, data_root)
    folder = Path(dataset.train_x[0].impath).parents[1]
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["img_id", "img_filename", "y", "split", "place"]
    assert Counter(row["split"] for row in rows) == {"0": 22, "1": 4, "2": 8}
    assert [int(row["img_id"]) for row in rows] == list(range(34))
    assert all((folder / row["img_filename"]).is_file() for row in rows)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CLASSES", ("circle", "squar"), "CLASSES: there is no 'squar': did you mean 'square'"),
        ("CLASSES", ("circle",), "CLASSES: .* two or more different names"),
        ("SCENES", ("sky", "sky"), "SCENES: .* two or more different names"),
        ("CLASSES", ("circle", "square", "star"), "SCENES must hold at least as many names"),
        ("CORRELATION", 1.5, "CORRELATION is a share between 0 and 1, not 1.5"),
        ("NUM_VAL", 3, "NUM_VAL is 3; there are 4 groups"),
        ("RADIUS", 0.2, r"RADIUS is a range \(low, high\)"),
        ("RADIUS", (0.2, 0.6), r"RADIUS is a range .* up to 0.48"),
        ("OPACITY", (0.8, 0.3), r"OPACITY is a range \(low, high\)"),
        ("OPACITY", ("a", "b"), r"OPACITY is a range \(low, high\)"),
        ("NOISE", -1.0, "NOISE cannot be negative"),
        ("RENDER_SEED", -1, "RENDER_SEED cannot be negative"),
    ],
)
def test_impossible_settings(make_cfg: MakeCfg, tmp_path: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=rf"DATASET\.SHAPES\.{message}"):
        check_values(make_cfg(**{f"DATASET__SHAPES__{key}": value}))
        shapes(make_cfg, tmp_path, **{key: value})
    assert files_of(tmp_path) == {}


# --- rendering -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", SCENES)
def test_every_shape_shows_on_every_scene(scene: str) -> None:
    clear = Difficulty(radius=(0.3, 0.3), opacity=(1.0, 1.0), noise=0.0)
    colour = visible_colours((scene,))[0]
    images = [render(np.random.default_rng(3), shape, colour, scene, 48, clear) for shape in SHAPES]
    assert all(image.shape == (48, 48, 3) and image.dtype == np.uint8 for image in images)
    assert len({image.tobytes() for image in images}) == len(SHAPES)
    assert np.array_equal(images[0], render(np.random.default_rng(3), SHAPES[0], colour, scene, 48, clear))


def test_camouflage_colours_are_left_out() -> None:
    assert visible_colours(()) == list(COLOURS)
    assert not {"blue", "green"} & set(visible_colours(("water", "land")))
    assert "green" in visible_colours(("water",))
    assert visible_colours(SCENES), "some colour shows on all scenes"
    assert rendering._CAMOUFLAGE.keys() == set(SCENES)
    assert set().union(*rendering._CAMOUFLAGE.values()) <= COLOURS.keys()


def test_camouflage_colours_are_not_drawn(make_cfg: MakeCfg, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Counter()

    def watch(rng: np.random.Generator, shape: str, colour: str, scene: str, *rest: object) -> np.ndarray:
        drawn[colour, scene] += 1
        return np.zeros((48, 48, 3), np.uint8)

    monkeypatch.setattr("oodprompt.datasets.shapes_on_scenes.render", watch)
    shapes(make_cfg, tmp_path, NUM_TRAIN=400)
    allowed = visible_colours(("water", "land"))
    assert drawn.keys() == {(colour, scene) for colour in allowed for scene in ("water", "land")}


# --- file lists ------------------------------------------------------------------------------------------------

HEAD = "img_id,img_filename,y,split,place"


def write_list(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
    path = folder / "metadata.csv"
    path.write_text("\n".join(lines), encoding=encoding)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_file_list_is_read(tmp_path: Path, encoding: str) -> None:
    lines = ("img_filename,place,y,split,note", "a.png,1,0,0,x", "b.png,0,1,2,", "a.png,3,1,1,")
    path = write_list(tmp_path, *lines, encoding=encoding)
    train, val, test = read_metadata(path, tmp_path, ("landbird", "waterbird"))
    fields = [(d.impath, d.label, d.classname, d.attribute, d.domain) for d in (*train, *val, *test)]
    a, b = (str(tmp_path / name) for name in ("a.png", "b.png"))
    assert fields == [(a, 0, "landbird", 1, 1), (a, 1, "waterbird", 3, 3), (b, 1, "waterbird", 0, 0)]


def test_file_list_with_floats_gaps_and_backslashes(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds/c.png").touch()
    path = write_list(tmp_path, HEAD, "1,birds\\c.png,1.0,0.0,1.0", "2,birds/c.png,0.0,1.0,nan", "3,a.png,1,2,")
    splits = read_metadata(path, tmp_path, ("landbird", "waterbird"), attributes=2)
    c, a = (str(tmp_path / name) for name in ("birds/c.png", "a.png"))
    assert [[(d.impath, d.label, d.attribute) for d in split] for split in splits] == [
        [(c, 1, 1)],
        [(c, 0, -1)],
        [(a, 1, -1)],
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((HEAD, "1,a.png,0,0,0", "2,b.png,x,0,0"), "line 3: y, split and place must be whole numbers"),
        ((HEAD, "", "1,a.png,0,0,0", "", "2,b.png,0,,0"), "line 5: y, split and place must be whole numbers"),
        ((HEAD, "1,a.png,0"), "line 2: y, split and place must be whole numbers"),
        ((HEAD, "1,a.png,2,0,0"), "line 2: y 2, split 0, place 0 are out of range .y below 2"),
        ((HEAD, "1,a.png,0,3,0"), "line 2: y 0, split 3"),
        ((HEAD, "1,a.png,0,0,-1"), "line 2: y 0, split 0, place -1"),
        ((HEAD, "1,a.png,0,0,0.5"), "line 2: y, split and place must be whole numbers"),
        ((HEAD, "1,a.png,nan,0,0"), "line 2: y, split and place must be whole numbers"),
        ((HEAD, "1,a.png,0,0,0", "2,c.png,0,0,0"), r"line 3 names .*c\.png, which is missing"),
        ((HEAD, "1,,0,0,0"), "line 2 names .*, which is missing"),
        (("img_id,img_filename,y", "1,a.png,0"), ": column split, place is missing; expected img_filename, y"),
        ((), ": column img_filename, y, split, place is missing"),
        ((HEAD, f"1,{'a' * 140000},0,0,0"), " is not a csv file: field larger"),
    ],
)
def test_bad_file_lists_name_file_and_line(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    path = write_list(tmp_path, *lines)
    with pytest.raises(UserError, match=f"^{path},? ?{message}"):
        read_metadata(path, tmp_path, ("landbird", "waterbird"))


def test_missing_and_binary_file_lists(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file list at .*columns img_filename, y, split, place"):
        read_metadata(tmp_path / "gone.csv", tmp_path, ("a",))
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=r"m\.csv is not a csv file"):
        read_metadata(tmp_path / "m.csv", tmp_path, ("a",))
