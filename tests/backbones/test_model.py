"""Our towers against OpenAI's ``clip.model`` on the same weights: features and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.backbones import CLIP, CLIPShape, load_backbone
from oodprompt.errors import UserError
from tests.helpers.clip_checks import (
    ALL,
    SMALL,
    TOLERANCE,
    Reference,
    assert_same,
    is_image,
    is_text,
    is_text_but_tokens,
    random,
    random_tokens,
    run,
)


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


# --- regions


HOWS = [(name, how) for name, hows in (("small ViT", "crops masked patches"), ("small RN", "roi crops patches"))
        for how in hows.split()]  # fmt: skip
WHOLE = torch.tensor([[0.0, 0, 1, 1]])


def some_boxes() -> list[Tensor]:
    """Of four images: two boxes, none, three, one."""
    corners = torch.rand(6, 2, 2, generator=torch.Generator().manual_seed(3))
    low, high = corners.amin(dim=1), corners.amax(dim=1)
    boxes = torch.cat([low, (high + 0.1).clamp(max=1)], dim=1)
    return [boxes[:2], boxes[:0], boxes[2:5], boxes[5:]]


def clip_and_images(name: str, reference: Reference, n: int = 4) -> tuple[CLIP, Tensor]:
    clip = CLIP.from_state_dict(reference(name).state_dict()).eval()
    return clip, random(n, 3, clip.shape.image_resolution, clip.shape.image_resolution)


def bilinear(image: Tensor, x: float, y: float) -> Tensor:
    """The value [c] of a map [c, n, n] at (x, y), in cells from the corner; beyond the outermost centres theirs."""
    n = image.shape[-1]
    x, y = (min(max(value - 0.5, 0), n - 1) for value in (x, y))
    i, j = min(int(y), n - 2), min(int(x), n - 2)
    dy, dx = y - i, x - j
    top = (1 - dx) * image[:, i, j] + dx * image[:, i, j + 1]
    return (1 - dy) * top + dy * ((1 - dx) * image[:, i + 1, j] + dx * image[:, i + 1, j + 1])


def resampled(image: Tensor, box: Tensor) -> Tensor:
    """The box of a map [c, n, n], stretched to n x n: one sample in the middle of every new cell."""
    n = image.shape[-1]
    left, top, right, bottom = (n * box).tolist()
    rows = [top + (k + 0.5) * (bottom - top) / n for k in range(n)]
    columns = [left + (k + 0.5) * (right - left) / n for k in range(n)]
    return torch.stack([torch.stack([bilinear(image, x, y) for x in columns], -1) for y in rows], 1)


def expected_region(clip: CLIP, image: Tensor, box: Tensor, how: str) -> Tensor:
    """One region of one image, the plain way."""
    visual = clip.visual
    if how == "crops":
        return clip.encode_image(resampled(image, box)[None])[0]
    if how == "roi":
        x = visual.stem(image[None])
        for i in (1, 2, 3):
            x = getattr(visual, f"layer{i}")(x)
        return visual.attnpool(visual.layer4(resampled(x[0], box)[None]))[0]
    assert how == "masked"
    kept: list[Tensor] = []
    block, side = visual.transformer.resblocks[-1], visual.side
    with block.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0])):
        visual.tokens(image[None])
    x = kept[0][0]
    q, k, v = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    left, top, right, bottom = (side * box).tolist()
    out = []
    for head in range(block.attn.heads):
        d = slice(head * 64, head * 64 + 64)
        weighted, total = torch.zeros(64), torch.zeros(())
        for i in range(side):
            for j in range(side):
                area = max(0, min(i + 1, bottom) - max(i, top)) * max(0, min(j + 1, right) - max(j, left))
                token = 1 + side * i + j
                weight = area * ((q[0, d] @ k[token, d]) / 8).exp()
                weighted, total = weighted + weight * v[token, d], total + weight
        out.append(weighted / total)
    y = x[0] + block.attn.out_proj(torch.cat(out))
    return visual.ln_post(y + block.mlp(block.ln_2(y))) @ visual.proj


@pytest.mark.parametrize(("name", "how"), [pair for pair in HOWS if pair[1] != "patches"])
def test_regions_against_the_plain_way(name: str, how: str, reference: Reference) -> None:
    """Images with different numbers of regions; features in the order of images, then of their boxes."""
    clip, images = clip_and_images(name, reference)
    boxes = some_boxes()
    with torch.no_grad():
        features = clip.region_features(images, boxes, how)
        pairs = [(image, box) for image, some in zip(images, boxes, strict=True) for box in some]
        expected = torch.stack([expected_region(clip, image, box, how) for image, box in pairs])
    assert features.shape == (6, clip.shape.embed_dim)
    assert (features - expected).abs().max() < 2e-5 * expected.abs().max()
    assert torch.pdist(features).min() > 1e-4 * features.abs().max()


@pytest.mark.parametrize(("name", "how"), HOWS)
def test_regions_by_image_are_those_of_equal_numbers(name: str, how: str, reference: Reference) -> None:
    """Boxes [B, K, 4] -> [B, K, d]; and nothing depends on how many other regions there are, or are taken at once."""
    clip, images = clip_and_images(name, reference)
    boxes = some_boxes()
    with torch.no_grad():
        features = clip.region_features(images, boxes, how)
        stacked = clip.region_features(images[[0, 2]], torch.stack([boxes[0], boxes[2][:2]]), how)
        alone = torch.cat([clip.region_features(images[i : i + 1], [boxes[i]], how, at_once=1) for i in range(4)])
    assert stacked.shape == (2, 2, clip.shape.embed_dim)
    for result, expected in ((stacked.flatten(0, 1), features[:4]), (alone, features)):
        assert (result - expected).abs().max() < 1e-5 * features.abs().max()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("how", ["auto", "crops"])
def test_the_whole_image_as_a_region_has_the_image_features(name: str, how: str, reference: Reference) -> None:
    clip, images = clip_and_images(name, reference, 2)
    with torch.no_grad():
        expected = clip.encode_image(images)
        features = clip.region_features(images, [WHOLE, WHOLE], how)
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("name", "auto"), [("small ViT", "tokens"), ("small RN", "roi")])
def test_what_auto_is(name: str, auto: str, reference: Reference) -> None:
    clip, images = clip_and_images(name, reference)
    with torch.no_grad():
        assert torch.equal(*(clip.region_features(images, some_boxes(), how) for how in ("auto", auto)))


@pytest.mark.parametrize(("name", "how"), HOWS)
def test_gradients_of_regions_reach_images_and_weights(name: str, how: str, reference: Reference) -> None:
    """Along a random direction in pixels, as finite differences have it; and some for the first convolution."""
    clip, images = clip_and_images(name, reference)
    clip.double()
    boxes, direction = some_boxes(), random(*images.shape, seed=4).double()
    images = images.double().requires_grad_()
    weight = random(6, clip.shape.embed_dim, seed=5).double()

    def value(at: Tensor) -> Tensor:
        return (clip.region_features(at, boxes, how).double() * weight).sum()

    gradient, of_weight = torch.autograd.grad(value(images), [images, clip.visual.conv1.weight])
    step = 1e-3
    with torch.no_grad():
        slope = (value(images + step * direction) - value(images - step * direction)) / (2 * step)
    assert abs((gradient * direction).sum() - slope) < 1e-2 * slope.abs() + 1e-2
    assert of_weight.abs().max() > 0 and gradient[1].abs().max() == 0  # the image without a region


@pytest.mark.parametrize(("name", "how"), HOWS)
def test_no_regions_give_no_features(name: str, how: str, reference: Reference) -> None:
    clip, images = clip_and_images(name, reference, 2)
    for n in (2, 0):
        assert clip.region_features(images[:n], [torch.zeros(0, 4)] * n, how).shape == (0, clip.shape.embed_dim)
    assert clip.region_features(images, torch.zeros(2, 0, 4), how).shape == (2, 0, clip.shape.embed_dim)


def test_wrong_ways_and_numbers_of_boxes(reference: Reference) -> None:
    vit, images = clip_and_images("small ViT", reference, 2)
    resnet, _ = clip_and_images("small RN", reference, 2)
    with pytest.raises(UserError, match="a ViT has no way 'roi'; give auto, tokens, crops, masked, patches"):
        vit.region_features(images, [WHOLE] * 2, "roi")
    with pytest.raises(UserError, match="a ResNet has no way 'masked'; give auto, roi, crops, patches"):
        resnet.region_features(images, [WHOLE] * 2, "masked")
    with pytest.raises(ValueError, match="2 images, but boxes of 1"):
        vit.region_features(images, [WHOLE])


@pytest.mark.parametrize("how", ["crops", "masked", "patches"])
def test_regions_with_visual_prompts(how: str, reference: Reference) -> None:
    clip, images = clip_and_images("small ViT", reference)
    prompts, deep = random(3, 128, seed=6), [random(3, 128, seed=7)]
    boxes = [WHOLE] * 4
    with torch.no_grad():
        features = clip.region_features(images, boxes, how, (prompts, deep))
        if how == "crops":
            expected = clip.encode_image(images, prompts, deep)
        elif how == "patches":
            expected = clip.visual.patch_features(images, prompts, deep).mean(dim=(1, 2))
        else:  # the class token reads all but itself

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:])

            tokens = clip.visual.tokens(images, prompts, deep, slice(0, 1), attend)[:, 0]
            expected = clip.visual.ln_post(tokens) @ clip.visual.proj
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("name", "how"), HOWS)
def test_regions_under_autocast(name: str, how: str, reference: Reference) -> None:
    clip, images = clip_and_images(name, reference)
    with torch.no_grad():
        expected = clip.region_features(images, some_boxes(), how)
        with torch.autocast("cpu", torch.bfloat16):
            result = clip.region_features(images, some_boxes(), how)
    assert F.cosine_similarity(result.float(), expected).min() > 0.99


def test_every_masked_region_reads_something(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that only fill up images with fewer regions, too: older PyTorch makes NaN of attention to nothing."""
    clip, images = clip_and_images("small ViT", reference)
    compute, areas = clip.visual.masked_features, []

    def keep(images: Tensor, boxes: Tensor) -> Tensor:
        areas.append((boxes[..., 2:] - boxes[..., :2]).prod(dim=-1))
        return compute(images, boxes)

    monkeypatch.setattr(clip.visual, "masked_features", keep)
    clip.region_features(images, some_boxes(), "masked")
    assert areas[0].shape == (4, 3) and areas[0].min() > 0
