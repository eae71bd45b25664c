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

from oodprompt.backbones.blocks import find_blocks, find_last_stage, works
from oodprompt.backbones.boxes import Patches, joined, same_number
from oodprompt.backbones.devices import to_device
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
    """Our text tower beside a library's image tower, untouched: all that concerns text is as fast as in ``CLIP``.

    Prompts and regions enter the image tower by hooks, where it has blocks or stages that take them (``blocks.py``).
    """

    image_tower = "this image tower"
    takes_visual_prompts = False
    region_ways: tuple[str, ...] = ("crops",)

    def take(self, image: nn.Module, preprocessing: Preprocessing, name: str) -> None:
        """Encode images by ``image``, [B, 3, R, R] -> [B, d]; ``name`` is that of the backbone, for messages."""
        self.visual, self.preprocessing = image, preprocessing
        self.image_tower = f"the image tower of {name}"
        images = torch.zeros(2, 3, *preprocessing.size)
        self.image_blocks = blocks = find_blocks(image, lambda: image(images))
        self.last_stage = None if blocks else find_last_stage(image, lambda: image(images))
        self.shape = replace(self.shape, image_resolution=preprocessing.size[0])
        if self.last_stage:
            self.region_ways = ("roi", "crops")
        if blocks is None:
            return
        self.shape = replace(self.shape, vision_width=blocks.width, vision_layers=len(blocks.names))
        prompt, one = torch.zeros(1, blocks.width), images[:1]
        self.takes_visual_prompts = works(lambda: self.encode_image(one, prompt, [prompt]), 1)
        corners = torch.tensor([[[0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.5, 1.0]]])
        if blocks.side > 1 and works(lambda: self._of_tokens(one, joined(corners), (), 2), 2):
            self.region_ways = ("tokens", "crops")

    @property
    def dtype(self) -> torch.dtype:
        return next(self.visual.parameters()).dtype

    def encode_image(self, images: Tensor, *prompts: Any) -> Tensor:
        """As ``CLIP.encode_image``."""
        images = images.to(self.dtype)
        if not prompts or prompts[0] is None:
            return self.visual(images)
        if self.image_blocks is None:
            raise ValueError(f"{self.image_tower} takes no prompts")
        with self.image_blocks.changed(self.visual, *prompts):
            return self.visual(images)

    def region_features(
        self,
        images: Tensor,
        boxes: Tensor | Sequence[Tensor],
        how: str = "auto",
        prompts: Sequence[Any] = (),
        at_once: int = 256,
    ) -> Tensor:
        """As ``CLIP.region_features``, by one of ``region_ways``."""
        how = way_of_regions(self, how)
        if len(boxes) != len(images):
            raise ValueError(f"{len(images)} images, but boxes of {len(boxes)}")
        images, rois = images.to(self.dtype), joined(boxes)
        if not len(rois):
            features = images.new_zeros(0, self.shape.embed_dim)
        elif how == "tokens":
            features = self._of_tokens(images, rois, prompts, at_once)
        elif how == "roi":
            features = self._of_maps(images, rois, at_once)
        else:
            features = regions_in_parts(lambda crops: self.encode_image(crops, *prompts), images, rois, at_once)
        return features.unflatten(0, boxes.shape[:2]) if isinstance(boxes, Tensor) else features

    def _of_tokens(self, images: Tensor, rois: Tensor, prompts: Sequence[Any], at_once: int) -> Tensor:
        """Regions [r, 5] by the patches that they hold; those with equally many patches go through the tower together."""
        blocks = self.image_blocks
        assert blocks is not None, "only towers with blocks have this way"
        first: Tensor | None = prompts[0] if prompts else None
        deep: Sequence[Tensor] = prompts[1] if len(prompts) > 1 else ()
        parts, places = [], []
        for place in same_number(rois, blocks.side):
            for some in place.split(at_once):
                chosen = Patches.of(rois[some], blocks.side, images.device)
                with blocks.changed(self.visual, first, deep, chosen=chosen):
                    parts.append(self.visual(images))
                places.append(some)
        order = to_device(torch.cat(places).argsort(), images.device)
        return torch.cat(parts)[order]

    def _of_maps(self, images: Tensor, rois: Tensor, at_once: int) -> Tensor:
        """Regions [r, 5] of what enters the last stage, resampled to the size of the whole, through the rest of the tower."""
        stage, tower = self.last_stage, self.visual
        assert stage is not None, "only towers with stages have this way"
        return regions_in_parts(
            lambda maps: stage.rest(tower, maps, images[:1]), stage.maps(tower, images), rois, at_once
        )


class GeneralCLIP(MixedCLIP):
    """``towers`` under the face of ``CLIP``. Its text encoder gets each prompt as a whole."""

    shares_prefixes = False

    def __init__(self, towers: Towers) -> None:
        nn.Module.__init__(self)
        self.text, self.token_embedding = towers.text, cast(Any, towers.embedding)
        self.logit_scale = nn.Parameter(torch.tensor(float(towers.scale)).log())
        self.tokenizer = towers.tokenizer
        self.__dict__["towers"] = towers  # its modules are registered above
        self.activation_limit, self.captures = 4 << 30, None
        tokens = self.cut(towers.tokenizer(["a photo", "a"]))
        self.text_blocks = blocks = find_blocks(towers.text, lambda: towers.encode_text(tokens))
        with torch.no_grad():
            width = towers.embedding(tokens[:1, :1]).shape[-1]
        # Tokens that a tower adds stand behind the others, so that prompts keep their places.
        self.takes_deep_text_prompts = bool(blocks and blocks.length >= tokens.shape[1] and blocks.width == width)
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
            text_layers=len(blocks.names) if blocks else 0,
        )
        self.take(towers.image, towers.preprocessing, towers.name)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [n, context_length] -> [n, embed_dim], not normalised."""
        return self.__dict__["towers"].encode_text(self.cut(tokens))

    def _encode_embedded(self, tokens: Tensor, embeddings: Tensor, deep: Sequence[Tensor]) -> Tensor:
        towers = self.__dict__["towers"]
        with contextlib.ExitStack() as stack:
            looked_up = stack.enter_context(_embedded(towers.embedding, embeddings))
            if deep:
                assert self.text_blocks is not None, "only towers with blocks take deep prompts"
                stack.enter_context(self.text_blocks.changed(towers.text, deep=deep, at=towers.tokenizer.before))
            features = towers.encode_text(tokens)
        if looked_up != [tuple(tokens.shape)]:
            raise RuntimeError(f"the text encoder of {towers.name} looked up its embeddings at {looked_up}, not once")
        return features

    def cut(self, tokens: Tensor) -> Tensor:
        """Without the columns that are padding in every row, where these play no part."""
        pad = self.__dict__["towers"].pad
        if pad is None:
            return tokens
        used = int((tokens != pad).any(dim=0).nonzero().max()) + 1
        used += pad == getattr(self.tokenizer, "end", None)  # then the first that looks like padding ends the text
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
