"""The image tower against OpenAI's modules: prompts beside the patches, patch and region features, the activation."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from oodprompt.backbones import CLIP, CLIPShape
from oodprompt.backbones.model import QuickGELU
from tests.helpers.clip_checks import TOLERANCE, Reference, assert_same, is_image, pair, random, run

SHAPE = CLIPShape(48, 40, 3, 128, 8, 12, 100, 64, 1, 1)
PATCHES, M = 25, 4


@pytest.fixture
def towers(openai: ModuleType) -> tuple[CLIP, nn.Module]:
    return pair(openai, SHAPE)


@pytest.fixture(params=["ViT", "RN"])
def clip(request: pytest.FixtureRequest, reference: Reference, openai: ModuleType) -> CLIP:
    """A CLIP with 5 x 5 patches, and one whose feature map is 2 x 2."""
    if request.param == "ViT":
        return pair(openai, SHAPE)[0]
    return CLIP.from_state_dict(reference("small RN").state_dict()).eval()


def make_images(clip: CLIP, n: int = 2) -> Tensor:
    return random(n, 3, clip.shape.image_resolution, clip.shape.image_resolution)


def make_prompts(depth: int) -> tuple[Tensor | None, list[Tensor]]:
    """Prompts for the first ``depth`` blocks, each [M, width]: those beside the patches, and the deep ones."""
    made = [(0.5 * random(M, SHAPE.vision_width, seed=20 + i)).requires_grad_() for i in range(depth)]
    return (made[0], made[1:]) if made else (None, [])


def reference_tokens(visual: nn.Module, images: Tensor, prompts: Tensor | None, deep: Sequence[Tensor]) -> Tensor:
    """All tokens after the last block, [B, 1 + patches + M, width]; each image on its own, as in MaPLe."""
    rows = []
    for image in images:
        x = visual.conv1(image.unsqueeze(0)).flatten(2).permute(0, 2, 1)
        x = torch.cat([visual.class_embedding.expand(1, 1, -1), x], dim=1) + visual.positional_embedding
        if prompts is not None:
            x = torch.cat([x, prompts.unsqueeze(0)], dim=1)
        x = visual.ln_pre(x).permute(1, 0, 2)
        for i, block in enumerate(visual.transformer.resblocks):
            if 0 < i <= len(deep):
                x = torch.cat([x[: -len(deep[i - 1])], deep[i - 1].unsqueeze(1)])
            x = block(x)
        rows.append(x[:, 0])
    return torch.stack(rows)


# --- prompts


@pytest.mark.parametrize("depth", range(SHAPE.vision_layers + 2))
def test_prompts_in_the_first_blocks(depth: int, towers: tuple[CLIP, nn.Module]) -> None:
    """Features, and gradients of prompts, weights and images; prompts for a block that does not exist are NaN."""
    prompts, deep = make_prompts(min(depth, SHAPE.vision_layers))
    leaves = {"prompts": prompts, **{f"deep {i}": value for i, value in enumerate(deep, 1)}} if depth else {}
    more_deep = [*deep, *[torch.full((M, SHAPE.vision_width), torch.nan)] * (depth - SHAPE.vision_layers)]
    ours, theirs = towers
    outcomes = []
    for model in towers:
        images = make_images(ours, 3).requires_grad_()
        if model is ours:
            features = ours.encode_image(images, prompts, more_deep)
        else:
            visual = theirs.visual
            features = visual.ln_post(reference_tokens(visual, images, prompts, more_deep)[:, 0]) @ visual.proj
        outcomes.append(run(features, model, is_image, images=images, **leaves))
    assert outcomes[0]["features"].shape == (3, SHAPE.embed_dim)
    assert_same(*outcomes)


@pytest.mark.parametrize("depth", range(SHAPE.vision_layers + 1))
def test_tokens(depth: int, towers: tuple[CLIP, nn.Module]) -> None:
    ours, theirs = towers
    images, (prompts, deep) = make_images(ours), make_prompts(depth)
    with torch.no_grad():
        tokens = ours.visual.tokens(images, prompts, deep)
        expected = reference_tokens(theirs.visual, images, prompts, deep)
    assert tokens.shape == expected.shape == (2, 1 + PATCHES + (M if depth else 0), SHAPE.vision_width)
    assert (tokens - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    "rows",
    [slice(0, 1), slice(3, 9), slice(-M, None), torch.tensor([0]), torch.tensor([27, 0, 5, 25])],
    ids=["class token", "slice", "prompts", "index", "indices"],
)
def test_rows_of_the_last_block(rows: slice | Tensor, towers: tuple[CLIP, nn.Module]) -> None:
    """Computing some rows alone gives what they are among all, and its MLP sees no others."""
    ours, _ = towers
    prompts, deep = make_prompts(3)
    seen: list[int] = []
    ours.visual.transformer.resblocks[-1].mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    outcomes = []
    for all_of_them in (False, True):
        images = make_images(ours).requires_grad_()
        tokens = ours.visual.tokens(images, prompts, deep, rows=None if all_of_them else rows)
        some = tokens[:, rows] if all_of_them else tokens
        leaves = {"images": images, "prompts": prompts, **{f"deep {i}": value for i, value in enumerate(deep)}}
        outcomes.append(run(some, ours.visual.transformer, lambda name: True, **leaves))
    assert_same(*outcomes)
    assert seen == [outcomes[0]["features"].shape[1], 1 + PATCHES + M]


def test_the_class_token_alone_passes_the_last_mlp(towers: tuple[CLIP, nn.Module]) -> None:
    ours, _ = towers
    seen: list[torch.Size] = []
    for block in ours.visual.transformer.resblocks:
        block.mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[:2]))
    prompts, deep = make_prompts(2)
    ours.encode_image(make_images(ours), prompts, deep)
    assert seen == [(2, 1 + PATCHES + M)] * 2 + [(2, 1)]


def test_no_graph_where_nothing_is_learned(clip: CLIP) -> None:
    clip.requires_grad_(False)
    images = make_images(clip)
    arguments = [[]]
    if clip.takes_visual_prompts:
        prompts, deep = make_prompts(3)
        arguments.append([prompts.detach(), [value.detach() for value in deep]])
    for prompts in arguments:
        assert clip.encode_image(images, *prompts).grad_fn is None
        assert clip.visual.patch_features(images, *prompts).grad_fn is None
    assert clip.region_features(images, torch.tensor([0, 0, 1, 1.0]).expand(2, 1, 4)).grad_fn is None


@pytest.mark.parametrize("depth", range(1, SHAPE.vision_layers + 1))
def test_frozen_weights_get_no_gradient(depth: int, towers: tuple[CLIP, nn.Module]) -> None:
    ours, _ = towers
    ours.requires_grad_(False)
    images, (prompts, deep) = make_images(ours), make_prompts(depth)
    ours.encode_image(images, prompts, deep).sum().backward()
    assert images.grad is None and all(parameter.grad is None for parameter in ours.parameters())
    for value in (prompts, *deep):
        assert value.grad is not None and value.grad.abs().amax(dim=1).all()


def test_only_a_vit_takes_prompts(clip: CLIP) -> None:
    assert clip.takes_visual_prompts == isinstance(clip.shape.vision_layers, int)


# --- patches


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_patch_features_of_a_vit(depth: int, towers: tuple[CLIP, nn.Module]) -> None:
    ours, theirs = towers
    prompts, deep = make_prompts(depth)
    leaves = {f"prompts {i}": value for i, value in enumerate([prompts, *deep])} if depth else {}
    outcomes = []
    for model in towers:
        images = make_images(ours).requires_grad_()
        if model is ours:
            features = ours.visual.patch_features(images, prompts, deep)
        else:
            visual = theirs.visual
            patches = reference_tokens(visual, images, prompts, deep)[:, 1 : 1 + PATCHES]
            features = (visual.ln_post(patches) @ visual.proj).reshape(2, 5, 5, SHAPE.embed_dim)
        outcomes.append(run(features, model, is_image, images=images, **leaves))
    assert_same(*outcomes)


def test_patch_features_of_a_resnet(reference: Reference) -> None:
    """c_proj(v_proj(x + position)) of each cell x of layer4."""
    theirs = reference("small RN")
    ours = CLIP.from_state_dict(theirs.state_dict()).eval()
    maps: list[Tensor] = []
    theirs.visual.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
    outcomes = []
    for model in (ours, theirs):
        images = make_images(ours).requires_grad_()
        if model is ours:
            features = ours.visual.patch_features(images)
        else:
            theirs.encode_image(images)
            pool, rows = theirs.visual.attnpool, []
            for i in range(2):
                cells = [maps[0][:, :, i, j] + pool.positional_embedding[1 + 2 * i + j] for j in range(2)]
                rows.append(torch.stack([pool.c_proj(pool.v_proj(cell)) for cell in cells], dim=1))
            features = torch.stack(rows, dim=1)
        outcomes.append(run(features, model, has_no_part_in_attention, images=images))
    assert outcomes[0]["features"].shape == (2, 2, 2, ours.shape.embed_dim)
    assert_same(*outcomes)


def has_no_part_in_attention(name: str) -> bool:
    """Keys and queries do not act on patch features: they decide how much of each the pool takes."""
    return is_image(name) and ".k_proj." not in name and ".q_proj." not in name


# --- regions


def centred(grid: int, row: int, column: int, cells: int = 1) -> list[float]:
    """A box around ``cells`` x ``cells`` cells from (row, column) on, a little smaller than these.

    RoIAlign takes ceil(size in cells) evenly spaced points a side. A box of just k cells may round to k + 1 points; one
    slightly smaller has k, and these stand (almost, but for k = 1 precisely) at the centres of the cells.
    """
    shrink = 1e-4
    return [(at + offset) / grid for offset, at in [(shrink, column), (shrink, row)]] + [
        (at + cells - shrink) / grid for at in (column, row)
    ]


def test_a_region_of_one_cell(clip: CLIP) -> None:
    images = make_images(clip)
    with torch.no_grad():
        patches = clip.visual.patch_features(images)
        grid = patches.shape[1]
        boxes = torch.tensor([centred(grid, i, j) for i in range(grid) for j in range(grid)])
        regions = clip.region_features(images, boxes.expand(2, -1, -1))
    expected = patches.flatten(1, 2)
    assert regions.shape == expected.shape
    assert (regions - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_region_of_exactly_one_cell_does_not_read_its_neighbours(clip: CLIP) -> None:
    """Boxes that rounding has made a little larger than the cell, and under autocast."""
    images = make_images(clip, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        patches = clip.visual.patch_features(images)[0].float()
        grid = len(patches)
        lefts = [i / grid for i in range(grid)]
        boxes = torch.tensor([[[x, 0.0, x + 1 / grid + 1e-6, 1 / grid + 1e-6] for x in lefts]])
        regions = clip.region_features(images, boxes)[0]
    assert (regions - patches[0]).abs().max() < 1e-3 * patches.abs().max()


def test_deep_prompts_alone_are_refused(clip: CLIP) -> None:
    if clip.takes_visual_prompts:
        with pytest.raises(ValueError, match="there are none"):
            clip.encode_image(make_images(clip), None, [torch.zeros(2, clip.shape.vision_width)])


def test_a_small_region_within_a_cell_is_read_at_its_centre(clip: CLIP) -> None:
    """However small the box: one point. At a cell's centre that is the cell, between two cells their mean."""
    images = make_images(clip, 1)
    with torch.no_grad():
        patches = clip.visual.patch_features(images)[0]
        cell = 1 / len(patches)
        across, down = ([x - 0.01, y - 0.02, x + 0.01, y + 0.02] for x, y in [(cell, cell / 2), (cell / 2, cell)])
        regions = clip.region_features(images, torch.tensor([[across, down]]))[0]
    for region, other in zip(regions, (patches[0, 1], patches[1, 0]), strict=True):
        expected = (patches[0, 0] + other) / 2
        assert (region - expected).abs().max() < 1e-5 * patches.abs().max()


def test_a_region_of_several_cells_is_their_mean(clip: CLIP) -> None:
    """The whole image precisely so; smaller squares but for the 1e-4 of a cell that ``centred`` takes off."""
    images = make_images(clip)
    with torch.no_grad():
        patches = clip.visual.patch_features(images)
        grid = patches.shape[1]
        whole = clip.region_features(images, torch.tensor([0, 0, 1, 1.0]).expand(2, 1, 4))[:, 0]
        assert (whole - patches.mean(dim=(1, 2))).abs().max() < 1e-5 * patches.abs().max()
        squares = [(0, 0, 2), (0, 2, 3), (3, 1, 2), (1, 0, 4)] if grid == 5 else [(0, 0, 2)]
        boxes = torch.tensor([centred(grid, *square) for square in squares]).expand(2, -1, -1)
        regions = clip.region_features(images, boxes)
    for k, (i, j, n) in enumerate(squares):
        expected = patches[:, i : i + n, j : j + n].mean(dim=(1, 2))
        assert (regions[:, k] - expected).abs().max() < 1e-3 * patches.abs().max()


def test_a_linear_field_is_read_at_the_centre(towers: tuple[CLIP, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bilinear samples, evenly around the centre: on a + b x + c y any box has the value at its centre.

    As long as all samples lie between the outermost centres of cells; whatever their number. Distinguishes x from y,
    corners from sizes, and cells' centres from their corners.
    """
    ours, _ = towers
    n = 5
    y, x = ((torch.arange(n) + 0.5) / n).view(n, 1).expand(n, n), ((torch.arange(n) + 0.5) / n).expand(n, n)
    field = torch.stack([x, y, 1 + 2 * x - 3 * y], dim=-1).expand(2, -1, -1, -1)
    monkeypatch.setattr(ours.visual, "patch_features", lambda images: field)
    generator = torch.Generator().manual_seed(5)
    corners = 0.1 + 0.8 * torch.rand(2, 50, 2, 2, generator=generator)
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1)
    regions = ours.region_features(make_images(ours), boxes)
    centre_x, centre_y = (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2
    expected = torch.stack([centre_x, centre_y, 1 + 2 * centre_x - 3 * centre_y], dim=-1)
    assert (regions - expected).abs().max() < 1e-5


def test_regions_keep_their_order(clip: CLIP) -> None:
    """Regions come in the order of the boxes, and each from its own image."""
    images = make_images(clip, 3)
    corners = torch.rand(3, 6, 2, 2, generator=torch.Generator().manual_seed(1))
    boxes = torch.cat([corners.amin(dim=2), corners.amax(dim=2)], dim=-1)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    with torch.no_grad():
        regions = clip.region_features(images, boxes)
        assert torch.equal(clip.region_features(images, boxes[:, order]), regions[:, order])
        for i in range(3):
            for k in range(6):
                one = clip.region_features(images[i : i + 1], boxes[i : i + 1, k : k + 1])
                assert (one[0, 0] - regions[i, k]).abs().max() < 1e-5 * regions.abs().max()
    assert torch.pdist(regions.flatten(0, 1)).min() > 1e-3 * regions.abs().max()


def test_gradients_of_regions(clip: CLIP) -> None:
    """To images and weights, as they are of the cells that the regions read."""
    outcomes = []
    for of_regions in (True, False):
        images = make_images(clip).requires_grad_()
        if of_regions:
            grid = 5 if clip.takes_visual_prompts else 2
            boxes = torch.tensor([centred(grid, 0, 1), centred(grid, 1, 0), [0, 0, 1, 1]]).expand(2, -1, -1)
            features = clip.region_features(images, boxes)
        else:
            patches = clip.visual.patch_features(images)
            features = torch.stack([patches[:, 0, 1], patches[:, 1, 0], patches.mean(dim=(1, 2))], dim=1)
        outcomes.append(run(features, clip, has_no_part_in_attention, images=images))
    assert_same(*outcomes)


# --- the activation


def test_quick_gelu() -> None:
    """x sigmoid(1.702 x) within 1e-6 of its value (of 1 where that is smaller), the derivative within 2e-6.

    Near x = 10 the derivative is 1 + 10 e^-17, got from 1 - sigmoid: OpenAI's formula is off by 0.97e-6 there, too.
    """
    ends = torch.tensor([30.0, 88, 89, 200, 1e4, 1e20, 1e37])
    x = torch.cat([torch.linspace(-20, 20, 4001), 1e-6 * torch.linspace(-1, 1, 11), ends, -ends]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = exact * torch.sigmoid(1.702 * exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    y = QuickGELU()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    for result, wanted, tolerance in ((y, expected, 1e-6), (slope, expected_slope, 2e-6)):
        assert ((result - wanted).abs() <= tolerance * wanted.abs().clamp(min=1)).all()


def test_quick_gelu_keeps_one_tensor() -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    x = random(3, 7).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        QuickGELU()(x)
    assert [value.shape for value in kept if value.ndim] == [x.shape]
