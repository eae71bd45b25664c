"""DATASET.ATTRIBUTE_NAMES auto: names that an audit proposes, the same when a run goes on or is evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oodprompt import cli
from oodprompt.engine import proposed_names
from oodprompt.engine.trainer import PromptTrainer, load_run
from oodprompt.errors import UserError

Run = Callable[..., dict[str, Any]]
AUTO = ["DATASET.ATTRIBUTE_NAMES", "auto", "DATASET.SHAPES.CORRELATION", "0.95", "DATASET.SHAPES.NUM_TRAIN", "240"]
ANCHORED = ["TRAINER.COOPOOD.ANCHOR", "attributes"]


def test_names_are_proposed_once_recorded_and_taken_again(
    run: Run, arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run("CoOpOOD", "auto", *ANCHORED, *AUTO)
    names = results["proposed_attribute_names"]
    assert len(names) == 2 and set(names) <= {"water", "sea", "lake", "ocean", "grass", "land", "field", "meadow"}
    assert [group["attribute"] for group in results["groups"]] == ["water", "land"] * 2  # the labels' own names
    assert json.loads((tmp_path / "auto" / "attribute_names.json").read_text())["names"] == names
    monkeypatch.setattr(proposed_names, "find_proposals", lambda *_: pytest.fail("asked again"))
    loaded = load_run(tmp_path / "auto", output_dir=str(tmp_path / "auto" / "eval"))
    assert list(loaded.attributes.pseudo.names) == names
    longer = run("CoOpOOD", "auto", *ANCHORED, *AUTO)  # resumes: nothing is left to train
    assert longer["proposed_attribute_names"] == names and longer["accuracy"] == results["accuracy"]


def test_another_folder_gets_the_same_names(build: Callable[..., PromptTrainer], run: Run) -> None:
    names = run("DebiasedPT", "auto", *AUTO)["proposed_attribute_names"]
    assert list(build("DebiasedPT", *AUTO).attributes.pseudo.names) == names


def test_methods_that_need_no_names_do_not_look_for_any(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposed_names, "find_proposals", lambda *_: pytest.fail("asked"))
    assert "proposed_attribute_names" not in run("CoOp", "coop", *AUTO)


def test_pseudo_attributes_of_proposed_names_are_those_of_given_ones(build: Callable[..., PromptTrainer]) -> None:
    auto = build("DebiasedPT", *AUTO)
    names = auto.attributes.pseudo.names
    given = build("DebiasedPT", *AUTO[2:], "DATASET.ATTRIBUTE_NAMES", str(tuple(names)))
    one, other = (t.attributes.pseudo.of(t.encoder.split("train")) for t in (auto, given))
    assert torch.equal(one, other)


def test_prompts_beside_auto_and_other_names_of_a_model_are_refused(
    build: Callable[..., PromptTrainer], run: Run, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="prompts belong to names"):
        build("DebiasedPT", *AUTO, "DATASET.ATTRIBUTE_PROMPTS", "['a','b']")
    run("DebiasedPT", "auto", *AUTO)
    file = tmp_path / "auto" / "attribute_names.json"
    file.write_text(json.dumps({"names": ["red", "blue"]}))
    more = ["--eval-only", "--model-dir", str(tmp_path / "auto")]
    with pytest.raises(UserError, match="was trained with the attribute names"):
        trainer = build("CoOpOOD", *ANCHORED, *AUTO)
        _ = trainer.attributes.pseudo.names
        trainer.load_model(tmp_path / "auto")
    file.write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        cli.run([*arguments("DebiasedPT", "auto", *AUTO)[:-2], *more, *AUTO[-2:]])
