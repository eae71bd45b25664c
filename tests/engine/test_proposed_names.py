"""DATASET.ATTRIBUTE_NAMES auto: names that an audit proposes, the same when a run goes on or is evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from oodprompt.backbones import CLIP
from oodprompt.engine import proposed_names
from oodprompt.engine.trainer import PromptTrainer, load_run
from oodprompt.errors import UserError

FILE = "attribute_names.json"
Run = Callable[..., dict[str, Any]]
Build = Callable[..., PromptTrainer]
AUTO = ["DATASET.ATTRIBUTE_NAMES", "auto", "DATASET.SHAPES.CORRELATION", "0.95", "DATASET.SHAPES.NUM_TRAIN", "240"]
AUTO += ["OPTIM.MAX_EPOCH", "1"]
ANCHORED = ["TRAINER.COOPOOD.ANCHOR", "attributes"]


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, nothing may be proposed."""
    return lambda: monkeypatch.setattr(proposed_names, "find_proposals", lambda *_: pytest.fail("asked again"))


def test_names_are_proposed_once_recorded_and_taken_by_a_run_that_goes_on(
    run: Run, tmp_path: Path, never: Callable[[], None]
) -> None:
    results = run("CoOpOOD", "auto", *ANCHORED, *AUTO)
    names = results["proposed_attribute_names"]
    assert len(names) == 2 and set(names) <= {"water", "sea", "lake", "ocean", "grass", "land", "field", "meadow"}
    assert [group["attribute"] for group in results["groups"]] == ["water", "land"] * 2  # the labels' own names
    assert json.loads((tmp_path / "auto" / FILE).read_text())["names"] == names
    never()
    again = run("CoOpOOD", "auto", *ANCHORED, *AUTO)  # nothing is left to train
    assert again["proposed_attribute_names"] == names and again["accuracy"] == results["accuracy"]
    other = run("CoOpOOD", "other", *ANCHORED, *AUTO, "--resume", tmp_path / "auto")
    assert other["proposed_attribute_names"] == json.loads((tmp_path / "other" / FILE).read_text())["names"] == names


def test_a_model_keeps_its_names_wherever_it_is_loaded(
    run: Run, arguments: Callable[..., list[str]], tmp_path: Path, never: Callable[[], None]
) -> None:
    run("CoOpOOD", "auto", *ANCHORED, *AUTO)
    file = (tmp_path / "auto" / FILE).rename(tmp_path / "kept.json")
    names = ["snow", "sand"]  # which no audit proposes here
    (tmp_path / "auto").rename(tmp_path / "moved")
    (tmp_path / "moved" / FILE).write_text(json.dumps(json.loads(file.read_text()) | {"names": names}))
    never()
    for folder in (None, str(tmp_path / "elsewhere")):
        assert list(load_run(tmp_path / "moved", output_dir=folder).attributes.pseudo.names) == names
    assert not (tmp_path / "auto").exists()
    evaluation = ["--eval-only", "--model-dir", tmp_path / "moved"]
    assert run("CoOpOOD", "tested", *evaluation, *ANCHORED, *AUTO)["proposed_attribute_names"] == names


@pytest.mark.parametrize("place", ["built", "."])
def test_names_of_other_images_and_of_other_folders_are_not_taken(
    place: str, build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that had another run, and one that holds many."""
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / FILE).write_text(json.dumps({"names": ["snow", "sand"], "facts": {"images": "others"}}))
    names = set(build("CoOpOOD", *ANCHORED, *AUTO).attributes.pseudo.names)
    assert not names & {"snow", "sand"}
    assert ("names are proposed anew" in capsys.readouterr().out) == (place == "built")


def test_another_folder_gets_the_same_names(build: Build, run: Run) -> None:
    names = run("DebiasedPT", "auto", *AUTO)["proposed_attribute_names"]
    assert list(build("DebiasedPT", *AUTO).attributes.pseudo.names) == names


def test_methods_that_need_no_names_do_not_look_for_any(run: Run, never: Callable[[], None]) -> None:
    never()
    assert "proposed_attribute_names" not in run("CoOp", "coop", *AUTO)


def test_pseudo_attributes_of_proposed_names_are_those_of_given_ones(build: Build) -> None:
    auto = build("DebiasedPT", *AUTO)
    names = auto.attributes.pseudo.names
    given = build("DebiasedPT", *AUTO[2:], "DATASET.ATTRIBUTE_NAMES", str(tuple(names)))
    one, other = (t.attributes.pseudo.of(t.encoder.split("train")) for t in (auto, given))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([*AUTO, "DATASET.ATTRIBUTE_PROMPTS", "['a','b']"], "prompts belong to names"),
        ([*AUTO, "TRAINER.PSEUDO_NAMES", "('a', 'b')"], "give one of them"),
    ],
)
def test_names_and_prompts_that_do_not_go_together_are_refused(build: Build, keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("DebiasedPT", *keys)


def test_other_names_than_those_of_the_model_are_refused(build: Build, tmp_path: Path) -> None:
    trainer = build("CoOpOOD", *ANCHORED, *AUTO)
    file = tmp_path / "built" / FILE
    file.write_text(file.read_text().replace("[", '["red", "blue"], "x": ['))
    with pytest.raises(UserError, match="was trained with the attribute names"):
        trainer.load_model(tmp_path / "built")


def test_names_that_nobody_has_asked_for_become_those_of_the_model(build: Build, run: Run, tmp_path: Path) -> None:
    run("CoOp", "coop", *AUTO)
    (tmp_path / "coop" / FILE).write_text(json.dumps({"names": ["snow", "sand"]}))
    trainer = build("CoOp", *AUTO)
    trainer.load_model(tmp_path / "coop")
    assert trainer.attributes.pseudo.names == ("snow", "sand")


def test_a_damaged_file_of_names_is_refused(build: Build, tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / FILE).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        build("CoOpOOD", *ANCHORED, *AUTO)


def test_images_are_encoded_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, original = [], CLIP.encode_image
    monkeypatch.setattr(CLIP, "encode_image", lambda self, x, *more: encoded.append(len(x)) or original(self, x, *more))
    trainer = build("CoOpOOD", *ANCHORED, *AUTO)
    trainer.encoder.batches("train")
    assert sum(encoded) == 240


@pytest.mark.parametrize(
    ("change", "message"),
    [({"best": None, "names": ()}, "no other word names the images without it"), (None, "none of 64 words goes")],
)
def test_without_names_the_run_ends_with_what_to_do(
    change: dict[str, Any] | None, message: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: Any = SimpleNamespace(**change or {})
    found: Any = SimpleNamespace(proposals=[first] if change else [], tested=64, word=lambda best: "sea")
    monkeypatch.setattr(proposed_names, "find_proposals", lambda *_: found)
    with pytest.raises(UserError, match=f"{message}.*TRAINER.PSEUDO_NAMES"):
        build("CoOpOOD", *ANCHORED, *AUTO)
