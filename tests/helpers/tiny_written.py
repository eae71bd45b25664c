"""The embedded ``tiny`` as other libraries keep a CLIP: folders and files that ``--backbone`` takes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.tokenizer import load_clip_file

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HEAD_WIDTH = 64  # of OpenAI's towers


def as_open_clip(folder: Path) -> None:
    """A configuration, weights, and a checkpoint of open_clip's training, ``epoch_3.checkpoint``."""
    clip = load_backbone("tiny")
    shape, weights = clip.shape, {key: value.contiguous() for key, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    training = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in weights.items()}, "optimizer": {}}
    torch.save(training, folder / "epoch_3.checkpoint")
    config = {
        "model_cfg": {
            "embed_dim": shape.embed_dim,
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": shape.image_resolution,
                "layers": shape.vision_layers,
                "width": shape.vision_width,
                "patch_size": shape.vision_patch,
            },
            "text_cfg": {"width": shape.text_width, "heads": shape.text_heads, "layers": shape.text_layers},
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def as_hugging_face(folder: Path, pad: str = "<|endoftext|>") -> None:
    """A ``CLIPModel``, its tokenizer and its image processor, as ``save_pretrained`` writes them.

    ``pad`` is the tokenizer's padding: the end of text in OpenAI's repositories, "!" (id 0) in those of OpenCLIP.
    """
    clip = load_backbone("tiny")
    shape, size = clip.shape, clip.shape.image_resolution
    tokenizer(pad).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder)
    towers = {
        "text": (shape.text_width, shape.text_layers, shape.text_heads),
        "vision": (shape.vision_width, shape.vision_layers, shape.vision_width // HEAD_WIDTH),
    }
    settings = {
        tower: {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu",
        }
        for tower, (width, layers, heads) in towers.items()
    }
    special = {
        "vocab_size": shape.vocab_size,
        "bos_token_id": shape.vocab_size - 2,
        "eos_token_id": shape.vocab_size - 1,
    }
    special |= {"pad_token_id": shape.vocab_size - 1 if pad == "<|endoftext|>" else 0}
    pixels = {"image_size": size, "patch_size": shape.vision_patch}
    config = CLIPConfig(
        text_config=settings["text"] | special | {"max_position_embeddings": shape.context_length},
        vision_config=settings["vision"] | pixels,
        projection_dim=shape.embed_dim,
    )
    model = CLIPModel(config)
    missing = model.load_state_dict(transformers_names(clip), strict=False)
    assert not missing.unexpected_keys and all(key.endswith("position_ids") for key in missing.missing_keys)
    model.save_pretrained(folder)


def tokenizer(pad: str) -> CLIPTokenizer:
    """transformers' tokenizer with the vocabulary of the installed ``clip``, which ids follow from as in OpenAI's code."""
    own = load_clip_file("simple_tokenizer")
    lines = gzip.decompress(Path(own.default_bpe()).read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    return CLIPTokenizer(vocab=dict(own.SimpleTokenizer().encoder), merges=merges, pad_token=pad, model_max_length=77)


def transformers_names(clip: CLIP) -> dict[str, Tensor]:
    """The state dict of ``clip``, a ViT, under the names of transformers' ``CLIPModel``."""
    ours, theirs = clip.state_dict(), {"logit_scale": clip.logit_scale}
    embeddings = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    }
    theirs |= {name: ours[key] for key, name in embeddings.items()}
    theirs |= {"text_projection.weight": ours["text_projection"].T, "visual_projection.weight": ours["visual.proj"].T}
    for kind in ("weight", "bias"):
        theirs[f"text_model.final_layer_norm.{kind}"] = ours[f"ln_final.{kind}"]
        theirs[f"vision_model.pre_layrnorm.{kind}"] = ours[f"visual.ln_pre.{kind}"]
        theirs[f"vision_model.post_layernorm.{kind}"] = ours[f"visual.ln_post.{kind}"]
        for tower, prefix, layers in (
            ("text", "", clip.shape.text_layers),
            ("vision", "visual.", clip.shape.vision_layers),
        ):
            assert isinstance(layers, int), "the image tower is a ViT"
            for i in range(layers):
                block, layer = f"{prefix}transformer.resblocks.{i}", f"{tower}_model.encoder.layers.{i}"
                queries_keys_values = ours[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for letter, part in zip("qkv", queries_keys_values, strict=True):
                    theirs[f"{layer}.self_attn.{letter}_proj.{kind}"] = part
                theirs[f"{layer}.self_attn.out_proj.{kind}"] = ours[f"{block}.attn.out_proj.{kind}"]
                for n, mlp in ((1, "c_fc"), (2, "c_proj")):
                    theirs[f"{layer}.layer_norm{n}.{kind}"] = ours[f"{block}.ln_{n}.{kind}"]
                    theirs[f"{layer}.mlp.fc{n}.{kind}"] = ours[f"{block}.mlp.{mlp}.{kind}"]
    return theirs
