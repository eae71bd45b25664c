"""The audit as a command and from Python, on small rendered data."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oodprompt
from oodprompt import cli
from oodprompt.auditing import command
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.reports.audit_page import audit_page
from tests.helpers.html_tree import Tree

SHAPES = ["DATASET.NAME", "ShapesOnScenes", "DATASET.SHAPES.NUM_TRAIN", "240", "DATASET.SHAPES.NUM_VAL", "40"]
SHAPES += ["DATASET.SHAPES.NUM_TEST", "8", "DATALOADER.NUM_WORKERS", "0", "VERBOSE", "False"]


@pytest.fixture(scope="module")
def audited(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an audit of ShapesOnScenes at the strength 0.95."""
    folder = tmp_path_factory.mktemp("audit") / "out"
    command.run(["--root", str(data_root), "--backbone", "tiny", "--output-dir", str(folder), *SHAPES])
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
    line = content_of(audited)["proposals"][0]["command"]
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
    assert words[:2] == ["oodprompt", "train"]
    cli.run([*words[2:], "OPTIM.MAX_EPOCH", "1"])
    results = json.loads((audited / "trained" / "results.json").read_text())
    assert results["trainer"] == "CoOpOOD" and results["worst_group_accuracy"] is not None


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


def test_regions_are_named_by_words(data_root: Path, tmp_path: Path) -> None:
    flags = ["--root", str(data_root), "--backbone", "tiny", "--output-dir", str(tmp_path / "out"), "--regions"]
    command.run([*flags, *SHAPES, "DISCOVERY.K_RANGE", "(3, 4)", "REGIONS.GRID", "(2, 2)"])
    regions = content_of(tmp_path / "out")["regions"]
    words = {word for cluster in regions["clusters"] for word in cluster["words"][:2]}
    assert regions["of"] in (3, 4) and words & {"water", "sea", "ocean", "lake"} and words & {"grass", "land", "meadow"}
    assert "Suspects by region" in Tree((tmp_path / "out" / "audit.html").read_text()).text


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
