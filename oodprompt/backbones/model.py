"""CLIP's two towers, with OpenAI's parameter names and values, written for prompt learning.

What differs from OpenAI's ``clip.model``: batch-first tensors, fused scaled-dot-product attention, a text tower
that starts from *embeddings* (so that learned context vectors can be put among them) and computes what prompts share
once, prompts in both towers, shallow and deep, and patch and region features. Parameter names are OpenAI's, so their
state dicts load as they are. Tests hold features and gradients equal to ``clip.model`` within 1e-5 in fp32.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from oodprompt.backbones.boxes import Patches, joined, side_by_side
from oodprompt.backbones.captures import Captures
from oodprompt.backbones.casts import Conv2d, Linear, autocast_dtype, cast
from oodprompt.backbones.company import COMPANY
from oodprompt.backbones.devices import queues_work, to_device
from oodprompt.backbones.packing import pack, way_of
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.backbones.tokenizer import OpenAITokenizer, Tokenizer
from oodprompt.errors import UserError

# How queries, keys and values [B, H, L, d] become [B, H, L, d]; the default lets every position see all others.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# What the text tower keeps for the backward pass per token, layer and unit of width: measured 43 to 45 in fp32.
BYTES_PER_TOKEN = 44
# The positions whose output is wanted: a slice, or their indices.
Rows = slice | Tensor


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's released weights.

    Written as ``silu(1.702 x) / 1.702``, which is the same and keeps one tensor for the backward pass instead of two.
    """

    slope = 1.702

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.slope * x).div_(self.slope)  # in place: the backward pass needs the input alone


# By the name that MODEL.BACKBONE.ACTIVATION has for it. A state dict does not say which one it was trained with.
ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class Attention(nn.Module):
    """Multi-head self-attention; parameters named as in ``nn.MultiheadAttention``, so OpenAI's weights fit."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def _project(self, x: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
        """Projections ``start`` to ``end`` of (q, k, v) of x [B, L, width], each [B, H, L, d]."""
        weight, bias = cast(self, "in_proj_weight"), cast(self, "in_proj_bias")
        if end - start < 3:
            rows = slice(start * x.shape[-1], end * x.shape[-1])
            weight, bias = weight[rows], bias[rows]
        y = F.linear(x, weight, bias).view(*x.shape[:2], end - start, self.heads, x.shape[-1] // self.heads)
        return tuple(t.transpose(1, 2) for t in y.unbind(2))

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention, rows: Rows | None = None) -> Tensor:
        """[B, L, width] -> [B, L, width], or [B, number of ``rows``, width] when only these are wanted."""
        if rows is None:
            q, k, v = self._project(x, 0, 3)
        else:
            (q,), (k, v) = self._project(_take(x, rows), 0, 1), self._project(x, 1, 3)
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


def _take(x: Tensor, rows: Rows) -> Tensor:
    """Positions ``rows`` of x [B, L, width]."""
    return x[:, rows] if isinstance(rows, slice) else x.index_select(1, rows)


class MLP(nn.Sequential):
    """Two linear layers with the activation between them, [B, L, width] -> [B, L, width]."""

    def __init__(self, width: int, activation: str, hidden: int = 0) -> None:
        hidden = hidden or 4 * width
        layers = {
            "c_fc": Linear(width, hidden),
            "gelu": ACTIVATIONS[activation](),
            "c_proj": Linear(hidden, width),
        }
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """In half precision on a GPU QuickGELU is one kernel: its factors are in the weights, which are cast anyway."""
        first, activation, second = self
        device, frozen = x.device, not (first.weight.requires_grad or second.weight.requires_grad)
        if not (frozen and isinstance(activation, QuickGELU) and queues_work(device) and autocast_dtype(device)):
            return super().forward(x)
        slope = QuickGELU.slope
        x = F.silu(F.linear(x, cast(first, "weight", slope), cast(first, "bias", slope)))
        return F.linear(x, cast(second, "weight", 1 / slope), cast(second, "bias"))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: ``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(self, width: int, heads: int, activation: str = "quick_gelu", hidden: int = 0) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width, activation, hidden)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, attend: Attend = F.scaled_dot_product_attention, rows: Rows | None = None) -> Tensor:
        y = self.attn(self.ln_1(x), attend, rows)
        x = (x if rows is None else _take(x, rows)) + y
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks over [B, L, width]."""

    def __init__(self, width: int, layers: int, heads: int, activation: str = "quick_gelu", hidden: int = 0) -> None:
        """``hidden``: width of the layer inside the MLPs; 0: four times ``width``."""
        super().__init__()
        self.width, self.layers = width, layers
        blocks = (ResidualAttentionBlock(width, heads, activation, hidden) for _ in range(layers))
        self.resblocks = nn.Sequential(*blocks)

    def forward(
        self,
        x: Tensor,
        attend: Attend = F.scaled_dot_product_attention,
        deep: Sequence[Tensor] = (),
        deep_at: int = 0,
        rows: Rows | None = None,
        attend_last: Attend | None = None,
    ) -> Tensor:
        """[B, L, width] -> [B, L, width]; with ``rows``, the last block computes these alone.

        ``attend_last`` takes the place of ``attend`` in the last block.

        Deep prompts: the M tokens from position ``deep_at`` on are replaced by ``deep[i - 1]`` [M, width] ahead of
        block i = 1, 2, ..., len(deep).
        """
        for i, block in enumerate(self.resblocks):
            if 0 < i <= len(deep):
                prompts = deep[i - 1].to(x.dtype)
                count = len(prompts)
                before, _, after = x.split([deep_at, count, x.shape[1] - deep_at - count], dim=1)
                x = torch.cat([before, prompts.expand(x.shape[0], -1, -1), after], dim=1)
            last = i == self.layers - 1
            x = block(x, attend_last or attend if last else attend, rows if last else None)
        return x


class VisionTransformer(nn.Module):
    """CLIP's ViT image tower, which takes visual prompts: tokens beside those of the patches."""

    def __init__(
        self,
        resolution: int,
        patch: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        activation: str = "quick_gelu",
        hidden: int = 0,
        ln_pre: bool = True,
        pool: str = "token",
    ) -> None:
        """``pool`` is what is read: the class "token", the "mean" of the patches' norms, or the norm of their mean, "norm of mean"."""
        super().__init__()
        self.input_resolution, self.output_dim, self.pool = resolution, output_dim, pool
        scale = width**-0.5
        self.conv1 = Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width) if ln_pre else nn.Identity()
        self.transformer = Transformer(width, layers, heads, activation, hidden)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def tokens(
        self,
        images: Tensor,
        prompts: Tensor | None = None,
        deep: Sequence[Tensor] = (),
        rows: Rows | None = None,
        attend_last: Attend | None = None,
    ) -> Tensor:
        """Images [B, 3, R, R] -> class token, patch tokens and prompts after the last block, [B, 1 + (R/p)^2 + M, width].

        ``prompts`` [M, width] stand behind the patches, without a position; ``deep`` prompts replace them ahead of
        blocks 1, 2, .... With ``rows``, the last block computes these positions alone, with
        ``attend_last`` it attends by that.
        """
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        length = x.shape[1]
        if prompts is None and deep:
            raise ValueError("deep prompts replace prompts at the entrance, and there are none")
        if prompts is not None:
            x = torch.cat([x, prompts.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
        return self.transformer(self.ln_pre(x), deep=deep, deep_at=length, rows=rows, attend_last=attend_last)

    def forward(self, images: Tensor, prompts: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        """Images [B, 3, R, R] -> image features [B, output_dim], not normalised."""
        return self._read(self.tokens(images, prompts, deep, rows=self._rows), self.side**2)

    @property
    def _rows(self) -> Rows | None:
        """The positions whose output is read; None: of all."""
        return slice(0, 1) if self.pool == "token" else None

    def _read(self, x: Tensor, patches: int, counts: Tensor | None = None) -> Tensor:
        """Tokens of ``_rows`` after the last block -> features [B, output_dim]. ``counts`` [B, n] says which patches count."""
        if self.pool == "token":
            return self.ln_post(x[:, 0]) @ cast(self, "proj")
        x = x[:, 1 : 1 + patches]
        x = self.ln_post(x) if self.pool == "mean" else x
        if counts is None:
            x = x.mean(dim=1)
        else:
            share = counts / counts.sum(dim=1, keepdim=True)
            x = (share.to(x.dtype).unsqueeze(1) @ x).squeeze(1)
        return (x if self.pool == "mean" else self.ln_post(x)) @ cast(self, "proj")

    @property
    def side(self) -> int:
        """Patches along a side of the image, R/p."""
        return self.input_resolution // self.conv1.stride[0]

    def patch_features(self, images: Tensor, prompts: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        """Images [B, 3, R, R] -> the patches in the space of image features, [B, R/p, R/p, output_dim], not normalised."""
        x = self.tokens(images, prompts, deep)[:, 1 : 1 + self.side**2]
        return (self.ln_post(x) @ cast(self, "proj")).unflatten(1, (self.side, self.side))

    def masked_features(
        self, images: Tensor, boxes: Tensor, prompts: Tensor | None = None, deep: Sequence[Tensor] = ()
    ) -> Tensor:
        """Image features whose class token reads, in the last block, no patches but those of a box.

        Images [B, 3, R, R] and ``boxes`` [B, K, 4], of positive area, in fractions of the image -> [B, K, output_dim],
        not normalised. With a_j the attention logit of the class token to patch j and s_j the share of the patch that
        the box covers, its weight is s_j exp(a_j) / sum_i s_i exp(a_i). The class token's own value is left out;
        prompts beside the patches count fully.

        Source: the mask class tokens of Ding et al., "Open-Vocabulary Universal Image Segmentation with MaskCLIP",
        2023; here without any training, and in the last block alone.
        """
        start = torch.arange(self.side, device=boxes.device) / self.side
        low, high = boxes[..., :2, None], boxes[..., 2:, None]
        overlap = self.side * (high.minimum(start + 1 / self.side) - low.maximum(start)).clamp(min=0)
        across, down = overlap.unbind(-2)
        covered = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)
        bias = F.pad(covered.log(), (1, 0), value=-torch.inf)
        bias = F.pad(bias, (0, 0 if prompts is None else len(prompts))).unsqueeze(1)  # [B, 1, K, L]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = q.expand(-1, -1, boxes.shape[1], -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))

        return self.ln_post(self.tokens(images, prompts, deep, slice(0, 1), attend)) @ cast(self, "proj")

    def token_features(
        self,
        images: Tensor,
        regions: Patches,
        prompts: Tensor | None = None,
        deep: Sequence[Tensor] = (),
    ) -> Tensor:
        """Features of regions that the tower sees alone: the patches of a box, at their places, and the class token.

        Images [B, 3, R, R] and the patches of r ``regions`` -> [r, output_dim], not normalised. Nothing outside the box
        plays a part, unlike in ``masked_features`` and ``patch_features``; a quarter of an image costs a quarter of it,
        unlike a crop. The whole image has the features of ``forward``.

        A ViT that is given some of its patches only: He et al., "Masked autoencoders are scalable vision learners", 2022.
        """
        position = self.positional_embedding.to(images.dtype)
        patches = self.conv1(images).flatten(2).transpose(1, 2) + position[1:]
        x = patches[regions.image.unsqueeze(1), regions.index]
        first = (self.class_embedding.to(x.dtype) + position[0]).expand(len(x), 1, -1)
        x = torch.cat(
            [first, x] if prompts is None else [first, x, prompts.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1
        )
        mask = None
        if regions.counts is not None:
            counts = F.pad(regions.counts, (1, 0 if prompts is None else len(prompts)), value=True)
            mask = counts[:, None, None, :]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        number = regions.index.shape[1]
        x = self.transformer(self.ln_pre(x), attend, deep, 1 + number, rows=self._rows)
        return self._read(x, number, regions.counts)


class Bottleneck(nn.Module):
    """CLIP's ResNet block: strides are done by average pooling, before ``conv3`` and in the shortcut."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inplanes != outplanes:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", Conv2d(inplanes, outplanes, 1, bias=False)),
                        ("1", nn.BatchNorm2d(outplanes)),
                    ]
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(self.avgpool(y)))
        return F.relu(y + self.downsample(x))


class AttentionPool2d(nn.Module):
    """Attention pooling: the mean over positions asks, all positions (and the mean) answer."""

    def __init__(self, grid: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) * width**-0.5)
        self.k_proj = Linear(width, width)
        self.q_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.c_proj = Linear(width, output_dim)

    def dense(self, x: Tensor) -> Tensor:
        """Feature map [B, width, grid, grid] -> the value of each position as the pool would hand it on, [B, grid, grid, d]."""
        side = x.shape[-1]
        x = x.flatten(2).transpose(1, 2) + self.positional_embedding[1:].to(x.dtype)
        return self.c_proj(self.v_proj(x)).unflatten(1, (side, side))

    def forward(self, x: Tensor) -> Tensor:
        """Feature map [B, width, grid, grid] -> [B, output_dim]."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(x[:, :1])), split(self.k_proj(x)), split(self.v_proj(x))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet image tower: a stem of three convolutions, anti-aliased strides, attention pooling."""

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, layers: tuple[int, ...], output_dim: int, heads: int, resolution: int, width: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = resolution, output_dim
        self.conv1 = Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        inplanes = width
        for i, depth in enumerate(layers):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(inplanes, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                inplanes = width * 2**i * Bottleneck.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool2d(resolution // 32, inplanes, heads, output_dim)

    def stem(self, x: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> [B, width, R/4, R/4]."""
        for i in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)))
        return self.avgpool(x)

    def middle_map(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> what enters the last stage, ``layer4``: [B, 16 width, R/16, R/16]."""
        return self.layer3(self.layer2(self.layer1(self.stem(images))))

    def head(self, x: Tensor) -> Tensor:
        """What ``middle_map`` gives -> image features [B, output_dim], not normalised."""
        return self.attnpool(self.layer4(x))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> image features [B, output_dim], not normalised."""
        return self.head(self.middle_map(images))

    def patch_features(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> cells in the space of image features, [B, R/32, R/32, output_dim], not normalised."""
        return self.attnpool.dense(self.layer4(self.middle_map(images)))


@dataclass(frozen=True)
class CLIPShape:
    """The sizes that define a CLIP. ``vision_layers`` is an int for a ViT, a tuple of four for a ResNet.

    It is 0 where the image tower is another's.

    ``vision_heads`` of a ViT are 0 where each is 64 wide; ``vision_hidden`` and ``text_hidden``, the widths inside the MLPs,
    are 0 where they are four times those of the tokens. ``vision_ln_pre`` and ``vision_pool`` are as in ``VisionTransformer``.
    """

    embed_dim: int
    image_resolution: int
    vision_layers: int | tuple[int, ...]
    vision_width: int
    vision_patch: int | None
    context_length: int
    vocab_size: int
    text_width: int
    text_heads: int
    text_layers: int
    vision_heads: int = 0
    vision_hidden: int = 0
    text_hidden: int = 0
    vision_ln_pre: bool = True
    vision_pool: str = "token"

    @classmethod
    def of(
        cls, state_dict: dict[str, Tensor], vision_heads: int = 0, text_heads: int = 0, vision_pool: str = "token"
    ) -> CLIPShape:
        """Read the sizes off a state dict in OpenAI's layout. It does not tell the heads; 0: they are 64 wide.

        Raises ``LookupError`` or ``ValueError`` when the state dict is not in that layout.
        """
        sd = state_dict
        vision_layers: int | tuple[int, ...]
        if not any(key.startswith("visual.") for key in sd):
            patch, vision_width, vision_layers, resolution = None, 0, 0, 0
        elif "visual.proj" in sd:
            vision_width, _, patch, _ = sd["visual.conv1.weight"].shape
            if vision_width % 64 and not vision_heads:
                raise ValueError(f"the vision width {vision_width} is no multiple of 64")
            vision_layers = _count(sd, "visual.transformer.resblocks.")
            resolution = patch * round((sd["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        else:
            patch = None
            vision_layers = tuple(_count(sd, f"visual.layer{i}.") for i in (1, 2, 3, 4))
            vision_width = sd["visual.layer1.0.conv1.weight"].shape[0]
            resolution = 32 * round((sd["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        text_width = sd["ln_final.weight"].shape[0]
        if text_width % 64 and not text_heads:
            raise ValueError(f"the text width {text_width} is no multiple of 64")
        return cls(
            embed_dim=sd["text_projection"].shape[1],
            image_resolution=resolution,
            vision_layers=vision_layers,
            vision_width=vision_width,
            vision_patch=patch,
            context_length=sd["positional_embedding"].shape[0],
            vocab_size=sd["token_embedding.weight"].shape[0],
            text_width=text_width,
            text_heads=text_heads or text_width // 64,
            text_layers=_count(sd, "transformer.resblocks."),
            vision_heads=0 if vision_heads * 64 == vision_width else vision_heads,
            vision_hidden=_hidden(sd, "visual.transformer.", vision_width) if patch else 0,
            text_hidden=_hidden(sd, "transformer.", text_width),
            vision_ln_pre=patch is None or "visual.ln_pre.weight" in sd,
            vision_pool=vision_pool,
        )


def _hidden(state_dict: dict[str, Tensor], prefix: str, width: int) -> int:
    """The width inside the MLPs of a transformer; 0 where it is four times that of the tokens."""
    first = state_dict.get(f"{prefix}resblocks.0.mlp.c_fc.weight")
    return 0 if first is None or len(first) == 4 * width else len(first)


def _count(state_dict: dict[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})


def _roi_align(maps: Tensor, rois: Tensor, side: int) -> Tensor:
    """RoIAlign of maps [B, c, n, n] to ``side`` x ``side``: the mean over each box (1), or its resampling (n).

    A mean takes ceil(size in cells) samples a side: a box that rounding makes a little larger than k cells would take
    k + 1 and read its neighbours, so boxes give up 1e-5 of a cell on every side. Resampled, no box is larger than the
    map, and one sample for every cell is enough.
    """
    from torchvision.ops import roi_align  # here: it takes seconds, and few runs look at regions

    cells = maps.shape[-1]
    if side == 1:
        rois = rois + rois.new_tensor([0, 1, 1, -1, -1]) * (1e-5 / cells)
    ratio, rois = 0 if side == 1 else 1, to_device(rois, maps.device)
    return roi_align(maps.float(), rois, (side, side), spatial_scale=cells, sampling_ratio=ratio, aligned=True)


def regions_in_parts(tower: Callable[[Tensor], Tensor], maps: Tensor, rois: Tensor, at_once: int) -> Tensor:
    """Regions of maps [B, c, n, n], resampled to n x n, through ``tower``: [r, d]."""
    side, rois = maps.shape[-1], to_device(rois, maps.device)
    return torch.cat([tower(_roi_align(maps, part, side).to(maps.dtype)) for part in rois.split(at_once)])


def way_of_regions(clip: Any, how: str) -> str:
    """``how``, or the best way of the backbone for "auto"; ``UserError`` where the backbone has no such way."""
    known = clip.region_ways
    if how == "auto":
        return known[0]
    if how not in known:
        raise UserError(f"features of regions: {clip.image_tower} has no way {how!r}; give auto, {', '.join(known)}")
    return how


class CLIP(nn.Module):
    """Both towers. Attribute and parameter names are OpenAI's. ``activation`` of the transformers: of ``ACTIVATIONS``."""

    def __init__(self, shape: CLIPShape, activation: str = "quick_gelu") -> None:
        super().__init__()
        self.shape = shape
        self.activation_limit = 4 << 30  # bytes that encode_prompts may keep for the backward pass
        self.tokenizer: Tokenizer = OpenAITokenizer(shape.context_length)
        self.preprocessing: Preprocessing | None = None  # what the image tower was trained on, where it is known
        self.captures: Captures | None = None  # records the passes of frozen towers, where there are prompts to learn
        self.visual: Any
        if shape.vision_layers == 0:
            self.visual = nn.Identity()  # the image tower is another's, see ``MixedCLIP``
        elif isinstance(shape.vision_layers, tuple):
            self.visual = ModifiedResNet(
                shape.vision_layers,
                shape.embed_dim,
                heads=shape.vision_width * 32 // 64,
                resolution=shape.image_resolution,
                width=shape.vision_width,
            )
        else:
            assert shape.vision_patch is not None, "a ViT has patches"
            self.visual = VisionTransformer(
                shape.image_resolution,
                shape.vision_patch,
                shape.vision_width,
                shape.vision_layers,
                heads=shape.vision_heads or shape.vision_width // 64,
                output_dim=shape.embed_dim,
                activation=activation,
                hidden=shape.vision_hidden,
                ln_pre=shape.vision_ln_pre,
                pool=shape.vision_pool,
            )
        self.transformer = Transformer(
            shape.text_width, shape.text_layers, shape.text_heads, activation, shape.text_hidden
        )
        self.token_embedding = nn.Embedding(shape.vocab_size, shape.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(shape.context_length, shape.text_width))
        self.ln_final = nn.LayerNorm(shape.text_width)
        self.text_projection = nn.Parameter(torch.randn(shape.text_width, shape.embed_dim) * shape.text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: dict[str, Tensor],
        activation: str = "quick_gelu",
        vision_heads: int = 0,
        text_heads: int = 0,
        vision_pool: str = "token",
    ) -> CLIP:
        """Build the CLIP that a state dict in OpenAI's layout describes, in fp32, and fill it strictly.

        It does not tell the numbers of heads (0: they are 64 wide), and which tokens of a ViT are read.
        """
        extras = ("input_resolution", "context_length", "vocab_size")
        weights = {key: value.float() for key, value in state_dict.items() if key not in extras}
        with torch.device("meta"):
            model = cls(CLIPShape.of(weights, vision_heads, text_heads, vision_pool), activation)
        model = model.to_empty(device="cpu")
        model.load_state_dict(weights, strict=True)
        return model

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    shares_prefixes: bool = True  # whether ``encode_prompts`` computes once what prompts share
    takes_deep_text_prompts: bool = True

    @property
    def tokens_at_once(self) -> int:
        """Tokens whose activations the text tower may keep for the backward pass, within ``activation_limit``."""
        per_token = BYTES_PER_TOKEN * self.shape.text_width * max(1, self.shape.text_layers)  # 0: not known
        return max(1, self.activation_limit // per_token)

    @property
    def image_tower(self) -> str:
        """What the image tower is, for messages."""
        return "a ViT" if self.takes_visual_prompts else "a ResNet"

    @property
    def region_ways(self) -> tuple[str, ...]:
        """The ways of ``region_features``, the best first."""
        if not self.takes_visual_prompts:
            return ("roi", "crops", "patches")
        by_token = self.shape.vision_pool == "token"  # "masked" restricts what the class token reads
        return ("tokens", "crops", "masked", "patches") if by_token else ("tokens", "crops", "patches")

    @property
    def takes_visual_prompts(self) -> bool:
        """Whether the image tower is a ViT, which alone has tokens to put prompts beside."""
        return isinstance(self.visual, VisionTransformer)

    def encode_image(self, images: Tensor, *prompts: Any) -> Tensor:
        """Images [B, 3, R, R] (preprocessed) -> [B, embed_dim], not normalised; ``prompts`` as in ``VisionTransformer``."""
        images = images.to(self.dtype)
        if self.captures is None or not prompts or self.visual.conv1.weight.requires_grad:
            return self.visual(images, *prompts)
        first, deep = prompts[0], prompts[1] if len(prompts) > 1 else ()
        if first is None:
            return self.visual(images, *prompts)
        return self.captures("image", lambda x, p, *more: self.visual(x, p, more), images, first, *deep)

    def region_features(
        self,
        images: Tensor,
        boxes: Tensor | Sequence[Tensor],
        how: str = "patches",
        prompts: Sequence[Any] = (),
        at_once: int = 256,
    ) -> Tensor:
        """Features of regions in the space of image features, not normalised; gradients flow to images and weights.

        ``images`` [B, 3, R, R]; ``boxes`` B tensors [n_i, 4] of (left, top, right, bottom) in fractions of the image,
        of positive area -> [sum n_i, embed_dim], image by image; boxes [B, K, 4] -> [B, K, embed_dim]. ``how`` is one:

        - "roi" (ResNet): RoIAlign (He et al. 2017) of what enters the last stage, to the size it has for a whole image,
          then the last stage and attention pooling, as in RegionCLIP (Zhong et al. 2022). The whole image has the
          features of ``encode_image``.
        - "crops": the box, stretched to R x R by bilinear interpolation, through the tower. The whole image has the
          features of ``encode_image``. One pass of the tower per region, the others one per image.
        - "tokens" (ViT): ``VisionTransformer.token_features``, the patches of the box alone through the tower.
        - "masked" (ViT): ``VisionTransformer.masked_features``, where the last block reads the box alone.
        - "patches": RoIAlign to 1 x 1 of ``patch_features``. CLIP was not trained to align these with text, and they
          have seen the rest of the image: poor where a region differs from what surrounds it.
        - "auto": "roi" for a ResNet, "tokens" for a ViT.

        ``prompts`` as in ``VisionTransformer``. "roi" and "crops" take ``at_once`` regions at a time through the tower.
        Raises ``UserError`` for another ``how``, ``ValueError`` for another number of boxes than images.
        """
        how = way_of_regions(self, how)
        if len(boxes) != len(images):
            raise ValueError(f"{len(images)} images, but boxes of {len(boxes)}")
        images = images.to(self.dtype)
        rois = joined(boxes)
        if not len(rois):
            features = images.new_zeros(0, self.shape.embed_dim)
        elif how == "patches":
            maps = self.visual.patch_features(images, *prompts).permute(0, 3, 1, 2)
            features = _roi_align(maps, rois, 1).flatten(1)
        elif how == "masked":
            assert isinstance(self.visual, VisionTransformer)
            padded, place = side_by_side(rois, len(images))
            features = self.visual.masked_features(images, to_device(padded, images.device), *prompts).flatten(0, 1)
            features = features if place is None else features[to_device(place, images.device)]
        elif how == "tokens":
            assert isinstance(self.visual, VisionTransformer)
            patches = Patches.of(rois, self.visual.side, images.device)
            features = self.visual.token_features(images, patches, *prompts)
        elif how == "roi":
            assert isinstance(self.visual, ModifiedResNet)
            features = regions_in_parts(self.visual.head, self.visual.middle_map(images), rois, at_once)
        else:
            features = regions_in_parts(lambda crops: self.visual(crops, *prompts), images, rois, at_once)
        return features.unflatten(0, boxes.shape[:2]) if isinstance(boxes, Tensor) else features

    def encode_prompts(
        self, prefix: Tensor, suffix: Tensor, lengths: tuple[int, ...], deep: Sequence[Tensor] = ()
    ) -> Tensor:
        """Token embeddings of C prompts -> text features, read at the end of text.

        ``prefix`` [P, e] are the first tokens, which all prompts share (P may be 0), or [B, P, e] when they depend on
        the image; ``suffix`` [C, S, e] the rest of each prompt, of which the first ``lengths[c]`` tokens count, the
        last one being the end of text; all without positions. ``deep`` prompts [M, e] replace M tokens, from the first that
        is not special, ahead of blocks 1, 2, ...; they must lie in the prefix.

        Returns [C, embed_dim] or [B, C, embed_dim], not normalised. The prefix is computed once, see
        ``oodprompt.backbones.packing``. Where the activations of all tokens would take more than
        ``activation_limit`` bytes, prompts are encoded in parts, whose activations are computed again in the backward
        pass.
        """
        if not self.shares_prefixes:
            raise NotImplementedError("this text encoder takes whole prompts: encode_embedded")
        if any(self.tokenizer.before + len(prompts) > prefix.shape[-2] for prompts in deep):
            raise ValueError("deep prompts must lie in the prefix")
        by_image = prefix.ndim == 3
        company = COMPANY.get()
        if company is not None and not by_image and not deep:
            joint = company.encode(self, prefix, suffix, lengths)
            if joint is not None:
                return joint
        batch = prefix if by_image else prefix.unsqueeze(0)
        classes, tokens = len(lengths), prefix.shape[-2] + sum(lengths)
        limit = self.tokens_at_once
        if batch.shape[0] * tokens <= limit:
            features = self._encode_at_once(batch, suffix, lengths, deep)
        else:
            tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (prefix, suffix, *deep))
            part = limit // 4 if tracked else limit
            images_at_once, classes_at_once = max(1, part // tokens), max(1, classes * part // tokens)
            rows = []
            for some in batch.split(images_at_once):
                columns = []
                for c in range(0, classes, classes_at_once):
                    inputs = (some, suffix[c : c + classes_at_once], lengths[c : c + classes_at_once], deep)
                    columns.append(
                        checkpoint(self._encode_packed, *inputs, use_reentrant=False)
                        if tracked
                        else self._encode_packed(*inputs)
                    )
                rows.append(torch.cat(columns, dim=1))
            features = torch.cat(rows)
        return features if by_image else features[0]

    def _encode_at_once(
        self, prefix: Tensor, suffix: Tensor, lengths: tuple[int, ...], deep: Sequence[Tensor]
    ) -> Tensor:
        """``_encode_packed``, recorded and replayed where steps repeat it."""
        if self.captures is None or self.text_projection.requires_grad:
            return self._encode_packed(prefix, suffix, lengths, deep)
        own = suffix[:, : max(lengths)]
        return self.captures(
            ("text", lengths), lambda x, own, *more: self._encode_packed(x, own, lengths, more), prefix, own, *deep
        )

    def _encode_packed(
        self, prefix: Tensor, suffix: Tensor, lengths: tuple[int, ...], deep: Sequence[Tensor]
    ) -> Tensor:
        """``encode_prompts`` for a prefix [B, P, e], at once; returns [B, C, embed_dim]."""
        way = way_of(prefix.device, prefix.shape[1] + sum(lengths), self.shape.text_width)
        packing = pack(prefix.shape[1], lengths, prefix.device, way)
        longest = max(lengths)
        if suffix.requires_grad:
            own = suffix[:, :longest].flatten(0, 1).index_select(0, packing.suffix_index)
        else:  # one kernel
            own = suffix[packing.suffix_places]
        x = torch.cat([prefix, own.to(prefix.dtype).expand(prefix.shape[0], -1, -1)], dim=1).to(self.dtype)
        x = x + self.positional_embedding[packing.positions]
        x = self.transformer(x, packing.attend, deep, deep_at=self.tokenizer.before, rows=packing.ends)
        x = self.ln_final(x)
        if way == "buckets":  # the others keep the classes in their order
            x = x.index_select(1, packing.class_order)
        return x @ cast(self, "text_projection")

    def encode_embedded(self, tokens: Tensor, embeddings: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
        """Whole prompts through text encoders that share no prefixes: token ids [n, L], embeddings [n, L, e] -> [n, embed_dim].

        The ids say where padding and the end of text are. ``deep`` prompts [M, e] replace M tokens, from the first that is
        not special, ahead of blocks 1, 2, .... Where the activations would take more than ``activation_limit`` bytes, prompts
        are encoded in parts, whose activations are computed again in the backward pass.
        """
        at_once = max(1, self.tokens_at_once // tokens.shape[1])
        if tokens.shape[0] <= at_once:
            return self._encode_embedded(tokens, embeddings, deep)
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (embeddings, *deep))
        rows = []
        for ids, some in zip(tokens.split(at_once), embeddings.split(at_once), strict=True):
            inputs = (ids, some, deep)
            rows.append(
                checkpoint(self._encode_embedded, *inputs, use_reentrant=False)
                if tracked
                else self._encode_embedded(*inputs)
            )
        return torch.cat(rows)

    def _encode_embedded(self, tokens: Tensor, embeddings: Tensor, deep: Sequence[Tensor]) -> Tensor:
        """``encode_embedded`` at once."""
        raise NotImplementedError("prompts are encoded by encode_prompts")

    def cut(self, tokens: Tensor) -> Tensor:
        """Token ids without columns that play no part in any row."""
        return tokens

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [C, context_length] (end of text has the highest id) -> [C, embed_dim], not normalised."""
        ends = self.tokenizer.ends(tokens)
        differs = (tokens != tokens[0]).any(dim=0)
        shared = min(int(ends.min()), int(differs.int().argmax()) if differs.any() else tokens.shape[1])
        embeddings = self.token_embedding(tokens[:, : int(ends.max()) + 1])
        lengths = tuple((ends + 1 - shared).tolist())
        return self.encode_prompts(embeddings[0, :shared], embeddings[:, shared:], lengths)
