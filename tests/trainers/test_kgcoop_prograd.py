"""KgCoOp and ProGrad: CoOp held near hand-written prompts, by a penalty or by its gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.kgcoop import KnowledgeGuidedLearner
from oodprompt.trainers.prograd import PromptAlignedLearner
from torch import Tensor

from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.contracts import PromptLearner
from tests.helpers.runs import Build
from tests.helpers.towers import (
    CLASSES,
    Towers,
    assert_close,
    assert_is_plain,
    bf16_deviation,
    hand_written,
    make_learner,
    plain_image,
    plain_texts,
    word_embeddings,
)

Batch = tuple[Tensor, Tensor]
TEMPLATE = "a centered satellite photo of {}."


def learner(
    kind: type[PromptLearner], towers: Towers, template: str = "a photo of a {}.", **keys: Any
) -> KnowledgeGuidedLearner | PromptAlignedLearner:
    """Keys with an underscore ahead are LOSS.*, others TRAINER.COOP.*."""
    dotted = {f"LOSS.{k[1:]}" if k.startswith("_") else f"TRAINER.COOP.{k}": v for k, v in keys.items()}
    return make_learner(kind, towers[0], dotted, template)


# --- KgCoOp ----------------------------------------------------------------------------------------------------

KGCOOP_CASES: list[tuple[dict[str, Any], str, str]] = [  # keys, template, the text ahead of the class name
    ({"N_CTX": 4}, "a photo of a {}.", "X X X X"),
    ({"N_CTX": 3, "W": 8.0, "CTX_INIT": False}, "{} in a video game, a type of pet.", "X X X"),
    ({"N_CTX": 16, "W": 0.0, "CTX_INIT": "an_origami"}, TEMPLATE, "an origami"),
    ({"N_CTX": 16, "W": 2.0, "CTX_INIT": True}, TEMPLATE, "a photo of a"),
]


@pytest.mark.parametrize(("keys", "template", "words"), KGCOOP_CASES)
def test_kgcoop_equals_the_plain_formula(
    towers: Towers, batch: Batch, keys: dict[str, Any], template: str, words: str
) -> None:
    theirs = towers[1]

    def plain(p: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor]:
        w = plain_texts(theirs, words, p["ctx"])
        distance = 1 - F.cosine_similarity(w, hand_written(theirs, template)).mean()
        return theirs.logit_scale.exp() * plain_image(theirs, images) @ w.T, keys.get("W", 1.0) * distance

    model = learner(KnowledgeGuidedLearner, towers, template, **keys)
    if keys.get("CTX_INIT"):
        torch.testing.assert_close(model.ctx.detach(), word_embeddings(theirs, words, len(words.split())))
    assert_is_plain(model, plain, theirs, batch)


def test_kgcoop_penalty_is_zero_at_the_hand_written_prompts_and_its_weight_at_right_angles(towers: Towers) -> None:
    model = learner(KnowledgeGuidedLearner, towers, W=3.0, CTX_INIT="a photo of a")
    alignment = model(torch.zeros(1, 96))
    assert model.penalty(alignment).item() == pytest.approx(0, abs=1e-5)
    w = model.hand_written
    across = torch.randn(4, 96)
    across = F.normalize(across - (across * w).sum(1, keepdim=True) * w, dim=1)
    assert model.penalty(replace(alignment, text_features=across)).item() == pytest.approx(3, rel=1e-5)
    assert model.penalty(replace(alignment, text_features=-w)).item() == pytest.approx(6, rel=1e-5)


# --- ProGrad ---------------------------------------------------------------------------------------------------


def plain_gradients(
    model: PromptAlignedLearner, towers: Towers, words: str, template: str, T: float, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, KL(zero-shot || learned) T^2, and the gradients of CE and of it by the context vectors."""
    theirs = towers[1]
    ctx = model.ctx.detach().clone().requires_grad_(True)
    z, s = plain_image(theirs, batch[0]), theirs.logit_scale.exp()
    logits = s * z @ plain_texts(theirs, words, ctx).T
    teacher = s * z @ hand_written(theirs, template).T
    kl = F.kl_div((logits / T).log_softmax(1), (teacher / T).softmax(1), reduction="batchmean") * T**2
    (g,) = torch.autograd.grad(F.cross_entropy(logits, batch[1]), ctx, retain_graph=True)
    (h,) = torch.autograd.grad(kl, ctx)
    return logits, kl, g, h


def projected(g: Tensor, h: Tensor, share: float = 1.0) -> Tensor:
    product = (g * h).sum()
    return g - share * product / (h * h).sum() * h if product < 0 else g


PROGRAD_CASES: list[tuple[dict[str, Any], str, str]] = [  # keys, template, the text ahead of the class name
    ({"N_CTX": 4}, "a photo of a {}.", "X X X X"),
    ({"N_CTX": 4, "_T": 3.0}, "a photo of a {}.", "X X X X"),
    ({"N_CTX": 4, "_LAMBDA": 0.3}, "a photo of a {}.", "X X X X"),
    ({"N_CTX": 4, "_LAMBDA": 0.0}, "a photo of a {}.", "X X X X"),
    ({"N_CTX": 7, "CTX_INIT": True}, TEMPLATE, "X X a centered satellite photo of"),
    ({"N_CTX": 5, "CTX_INIT": True}, TEMPLATE, "a centered satellite photo of"),
    ({"N_CTX": 6, "CTX_INIT": "an_origami", "_T": 2.0}, "a photo of a {}.", "X X X X an origami"),
]


@pytest.mark.parametrize(("keys", "template", "words"), PROGRAD_CASES)
@pytest.mark.parametrize("conflict", [True, False])
def test_prograd_projects_exactly_the_gradients_that_conflict(
    towers: Towers, batch: Batch, keys: dict[str, Any], template: str, words: str, conflict: bool
) -> None:
    T, share = keys.get("_T", 1.0), keys.get("_LAMBDA", 1.0)
    model = learner(PromptAlignedLearner, towers, template, **keys)
    torch.manual_seed(4)
    with torch.no_grad():
        model.ctx += 0.2 * torch.randn_like(model.ctx)
        # Labels that zero-shot CLIP finds the least or the most likely pull against it or with it.
        teacher = plain_image(towers[1], batch[0]) @ hand_written(towers[1], template).T
        learned = model(model.encode_image(batch[0])).logits / towers[1].logit_scale.exp()
    label = (teacher - learned).argmin(dim=1) if conflict else (teacher - learned).argmax(dim=1)
    images = batch[0]
    logits, kl, g, h = plain_gradients(model, towers, words, template, T, (images, label))
    assert ((g * h).sum() < 0) == conflict
    alignment = model(model.encode_image(images))
    assert_close(alignment.logits, logits, "logits")
    entropy = torch.distributions.Categorical(logits=towers[1].logit_scale.exp() * teacher / T).entropy().mean()
    assert_close(model.guide(alignment), kl + T**2 * entropy, "guide")
    model.backward(F.cross_entropy(alignment.logits, label), alignment, lambda x: x)
    assert_close(model.ctx.grad, projected(g, h, share), "ctx", 2e-5, of=g)  # rounding of both gradients adds up
    assert torch.allclose(projected(g, h, share), g) == (not conflict or share == 0)
    if conflict and share == 1:
        along = (model.ctx.grad * h).sum() / h.norm()
        assert along.abs() < 1e-5 * g.norm()  # what is left neither helps nor hurts the zero-shot prediction
    assert all(p.grad is None for p in model.clip.parameters())


def test_prograd_gradients_take_the_scale_of_the_loss(towers: Towers, batch: Batch) -> None:
    model = learner(PromptAlignedLearner, towers, N_CTX=4)
    cases = set()
    for sign in (1, -1):
        gradients = []
        for scale in (1, 1024):
            model.zero_grad()
            alignment = model(model.encode_image(batch[0]))
            loss = sign * F.cross_entropy(alignment.logits, batch[1])
            g, h = (torch.autograd.grad(x, model.ctx, retain_graph=True)[0] for x in (loss, model.guide(alignment)))
            cases.add(bool((g * h).sum() < 0))
            model.backward(loss, alignment, lambda x, scale=scale: scale * x)
            gradients.append(model.ctx.grad.clone())
        assert_close(gradients[1], 1024 * gradients[0], "ctx", 1e-6)
    assert cases == {True, False}


def test_prograd_takes_nothing_away_where_nothing_can_conflict(towers: Towers, batch: Batch) -> None:
    """At the hand-written prompts the distance to zero-shot CLIP has its minimum, and h = 0."""
    model = learner(PromptAlignedLearner, towers, N_CTX=4, CTX_INIT=True)
    for sign in (1, -1):
        model.zero_grad()
        alignment = model(model.encode_image(batch[0]))
        loss = sign * F.cross_entropy(alignment.logits, batch[1])
        (g,) = torch.autograd.grad(loss, model.ctx, retain_graph=True)
        model.backward(loss, alignment, lambda x: x)
        assert_close(model.ctx.grad, g, "ctx")


def test_prograd_starts_at_zeros_then_the_words(towers: Towers) -> None:
    model = learner(PromptAlignedLearner, towers, TEMPLATE, N_CTX=7, CTX_INIT=True)
    assert not model.ctx[:2].any()
    torch.testing.assert_close(model.ctx[2:].detach(), word_embeddings(towers[1], "a centered satellite photo of", 5))
    random = learner(PromptAlignedLearner, towers, N_CTX=16).ctx
    assert random.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("turn", [0, 1])
def test_prograd_guides_the_objective_of_a_debiaser(build: Build, turn: int) -> None:
    """Of all that CoOpOOD asks of the prompt, what conflicts is taken away; its own parameters are left alone."""
    keys = ["--base", "ProGrad", "TRAINER.COOP.N_CTX", 4, "TRAINER.COOP.CTX_INIT", "", "TRAINER.COOPOOD.ALPHA", 5]
    trainer: PromptTrainer = build("CoOpOOD", *keys)
    debiaser = trainer.debiasers[0]
    debiaser.steps += turn  # even: L_ce^u + L_c, odd: L_s + L_c
    batch = next(iter(trainer.encoder.batches("train")))
    cases = set()
    for flip in (False, True):
        trainer.learner.zero_grad(), debiaser.zero_grad()
        alignment = trainer.encoder.align(batch)
        loss, _ = trainer.objective(alignment, batch)
        debiaser.steps -= 1
        loss = -loss if flip else loss
        ours = [p for p in debiaser.parameters() if p.requires_grad]
        g, *others = torch.autograd.grad(loss, [trainer.learner.ctx, *ours], retain_graph=True, materialize_grads=True)
        z, s = alignment.image_features, alignment.logit_scale
        teacher = (s * z @ trainer.learner.hand_written.T).softmax(1)
        kl = F.kl_div((s * z @ alignment.text_features.T).log_softmax(1), teacher, reduction="batchmean")
        (h,) = torch.autograd.grad(kl, trainer.learner.ctx, retain_graph=True)
        cases.add(bool((g * h).sum() < 0))
        trainer.learner.backward(loss, alignment, lambda x: 1024 * x)
        assert_close(trainer.learner.ctx.grad / 1024, projected(g, h), "ctx", of=g)
        for parameter, gradient in zip(ours, others, strict=True):
            torch.testing.assert_close(parameter.grad / 1024, gradient)
    assert cases == {True, False}


# --- both ------------------------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("kind", [KnowledgeGuidedLearner, PromptAlignedLearner])


@KINDS
def test_checkpoint_has_the_keys_and_shapes_of_upstream(towers: Towers, kind: type[PromptLearner]) -> None:
    shapes = {key: tuple(value.shape) for key, value in learner(kind, towers, N_CTX=16).state_dict().items()}
    assert shapes == {"ctx": (16, 64), "token_prefix": (4, 1, 64), "token_suffix": (4, 60, 64)}
    assert learner(kind, towers, N_CTX=16, CSC=True).ctx.shape == (len(CLASSES), 16, 64)


@KINDS
def test_impossible_keys_are_refused(towers: Towers, kind: type[PromptLearner]) -> None:
    for keys in ({"N_CTX": 0}, {"N_CTX": 76}):
        with pytest.raises(UserError, match="N_CTX") as error:
            learner(kind, towers, **keys)
        assert "\n" not in str(error.value)


def test_prograd_needs_room_for_its_words(towers: Towers) -> None:
    with pytest.raises(UserError, match="N_CTX: 4 .* 'a centered satellite photo of'") as error:
        learner(PromptAlignedLearner, towers, TEMPLATE, N_CTX=4, CTX_INIT=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("trainer", ["CoOp", "KgCoOp", "ProGrad"])
def test_bf16_is_close_to_fp32(build: Build, trainer: str) -> None:
    """What ProGrad leaves of a gradient that conflicts is a small difference, of which rounding is a larger part."""
    logits, cosine = bf16_deviation(build, trainer)
    # Measured: 0.036 each; cosines 0.99982, 0.99986 and 0.979.
    assert logits < 0.2 and cosine > (0.95 if trainer == "ProGrad" else 0.999)


def test_a_temperature_of_zero_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match=r"LOSS.T: 0.0 is no temperature"):
        build("ProGrad", "TRAINER.COOP.N_CTX", 4, "LOSS.T", 0)
