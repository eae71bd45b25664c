"""CLIP's two towers, with OpenAI's parameter names and values, written for prompt learning.

What differs from OpenAI's ``clip.model``: batch-first tensors, fused scaled-dot-product attention, a text tower
that starts from *embeddings* (so that learned context vectors can be put among them) and stops at the last
end-of-text token, and an image tower that can return its patch tokens. Parameter names are OpenAI's, so their
state dicts load as they are. Tests hold features and gradients equal to ``clip.model`` within 1e-5 in fp32.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``, the activation of OpenAI's released weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention; parameters named as in ``nn.MultiheadAttention``, so OpenAI's weights fit."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.in_proj_weight, std=width**-0.5)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, L, width] -> [B, L, width]; with ``causal`` position t sees positions 0..t only."""
        batch, length, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).reshape(batch, length, width))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: ``x + attn(ln_1(x))``, then ``x + mlp(ln_2(x))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks over [B, L, width]."""

    def __init__(self, width: int, layers: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.width, self.layers, self.causal = width, layers, causal
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(width, heads) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x, self.causal)
        return x


class VisionTransformer(nn.Module):
    """CLIP's ViT image tower."""

    def __init__(self, resolution: int, patch: int, width: int, layers: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = resolution, output_dim
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((resolution // patch) ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def tokens(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> class token and patch tokens after the last block, [B, 1 + (R/patch)^2, width]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> image features [B, output_dim], not normalised."""
        return self.ln_post(self.tokens(images)[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    """CLIP's ResNet block: strides are done by average pooling, before ``conv3`` and in the shortcut."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        outplanes = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inplanes != outplanes:
            self.downsample = nn.Sequential(
                OrderedDict(
                    [
                        ("-1", nn.AvgPool2d(stride)),
                        ("0", nn.Conv2d(inplanes, outplanes, 1, bias=False)),
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
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)

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

    def __init__(self, layers: tuple[int, ...], output_dim: int, heads: int, resolution: int, width: int) -> None:
        super().__init__()
        self.input_resolution, self.output_dim = resolution, output_dim
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
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

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> image features [B, output_dim], not normalised."""
        x = self.stem(images)
        for i in (1, 2, 3, 4):
            x = getattr(self, f"layer{i}")(x)
        return self.attnpool(x)


@dataclass(frozen=True)
class CLIPShape:
    """The sizes that define a CLIP. ``vision_layers`` is an int for a ViT, a tuple of four for a ResNet."""

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

    @classmethod
    def of(cls, state_dict: dict[str, Tensor]) -> CLIPShape:
        """Read the sizes off a state dict in OpenAI's layout (their heads are 64 wide).

        Raises ``LookupError`` or ``ValueError`` when the state dict is not in that layout.
        """
        sd = state_dict
        if "visual.proj" in sd:
            vision_width, _, patch, _ = sd["visual.conv1.weight"].shape
            if vision_width % 64:
                raise ValueError(f"the vision width {vision_width} is no multiple of 64")
            vision_layers: int | tuple[int, ...] = _count(sd, "visual.transformer.resblocks.")
            resolution = patch * round((sd["visual.positional_embedding"].shape[0] - 1) ** 0.5)
        else:
            patch = None
            vision_layers = tuple(_count(sd, f"visual.layer{i}.") for i in (1, 2, 3, 4))
            vision_width = sd["visual.layer1.0.conv1.weight"].shape[0]
            resolution = 32 * round((sd["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
        text_width = sd["ln_final.weight"].shape[0]
        if text_width % 64:
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
            text_heads=text_width // 64,
            text_layers=_count(sd, "transformer.resblocks."),
        )


def _count(state_dict: dict[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)})


class CLIP(nn.Module):
    """Both towers. Attribute and parameter names are OpenAI's."""

    def __init__(self, shape: CLIPShape) -> None:
        super().__init__()
        self.shape = shape
        if isinstance(shape.vision_layers, tuple):
            self.visual: nn.Module = ModifiedResNet(
                shape.vision_layers,
                shape.embed_dim,
                heads=shape.vision_width * 32 // 64,
                resolution=shape.image_resolution,
                width=shape.vision_width,
            )
        else:
            self.visual = VisionTransformer(
                shape.image_resolution,
                shape.vision_patch,
                shape.vision_width,
                shape.vision_layers,
                heads=shape.vision_width // 64,
                output_dim=shape.embed_dim,
            )
        self.transformer = Transformer(shape.text_width, shape.text_layers, shape.text_heads, causal=True)
        self.token_embedding = nn.Embedding(shape.vocab_size, shape.text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(shape.context_length, shape.text_width))
        self.ln_final = nn.LayerNorm(shape.text_width)
        self.text_projection = nn.Parameter(torch.randn(shape.text_width, shape.embed_dim) * shape.text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> CLIP:
        """Build the CLIP that a state dict in OpenAI's layout describes, in fp32, and fill it strictly."""
        extras = ("input_resolution", "context_length", "vocab_size")
        weights = {key: value.float() for key, value in state_dict.items() if key not in extras}
        with torch.device("meta"):
            model = cls(CLIPShape.of(weights))
        model = model.to_empty(device="cpu")
        model.load_state_dict(weights, strict=True)
        return model

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] (preprocessed) -> [B, embed_dim], not normalised."""
        return self.visual(images.to(self.dtype))

    def encode_embeddings(self, embeddings: Tensor, eot: Tensor) -> Tensor:
        """Token embeddings -> text features, read at the end-of-text position.

        ``embeddings`` [C, L, text_width] without positions, ``eot`` [C] the index of each end-of-text token.
        The tower is causal, so what follows the last end-of-text token cannot change the result and is left out.
        Returns [C, embed_dim], not normalised.
        """
        length = int(eot.max()) + 1
        x = embeddings[:, :length].to(self.dtype) + self.positional_embedding[:length]
        x = self.transformer(x)
        x = self.ln_final(x[torch.arange(x.shape[0], device=x.device), eot])
        return x @ self.text_projection

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [C, context_length] (end of text has the highest id) -> [C, embed_dim], not normalised."""
        return self.encode_embeddings(self.token_embedding(tokens), tokens.argmax(dim=-1))
