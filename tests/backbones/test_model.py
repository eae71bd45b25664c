"""Our towers against OpenAI's ``clip.model`` on the same weights: features and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oodprompt.backbones import CLIP, CLIPShape, load_backbone
from oodprompt.errors import UserError

ALL = ("small ViT", "small RN", "ViT-B/16", "RN50")
SMALL = ("small ViT", "small RN")
TOLERANCE = 1e-5  # of the largest absolute value of the reference

Reference = Callable[[str], nn.Module]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_tokens(shape: CLIPShape, ends: list[int], seed: int = 0) -> Tensor:
    """Token ids [len(ends), context_length]: start token, words, the end token at ``ends``, then zeros."""
    vocab, length = shape.vocab_size, shape.context_length
    tokens = torch.randint(1, vocab - 2, (len(ends), length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = vocab - 2
    for row, end in zip(tokens, ends, strict=True):
        row[end] = vocab - 1
        row[end + 1 :] = 0
    return tokens


def run(features: Tensor, model: nn.Module, tower: Callable[[str], bool], **leaves: Tensor) -> dict[str, Tensor]:
    """The features, and the gradient of (features x fixed random).sum() for the tower's parameters and ``leaves``."""
    parameters = {name: value for name, value in model.named_parameters() if tower(name)}
    wanted = {**parameters, **leaves}
    gradients = torch.autograd.grad((features * random(*features.shape, seed=9)).sum(), list(wanted.values()))
    return {"features": features.detach(), **dict(zip(wanted, gradients, strict=True))}


def is_image(name: str) -> bool:
    return name.startswith("visual.")


def is_text(name: str) -> bool:
    return not is_image(name) and name != "logit_scale"


def is_text_but_tokens(name: str) -> bool:
    return is_text(name) and name != "token_embedding.weight"


def assert_same(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """All tensors equal within TOLERANCE, and none trivially so."""
    assert ours.keys() == reference.keys()
    deviations = {}
    for name, expected in reference.items():
        scale = expected.abs().max()
        if name.endswith("attnpool.k_proj.bias"):
            # A constant added to all keys shifts every softmax logit alike: the true gradient is 0, both are noise.
            scale = reference[name.replace("bias", "weight")].abs().max()
        assert scale > 0 and ours[name].isfinite().all(), name
        deviations[name] = ((ours[name] - expected).abs().max() / scale).item()
    worst = max(deviations, key=deviations.__getitem__)
    print(f"largest relative deviation: {deviations[worst]:.1e} in {worst}; features: {deviations['features']:.1e}")
    assert deviations[worst] < TOLERANCE, (worst, deviations[worst])


def reference_text(model: nn.Module, embeddings: Tensor, eot: Tensor) -> Tensor:
    """OpenAI's text tower from embeddings, over all positions (as in CoOp's ``TextEncoder``)."""
    x = model.transformer((embeddings + model.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
    return model.ln_final(x)[torch.arange(len(x)), eot] @ model.text_projection


def from_embeddings(model: CLIP) -> Callable[[Tensor, Tensor], Tensor]:
    """Our text tower from embeddings [C, L, e] that share nothing, and ends of text [C]."""
    return lambda x, eot: model.encode_prompts(x[0, :0], x, tuple((eot + 1).tolist()))


@pytest.mark.parametrize("name", ALL)
def test_image_features_and_gradients(name: str, reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    theirs = reference(name)
    ours = CLIP.from_state_dict(theirs.state_dict()).eval()
    results = []
    for model in (ours, theirs):
        images = random(2, 3, *2 * (shapes[name].image_resolution,)).requires_grad_()
        results.append(run(model.encode_image(images), model, is_image, images=images))
    assert results[0]["features"].shape == (2, shapes[name].embed_dim)
    assert_same(*results)


@pytest.mark.parametrize("name", ALL)
def test_text_features_and_gradients(name: str, reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    """Prompts of several lengths, one of which fills the context: nothing can be left out."""
    theirs = reference(name)
    ours = CLIP.from_state_dict(theirs.state_dict()).eval()
    tokens = random_tokens(shapes[name], [5, shapes[name].context_length - 1, 1])
    results = [run(model.encode_text(tokens), model, is_text) for model in (ours, theirs)]
    assert results[0]["features"].shape == (3, shapes[name].embed_dim)
    assert_same(*results)


@pytest.mark.parametrize("ends", [[1], [4, 9, 6], [11, 2]], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_truncation_is_exact(name: str, ends: list[int], reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    """Stopping each prompt at its end-of-text token changes neither features nor gradients, down to the embeddings."""
    theirs = reference(name)
    ours = CLIP.from_state_dict(theirs.state_dict()).eval()
    lengths = []
    ours.transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    eot, results = torch.tensor(ends), []
    for model, encode in ((ours, from_embeddings(ours)), (theirs, lambda x, i: reference_text(theirs, x, i))):
        embeddings = 0.1 * random(len(ends), shapes[name].context_length, shapes[name].text_width)
        embeddings.requires_grad_()
        features = encode(embeddings, eot)
        results.append(run(features, model, is_text_but_tokens, embeddings=embeddings))
    assert lengths == [sum(end + 1 for end in ends)]
    assert_same(*results)
    for row, end in zip(results[0]["embeddings"], ends, strict=True):
        assert row[: end + 1].abs().amax(dim=1).all() and not row[end + 1 :].any()


@pytest.mark.parametrize("name", SMALL)
def test_what_follows_the_end_of_text_does_not_matter(
    name: str, reference: Reference, shapes: dict[str, CLIPShape]
) -> None:
    ours = CLIP.from_state_dict(reference(name).state_dict()).eval()
    eot = torch.tensor([3, 7])
    embeddings = random(2, shapes[name].context_length, shapes[name].text_width)
    expected = from_embeddings(ours)(embeddings, eot)
    embeddings_after = embeddings.clone()
    embeddings_after[0, 4:] = torch.nan
    embeddings_after[1, 8:] = torch.nan
    assert torch.equal(from_embeddings(ours)(embeddings_after, eot), expected)
    assert torch.equal(from_embeddings(ours)(embeddings[:, :8], eot), expected)


def test_gradients_reach_only_the_learned_embeddings(reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    """The use in prompt learning: frozen weights, context vectors as the only leaf, between frozen embeddings."""
    theirs = reference("small ViT").requires_grad_(False)
    ours = CLIP.from_state_dict(theirs.state_dict()).eval().requires_grad_(False)
    tokens = random_tokens(shapes["small ViT"], [8, 6])
    gradients = []
    for model, encode in ((ours, from_embeddings(ours)), (theirs, lambda x, i: reference_text(theirs, x, i))):
        context = (0.02 * random(4, shapes["small ViT"].text_width)).requires_grad_()
        frozen = model.token_embedding(tokens)
        embeddings = torch.cat([frozen[:, :1], context.expand(2, -1, -1), frozen[:, 5:]], dim=1)
        features = encode(embeddings, tokens.argmax(dim=1))
        (features * random(*features.shape)).sum().backward()
        gradients.append(context.grad)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert (gradients[0] - gradients[1]).abs().max() < TOLERANCE * gradients[1].abs().max()


@pytest.mark.parametrize("name", ("small ViT", "ViT-B/16"))
def test_patch_tokens(name: str, reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    theirs, shape = reference(name), shapes[name]
    ours = CLIP.from_state_dict(theirs.state_dict()).eval()
    kept: list[Tensor] = []
    theirs.visual.transformer.register_forward_hook(lambda _, inputs, output: kept.append(output.permute(1, 0, 2)))
    images = random(2, 3, shape.image_resolution, shape.image_resolution)
    with torch.no_grad():
        theirs.encode_image(images)
        tokens = ours.visual.tokens(images)
    assert tokens.shape == (2, 1 + (shape.image_resolution // shape.vision_patch) ** 2, shape.vision_width)
    assert (tokens - kept[0]).abs().max() < TOLERANCE * kept[0].abs().max()


@pytest.mark.parametrize("name", ALL)
def test_shape_is_read_off_the_state_dict(name: str, reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    state = reference(name).state_dict()
    assert CLIPShape.of(state) == shapes[name]
    assert CLIP.from_state_dict(state).shape == shapes[name]


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_layers": 12, "text_layers": 11},
        {"vision_layers": (3, 4, 6, 3), "vision_patch": None, "vision_width": 8, "image_resolution": 96},
        {"image_resolution": 56, "vision_patch": 14, "embed_dim": 32},
        {"context_length": 9, "vocab_size": 33, "text_width": 192, "text_heads": 3},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_every_size_is_inferred(changes: dict, shapes: dict[str, CLIPShape]) -> None:
    """More than nine layers, too: layer 10 and 11 must not be taken for layer 1."""
    shape = replace(shapes["small ViT"], **changes)
    assert CLIPShape.of(CLIP(shape).state_dict()) == shape


@pytest.mark.parametrize("name", SMALL)
def test_names_are_openais(name: str, reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    theirs, ours = reference(name).state_dict(), CLIP(shapes[name]).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_weights_become_fp32(name: str, reference: Reference) -> None:
    state = {key: value.half() for key, value in reference(name).state_dict().items()}
    ours = CLIP.from_state_dict(state)
    assert ours.dtype == torch.float32
    for key, value in ours.state_dict().items():
        assert torch.equal(value.float(), state[key].float()), key


@pytest.mark.parametrize("name", SMALL)
def test_the_model_runs_in_another_precision(name: str, reference: Reference, shapes: dict[str, CLIPShape]) -> None:
    ours, shape = CLIP.from_state_dict(reference(name).state_dict()).eval(), shapes[name]
    images, tokens = random(2, 3, shape.image_resolution, shape.image_resolution), random_tokens(shape, [4, 9])
    with torch.no_grad():
        expected = [ours.encode_image(images), ours.encode_text(tokens)]
        ours.double()
        result = [ours.encode_image(images), ours.encode_text(tokens)]
    for x, y in zip(result, expected, strict=True):
        assert x.dtype == torch.float64
        assert (x - y).abs().max() < 1e-4 * y.abs().max()


KEYS = [
    ("small ViT", "visual.class_embedding"),
    ("small ViT", "visual.transformer.resblocks.1.attn.in_proj_bias"),
    ("small ViT", "visual.positional_embedding"),
    ("small ViT", "token_embedding.weight"),
    ("small ViT", "logit_scale"),
    ("small RN", "visual.layer1.1.bn3.running_var"),
    ("small RN", "visual.attnpool.c_proj.weight"),
    ("small RN", "text_projection"),
]


@pytest.mark.parametrize(("name", "key"), KEYS)
def test_a_missing_key_is_named(name: str, key: str, reference: Reference, tmp_path: Path) -> None:
    state, file = reference(name).state_dict(), tmp_path / "clip.pt"
    del state[key]
    torch.save(state, file)
    with pytest.raises(UserError) as error:
        load_backbone("", file)
    assert key in str(error.value) and str(file) in str(error.value) and "OpenAI's layout" in str(error.value)


FOREIGN: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "empty": lambda state: {},
    "Hugging Face": lambda state: {
        "vision_model.embeddings.class_embedding": torch.zeros(128),
        "text_model.embeddings.token_embedding.weight": torch.zeros(100, 64),
        "text_projection.weight": torch.zeros(48, 64),
    },
    "timm tower": lambda state: {
        "visual.trunk.cls_token" if key == "visual.class_embedding" else key: value
        for key, value in state.items()
        if not key.startswith("visual.proj")
    },
    "a further key": lambda state: {**state, "visual.head.weight": torch.zeros(2, 2)},
    "torchvision": lambda state: {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.weight": torch.zeros(10, 64)},
    "wrong number of axes": lambda state: {**state, "text_projection": torch.zeros(64)},
    "no axes": lambda state: {**state, "ln_final.weight": torch.zeros(())},
    "patches not square": lambda state: {**state, "visual.positional_embedding": torch.zeros(28, 128)},
    "text heads not 64 wide": lambda state: CLIP(replace(CLIPShape.of(state), text_width=96)).state_dict(),
    "vision heads not 64 wide": lambda state: CLIP(replace(CLIPShape.of(state), vision_width=96)).state_dict(),
    "numbers as keys": lambda state: dict(enumerate(state.values())),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_a_foreign_layout_is_refused(layout: str, reference: Reference, tmp_path: Path) -> None:
    file = tmp_path / "foreign.pt"
    torch.save(FOREIGN[layout](dict(reference("small ViT").state_dict())), file)
    with pytest.raises(UserError) as error:
        load_backbone("tiny", file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ALL)
def test_no_images_and_no_prompts_give_no_features(
    name: str, reference: Reference, shapes: dict[str, CLIPShape]
) -> None:
    """What a process computes that gets no image of the last batch."""
    ours, shape = CLIP.from_state_dict(reference(name).state_dict()).eval(), shapes[name]
    size = shape.image_resolution
    assert ours.encode_image(torch.zeros(0, 3, size, size)).shape == (0, shape.embed_dim)
    features = ours.encode_prompts(torch.zeros(0, 2, shape.text_width), torch.zeros(3, 2, shape.text_width), (1, 2, 2))
    assert features.shape == (0, 3, shape.embed_dim)
