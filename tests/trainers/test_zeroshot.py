"""Zero-shot CLIP: one template as before, and the mean of several as upstream's ZeroshotCLIP2 makes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.zeroshot import EnsembledPrompts, FixedPrompts
from torch import Tensor, nn

from oodprompt.backbones import CLIP, tokenize
from oodprompt.config.keys import get_cfg_default
from oodprompt.errors import UserError
from oodprompt.methods.prompts import class_text_features
from oodprompt.methods.templates import PROMPTSRC_TEMPLATES, expand_templates
from tests.helpers.runs import Build
from tests.helpers.towers import CLASSES, NAMES, Towers, make_learner

KEY = "TRAINER.ZEROSHOT.TEMPLATES"
OWN = "a drawing of a {}."
SELECT = [  # of CoOp/trainers/imagenet_templates.py
    *("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}."),
    *("a {} in a video game.", "art of the {}.", "a photo of the small {}."),
]


def learner(clip: CLIP, templates: Sequence[str] = (), kind: type[FixedPrompts] = FixedPrompts, **keys: Any) -> Tensor:
    return make_learner(kind, clip, {KEY: tuple(templates), **keys}, OWN).text_features


def ensemble(theirs: nn.Module, templates: Sequence[str]) -> Tensor:
    """l2norm(mean over templates of l2norm(text)), template by template and class by class, by OpenAI's modules."""
    rows = []
    for name in NAMES:
        features = [theirs.encode_text(tokenize(template.replace("{}", name)))[0] for template in templates]
        total = sum(feature / feature.norm() for feature in features) / len(features)
        rows.append(total / total.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("templates", [(), (OWN,)])
def test_one_template_gives_what_it_always_gave(towers: Towers, templates: tuple[str, ...]) -> None:
    assert torch.equal(learner(towers[0], templates), class_text_features(towers[0], NAMES, [OWN]))
    torch.testing.assert_close(learner(towers[0], templates), ensemble(towers[1], [OWN]), rtol=1e-5, atol=1e-6)


def test_features_are_normalised_before_they_are_averaged(towers: Towers) -> None:
    templates = ["a photo of a {}.", "{}", "a blurry picture of many {} in the rain"]
    text = learner(towers[0], templates)
    torch.testing.assert_close(text, ensemble(towers[1], templates), rtol=1e-5, atol=1e-6)
    other_way = class_text_features(towers[0], NAMES, templates)
    with pytest.raises(TypeError, match="a list of them is wanted"):
        class_text_features(towers[0], NAMES, OWN)
    assert (text - other_way).abs().max() > 1e-4, "here templates must differ in length, or this test tells nothing"


def test_names_of_sets_stand_for_their_templates(towers: Towers) -> None:
    assert expand_templates(["imagenet_select"], KEY) == SELECT
    assert expand_templates(["imagenet_60"], KEY) == list(PROMPTSRC_TEMPLATES) and len(PROMPTSRC_TEMPLATES) == 60
    assert expand_templates([OWN, "imagenet_select", "{}"], KEY) == [OWN, *SELECT, "{}"]
    expected = ensemble(towers[1], [*SELECT, OWN])
    text = learner(towers[0], ["imagenet_select", OWN])
    torch.testing.assert_close(text, expected, rtol=1e-5, atol=1e-6)
    assert (learner(towers[0], ["imagenet_60"]) - text).abs().max() > 1e-3


def test_upstreams_second_trainer_has_seven_templates_and_the_data_sets_own(towers: Towers) -> None:
    text = learner(towers[0], kind=EnsembledPrompts)
    torch.testing.assert_close(text, ensemble(towers[1], [*SELECT, OWN]), rtol=1e-5, atol=1e-6)
    for_imagenet = learner(towers[0], kind=EnsembledPrompts, **{"DATASET.NAME": "ImageNet"})
    torch.testing.assert_close(for_imagenet, ensemble(towers[1], SELECT), rtol=1e-5, atol=1e-6)
    given = learner(towers[0], ["a {}"], EnsembledPrompts)
    torch.testing.assert_close(given, ensemble(towers[1], ["a {}"]), rtol=1e-5, atol=1e-6)


def test_what_is_no_template_is_refused(towers: Towers) -> None:
    with pytest.raises(
        UserError, match=r"ZEROSHOT.TEMPLATES: 'imagenet_selct' has no \{\}.*did you mean 'imagenet_sel"
    ):
        learner(towers[0], ["imagenet_selct"])
    with pytest.raises(UserError, match="'a photo of a' has no"):
        learner(towers[0], [OWN, "a photo of a"])


def test_the_default_is_the_data_sets_template() -> None:
    assert get_cfg_default().TRAINER.ZEROSHOT.TEMPLATES == ()
    assert "traffic_light" in CLASSES and "traffic light" in NAMES  # which the tests above rest on


def test_ensembles_train_nothing_and_write_results(run: Callable[..., Any], tmp_path: Path) -> None:
    results = run("ZeroshotCLIP2", "two")
    assert (results["trainer"], results["base"], results["time"]["train_s"]) == ("ZeroshotCLIP2",) * 2 + (0.0,)
    assert not (tmp_path / "two" / "prompt_learner").exists()
    assert "and 7 more templates" in (tmp_path / "two" / "log.txt").read_text()
    same = run("ZeroshotCLIP", "set", KEY, f"('imagenet_select', '{'a photo of a {}.'}')")
    assert same["groups"] == results["groups"]


def test_an_ensemble_goes_under_a_debiaser(build: Build) -> None:
    trainer = build("OrthCal", "--base", "ZeroshotCLIP2")
    own = build("OrthCal")
    z = F.normalize(torch.randn(3, 128), dim=1)
    assert (trainer.learner(z).text_features - own.learner(z).text_features).abs().max() > 1e-4
    assert trainer.objective.predict(trainer.learner(z)).shape == (3, 2)
