"""Small models of open_clip with random weights, whose image encoders need not be those of the architecture."""

from __future__ import annotations

import copy
from typing import Any

from open_clip import factory

from oodprompt.backbones.open_clip_models import pooling_of
from oodprompt.backbones.tokenizer import Tokenizer
from tests.helpers.architectures import VOCABULARY, WordTokenizer

NAMES = ["water bird", "land bird", "cat"]


def small(name: str, any_image_tower: bool = True) -> dict[str, Any]:
    """The settings of an architecture with few layers, small images and a small vocabulary.

    Without ``any_image_tower`` a small ViT of open_clip's takes the place of those of timm.
    """
    config = copy.deepcopy(factory._MODEL_CONFIGS[name])
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision and not any_image_tower:
        config["vision_cfg"] = {"image_size": 64, "patch_size": 32, "layers": 1, "width": 64}
    elif "timm_model_name" in vision:
        if not name.startswith("MobileCLIP"):
            vision.update(timm_model_name="vit_tiny_patch16_224", timm_pool="avg", timm_proj="linear")
    else:
        patch = vision.get("patch_size") or 32
        vision.update(layers=[1, 1, 1, 1] if isinstance(vision["layers"], list) else 2, image_size=2 * patch)
        if patch == 32 and isinstance(vision["layers"], list):
            vision["image_size"] = 64
    text.update(layers=2, vocab_size=VOCABULARY)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"]["layers"] = 1
    return config


def tokenizer_of(module: Any) -> Tokenizer:
    text = getattr(module, "text", module)
    tokenizer = WordTokenizer(module.context_length, VOCABULARY)
    pooled, end = pooling_of(text)
    if pooled == "eos":
        assert end is not None
        tokenizer.end = end
    return tokenizer
