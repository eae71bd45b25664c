"""Kinds of models of transformers beside CLIP and SigLIP: features, prompts and scale are those of the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image
from torch import Tensor, nn

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.general import GeneralCLIP
from oodprompt.data.transforms import build_transform
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.errors import UserError
from oodprompt.methods.prompts import ContextPrompts, class_text_features, initial_context
from tests.helpers.hugging_face import off, write_tokenizer

NAMES, LENGTH = ["water bird", "cat"], 42
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
PIXELS = SIZES | {"image_size": 32, "patch_size": 16}
GROUPS = {"depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}
NARROW = {"image_size": 64, "hidden_dim": 64, "width_coefficient": 0.2, "depth_coefficient": 0.2}
CUT = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
STRETCHED = t.BlipImageProcessor(size={"height": 32, "width": 32})
PATCHES = t.Siglip2ImageProcessor(patch_size=16, max_num_patches=4)


def both(config: Any, image: dict[str, Any], text: dict[str, Any], **more: Any) -> Any:
    return config(vision_config=image, text_config=text, projection_dim=more.pop("projection_dim", 48), **more)


def pair(text: dict[str, Any]) -> Any:
    make = t.VisionTextDualEncoderConfig.from_vision_text_configs
    return make(t.ViTConfig(**PIXELS), t.BertConfig(**text), projection_dim=48)


# Kind -> its model from the settings of its text encoder, whether its padding is the end of text, its processor.
Make = Callable[[dict[str, Any]], Any]
KINDS: dict[str, tuple[Make, bool, Any]] = {
    "AltCLIP": (lambda x: t.AltCLIPModel(both(t.AltCLIPConfig, PIXELS, x | {"project_dim": 64})), False, CUT),
    "ChineseCLIP": (lambda x: t.ChineseCLIPModel(both(t.ChineseCLIPConfig, PIXELS, x)), False, CUT),
    "MetaClip2": (lambda x: t.MetaClip2Model(both(t.MetaClip2Config, PIXELS, x)), False, CUT),
    "Siglip2": (
        lambda x: t.Siglip2Model(
            t.Siglip2Config(
                vision_config=SIZES | {"patch_size": 16, "num_patches": 4}, text_config=x | {"projection_size": 64}
            )
        ),
        False,
        PATCHES,
    ),
    "CLIPSeg": (lambda x: t.CLIPSegModel(both(t.CLIPSegConfig, PIXELS, x)), True, CUT),
    "CLIP of another activation": (
        lambda x: t.CLIPModel(both(t.CLIPConfig, PIXELS, x | {"hidden_act": "relu"})),
        True,
        CUT,
    ),
    "Blip": (lambda x: t.BlipModel(both(t.BlipConfig, PIXELS, x)), False, STRETCHED),
    "ALIGN": (lambda x: t.AlignModel(both(t.AlignConfig, NARROW, x, projection_dim=64)), False, STRETCHED),
    "GroupViT": (lambda x: t.GroupViTModel(both(t.GroupViTConfig, PIXELS | GROUPS, x)), True, CUT),
    "OwlViT": (lambda x: t.OwlViTModel(both(t.OwlViTConfig, PIXELS, x)), True, CUT),
    "ViT and BERT": (lambda x: t.VisionTextDualEncoderModel(pair(x)), False, CUT),
}


def write(kind: str, folder: Path) -> Any:
    make, pads_with_end, processor = KINDS[kind]
    if kind == "Siglip2":  # the tokenizer of its class, which knows letters
        ids = {
            token: i
            for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *"\u2581.abcdefghijklmnopqrstuvwxyz"])
        }
        t.Siglip2Tokenizer(vocab=ids, merges=[], padding_side="right").save_pretrained(folder)
        text = {"vocab_size": len(ids), "max_position_embeddings": LENGTH, "eos_token_id": 1, "bos_token_id": 2}
    else:
        end = write_tokenizer(folder, pads_with_end)
        text = {"vocab_size": end + 1, "max_position_embeddings": LENGTH, "eos_token_id": end, "pad_token_id": 1}
    torch.manual_seed(0)
    model = make(SIZES | text).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5)
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.1)
        if isinstance(module, nn.Conv2d):
            module.weight.data.normal_(std=module.weight[0].numel() ** -0.5)
    if kind == "ALIGN":
        model.temperature.data.fill_(0.1)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return model


def features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


def looked_at(kind: str, pixels: np.ndarray) -> dict[str, Tensor]:
    """What the model takes of images, by its own processor."""
    return dict(KINDS[kind][2](images=[Image.fromarray(image) for image in pixels], return_tensors="pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_features_prompts_and_scale_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    theirs = write(kind, tmp_path)
    clip: Any = load_backbone(f"hf:{tmp_path}")
    assert type(clip) is (CLIP if kind == "MetaClip2" else GeneralCLIP) and clip.preprocessing.size == (32, 32)
    words = ["--trainer", "CoOp", "--backbone", f"hf:{tmp_path}", "DATASET.NAME", "ShapesOnScenes"]
    cfg = setup_cfg(build_parser().parse_intermixed_args([*words, "INPUT.TRANSFORMS", "['normalize']"]))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    images = torch.stack([build_transform(cfg, is_train=False)(Image.fromarray(image)) for image in pixels])
    texts = ["a photo of a cat.", "water bird", "a photo of a photo of a photo of a cat"]
    own = t.AutoTokenizer.from_pretrained(tmp_path)
    given = {key: own(texts, padding=True, return_tensors="pt")[key] for key in ("input_ids", "attention_mask")}
    if kind == "Siglip2":  # trained on whole rows without a mask
        given = {"input_ids": own(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids}
    tokens = clip.tokenizer(texts)
    ours = [clip.encode_image(images), clip.encode_text(tokens)]
    with torch.no_grad():
        inputs = looked_at(kind, pixels)
        expected = [features(theirs.get_image_features(**inputs)), features(theirs.get_text_features(**given))]
        logits = theirs(**inputs, **given).logits_per_image - (theirs.logit_bias if kind == "Siglip2" else 0)
    assert all(off(a, b) < 1e-5 for a, b in zip(ours, expected, strict=True))
    image, text = (nn.functional.normalize(x, dim=-1) for x in ours)
    assert off(clip.logit_scale.exp() * image @ text.T, logits) < 1e-4
    words, context = initial_context(clip, "key", 4, "a photo of a")
    prompts = ContextPrompts(nn.Module(), clip, NAMES, words, context).text_features()
    assert (prompts - class_text_features(clip, NAMES, ["a photo of a {}."])).abs().max() < 1e-5


def test_a_segmentation_model_is_its_clip(tmp_path: Path) -> None:
    theirs = write("CLIPSeg", tmp_path)
    config = theirs.config
    config.extract_layers, config.reduce_dim = [0, 1], 16
    whole = t.CLIPSegForImageSegmentation(config).eval()
    whole.clip.load_state_dict(theirs.state_dict())
    whole.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    expected = theirs.get_image_features(pixel_values=images).pooler_output
    assert off(load_backbone(f"hf:{tmp_path}").encode_image(images), expected) < 1e-5


def test_a_cut_that_we_do_not_make_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write("ALIGN", tmp_path)
    t.EfficientNetImageProcessor(
        size={"height": 40, "width": 40}, crop_size={"height": 36, "width": 36}, do_center_crop=True
    ).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="oodprompt"):
        clip: Any = load_backbone(f"hf:{tmp_path}")
    assert clip.preprocessing.size == (36, 36), "it takes images of any size"
    assert caplog.messages == [
        f"Note: hf:{tmp_path} was trained on 36 pixels in the middle of 40; here images are resized to 36"
    ]


def test_the_tokenizer_may_take_less_than_the_text_encoder(tmp_path: Path) -> None:
    """Of RoBERTa's kind two positions stand for no token."""
    write("AltCLIP", tmp_path)
    own = t.AutoTokenizer.from_pretrained(tmp_path)
    own.model_max_length = 12
    own.save_pretrained(tmp_path)
    clip: Any = load_backbone(f"hf:{tmp_path}")
    assert clip.tokenizer.context_length == 12 and clip.tokenizer.is_too_long("bird " * 11)


def test_padding_on_the_left_is_refused(tmp_path: Path) -> None:
    write("Blip", tmp_path)
    write_tokenizer(tmp_path, pads_with_end=False, padding_side="left")
    with pytest.raises(UserError, match=r"pads texts on the left, .* tokenizer_config\.json"):
        load_backbone(f"hf:{tmp_path}")


def test_kinds_whose_features_are_not_known_are_refused(tmp_path: Path) -> None:
    end = write_tokenizer(tmp_path, pads_with_end=True)
    text = SIZES | {"vocab_size": end + 1, "max_position_embeddings": 16, "eos_token_id": end, "pad_token_id": 1}
    CUT.save_pretrained(tmp_path)
    t.XCLIPModel(both(t.XCLIPConfig, PIXELS, text)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"how a xclip makes features of images and texts is not known here .*; choose"):
        load_backbone(f"hf:{tmp_path}")
    t.FlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a flava without an image and a text encoder"):
        load_backbone(f"hf:{tmp_path}")
