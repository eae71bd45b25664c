"""CoOp against the plain formula through OpenAI's own ``clip.model``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.coop import ContextLearner
from torch import Tensor, nn

from oodprompt.backbones import CLIP, CLIPShape, encode, tokenize
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.errors import UserError
from oodprompt.methods.prompts import ContextPrompts, initial_context

CLASSES = ["circle", "traffic_light", "golden retriever"]
SHAPE = CLIPShape(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2)


@pytest.fixture(scope="module")
def towers() -> tuple[CLIP, nn.Module]:
    """Our CLIP and OpenAI's with the same random weights."""
    torch.manual_seed(0)
    theirs = load_clip_file("model").CLIP(64, 32, 2, 64, 8, 77, 49408, 64, 1, 2).float().eval()
    with torch.no_grad():
        theirs.logit_scale.fill_(1.0)
    return CLIP.from_state_dict(theirs.state_dict()).eval().requires_grad_(False), theirs


def learner(clip: CLIP, **keys: object) -> ContextLearner:
    cfg = get_cfg_default()
    for key, value in keys.items():
        set_key(cfg, f"TRAINER.COOP.{key}", value, "test")
    torch.manual_seed(1)
    return ContextLearner(cfg, CLASSES, "a photo of a {}.", clip)


def plain_logits(theirs: nn.Module, ctx: Tensor, images: Tensor, position: str, classes: Sequence[str]) -> Tensor:
    """CoOp's formula class by class, with all 77 positions computed by OpenAI's modules."""
    rows = []
    for i, name in enumerate(name.replace("_", " ") for name in classes):
        context = ctx if ctx.ndim == 2 else ctx[i]
        n, m = len(encode(name)), len(context)
        tokens = tokenize(" ".join(["X"] * m) + f" {name}.")
        word = theirs.token_embedding(tokens)[0].detach()
        before = {"end": m, "middle": m // 2, "front": 0}[position]
        name_part, rest = word[1 + m : 1 + m + n], word[1 + m + n :]
        prompt = torch.cat([word[:1], context[:before], name_part, context[before:], rest])[None]
        x = theirs.transformer((prompt + theirs.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        rows.append(theirs.ln_final(x)[0, tokens.argmax()] @ theirs.text_projection)
    w = F.normalize(torch.stack(rows), dim=-1)
    z = F.normalize(theirs.encode_image(images), dim=-1)
    return theirs.logit_scale.exp() * z @ w.T


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("csc", [False, True])
def test_logits_and_gradients_equal_the_plain_formula(towers: tuple[CLIP, nn.Module], position: str, csc: bool) -> None:
    ours, theirs = towers
    model = learner(ours, N_CTX=5, CSC=csc, CLASS_TOKEN_POSITION=position)
    images, label = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    logits = model(model.encode_image(images)).logits
    ctx = model.ctx.detach().clone().requires_grad_(True)
    expected = plain_logits(theirs, ctx, images, position, CLASSES)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    F.cross_entropy(logits, label).backward()
    F.cross_entropy(expected, label).backward()
    assert (model.ctx.grad - ctx.grad).abs().max() < 1e-5 * ctx.grad.abs().max()


def test_words_start_at_the_hand_written_prompt(towers: tuple[CLIP, nn.Module]) -> None:
    ours, theirs = towers
    model = learner(ours, CTX_INIT="a_photo_of_a")
    z = F.normalize(torch.randn(2, 64), dim=-1)
    prompts = tokenize([f"a photo of a {name.replace('_', ' ')}." for name in CLASSES])
    expected = F.normalize(theirs.encode_text(prompts), dim=-1)
    torch.testing.assert_close(model(z).text_features, expected, rtol=1e-5, atol=1e-5)
    assert model.ctx.shape == (4, 64)


def test_checkpoint_has_the_keys_and_shapes_of_upstream(towers: tuple[CLIP, nn.Module]) -> None:
    shapes = {key: tuple(value.shape) for key, value in learner(towers[0], N_CTX=16).state_dict().items()}
    assert shapes == {"ctx": (16, 64), "token_prefix": (3, 1, 64), "token_suffix": (3, 60, 64)}
    assert learner(towers[0], N_CTX=16, CSC=True).ctx.shape == (3, 16, 64)


def test_clip_is_neither_trained_nor_saved(towers: tuple[CLIP, nn.Module]) -> None:
    assert [name for name, _ in learner(towers[0]).named_parameters()] == ["ctx"]


@pytest.mark.parametrize("keys", [{"CLASS_TOKEN_POSITION": "centre"}, {"N_CTX": 0}, {"N_CTX": 90}])
def test_impossible_keys_are_refused(towers: tuple[CLIP, nn.Module], keys: dict[str, object]) -> None:
    with pytest.raises(UserError):
        learner(towers[0], **keys)


def test_zero_shot_equals_openai(build: Callable[..., object]) -> None:
    trainer = build("ZeroshotCLIP", "DATASET.TEMPLATE", "a drawing of a {}.")
    assert trainer.learner.text_features.shape[0] == 2
    state = {key: value.clone() for key, value in trainer.clip.state_dict().items()}
    module = load_clip_file("model")
    shape = trainer.clip.shape
    theirs = module.CLIP(
        *(shape.embed_dim, shape.image_resolution, shape.vision_layers, shape.vision_width, shape.vision_patch),
        *(shape.context_length, shape.vocab_size, shape.text_width, shape.text_heads, shape.text_layers),
    )
    theirs.load_state_dict(state)
    theirs.eval()
    batch = next(iter(trainer.test_loader))
    prompts = tokenize(["a drawing of a circle.", "a drawing of a diamond."])
    with torch.no_grad():
        expected, _ = theirs(batch["img"], prompts)
        torch.testing.assert_close(trainer.encoder.align(batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("position", "expected"), [("front", "0 5 1 2 3 4"), ("middle", "0 1 5 2 3 4")])
def test_words_of_several_tokens_stay_together(towers: tuple[CLIP, nn.Module], position: str, expected: str) -> None:
    """Two words of four tokens: two context vectors, two frozen tokens, and the name where it belongs."""
    clip, _ = towers
    assert len(encode("gyrfalcon of")) == 4
    torch.manual_seed(1)
    holder = nn.Module()
    context = initial_context(clip, "N_CTX", 2, "gyrfalcon of")[1]
    prompts = ContextPrompts(holder, clip, ["cat", "dog"], "gyrfalcon of", context, position)
    order = torch.cat([prompts.prefix_order, prompts.suffix_order[0]])[:6]
    assert order.tolist() == [int(place) for place in expected.split()]


def test_a_template_without_words_ahead_of_the_name_has_nothing_to_start_from(towers: tuple[CLIP, nn.Module]) -> None:
    cfg = get_cfg_default()
    set_key(cfg, "TRAINER.COOP.CTX_INIT", True, "test")
    with pytest.raises(UserError, match=r"template '\{\} texture.' has none"):
        ContextLearner(cfg, CLASSES, "{} texture.", towers[0])
