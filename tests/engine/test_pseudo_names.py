"""TRAINER.PSEUDO_NAMES: pseudo-attributes have names of their own, and attribute labels keep theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError


def test_names_of_pseudo_attributes_leave_those_of_the_labels(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Three names, of data that have two attribute values: pseudo-groups of validation images are counted, too."""
    more = ["TRAINER.PSEUDO_NAMES", "('snow', 'grass', 'sea')", "TEST.FINAL_MODEL", "best_val"]
    results = run("DebiasedPT", "given", *more, "TEST.SELECTION", "worst_pseudo_group_accuracy", "OPTIM.MAX_EPOCH", 1)
    assert [group["attribute"] for group in results["groups"]] == ["water", "land"] * 2
    report = json.loads((tmp_path / "given" / "pseudo_attributes.json").read_text())
    assert report["attributes"] == ["snow", "grass", "sea"] and report["splits"]["train"]["accuracy"] is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["('a', 'b')", "DATASET.ATTRIBUTE_PROMPTS", "['a','b']"], "leave out DATASET"),
        (["a"], "two names or more"),
    ],
)
def test_names_without_a_meaning_are_refused(
    build: Callable[..., PromptTrainer], keys: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build("DebiasedPT", "TRAINER.PSEUDO_NAMES", *keys)
