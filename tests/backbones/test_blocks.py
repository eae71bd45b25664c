"""Prompts, patches and regions in the towers of other libraries, by hooks: equal to our own towers and to plain loops."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip import factory
from torch import Tensor, nn

from oodprompt.backbones import CLIP
from oodprompt.backbones.general import GeneralCLIP, MixedCLIP
from oodprompt.backbones.open_clip_models import _general, adapt
from oodprompt.errors import UserError
from oodprompt.methods.prompts import ContextPrompts, initial_context
from tests.helpers.architectures import as_trained
from tests.helpers.hugging_face import off
from tests.helpers.open_clip_small import NAMES, small, tokenizer_of

M, TOLERANCE = 3, 1e-5
REGIONS = torch.tensor(
    [[[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0.5, 1, 1]], [[0, 0, 1, 0.5], [0.5, 0, 1, 1], [0, 0, 1, 1]]]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def native() -> tuple[CLIP, GeneralCLIP, Any]:
    """One open_clip model, 4 x 4 patches: in our towers, and as it is."""
    settings = small("ViT-B-32")
    settings["vision_cfg"].update(image_size=64, patch_size=16, width=128, layers=3, head_width=32)
    settings["text_cfg"].update(layers=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", settings)
        logging.disable(logging.WARNING)
        torch.manual_seed(0)
        module = open_clip.create_model("ViT-B-32", pretrained=None, load_weights=False).eval().requires_grad_(False)
        logging.disable(logging.NOTSET)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.data.uniform_(0.5, 1.5)
    tokenizer, trained = tokenizer_of(module), as_trained(module)
    ours = adapt(module, tokenizer, trained, "ours")
    theirs = _general(module, tokenizer, trained, "theirs")
    theirs.preprocessing = trained
    assert type(ours) is CLIP
    return ours, theirs, module


def gradients(features: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((features * random(*features.shape, seed=9)).sum(), of))


@pytest.mark.parametrize("depth", [1, 3])
def test_visual_prompts_are_those_of_our_tower(native: tuple[CLIP, GeneralCLIP, Any], depth: int) -> None:
    ours, theirs, _ = native
    images = random(2, 3, 64, 64)
    prompts = [random(M, 128, seed=i).requires_grad_() for i in range(depth)]
    features = [clip.encode_image(images, prompts[0], prompts[1:]) for clip in (ours, theirs)]
    assert off(features[1], features[0]) < TOLERANCE and off(features[0], ours.encode_image(images)) > 1e-2
    for expected, found in zip(*(gradients(z, prompts) for z in features), strict=True):
        assert off(found, expected) < TOLERANCE


@pytest.mark.parametrize("prompted", [False, True], ids=["", "prompts"])
def test_regions_by_their_patches_are_those_of_our_tower(native: tuple[CLIP, GeneralCLIP, Any], prompted: bool) -> None:
    ours, theirs, _ = native
    images = random(2, 3, 64, 64).requires_grad_()
    prompts = (random(M, 128, seed=1), [random(M, 128, seed=2)]) if prompted else ()
    expected, found = (clip.region_features(images, REGIONS, "tokens", prompts, at_once=2) for clip in (ours, theirs))
    assert off(found, expected) < TOLERANCE
    for ours_grad, theirs_grad in zip(*(gradients(z, [images]) for z in (expected, found)), strict=True):
        assert off(theirs_grad, ours_grad) < TOLERANCE


@pytest.mark.parametrize("position", ["end", "middle"])
def test_deep_text_prompts_are_those_of_our_tower(native: tuple[CLIP, GeneralCLIP, Any], position: str) -> None:
    ours, theirs, _ = native
    deep = [random(4, ours.shape.text_width, seed=i).requires_grad_() for i in range(1 if position == "middle" else 2)]
    features = []
    for clip in (ours, theirs):
        words, context = initial_context(clip, "key", 4, "a photo of a")
        prompts = ContextPrompts(nn.Module(), clip, NAMES, words, context, position)
        features.append(prompts.text_features(deep=deep if position == "end" else ()))
    assert (features[0] - features[1]).abs().max() < TOLERANCE
    if position == "end":
        for expected, found in zip(*(gradients(z, deep) for z in features), strict=True):
            assert off(found, expected) < 10 * TOLERANCE


# --- towers of timm ---------------------------------------------------------------------------------------------------


class Timm:
    """CLIPs with a small timm tower, each built once."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[MixedCLIP, Any]] = {}

    def __call__(self, tower: str, size: int = 64, pool: str = "", **cut: Any) -> tuple[MixedCLIP, Any]:
        if tower not in self.made:
            settings = small("ViT-B-32")
            settings["vision_cfg"] = {
                "timm_model_name": tower,
                "timm_model_pretrained": False,
                "timm_pool": pool,
                "timm_proj": "linear",
                "image_size": size,
            }
            create = timm.create_model
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", settings)
                patch.setattr(timm, "create_model", lambda name, **words: create(name, **words, **cut))
                logging.disable(logging.WARNING)
                torch.manual_seed(0)
                module = open_clip.create_model("ViT-B-32", pretrained=None, load_weights=False).eval()
                logging.disable(logging.NOTSET)
            for name, value in module.named_parameters():
                if name.endswith(("gamma", "gamma_1", "gamma_2")):  # of layer scale, which starts at next to nothing
                    value.data.fill_(0.5)
            clip = adapt(module, tokenizer_of(module), as_trained(module), tower)
            assert isinstance(clip, MixedCLIP)
            self.made[tower] = clip, module.visual
        return self.made[tower]


VITS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"pool": "token", "depth": 2, "img_size": 64},
    "vit_medium_patch16_gap_256": {"pool": "avg", "depth": 2, "img_size": 64},
    "vit_base_patch16_siglip_224": {"pool": "map", "depth": 2, "img_size": 64},
    "eva02_tiny_patch14_224": {"pool": "token", "size": 56, "depth": 2, "img_size": 56},
    "vit_pe_core_tiny_patch16_384": {"pool": "avg", "depth": 2, "img_size": 64},
}
CONVOLUTIONAL: dict[str, dict[str, Any]] = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "size": 128},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "size": 224},
    "fastvit_t8": {"layers": (1, 1, 1, 1), "size": 128},
}


@pytest.fixture(scope="module")
def towers() -> Iterator[Callable[..., tuple[MixedCLIP, Any]]]:
    yield Timm()


@pytest.mark.parametrize("tower", VITS)
def test_prompts_in_a_vit_of_timm(tower: str, towers: Callable[..., tuple[MixedCLIP, Any]]) -> None:
    """As its own blocks would compute with more tokens ahead of the patches, without positions."""
    clip, visual = towers(tower, **VITS[tower])
    size = clip.shape.image_resolution
    images, width = random(2, 3, size, size), clip.shape.vision_width
    prompts = [random(M, width, seed=i).requires_grad_() for i in range(2)]
    assert clip.takes_visual_prompts and clip.shape.vision_layers == 2 and clip.region_ways[0] == "tokens"
    before = [part.num_prefix_tokens for part in visual.modules() if hasattr(part, "num_prefix_tokens")]
    features = clip.encode_image(images, prompts[0], prompts[1:])
    assert off(features, by_hand(visual, images, prompts)) < TOLERANCE
    assert off(features, clip.encode_image(images)) > 1e-3
    assert before == [part.num_prefix_tokens for part in visual.modules() if hasattr(part, "num_prefix_tokens")]
    assert all(g.any() for g in gradients(features, prompts))


def by_hand(visual: Any, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """A plain forward pass of timm's ViT or EVA with prompts."""
    trunk = visual.trunk
    ahead, rope = trunk.num_prefix_tokens, None
    if hasattr(trunk, "rope"):
        x, rope = trunk._pos_embed(trunk.patch_embed(images))
        x = trunk.norm_pre(x)
    else:
        x = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))
    first, rest = x[:, :ahead], x[:, ahead:]
    for block, own in zip(trunk.blocks, prompts, strict=True):
        x = torch.cat([first, own.expand(len(x), -1, -1), rest], dim=1)
        if rope is None:
            x = block(x)
        else:
            block.attn.num_prefix_tokens += M
            x = block(x, rope=rope)
            block.attn.num_prefix_tokens -= M
        first, rest = x[:, :ahead], x[:, ahead + M :]
    x = trunk.norm(torch.cat([first, rest], dim=1))
    return visual.head(trunk.forward_head(x))


@pytest.mark.parametrize("tower", VITS)
def test_regions_of_a_vit_of_timm(tower: str, towers: Callable[..., tuple[MixedCLIP, Any]]) -> None:
    """A region reads nothing of what is outside it, and knows where it is; the whole image is as encoded."""
    clip, _ = towers(tower, **VITS[tower])
    size = clip.shape.image_resolution
    images = random(2, 3, size, size)
    found = clip.region_features(images, REGIONS)
    assert torch.allclose(found[[0, 1], [0, 2]], clip.encode_image(images), atol=1e-5)
    left, other = torch.tensor([[[0, 0, 0.5, 1]]]), images[:1].clone()
    other[..., size // 2 :] = 0
    assert torch.equal(clip.region_features(other, left)[0, 0], clip.region_features(images[:1], left)[0, 0])
    swapped = images[:1].roll(size // 2, dims=-1)
    right = torch.tensor([[[0.5, 0, 1, 1]]])
    assert off(clip.region_features(swapped, right)[0, 0], found[0, 1]) > 1e-4


def test_regions_of_rotary_positions(towers: Callable[..., tuple[MixedCLIP, Any]]) -> None:
    """The chosen patches keep theirs: those of other places count nothing where no patch attends to them."""
    clip, visual = towers("eva02_tiny_patch14_224", **VITS["eva02_tiny_patch14_224"])
    images, trunk = random(1, 3, 56, 56), visual.trunk
    x, rope = trunk._pos_embed(trunk.patch_embed(images))
    index = torch.tensor([10, 11, 14, 15])
    x = torch.cat([x[:, :1], x[:, 1 + index]], dim=1)
    for block in trunk.blocks:
        x = block(x, rope=rope[index])
    expected = visual.head(trunk.forward_head(trunk.norm(x)))
    assert off(clip.region_features(images, REGIONS[:1, 2:])[0], expected) < TOLERANCE


@pytest.mark.parametrize("tower", CONVOLUTIONAL)
def test_regions_of_a_convolutional_tower(tower: str, towers: Callable[..., tuple[MixedCLIP, Any]]) -> None:
    clip, visual = towers(tower, **CONVOLUTIONAL[tower])
    size = clip.shape.image_resolution
    images = random(2, 3, size, size).requires_grad_()
    assert clip.region_ways == ("roi", "crops") and not clip.takes_visual_prompts
    found = clip.region_features(images, REGIONS, at_once=4)
    assert torch.allclose(found[[0, 1], [0, 2]], clip.encode_image(images), atol=1e-5)
    assert off(found[0, 1], found[0, 0]) > 1e-4
    other = images.detach().clone()
    other[0] = 0
    assert torch.equal(clip.region_features(other, REGIONS)[1], clip.region_features(images, REGIONS)[1])
    assert all(g.any() for g in gradients(found, [images]))


def test_what_blocks_cannot_take_is_refused(towers: Callable[..., tuple[MixedCLIP, Any]]) -> None:
    """The bias by relative place has a fixed number of tokens."""
    clip, _ = towers("vit_relpos_small_patch16_224", pool="avg", size=224, depth=1)
    assert clip.region_ways == ("crops",) and not clip.takes_visual_prompts
    with pytest.raises(UserError, match="the image tower of vit_relpos_small_patch16_224 has no way 'tokens'"):
        clip.region_features(torch.zeros(1, 3, 224, 224), REGIONS[:1], "tokens")
