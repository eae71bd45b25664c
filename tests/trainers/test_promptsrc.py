"""PromptSRC: the plain formula, each of its three regularisers, and the average over epochs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.promptsrc import SelfRegulatedLearner
from torch import Tensor

from oodprompt.backbones import CLIP
from oodprompt.engine import checkpoint
from oodprompt.errors import UserError
from oodprompt.methods.contracts import Alignment
from oodprompt.methods.templates import PROMPTSRC_TEMPLATES
from tests.helpers.runs import Build
from tests.helpers.towers import (
    Towers,
    assert_is_plain,
    bf16_deviation,
    deep_prompts,
    gaussian,
    hand_written,
    make_learner,
    plain_image,
    plain_texts,
    word_embeddings,
)

Batch = tuple[Tensor, Tensor]
WORDS = "a photo of a"


def learner(towers: Towers, **keys: Any) -> SelfRegulatedLearner:
    return make_learner(SelfRegulatedLearner, towers[0], {f"TRAINER.PROMPTSRC.{k}": v for k, v in keys.items()})


CASES: list[tuple[dict[str, Any], str, int, int]] = [  # keys, words, blocks of the text and the image tower
    ({}, WORDS, 3, 4),
    ({"PROMPT_DEPTH_TEXT": 1, "PROMPT_DEPTH_VISION": 1, "N_CTX_TEXT": 2, "N_CTX_VISION": 3}, WORDS, 1, 1),
    ({"PROMPT_DEPTH_TEXT": 2, "PROMPT_DEPTH_VISION": 3, "N_CTX_TEXT": 5, "TEXT_LOSS_WEIGHT": 3}, "X X X X X", 2, 3),
    ({"PROMPT_DEPTH_TEXT": 3, "PROMPT_DEPTH_VISION": 2, "CTX_INIT": "", "IMAGE_LOSS_WEIGHT": 40}, "X X X X", 3, 2),
    ({"PROMPT_DEPTH_VISION": 0, "N_CTX_TEXT": 3}, WORDS, 3, 0),
]


@pytest.mark.parametrize(("keys", "words", "text_blocks", "image_blocks"), CASES)
def test_logits_loss_and_gradients_equal_the_plain_formula(
    towers: Towers, batch: Batch, keys: dict[str, Any], words: str, text_blocks: int, image_blocks: int
) -> None:
    theirs = towers[1]

    def plain(p: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        text, image = deep_prompts(p, "text_encoder"), deep_prompts(p, "image_encoder")
        assert (len(text), len(image)) == (text_blocks - 1, max(image_blocks - 1, 0))
        w = plain_texts(theirs, words, p["prompt_learner.ctx"], text)
        z = plain_image(theirs, images, p["image_encoder.VPT"] if image_blocks else None, image)
        w_clip, z_clip = hand_written(theirs, *PROMPTSRC_TEMPLATES), plain_image(theirs, images)
        s = theirs.logit_scale.exp()
        kl = F.kl_div((s * z @ w.T).log_softmax(1), (s * z_clip @ w_clip.T).softmax(1), reduction="sum")
        regularisers = (
            keys.get("TEXT_LOSS_WEIGHT", 25) * (w - w_clip).abs().mean()
            + keys.get("IMAGE_LOSS_WEIGHT", 10) * (z - z_clip).abs().mean()
            + kl / (len(z) * len(w))
        )
        return s * z @ w.T, regularisers

    model = learner(towers, **keys)
    if words == WORDS:
        start = word_embeddings(theirs, WORDS, keys.get("N_CTX_TEXT", 4))
        torch.testing.assert_close(model.prompt_learner.ctx.detach(), start)
    assert_is_plain(model, plain, theirs, batch)


def test_each_regulariser_by_hand(towers: Towers) -> None:
    """Two images, four classes, features on the axes."""
    model = learner(towers, TEXT_LOSS_WEIGHT=7, IMAGE_LOSS_WEIGHT=5)
    axes, s = torch.eye(96), torch.tensor(2.0)
    model.hand_written.copy_(axes[:4])
    same = Alignment(axes[:2], axes[:4], s, axes[:2])
    assert model.penalty(same).item() == pytest.approx(0, abs=1e-6)
    # A text feature that is another axis differs in two entries of 4 * 96 by 1, and no logit of these images tells.
    text = replace(same, text_features=axes[[0, 1, 2, 9]])
    assert model.penalty(text).item() == pytest.approx(7 * 2 / (4 * 96), rel=1e-5)
    # So with an image feature of 2 * 96 entries, but now the logits of one image are (0, 0, 0, 0), not (2, 0, 0, 0).
    p = math.exp(2) / (math.exp(2) + 3)
    kl = p * math.log(4 * p) + (1 - p) * math.log(4 * (1 - p) / 3)
    image = replace(same, image_features=axes[[9, 1]])
    assert model.penalty(image).item() == pytest.approx(5 * 2 / (2 * 96) + kl / (2 * 4), rel=1e-5)


def test_the_frozen_features_come_from_the_same_views(build: Build) -> None:
    """The engine compares each image with itself in frozen CLIP, under the random transform of that step."""
    views = ["INPUT.TRANSFORMS", "('random_resized_crop', 'random_flip', 'normalize')"]
    trainer = build("PromptSRC", *views)
    batch = next(iter(trainer.encoder.batches("train")))
    trainer.learner.train()
    frozen = trainer.encoder.align(batch).frozen_image_features
    expected = F.normalize(trainer.clip.encode_image(batch["img"]), dim=-1)
    torch.testing.assert_close(frozen, expected, rtol=1e-5, atol=1e-6)
    assert not frozen.requires_grad
    trainer.learner.eval()
    assert trainer.encoder.align(batch).frozen_image_features is None  # evaluation does not pay for it


@pytest.mark.parametrize("depth", [9, 0])
def test_the_objective_adds_the_regularisers(build: Build, depth: int) -> None:
    trainer = build("PromptSRC", "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", depth)
    batch = next(iter(trainer.encoder.batches("train")))
    trainer.learner.train()
    assert ("img" in batch) == (depth > 0)  # features that do not change are cached
    alignment = trainer.encoder.align(batch)
    loss, _ = trainer.objective(alignment, batch)
    s, z, w = alignment.logit_scale, alignment.image_features, alignment.text_features
    z_clip, w_clip = trainer.encoder.frozen_features_of("train")[batch["index"]], trainer.learner.hand_written
    log_p, log_q = (s * z @ w.T).log_softmax(1), (s * z_clip @ w_clip.T).log_softmax(1)
    expected = F.cross_entropy(s * z @ w.T, batch["label"]) + (log_q.exp() * (log_q - log_p)).mean()
    expected = expected + 25 * (w - w_clip).abs().mean() + 10 * (z - z_clip).abs().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(z, z_clip) == (depth == 0)


def test_the_templates_are_sixty() -> None:
    assert len(set(PROMPTSRC_TEMPLATES)) == len(PROMPTSRC_TEMPLATES) == 60
    assert all(template.count("{}") == 1 and template.endswith(".") for template in PROMPTSRC_TEMPLATES)


# --- the average over epochs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "mean", "std"), [(20, 15, 1), (50, 30, 30), (50, 45, 5), (1, 15, 1), (5, 2, 0.3)])
def test_weights_of_the_average_are_a_gaussian(towers: Towers, epochs: int, mean: float, std: float) -> None:
    keys = {"OPTIM.MAX_EPOCH": epochs, "TRAINER.PROMPTSRC.GPA_MEAN": mean, "TRAINER.PROMPTSRC.GPA_STD": std}
    weights = make_learner(SelfRegulatedLearner, towers[0], keys).epoch_weights
    assert weights == pytest.approx(gaussian(epochs, mean, std), rel=1e-9, abs=1e-12)
    assert sum(weights) == pytest.approx(1, abs=1e-12)


def test_weights_far_from_all_epochs_are_still_weights(towers: Towers) -> None:
    """Upstream divides 0 by 0 here: every density is too small for a float."""
    weights = make_learner(SelfRegulatedLearner, towers[0], {"OPTIM.MAX_EPOCH": 5, "TRAINER.PROMPTSRC.GPA_MEAN": 90})
    assert weights.epoch_weights == pytest.approx([0, 0, 0, 0, 1])


@pytest.mark.parametrize("depth", [9, 0])
def test_the_final_model_is_the_weighted_sum_of_the_epochs(build: Build, depth: int, tmp_path: Path) -> None:
    keys = ["OPTIM.MAX_EPOCH", 4, "OPTIM.LR", 0.05, "OPTIM.WARMUP_EPOCH", -1, "DATASET.SHAPES.NUM_TRAIN", 32]
    keys += ["TRAINER.PROMPTSRC.GPA_MEAN", 2, "TRAINER.PROMPTSRC.GPA_STD", 1.5]
    trainer = build("PromptSRC", *keys, "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", depth)
    learner, epochs = trainer.learner, []
    after_epoch = learner.after_epoch

    def recorded(epoch: int) -> None:
        epochs.append({name: p.detach().clone() for name, p in learner.named_parameters()})
        after_epoch(epoch)
        if epoch < 3:  # training goes on from where it stood, not from the average
            assert all(torch.equal(p, epochs[-1][name]) for name, p in learner.named_parameters())

    learner.after_epoch = recorded
    trainer.train()
    weights = gaussian(4, 2, 1.5)
    saved = checkpoint.load(tmp_path / "built" / "VLPromptLearner" / "model.pth.tar-4")["state_dict"]
    assert len(epochs) == 4
    for name, parameter in learner.named_parameters():
        average = sum(weight * values[name] for weight, values in zip(weights, epochs, strict=True))
        torch.testing.assert_close(parameter.detach(), average, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(saved[name], parameter)
        assert (average - epochs[-1][name]).abs().max() > 1e-4, f"{name} did not move"


# --- keys ------------------------------------------------------------------------------------------------------


def test_checkpoint_has_the_keys_and_shapes_of_upstream(towers: Towers) -> None:
    model = learner(towers, PROMPT_DEPTH_VISION=2, PROMPT_DEPTH_TEXT=2)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == {
        "prompt_learner.ctx": (4, 64),
        "prompt_learner.token_prefix": (4, 1, 64),
        "prompt_learner.token_suffix": (4, 72, 64),
        "text_encoder.transformer.resblocks.1.VPT_shallow": (4, 64),
        "image_encoder.VPT": (4, 128),
        "image_encoder.transformer.resblocks.1.VPT_shallow": (4, 128),
        "gpa": (4 * (2 * 64 + 2 * 128),),  # the one key that upstream's has not
    }


@pytest.mark.parametrize(
    "keys", [{"GPA_STD": 0}, {"GPA_STD": -1}, {"PROMPT_DEPTH_TEXT": 0}, {"N_CTX_TEXT": 0}, {"N_CTX_VISION": 0}]
)
def test_impossible_keys_are_refused(towers: Towers, keys: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(keys))) as error:
        learner(towers, **keys)
    assert "\n" not in str(error.value)


def test_a_resnet_is_refused(resnet: CLIP) -> None:
    with pytest.raises(UserError, match="PromptSRC .* ResNet has none: choose a ViT") as error:
        make_learner(SelfRegulatedLearner, resnet, {"TRAINER.NAME": "PromptSRC"})
    assert "\n" not in str(error.value)


def test_bf16_is_close_to_fp32(build: Build) -> None:
    logits, cosine = bf16_deviation(build, "PromptSRC")
    assert logits < 0.2 and cosine > 0.999  # measured: 0.047, 0.99996
