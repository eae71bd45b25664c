"""LinearProbe against the plain formula."""

from __future__ import annotations

import pytest
import torch
from oodprompt.trainers.linear_probe import ClassVectors
from torch import Tensor

from oodprompt.backbones import CLIP
from oodprompt.errors import UserError
from tests.helpers.runs import Build
from tests.helpers.towers import Towers, assert_is_plain, bf16_deviation, hand_written, make_learner, plain_image


def learner(clip: CLIP, init: str) -> ClassVectors:
    return make_learner(ClassVectors, clip, {"TRAINER.LINEARPROBE.INIT": init}, "a drawing of a {}.")


@pytest.mark.parametrize("init", ["zero", "text"])
def test_logits_and_gradients_equal_the_plain_formula(towers: Towers, batch: tuple[Tensor, Tensor], init: str) -> None:
    theirs = towers[1]
    model = learner(towers[0], init)
    start = torch.zeros(4, 96) if init == "zero" else hand_written(theirs, "a drawing of a {}.")
    torch.testing.assert_close(model.weight.detach(), start, rtol=1e-5, atol=1e-6)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {"weight": (4, 96)}

    def plain(p: dict[str, Tensor], images: Tensor) -> tuple[Tensor, float]:
        return theirs.logit_scale.exp() * plain_image(theirs, images) @ p["weight"].T, 0.0

    assert_is_plain(model, plain, theirs, batch)


def test_a_resnet_is_taken(resnet: CLIP) -> None:
    model = learner(resnet, "text")
    assert model(model.encode_image(torch.zeros(2, 3, 64, 64))).logits.shape == (2, 4)


def test_unknown_start_is_refused(towers: Towers) -> None:
    with pytest.raises(UserError, match=r"LINEARPROBE.INIT: unknown choice 'txet': did you mean 'text'") as error:
        learner(towers[0], "txet")
    assert "\n" not in str(error.value)


def test_bf16_is_close_to_fp32(build: Build) -> None:
    logits, cosine = bf16_deviation(build, "LinearProbe", "TRAINER.LINEARPROBE.INIT", "text")
    assert logits < 0.2 and cosine > 0.999  # measured: 0.046, 0.99995
