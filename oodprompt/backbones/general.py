"""Any pair of an image encoder and a text encoder under the face of ``CLIP``: a library's own modules, untouched.

What prompt learners need of a text encoder is that it encodes *embeddings*. Here a module of the library stands by its
token ids, and what its embedding layer gives for them is replaced during the call: masks and pooling go by the ids, so
they stay right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from oodprompt.backbones.boxes import joined
from oodprompt.backbones.model import CLIP, CLIPShape, regions_in_parts, way_of_regions
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.backbones.tokenizer import Tokenizer


@dataclass
class Towers:
    """What ``GeneralCLIP`` is made of.

    ``image`` [B, 3, R, R] -> [B, d] is the image encoder. ``text`` is the module with the text encoder, and
    ``encode_text(ids)`` [n, L] -> [n, d] computes with it. Nothing is normalised. ``embedding`` is the layer of ``text``
    that looks up token ids. ``scale`` multiplies cosines. ``pad`` is the id of padding that the text encoder neither
    attends to nor counts, so that it may be cut off; None: all ids are needed. ``name`` is for messages.
    """

    image: nn.Module
    text: nn.Module
    encode_text: Callable[[Tensor], Tensor]
    embedding: nn.Module
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    scale: float
    embed_dim: int
    pad: int | None = None
    name: str = "this model"


class MixedCLIP(CLIP):
    """Our text tower beside a library's image tower, untouched: all that concerns text is as fast as in ``CLIP``."""

    takes_visual_prompts = False
    region_ways = ("crops",)
    image_tower = "this image tower"

    def take(self, image: nn.Module, preprocessing: Preprocessing, name: str) -> None:
        """Encode images by ``image``, [B, 3, R, R] -> [B, d]; ``name`` is that of the backbone, for messages."""
        self.visual, self.preprocessing = image, preprocessing
        self.image_tower = f"the image tower of {name}"
        self.shape = replace(self.shape, image_resolution=preprocessing.size[0])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.visual.parameters()).dtype

    def encode_image(self, images: Tensor, *prompts: Any) -> Tensor:
        """Images [B, 3, R, R] (preprocessed) -> [B, embed_dim], not normalised."""
        if prompts:
            raise ValueError(f"{self.image_tower} takes no prompts")
        return self.visual(images.to(self.dtype))

    def region_features(
        self,
        images: Tensor,
        boxes: Tensor | Sequence[Tensor],
        how: str = "auto",
        prompts: Sequence[Any] = (),
        at_once: int = 256,
    ) -> Tensor:
        """As ``CLIP.region_features``; the one way is "crops"."""
        way_of_regions(self, how)
        if len(boxes) != len(images):
            raise ValueError(f"{len(images)} images, but boxes of {len(boxes)}")
        images, rois = images.to(self.dtype), joined(boxes)
        if len(rois):
            features = regions_in_parts(self.encode_image, images, rois, at_once)
        else:
            features = images.new_zeros(0, self.shape.embed_dim)
        return features.unflatten(0, boxes.shape[:2]) if isinstance(boxes, Tensor) else features


class GeneralCLIP(MixedCLIP):
    """``towers`` under the face of ``CLIP``. Prompts are encoded one by one, and the image tower takes none."""

    shares_prefixes = False
    takes_deep_text_prompts = False

    def __init__(self, towers: Towers) -> None:
        nn.Module.__init__(self)
        self.text, self.token_embedding = towers.text, cast(Any, towers.embedding)
        self.logit_scale = nn.Parameter(torch.tensor(float(towers.scale)).log())
        self.tokenizer = towers.tokenizer
        self.__dict__["towers"] = towers  # its modules are registered above
        self.activation_limit, self.captures = 0, None
        with torch.no_grad():
            width = towers.embedding(torch.zeros(1, 1, dtype=torch.long)).shape[-1]
        self.shape = CLIPShape(
            embed_dim=towers.embed_dim,
            image_resolution=0,
            vision_layers=0,
            vision_width=0,
            vision_patch=None,
            context_length=towers.tokenizer.context_length,
            vocab_size=0,
            text_width=width,
            text_heads=0,
            text_layers=0,
        )
        self.take(towers.image, towers.preprocessing, towers.name)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [n, context_length] -> [n, embed_dim], not normalised."""
        return self.__dict__["towers"].encode_text(self.cut(tokens))

    def encode_embedded(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """As ``encode_text``, with ``embeddings`` [n, L, e] in the place of those of the ids [n, L], which may be ``cut``."""
        towers = self.__dict__["towers"]
        with _embedded(towers.embedding, embeddings) as looked_up:
            features = towers.encode_text(tokens)
        if looked_up != [tuple(tokens.shape)]:
            raise RuntimeError(f"the text encoder of {towers.name} looked up its embeddings at {looked_up}, not once")
        return features

    def encode_prompts(
        self, prefix: Tensor, suffix: Tensor, lengths: tuple[int, ...], deep: Sequence[Tensor] = ()
    ) -> Tensor:
        name = self.__dict__["towers"].name
        raise NotImplementedError(f"the text encoder of {name} takes whole prompts: encode_embedded")

    def cut(self, tokens: Tensor) -> Tensor:
        """Without the columns that are padding in every row, where these play no part."""
        pad = self.__dict__["towers"].pad
        if pad is None:
            return tokens
        used = int((tokens != pad).any(dim=0).nonzero().max()) + 1
        return tokens[:, :used]


@contextlib.contextmanager
def _embedded(layer: nn.Module, embeddings: Tensor) -> Iterator[list[tuple[int, ...]]]:
    """``layer`` gives ``embeddings`` meanwhile. The list will hold the shapes of what it is asked for."""
    asked: list[tuple[int, ...]] = []

    def instead(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        asked.append(tuple(inputs[0].shape))
        return embeddings.to(output.dtype)

    handle = layer.register_forward_hook(instead)
    try:
        yield asked
    finally:
        handle.remove()
