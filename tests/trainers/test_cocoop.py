"""CoCoOp against the plain formula, one image and one class at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.cocoop import ConditionalContextLearner
from torch import Tensor

from oodprompt.errors import UserError
from tests.helpers.runs import Build
from tests.helpers.towers import (
    NAMES,
    Towers,
    assert_close,
    assert_is_plain,
    bf16_deviation,
    hand_written,
    make_learner,
    plain_image,
    plain_text,
    word_embeddings,
)

Batch = tuple[Tensor, Tensor]
# Keys under TRAINER.COCOOP, and the text ahead of the class name.
CASES: list[tuple[dict[str, Any], str]] = [
    ({"N_CTX": 1}, "X"),
    ({"N_CTX": 5}, "X X X X X"),
    ({"N_CTX": 16, "CTX_INIT": "a_photo_of_a"}, "a photo of a"),
    ({"CTX_INIT": "a rendering"}, "a rendering"),
]


def learner(towers: Towers, keys: dict[str, Any]) -> ConditionalContextLearner:
    return make_learner(ConditionalContextLearner, towers[0], {f"TRAINER.COCOOP.{k}": v for k, v in keys.items()})


@pytest.mark.parametrize(("keys", "words"), CASES)
def test_logits_and_gradients_equal_the_plain_formula(
    towers: Towers, batch: Batch, keys: dict[str, Any], words: str
) -> None:
    theirs = towers[1]

    def plain(p: dict[str, Tensor], images: Tensor) -> tuple[Tensor, float]:
        rows = []
        for image in images:
            (z,) = plain_image(theirs, image.unsqueeze(0))
            hidden = (p["meta_net.linear1.weight"] @ z + p["meta_net.linear1.bias"]).clamp(min=0)
            shift = p["meta_net.linear2.weight"] @ hidden + p["meta_net.linear2.bias"]
            rows.append(torch.stack([z @ plain_text(theirs, words, name, p["ctx"] + shift) for name in NAMES]))
        return theirs.logit_scale.exp() * torch.stack(rows), 0.0

    assert_is_plain(learner(towers, keys), plain, theirs, batch)


@pytest.mark.parametrize("limit", [1, 200_000])
def test_encoding_prompts_in_parts_changes_nothing(
    towers: Towers, batch: Batch, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = learner(towers, {"N_CTX": 3})

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        logits = model(model.encode_image(batch[0])).logits
        F.cross_entropy(logits, batch[1]).backward()
        return logits, {name: p.grad.clone() for name, p in model.named_parameters()}

    logits, gradients = step()
    monkeypatch.setattr(model.clip, "activation_limit", limit)
    in_parts, parts = step()
    assert_close(in_parts, logits, "logits", 5e-5)
    for name, gradient in gradients.items():
        assert_close(parts[name], gradient, name, 5e-5)


def test_starts_at_the_words_shifted_by_the_image(towers: Towers, batch: Batch) -> None:
    model = learner(towers, {"CTX_INIT": "a photo of a"})
    torch.testing.assert_close(model.ctx.detach(), word_embeddings(towers[1], "a photo of a", 4))
    with torch.no_grad():
        model.meta_net.linear2.weight.zero_()
        model.meta_net.linear2.bias.zero_()
    features = model(model.encode_image(batch[0])).text_features
    assert features.shape == (5, 4, 96)
    for image in features:  # without a shift, every image has the hand-written prompts
        torch.testing.assert_close(image, hand_written(towers[1], "a photo of a {}."), rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    contexts = [learner(towers, {"N_CTX": 16, "CTX_INIT": ""}).ctx.detach() for _ in range(2)]
    assert contexts[0].shape == (16, 64) and contexts[0].std().item() == pytest.approx(0.02, rel=0.1)


def test_checkpoint_has_the_keys_and_shapes_of_upstream(towers: Towers) -> None:
    shapes = {key: tuple(value.shape) for key, value in learner(towers, {"N_CTX": 16}).state_dict().items()}
    assert shapes == {
        "ctx": (16, 64),
        "token_prefix": (4, 1, 64),
        "token_suffix": (4, 60, 64),
        "meta_net.linear1.weight": (6, 96),
        "meta_net.linear1.bias": (6,),
        "meta_net.linear2.weight": (64, 6),
        "meta_net.linear2.bias": (64,),
    }


@pytest.mark.parametrize("n_ctx", [0, -1, 76])
def test_impossible_numbers_of_contexts_are_refused(towers: Towers, n_ctx: int) -> None:
    with pytest.raises(UserError, match="N_CTX") as error:
        learner(towers, {"N_CTX": n_ctx})
    assert "\n" not in str(error.value)


def test_true_is_not_a_word(towers: Towers) -> None:
    try:
        model = learner(towers, {"N_CTX": 16, "CTX_INIT": True})
    except UserError:
        return
    assert not torch.equal(model.ctx.detach(), word_embeddings(towers[1], "True", 1))


def test_bf16_is_close_to_fp32(build: Build) -> None:
    logits, cosine = bf16_deviation(build, "CoCoOp", "TRAINER.COCOOP.CTX_INIT", "a photo of a")
    assert logits < 0.2 and cosine > 0.999  # measured: 0.041, 0.99974
