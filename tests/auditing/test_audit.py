"""The audit as a command and from Python, on small rendered data."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import oodprompt
from oodprompt import cli
from oodprompt.auditing import command, looking
from oodprompt.auditing import run as auditing
from oodprompt.data.columns import Images
from oodprompt.data.datum import Datum
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.reports.audit_page import audit_page
from oodprompt.shortcuts.words import Words
from tests.helpers.html_tree import Tree

SHAPES = ["DATASET.NAME", "ShapesOnScenes", "DATASET.SHAPES.NUM_TRAIN", "240", "DATASET.SHAPES.NUM_VAL", "40"]
SHAPES += ["DATASET.SHAPES.NUM_TEST", "8", "DATALOADER.NUM_WORKERS", "0", "VERBOSE", "False"]
FEATURES = {"image_features": np.eye(8, 128, dtype=np.float32), "label": [0, 1] * 4, "class_names": ["disc", "star"]}
FEATURES["split"] = ["train"] * 4 + ["test"] * 4


@pytest.fixture(scope="module")
def audited(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit of ShapesOnScenes at the strength 0.95, whose attribute has prompts of its own."""
    folder = tmp_path_factory.mktemp("audit") / "out"
    flags = ["--root", str(data_root), "--backbone", "tiny", "--output-dir", str(folder)]
    command.run([*flags, *SHAPES, "DATASET.ATTRIBUTE_PROMPTS", "['a sea', 'a lawn']"])
    return folder


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "audit.json").read_text())


@pytest.fixture
def photos(data_root: Path, audited: Path, tmp_path: Path) -> Path:
    """The same images as a csv file with captions and without attributes; one image of either split is damaged."""
    (rendered,) = {
        Path(row["image"]).parents[1] for g in content_of(audited)["proposals"][0]["images"] for row in g["rows"]
    }
    rows = []
    for row in csv.DictReader((rendered / "metadata.csv").open()):
        name = {"0": "circle", "1": "diamond"}[row["y"]]
        place = {"0": "water", "1": "grass"}[row["place"]]
        rows.append([str(rendered / row["img_filename"]), name, row["split"], f"a {name} on {place}"])
    for i in (0, 245):
        rows[i][0] = str(tmp_path / f"broken{i}.png")
        Path(rows[i][0]).write_bytes(b"no image")
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "split", "caption"], *rows])
    return tmp_path


def test_the_planted_scene_is_the_first_suspect_and_the_only_strong_one(audited: Path) -> None:
    content = content_of(audited)
    first = content["proposals"][0]
    words = {first["word"], *(w["word"] for w in (*first["same"], *first["opposite"]))}
    assert words >= {"water", "grass", "land", "sea"} and first["goes_with"] in ("circle", "diamond")
    assert [p["strong"] for p in content["proposals"]].count(True) == 1 and first["strong"]
    assert first["v"] == pytest.approx(0.9, abs=0.05) and first["low"] < first["v"] < first["high"]
    assert {row["class"]: row["with"]["train"] + row["without"]["train"] for row in first["classes"]} == {
        "circle": 120,
        "diamond": 120,
    }
    assert content["num_images"] == 40 and content["split"] == "val" and content["num_train"] == 240


def test_unknown_words_are_counted_and_words_of_classes_left_out(audited: Path) -> None:
    vocabulary = content_of(audited)["vocabulary"]
    assert (
        len(vocabulary["unknown"]) + vocabulary["tested"] + vocabulary["too_rare"] + len(vocabulary["of_class"])
        == (vocabulary["words"])
    )
    assert {"word": "disc", "class": "circle"} in vocabulary["of_class"]
    assert "no embedding of" in (audited / "log.txt").read_text()


def test_the_page_shows_what_the_json_says_and_loads_nothing(audited: Path) -> None:
    page, first = (audited / "audit.html").read_text(), content_of(audited)["proposals"][0]
    tree = Tree(page)
    assert f"1 strong suspect: “{first['word']}”." in tree.text
    row = first["classes"][0]["with"]
    assert f"{100 * row['accuracy']:.0f} % of {row['number']}" in tree.text and f"training: {row['train']}" in tree.text
    assert first["command"] in tree.text
    assert not re.search(r"https?:|url\(|@import|<script|<iframe", re.sub(r"base64,[^\"]*", "", page))
    for _, attributes in tree.elements:
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#"))
    assert len(tree.all("img")) > 20 and all(image["alt"] for image in tree.all("img"))


def test_a_users_words_are_escaped_and_features_alone_give_a_page_without_pictures(audited: Path) -> None:
    content = content_of(audited) | {"has_pictures": False, "title": "<i>x</i>", "num_unreadable": 1}
    content["proposals"][0] |= {"word": "<script>alert(1)</script>", "strong": False}
    page = audit_page(content, None)
    assert "<script" not in page and "<i>x" not in page and "&lt;script&gt;" in page
    tree = Tree(page)
    assert "No word is a strong suspect." in tree.text and not tree.all("img")
    assert "1 image could not be read and is left out" in tree.text


@pytest.mark.usefixtures("undrawn")
def test_the_command_of_the_page_trains(audited: Path) -> None:
    first = content_of(audited)["proposals"][0]
    line = first["command"]
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
    assert words[:2] == ["oodprompt", "train"]
    cli.run([*words[2:], "OPTIM.MAX_EPOCH", "1"])
    results = json.loads((audited / "trained" / "results.json").read_text())
    assert results["trainer"] == "CoOpOOD"
    assert [group["attribute"] for group in results["groups"]] == ["water", "land"] * 2  # as the labels are called
    report = json.loads((audited / "trained" / "pseudo_attributes.json").read_text())
    assert report["attributes"] == first["names"] and report["prompts"] == [
        [f"a photo of {n}."] for n in first["names"]
    ]


def test_damaged_images_are_counted_and_captions_give_words(photos: Path) -> None:
    content = oodprompt.audit(
        photos / "metadata.csv",
        backbone="tiny",
        output=photos / "out",
        vocabulary="captions",
        keys={"DATALOADER.NUM_WORKERS": 0},
    )
    assert content["num_unreadable"] == 2 and content["num_train"] == 239 and content["num_images"] == 39
    assert all(Path(path).name.startswith("broken") for path in content["unreadable"])
    assert content["vocabulary"]["source"] == "the captions"
    first = content["proposals"][0]
    assert {first["word"], *(w["word"] for w in first["opposite"])} == {"water", "grass"}
    assert "2 images could not be read and are left out" in Tree((photos / "out" / "audit.html").read_text()).text
    assert content["groups"] == []


def test_a_trained_model_is_audited_with_its_own_predictions(
    run: Callable[..., dict[str, Any]], tmp_path: Path, audited: Path
) -> None:
    run("CoOp", "coop", "DATASET.SHAPES.CORRELATION", "0.99", "DATASET.SHAPES.NUM_TRAIN", "200")
    command.run(["--model-dir", str(tmp_path / "coop"), "--split", "test", "VERBOSE", "False"])
    content = content_of(tmp_path / "coop" / "audit")
    results = json.loads((tmp_path / "coop" / "results.json").read_text())
    assert content["accuracy"] == pytest.approx(results["accuracy"]) and content["model"].startswith("CoOp")
    assert [row["accuracy"] for row in content["groups"]] == pytest.approx([g["accuracy"] for g in results["groups"]])
    assert "--base CoOp" in content["proposals"][0]["command"]


def test_regions_are_named_by_words_and_shown_as_the_model_sees_them(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracy is measured on another split, which has fewer images than that of the regions."""
    seen = []
    look = Image.new("RGB", (30, 20))
    monkeypatch.setattr(auditing, "as_seen", lambda cfg, images: seen.append(len(images)) or (lambda i: look))
    flags = ["--root", str(data_root), "--backbone", "tiny", "--output-dir", str(tmp_path / "out"), "--regions"]
    command.run([*flags, "--split", "test", *SHAPES, "DISCOVERY.K_RANGE", "(3, 4)", "REGIONS.GRID", "(2, 2)"])
    tree = Tree((tmp_path / "out" / "audit.html").read_text())
    sizes = [(image["width"], image["height"]) for image in tree.all("img")]
    assert seen == [40] and sizes.count(("30", "20")) == len(tree.all("svg")) > 5 and ("48", "48") in sizes
    regions = content_of(tmp_path / "out")["regions"]
    words = {word for cluster in regions["clusters"] for word in cluster["words"][:2]}
    assert regions["of"] in (3, 4) and words & {"water", "sea", "ocean", "lake"} and words & {"grass", "land", "meadow"}
    assert "Suspects by region" in tree.text


def test_what_was_found_is_there_where_regions_fail(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("no memory")

    monkeypatch.setattr(auditing, "region_suspects", fail)
    flags = ["--root", str(data_root), "--backbone", "tiny", "--output-dir", str(tmp_path / "out"), "--regions"]
    with pytest.raises(UserError, match="no memory"):
        command.run([*flags, *SHAPES])
    assert content_of(tmp_path / "out")["proposals"] and (tmp_path / "out" / "audit.html").is_file()


def test_the_command_of_the_page_imports_what_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OODPROMPT_IMPORT", f"{tmp_path / 'mine.py'}:package.module")
    trainer: Any = SimpleNamespace(learner=torch.nn.Identity(), base_name="CoOp")
    line = auditing.next_command(trainer, tmp_path, ("sea", "lawn"))
    assert f"--import {tmp_path / 'mine.py'} --import package.module" in line and "--base" not in line


def test_keywords_are_of_the_vocabulary_where_the_split_has_no_captions() -> None:
    data = [Datum.unchecked(f"{i}.png", 0, 0, "circle", -1, "a sea" if i < 2 else "") for i in range(22)]
    axes, predicted = torch.eye(2), np.repeat([0, 1], 10)
    images, label = Images.of(data).take(range(2, 22)), np.zeros(20, dtype=np.int64)
    features = torch.cat([axes[:1].repeat(10, 1), axes[1:].repeat(10, 1)])
    evaluated = looking._Evaluated("val", images, label, predicted, features, ["circle"])
    (row,) = looking._keywords(Words(("barn", "sea"), ("", ""), axes, axes), evaluated)
    assert row["wrong"] == 10 and [word["word"] for word in row["words"]] == ["sea"]


def test_features_are_not_computed_twice(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--root", str(data_root), "--backbone", "tiny", *SHAPES, "DATALOADER.FEATURE_CACHE", "disk"]
    flags += ["DATALOADER.CACHE_DIR", str(tmp_path / "cache")]
    command.run([*flags, "--output-dir", str(tmp_path / "one")])
    monkeypatch.setattr(Encoder, "encode_image", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(Encoder, "encode_frozen", lambda *_: pytest.fail("computed again"))
    command.run([*flags, "--output-dir", str(tmp_path / "other")])
    assert content_of(tmp_path / "one")["proposals"][0]["v"] == content_of(tmp_path / "other")["proposals"][0]["v"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-dir", "nowhere"], "no folder nowhere"),
        (["--backbone", "tiny", "--model-dir", "."], "own backbone"),
        (["--config-file", "x.yaml", "--model-dir", "."], "own backbone and config"),
        (["--backbone", "tiny", "DATASET.NAME"], "stands alone"),
        (["--backbone", "tiny", *SHAPES, "--vocabulary", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--backbone", "tiny", *SHAPES, "--vocabulary", "captions"], "no word is in five captions"),
    ],
)
def test_what_makes_no_sense_is_refused(
    flags: list[str], message: str, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = ["--root", str(data_root)] if "--model-dir" not in flags else []
    with pytest.raises(UserError, match=message):
        command.run([*root, *flags])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "validation"}, "split=: unknown split 'validation'.*train"),
        ({"model_dir": ".", "data": "photos"}, "model_dir= or data="),
        ({"model_dir": ".", "dataset_config_file": "x.yaml"}, "own backbone and config"),
        ({"model_dir": "nowhere"}, "no folder nowhere"),
        ({"data": FEATURES, "backbone": "tiny", "regions": True}, "regions=True looks at regions of images"),
    ],
)
def test_what_makes_no_sense_is_refused_from_python(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        oodprompt.audit(**values)


def test_an_audit_of_a_run_goes_to_its_folder() -> None:
    assert auditing.folder_of(None, "run") == Path("run/audit") and auditing.folder_of(None, None) == Path("audit")
    assert auditing.folder_of("out", "run") == Path("out")
    assert auditing.folder_of("~/audit", None) == Path.home() / "audit"
