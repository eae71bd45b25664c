"""MaPLe against the plain formula: deep prompts in both towers, those of the image projected from those of the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oodprompt.trainers.maple import MultiModalPromptLearner
from torch import Tensor

from oodprompt.backbones import CLIP
from oodprompt.errors import UserError
from tests.helpers.runs import Build
from tests.helpers.towers import (
    Towers,
    assert_is_plain,
    bf16_deviation,
    make_learner,
    plain_image,
    plain_texts,
    word_embeddings,
)

WORDS = "a photo of a"
# Keys under TRAINER.MAPLE, the text ahead of the class name, and the depth in towers of 4 and 3 blocks.
CASES: list[tuple[dict[str, Any], str, int]] = [
    ({"N_CTX": 2, "PROMPT_DEPTH": 1}, WORDS, 1),
    ({"N_CTX": 2, "PROMPT_DEPTH": 2}, WORDS, 2),
    ({"N_CTX": 4, "PROMPT_DEPTH": 3}, WORDS, 3),
    ({"N_CTX": 2, "PROMPT_DEPTH": 4}, WORDS, 4),
    ({"N_CTX": 1, "PROMPT_DEPTH": 9}, WORDS, 4),
    ({"N_CTX": 3, "PROMPT_DEPTH": 3, "CTX_INIT": ""}, "X X X", 3),
    ({"N_CTX": 5, "PROMPT_DEPTH": 3}, "X X X X X", 3),
]


def learner(towers: Towers, keys: dict[str, Any]) -> MultiModalPromptLearner:
    return make_learner(MultiModalPromptLearner, towers[0], {f"TRAINER.MAPLE.{k}": v for k, v in keys.items()})


@pytest.mark.parametrize(("keys", "words", "depth"), CASES)
def test_logits_and_gradients_equal_the_plain_formula(
    towers: Towers, batch: tuple[Tensor, Tensor], keys: dict[str, Any], words: str, depth: int
) -> None:
    theirs = towers[1]

    def plain(p: dict[str, Tensor], images: Tensor) -> tuple[Tensor, float]:
        p = {name.removeprefix("prompt_learner."): value for name, value in p.items()}
        text = [p[f"compound_prompts_text.{i}"] for i in range(depth - 1)]
        image = []
        for i, prompts in enumerate(text):
            layer = f"compound_prompt_projections.{i}"
            image.append(prompts @ p[f"{layer}.weight"].T + p[f"{layer}.bias"])
        first = p["ctx"] @ p["proj.weight"].T + p["proj.bias"]
        w, z = plain_texts(theirs, words, p["ctx"], text), plain_image(theirs, images, first, image)
        return theirs.logit_scale.exp() * z @ w.T, 0.0

    assert_is_plain(learner(towers, keys), plain, theirs, batch)


def test_starting_values(towers: Towers) -> None:
    own = learner(towers, {"N_CTX": 2, "PROMPT_DEPTH": 4}).prompt_learner
    torch.testing.assert_close(own.ctx.detach(), word_embeddings(towers[1], WORDS, 2))
    layers = own.compound_prompt_projections
    for part in ("weight", "bias"):
        assert all(torch.equal(getattr(layer, part), getattr(layers[0], part)) for layer in layers)
    assert all(layer.weight is not layers[0].weight for layer in layers[1:])
    prompts = list(own.compound_prompts_text)
    assert not torch.equal(prompts[0], prompts[1])
    assert torch.cat(prompts).std().item() == pytest.approx(0.02, rel=0.2)
    own = learner(towers, {"N_CTX": 8, "CTX_INIT": WORDS}).prompt_learner
    assert own.ctx.std().item() == pytest.approx(0.02, rel=0.2)  # random where words cannot fill it


def test_checkpoint_has_the_keys_and_shapes_of_upstream(towers: Towers) -> None:
    shapes = {key: tuple(value.shape) for key, value in learner(towers, {"PROMPT_DEPTH": 3}).state_dict().items()}
    assert shapes == {
        "prompt_learner.ctx": (2, 64),
        "prompt_learner.token_prefix": (4, 1, 64),
        "prompt_learner.token_suffix": (4, 74, 64),
        "prompt_learner.proj.weight": (128, 64),
        "prompt_learner.proj.bias": (128,),
        **{f"prompt_learner.compound_prompts_text.{i}": (2, 64) for i in (0, 1)},
        **{f"prompt_learner.compound_prompt_projections.{i}.weight": (128, 64) for i in (0, 1)},
        **{f"prompt_learner.compound_prompt_projections.{i}.bias": (128,) for i in (0, 1)},
    }


@pytest.mark.parametrize("keys", [{"N_CTX": 0}, {"N_CTX": 76}, {"PROMPT_DEPTH": 0}])
def test_impossible_keys_are_refused(towers: Towers, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(keys))) as error:
        learner(towers, keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["a photo", "a"])
def test_more_contexts_than_words_are_refused(towers: Towers, words: str) -> None:
    with pytest.raises(UserError, match="N_CTX"):
        model = learner(towers, {"N_CTX": 4, "CTX_INIT": words})
        model(torch.zeros(1, 96))


def test_a_resnet_is_refused(resnet: CLIP) -> None:
    with pytest.raises(UserError, match="MaPLe .* ResNet has none: choose a ViT") as error:
        make_learner(MultiModalPromptLearner, resnet, {})
    assert "\n" not in str(error.value)


def test_bf16_is_close_to_fp32(build: Build) -> None:
    logits, cosine = bf16_deviation(build, "MaPLe")
    assert logits < 0.2 and cosine > 0.999  # measured: 0.045, 0.99984


@pytest.mark.parametrize("trainer", ["MaPLe", "VPT", "IVLP", "PromptSRC"])
def test_true_names_no_words(build: Callable[..., Any], trainer: str) -> None:
    with pytest.raises(UserError, match="CTX_INIT: True means something for"):
        build(trainer, f"TRAINER.{trainer.upper()}.CTX_INIT", "True")
