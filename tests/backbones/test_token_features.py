"""Features of regions that the image tower sees alone: the box's own patches, at their places, and the class token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from oodprompt.backbones.model import CLIP, CLIPShape

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


@pytest.fixture(scope="module")
def clip() -> CLIP:
    """A ViT of 4 x 4 patches."""
    torch.manual_seed(0)
    shape = CLIPShape(16, 32, 3, 64, 8, 77, 100, 64, 1, 1)
    return CLIP(shape).double().eval().requires_grad_(False)


def alone(clip: CLIP, image: Tensor, patches: list[int], prompts: Tensor | None = None) -> Tensor:
    """The tower's own blocks on the class token and the patches of one image [3, R, R]."""
    v = clip.visual
    x = v.conv1(image[None]).flatten(2).transpose(1, 2)[0] + v.positional_embedding[1:]
    x = torch.cat([(v.class_embedding + v.positional_embedding[0])[None], x[patches]])
    x = v.ln_pre(x if prompts is None else torch.cat([x, prompts]))[None]
    for block in v.transformer.resblocks:
        x = block(x)
    return v.ln_post(x[0, 0]) @ v.proj


@pytest.mark.parametrize(
    ("box", "patches"),
    [
        ((0, 0, 0.5, 0.5), [0, 1, 4, 5]),
        ((0.5, 0, 1, 0.5), [2, 3, 6, 7]),
        ((0, 0.5, 0.5, 1), [8, 9, 12, 13]),
        ((0.25, 0.5, 0.5, 0.75), [9]),
        ((0.1, 0.1, 0.9, 0.4), [0, 1, 2, 3, 4, 5, 6, 7]),  # holds the centres 0.125 and 0.375
        ((0.13, 0.1, 0.874, 0.3), [1, 2]),
        ((0.3, 0.3, 0.32, 0.32), [5]),  # holds no centre: the patch it lies in
        ((0.2, 0.3, 0.24, 0.9), [4, 8, 12]),  # no centre across, three down
        ((1.0, 1.0, 1.0, 1.0), [15]),
    ],
)
def test_region_is_its_patches_through_the_tower(clip: CLIP, box: tuple[float, ...], patches: list[int]) -> None:
    image = torch.randn(3, 32, 32, dtype=torch.double)
    got = clip.region_features(image[None], [torch.tensor([box])], "tokens")
    assert torch.allclose(got[0], alone(clip, image, patches), rtol=1e-6, atol=1e-9)


def test_regions_of_different_sizes_beside_one_another(clip: CLIP) -> None:
    images = torch.randn(3, 3, 32, 32, dtype=torch.double)
    boxes = [torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1.0], [0, 0, 1, 0.25]]), torch.zeros(0, 4), WHOLE]
    got = clip.region_features(images, boxes, "tokens")
    own = [(0, [0, 1, 4, 5]), (0, [10, 11, 14, 15]), (0, [0, 1, 2, 3]), (2, list(range(16)))]
    want = torch.stack([alone(clip, images[i], patches) for i, patches in own])
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-9)


def test_whole_image_has_the_image_feature(clip: CLIP) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.double)
    assert torch.allclose(clip.region_features(images, [WHOLE, WHOLE], "tokens"), clip.encode_image(images))


def test_nothing_outside_the_box_plays_a_part(clip: CLIP) -> None:
    image = torch.randn(1, 3, 32, 32, dtype=torch.double)
    other = image.clone()
    other[:, :, 16:] = 7.0
    box = [torch.tensor([[0.5, 0, 1, 0.5]])]
    one, two = (clip.region_features(x, box, "tokens") for x in (image, other))
    assert torch.equal(one, two)
    other[:, :, :16, 16:] = 7.0
    assert not torch.allclose(one, clip.region_features(other, box, "tokens"))


@pytest.mark.parametrize("boxes", [[0, 0, 0.5, 0.5], [0.25, 0, 1, 1]])
def test_prompts_stand_behind_the_patches(clip: CLIP, boxes: list[float]) -> None:
    image, prompts = torch.randn(1, 3, 32, 32, dtype=torch.double), torch.randn(2, 64, dtype=torch.double)
    deep = [torch.randn(2, 64, dtype=torch.double)]
    whole = clip.region_features(image, [WHOLE], "tokens", (prompts, deep))
    assert torch.allclose(whole, clip.encode_image(image, prompts, deep))
    two = [torch.tensor([boxes, [0.0, 0, 1, 1]])]
    shallow = clip.region_features(image, two, "tokens", (prompts,))
    grid = torch.arange(16).view(4, 4)
    patches = grid[:2, :2] if boxes[2] < 1 else grid[:, 1:]
    assert torch.allclose(shallow[0], alone(clip, image[0], patches.flatten().tolist(), prompts))
    both = clip.region_features(image, two, "tokens", (prompts, deep))
    assert torch.allclose(both[:1], clip.region_features(image, [two[0][:1]], "tokens", (prompts, deep)))


def test_gradients_reach_pixels_and_prompts(clip: CLIP) -> None:
    image = torch.randn(1, 3, 32, 32, dtype=torch.double, requires_grad=True)
    prompts = torch.randn(2, 64, dtype=torch.double, requires_grad=True)
    clip.region_features(image, [torch.tensor([[0, 0, 0.5, 0.5]])], "tokens", (prompts,)).sum().backward()
    assert image.grad[..., :16, :16].abs().min() > 0 and not image.grad[..., 16:, :].any() and prompts.grad.any()
