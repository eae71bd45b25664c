"""Settings of a small file in COCO's form."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oodprompt.config.keys import get_cfg_default
from oodprompt.data.dataset import build_dataset
from oodprompt.errors import UserError
from oodprompt.studies.coco import CocoPair, _apart, build_coco_setting, coco_pairs, fitting_table, naming, read_coco
from oodprompt.studies.planting import contingency, cramers_v
from tests.helpers.coco import IDS, KINDS, PAIR, coco


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    coco(folder, "train")
    coco(folder, "val", seed=1)
    return folder


@pytest.fixture(scope="session")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_coco_setting(root, tmp_path_factory.mktemp("out"), PAIR, 0.8, n_train=90, n_val=60, n_test=60)


def instances(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def captions(root: Path) -> Path:
    return root / "annotations" / "captions_train2017.json"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def shown_in(root: Path, split: str) -> dict[str, tuple[list[str], list[str]]]:
    """Of every image, by its path: the names of its objects and of its crowds."""
    content = json.loads(instances(root, split).read_text())
    names = {number: name for name, number in IDS.items()}
    found: dict[int, tuple[list[str], list[str]]] = {image["id"]: ([], []) for image in content["images"]}
    for note in content["annotations"]:
        found[note["image_id"]][note["iscrowd"]].append(names[note["category_id"]])
    paths = {image["id"]: str(root.absolute() / f"{split}2017" / image["file_name"]) for image in content["images"]}
    return {paths[i]: found[i] for i in paths}


# --- reading ---------------------------------------------------------------------------------------------------


def test_cells_hold_the_images_that_can_be_told(root: Path) -> None:
    data = read_coco(instances(root, "val"))
    shown = shown_in(root, "val")
    for (label, kinds), cell in zip(
        {"cat": (0, 1), "dog": (2, 3), "traffic light": (4, 5)}.items(),
        data.cells(*PAIR[::2], named=False),
        strict=True,
    ):
        for present, (kind, images) in enumerate(zip(kinds, cell, strict=True)):
            assert len(images) == KINDS[kind][3]
            for i in images:
                objects, crowds = shown[str(root / "val2017" / data.files[i])]
                assert set(objects) & set(PAIR.labels) == {label} and ("person" in objects) == bool(present)
                assert not set(crowds) & {"person", *PAIR.labels}


def test_with_captions_only_images_whose_label_is_named(root: Path) -> None:
    data = read_coco(instances(root, "train"), captions(root))
    plain, named = (data.cells(*PAIR[::2], named=named) for named in (False, True))
    for label, before, after in zip(PAIR.labels, plain, named, strict=True):
        for some, fewer in zip(before, after, strict=True):
            assert fewer.tolist() == [i for i in some if i % 5] and len(fewer) < len(some)
            assert all(naming(data.captions[i], label)[0] == f"Two {label.title()}s there" for i in fewer)


def test_naming() -> None:
    texts = ["A CAT.", "two cats", "a catalogue", "concat", "couches", "a couch!", "a hot dog"]
    assert naming(texts, "cat") == ["A CAT.", "two cats"]
    assert naming(texts, "couch") == ["couches", "a couch!"] and naming(texts, "hot dog") == ["a hot dog"]
    assert naming(texts, "c.t") == []


def test_boxes_stay_within_the_image(tmp_path: Path) -> None:
    boxes = [[-5, 10, 20, 30], [90, 70, 30, 30], [10, 10, 0, 5], [200, 10, 5, 5], [1.5, 2.25, 3, 4]]
    content = {
        "images": [{"id": 7, "file_name": "a.jpg", "width": 100, "height": 80}],
        "categories": [{"id": k, "name": f"c{k}"} for k in range(5)],
        "annotations": [{"image_id": 7, "category_id": k, "bbox": box} for k, box in enumerate(boxes)],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    data = read_coco(path)
    assert data.boxes == (((0, 10, 15, 40, "c0"), (90, 70, 100, 80, "c1"), (1.5, 2.25, 4.5, 6.25, "c4")),)
    assert data.shown.tolist() == [[True, True, False, False, True]] and data.captions == ((),)
    assert read_coco(path) is data
    content["images"][0]["width"] = 300
    path.write_text(json.dumps(content) + " ")
    assert len(read_coco(path).boxes[0]) == 4  # the file has changed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read .*f.json"),
        ("[]", "f.json has no images, annotations, categories; expected a COCO file"),
        ('{"images": [], "annotations": []}', "f.json has no categories"),
        ('{"images": [{}], "annotations": [], "categories": []}', "not of COCO's form .KeyError: 'id'"),
        ('{"images": [], "annotations": [{"image_id": 1, "category_id": 1}], "categories": []}', "not of COCO's form"),
        ('{"images": [3], "annotations": [], "categories": []}', "not of COCO's form .TypeError"),
    ],
)
def test_files_of_another_form(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_coco(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no file {tmp_path}/f.json; put COCO's annotations there"):
        read_coco(tmp_path / "f.json")


# --- pairs -----------------------------------------------------------------------------------------------------


def slow_smallest(root: Path, split: str, pair: CocoPair) -> int:
    cells: Counter[tuple[str, bool]] = Counter({(label, a): 0 for label in pair.labels for a in (False, True)})
    for objects, crowds in shown_in(root, split).values():
        labels = set(objects) & set(pair.labels)
        if len(labels) == 1 and not set(crowds) & {pair.feature, *pair.labels}:
            cells[labels.pop(), pair.feature in objects] += 1
    return min(cells.values())


def test_pairs(root: Path) -> None:
    found = coco_pairs(instances(root, "train"), None, instances(root, "val"), min_images=40, min_evaluation=9)
    assert {pair.feature for pair in found} == {"person"}
    assert {pair.label for pair in found} == {"cat", "dog", "traffic light"} and len(found) == 3
    for pair in found:
        assert (
            pair.label in pair.labels and 2 <= len(pair.labels) <= 3 and list(pair.labels) == sorted(set(pair.labels))
        )
        assert slow_smallest(root, "train", pair) >= 40 and slow_smallest(root, "val", pair) >= 9


def test_pairs_need_enough_images_of_both_files(root: Path) -> None:
    train, val = instances(root, "train"), instances(root, "val")
    assert {pair.label for pair in coco_pairs(train, None, val, sizes=(2, 2), min_images=40, min_evaluation=16)} == {
        "cat", "traffic light",
    }  # fmt: skip
    for seed in range(6):  # 14 images show a dog and no person; 5 of these show a cat too
        pairs = coco_pairs(train, None, val, sizes=(2, 2), min_images=40, min_evaluation=10, seed=seed)
        assert pairs and ("cat", "dog") not in {pair.labels for pair in pairs}
    with_dog = coco_pairs(train, sizes=(3, 3), min_images=50)
    assert with_dog and all("dog" in pair.labels for pair in with_dog)
    with pytest.raises(UserError, match="no pair of categories has 50 images in every cell"):
        coco_pairs(train, captions(root), sizes=(3, 3), min_images=50)  # of 50 images, captions of 40 name the dog
    with pytest.raises(UserError, match="no pair of categories"):
        coco_pairs(train, sizes=(4, 5), min_images=40)


def test_candidates_are_categories_that_are_seen_with_and_without_another(root: Path) -> None:
    data = read_coco(instances(root, "train"))
    shown = [set(objects) for objects, _ in shown_in(root, "train").values()]
    for e, feature in enumerate(data.categories):
        for y, label in enumerate(data.categories):
            both = sum({feature, label} <= objects for objects in shown)
            alone = sum(label in objects and feature not in objects for objects in shown)
            assert _apart(data)[e, y] == min(both, alone)


def test_pairs_are_drawn_by_the_seed(root: Path) -> None:
    def draw(**keys: Any) -> list[CocoPair]:
        return coco_pairs(instances(root, "train"), min_images=5, **keys)

    assert draw(seed=1) == draw(seed=1) and len({tuple(draw(seed=seed)) for seed in range(5)}) > 1
    assert draw(seed=1, count=2) == draw(seed=1)[:2]
    assert len({pair[:2] for pair in draw()}) == len(draw())
    for pair in draw():
        assert pair.feature not in pair.labels


@pytest.mark.parametrize("sizes", [(1, 2), (3, 2)])
def test_sizes_that_cannot_be(root: Path, sizes: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="two or more classes"):
        coco_pairs(instances(root, "train"), sizes=sizes)


def test_too_few_categories(root: Path) -> None:
    with pytest.raises(UserError, match="has 6 categories; 6 labels and a feature need more"):
        coco_pairs(instances(root, "train"), sizes=(6, 6))


# --- settings --------------------------------------------------------------------------------------------------


def test_what_is_planted(built: Path, root: Path) -> None:
    setting = json.loads((built / "setting.json").read_text())
    assert (setting["kind"], setting["feature"], setting["target"]) == ("coco", "person", "cat")
    assert setting["classes"] == ["cat", "dog", "traffic light"] and setting["v_asked"] == 0.8
    assert setting["sizes"] == {"train": 86, "held_out": 4, "val": 40, "test": 42}
    whole = np.array(setting["table"])
    assert whole.sum(axis=1).tolist() == [30, 30, 30] and setting["v_reached"] == cramers_v(whole)
    assert setting["v_reached"] == pytest.approx(0.8, abs=0.02) and whole[0, 1] > 20 and (whole[1:, 0] > 20).all()
    # 12, 9 and 20 images of the rarer presence, halved between val and test, of at most 10 in each
    assert setting["tables"]["val"] == [[6, 6], [4, 4], [10, 10]]
    assert setting["tables"]["test"] == [[6, 6], [5, 5], [10, 10]]
    assert setting["v"]["val"] == setting["v"]["test"] == 0
    shown = shown_in(root, "train") | shown_in(root, "val")
    rows = rows_of(built / "metadata.csv")
    held_out = [row for row in rows_of(built / "finetune.csv") if row["split"] == "val"]
    for row in rows + held_out:
        objects, _ = shown[row["image"]]
        assert set(objects) & set(PAIR.labels) == {row["label"]} and ("person" in objects) == (row["attribute"] == "1")
    images = [row["image"] for row in rows + held_out]
    assert len(images) == len(set(images)) == 86 + 4 + 40 + 42
    place = {"train": "train2017", "val": "val2017", "test": "val2017"}
    assert all(Path(row["image"]).parent == root / place[row["split"]] for row in rows)
    assert all(Path(row["image"]).parent == root / "train2017" for row in held_out)


def test_captions_are_the_original_ones_that_name_the_label(built: Path, root: Path) -> None:
    rows = [row for row in rows_of(built / "metadata.csv") if row["split"] == "train"]
    used = Counter()
    for row in rows:
        texts = [f"Two {row['label'].title()}s there", f"the {row['label']} again"]
        used[texts.index(row["caption"])] += 1
    assert min(used[0], used[1]) > 20


def test_regions_are_the_boxes(built: Path, root: Path) -> None:
    regions: dict[str, list[tuple[str, ...]]] = {}
    for row in rows_of(built / "regions.csv"):
        regions.setdefault(row["image"], []).append(tuple(row[k] for k in ("left", "top", "right", "bottom", "label")))
    rows = rows_of(built / "metadata.csv")
    shown = shown_in(root, "train") | shown_in(root, "val")
    assert {row["image"] for row in rows} < regions.keys()
    for row in rows:
        objects, _ = shown[row["image"]]
        wanted = [(str(10.5 * k), "20.0", str(10.5 * k + 100.25), "70.0", name) for k, name in enumerate(objects)]
        assert regions[row["image"]] == wanted


def test_the_csv_data_set_reads_it(built: Path) -> None:
    cfg = get_cfg_default()
    cfg.DATASET.ROOT, cfg.DATASET.NAME = str(built), "CSV"
    data = build_dataset(cfg)
    assert data.classnames == ["cat", "dog", "traffic light"] and data.attribute_names == ("0", "1")
    assert [len(part) for part in (data.train_x, data.val, data.test)] == [86, 40, 42]


def test_a_seed_fixes_everything(built: Path, root: Path, tmp_path: Path) -> None:
    keys = {"n_train": 90, "n_val": 60, "n_test": 60}
    again = build_coco_setting(root, tmp_path, PAIR, 0.8, **keys)
    names = sorted(path.name for path in built.iterdir())
    assert again.name == built.name and names == ["finetune.csv", "metadata.csv", "regions.csv", "setting.json"]
    assert all((built / name).read_bytes() == (again / name).read_bytes() for name in names)
    other = build_coco_setting(root, tmp_path, PAIR, 0.8, **keys, seed=1)
    assert (other / "metadata.csv").read_bytes() != (again / "metadata.csv").read_bytes()
    before = (again / "setting.json").stat().st_mtime_ns
    assert build_coco_setting(root, tmp_path, PAIR, 0.8, **keys) == again
    assert (again / "setting.json").stat().st_mtime_ns == before


def test_without_captions_all_images_are_used(root: Path, tmp_path: Path) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / "coco" / f"{split}2017").symlink_to(root / f"{split}2017")
        (tmp_path / "coco" / "annotations" / instances(root, split).name).write_bytes(
            instances(root, split).read_bytes()
        )
    folder = build_coco_setting(tmp_path / "coco", tmp_path / "out", PAIR, 1.0, val_share=0)
    assert {row["caption"] for row in rows_of(folder / "metadata.csv")} == {""}
    setting = json.loads((folder / "setting.json").read_text())
    assert setting["table"] == [[0, 55], [55, 0], [55, 0]]  # as many as there are traffic lights without a person


def test_the_table_is_as_large_as_the_images_allow() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        have, V = rng.integers(5, 300, (3, 2)), rng.uniform(0.5, 1)
        table = fitting_table(have, 1, V, 200, np.random.default_rng(seed))
        each = table[0].sum()
        assert (table <= have).all() and (table.sum(axis=1) == each).all()
        turn = np.random.default_rng(seed).integers(2**32)
        larger = [
            n for n in range(each + 1, 201)
            if (contingency([n] * 3, 1, V, np.random.default_rng(turn)) <= have).all()
        ]  # fmt: skip
        assert not larger
    assert fitting_table(np.array([[9, 9], [9, 0]]), 1, 1.0, 50, np.random.default_rng(0)) is None
    assert fitting_table(np.full((2, 2), 99), 1, 1.0, 30, np.random.default_rng(0)).tolist() == [[30, 0], [0, 30]]


Change = Callable[[Path], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": CocoPair("person", "cat", ("cat",))}, "must hold two or more different classes"),
        ({"pair": CocoPair("person", "cat", ("dog", "bench"))}, "'cat' among them"),
        ({"pair": CocoPair("person", "cat", ("cat", "cat"))}, "two or more different classes"),
        ({"pair": CocoPair("dog", "cat", ("cat", "dog"))}, "the feature 'dog' is in the label set"),
        ({"pair": CocoPair("persn", "cat", ("cat", "dog"))}, "COCO has no category 'persn': did you mean 'person'"),
        ({"pair": CocoPair("person", "cat", ("cat", "kite"))}, "the training images are too few for Cramer's V 0.8"),
        ({"V": 2}, "between 0 and 1, and 2"),
        ({"n_train": 5}, "n_train is 5; 3 classes need 6"),
        ({"year": "2014"}, "no file .*instances_train2014.json"),
    ],
)
def test_what_cannot_be_built(root: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_coco_setting(**{"root": root, "out": tmp_path, "pair": PAIR, "V": 0.8} | change)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_image(tmp_path: Path) -> None:
    for split in ("train", "val"):
        coco(tmp_path, split)
    for path in (tmp_path / "val2017").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no image .*val2017/\d+.jpg, which the annotations name; put COCO's images"):
        build_coco_setting(tmp_path, tmp_path / "out", PAIR, 0.8)


def test_too_few_images_for_evaluation(root: Path, tmp_path: Path) -> None:
    coco(tmp_path, "train")
    coco(tmp_path, "val")
    content = json.loads(instances(tmp_path, "val").read_text())
    dogs = {note["image_id"] for note in content["annotations"] if note["category_id"] == IDS["dog"]}
    notes = [n for n in content["annotations"] if n["category_id"] != IDS["person"] or n["image_id"] not in dogs]
    instances(tmp_path, "val").write_text(json.dumps(content | {"annotations": notes}))
    with pytest.raises(UserError, match="for evaluation are too few: dog has 39 without person and 0 with it"):
        build_coco_setting(tmp_path, tmp_path / "out", PAIR, 0.8)
