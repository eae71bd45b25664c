"""Models of Hugging Face's transformers, ``hf:REPOSITORY`` and ``hf:FOLDER``: ``CLIPModel`` on our fast path, others as they are.

``CLIPModel`` has OpenAI's towers under other names, with queries, keys and values apart. All other models that have an
image encoder and a text encoder (SigLIP, AltCLIP, ChineseCLIP, ...) are used under the face of ``GeneralCLIP``.

Source: Wolf et al., Transformers, github.com/huggingface/transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodprompt.backbones.general import GeneralCLIP, Towers
from oodprompt.backbones.model import CLIP
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.backbones.quiet import quiet
from oodprompt.backbones.state_dicts import brief
from oodprompt.backbones.tokenizer import LibraryTokenizer, Tokenizer
from oodprompt.errors import UserError
from oodprompt.log import logger

PREFIX = "hf:"
_MISSING = "{name} needs the package transformers, which is not installed: pip install 'oodprompt[transformers]'"
_UNREACHABLE = (
    "cannot get the {what} of {name} ({reason}). Transformers keeps them in the cache of Hugging Face (HF_HOME): download them "
    "where there is a network, or give the folder of a model that was saved by save_pretrained"
)
_LONGEST = 512  # tokens of a text, where neither model nor tokenizer says less
_OF_ANY_SIZE = ("align", "clipseg")  # model types
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as preprocessors have them


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(_MISSING.format(name=name)) from error
    return transformers


def _of_library(name: str, what: str, load: Any) -> Any:
    """What ``load(place)`` gives; ``UserError`` where it cannot be had. ``place`` is a folder or a repository."""
    rest = name.removeprefix(PREFIX)
    folder = Path(rest).expanduser()
    if not rest:
        raise UserError(f"MODEL.BACKBONE.NAME {name} names no model: give {PREFIX}REPOSITORY or {PREFIX}FOLDER")
    try:
        return load(str(folder) if folder.is_dir() else rest)
    except Exception as error:  # the hub's errors are of many kinds
        raise UserError(_UNREACHABLE.format(what=what, name=name, reason=brief(error))) from error


@quiet("transformers")
def check_hugging_face(name: str) -> Preprocessing:
    """What the image encoder was trained on, without its weights. ``UserError`` as ``load_hugging_face``, as far as known."""
    return _preprocessing(*_settings(name))


def _preprocessing(config: Any, facts: dict[str, Any]) -> Preprocessing:
    size, interpolation = _size(config, facts), _RESAMPLE.get(facts.get("resample", 3), "bicubic")
    mean, std = facts.get("image_mean") or [0.5] * 3, facts.get("image_std") or [0.5] * 3
    return Preprocessing((size, size), tuple(mean), tuple(std), interpolation, _resize_mode(facts))


def _settings(name: str) -> tuple[Any, dict[str, Any]]:
    """The configuration of a model, and the settings of its image processor."""
    transformers = _transformers(name)
    config = _of_library(name, "configuration", transformers.AutoConfig.from_pretrained)
    if not (hasattr(config, "vision_config") and hasattr(config, "text_config")):
        raise UserError(f"MODEL.BACKBONE.NAME {name} is a {config.model_type} without an image and a text encoder")
    return config, _of_library(name, "preprocessor", transformers.ImageProcessingMixin.get_image_processor_dict)[0]


def _size(config: Any, facts: dict[str, Any]) -> int:
    """The edge of the images that a model takes: what its image encoder says, or its processor where it takes any."""
    vision = config.vision_config
    if config.model_type in _OF_ANY_SIZE and (edge := _edge(facts, "crop_size") or _edge(facts, "size")):
        return edge
    if config.model_type == "siglip2":  # patches of an image of any shape; here those of a square
        return vision.patch_size * math.isqrt(vision.num_patches)
    return int(getattr(vision, "image_size", 224))


def _edge(facts: dict[str, Any], key: str) -> int:
    """An edge in pixels in the settings of an image processor; 0 where it does not apply."""
    size = facts.get(key)
    if key == "crop_size" and not facts.get("do_center_crop") or not size:
        return 0
    return int(size if isinstance(size, int) else size.get("height") or size.get("shortest_edge") or 0)


def _note_cut(name: str, facts: dict[str, Any], size: int) -> None:
    """Say where a model was trained on the centre of images that were resized to more than that."""
    cut, resized = _edge(facts, "crop_size"), _edge(facts, "size")
    if cut and cut < resized:
        logger.info(
            f"Note: {name} was trained on {cut} pixels in the middle of {resized}; here images are resized to {size}"
        )


def _resize_mode(facts: dict[str, Any]) -> str:
    """How an image processor with these settings gets an image to its size, as ``Preprocessing`` calls it.

    A height and a width are those of the whole image. One number is the short edge where the centre is cut.
    """
    size = facts.get("size")
    has_both = isinstance(size, dict) and "height" in size
    return "shortest" if facts.get("do_center_crop") and not has_both else "squash"


@quiet("transformers")
def load_hugging_face(name: str) -> CLIP:
    """The backbone ``hf:REPOSITORY`` or ``hf:FOLDER``, in fp32 on the CPU, in evaluation mode, with no gradients.

    ``UserError`` where transformers is not installed, the files cannot be had or lack weights, or the model has no two
    encoders.
    """
    (config, facts), transformers = _settings(name), _transformers(name)
    preprocessing = _preprocessing(config, facts)
    _note_cut(name, facts, preprocessing.size[0])

    def load(place: str) -> tuple[Any, dict[str, Any]]:
        return transformers.AutoModel.from_pretrained(place, dtype=torch.float32, output_loading_info=True)

    module, found = _of_library(name, "weights", load)
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: its files lack {len(missing):,} weights of a {type(module).__name__} "
            f"({missing[0]}, ...); give the folder or repository of a whole model"
        )
    own = _of_library(name, "tokenizer", transformers.AutoTokenizer.from_pretrained)
    return adapt(module.eval(), own, preprocessing, name)


def adapt(module: Any, own: Any, preprocessing: Preprocessing, name: str) -> CLIP:
    """The library's ``module`` with its tokenizer ``own``: in our towers where it is a ``CLIPModel``; frozen."""
    if own.padding_side != "right":
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: its tokenizer pads texts on the {own.padding_side}, and prompts are padded on the "
            'right; write "padding_side": "right" into its tokenizer_config.json if it was trained so'
        )
    tokenizer = _tokenizer(module, own)
    clip = _fast(module) if _is_ours(module) else None
    backbone: CLIP = clip or _general(module, tokenizer, own, preprocessing, name)
    backbone.tokenizer, backbone.preprocessing = tokenizer, preprocessing
    return backbone.eval().requires_grad_(False)


def _tokenizer(module: Any, own: Any) -> Tokenizer:
    text = module.config.text_config
    length = int(min(getattr(text, "max_position_embeddings", _LONGEST), own.model_max_length, _LONGEST))

    def call(texts: Sequence[str], context_length: int) -> Tensor:
        batch = own(list(texts), padding="max_length", truncation=True, max_length=context_length, return_tensors="pt")
        return batch.input_ids

    end = getattr(own, "eos_token_id", None)
    return LibraryTokenizer(call, lambda text: own(text, add_special_tokens=False).input_ids, length, end)


def _is_ours(module: Any) -> bool:
    """Whether our towers compute what ``module`` does."""
    if module.config.model_type not in ("clip", "metaclip_2") or not hasattr(module, "text_projection"):
        return False
    parts = module.config.text_config, module.config.vision_config
    acts = {part.hidden_act for part in parts}
    return len(acts) == 1 and acts <= {"gelu", "quick_gelu"} and all(part.layer_norm_eps == 1e-5 for part in parts)


def _fast(module: Any) -> CLIP:
    text, vision = module.config.text_config, module.config.vision_config
    return CLIP.from_state_dict(
        openai_names(module.state_dict()), text.hidden_act, vision.num_attention_heads, text.num_attention_heads
    )


# A layer's parts: theirs, ours.
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_WHOLE = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}


def openai_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a ``CLIPModel`` under OpenAI's names. ``LookupError`` where it is none."""
    result = {ours: weights[theirs] for theirs, ours in _WHOLE.items()}
    result["visual.proj"] = weights["visual_projection.weight"].T
    result["text_projection"] = weights["text_projection.weight"].T
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        layers = {int(key.split(".")[3]) for key in weights if key.startswith(f"{tower}.encoder.layers.")}
        for i in layers:
            theirs, ours = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                for part, name in _LAYER.items():
                    result[f"{ours}.{name}.{kind}"] = weights[f"{theirs}.{part}.{kind}"]
                rows = [weights[f"{theirs}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                result[f"{ours}.attn.in_proj_{kind}"] = torch.cat(rows)
    return result


def _general(module: Any, tokenizer: Tokenizer, own: Any, preprocessing: Preprocessing, name: str) -> GeneralCLIP:
    """The module as it is. ``UserError`` where it is of a kind whose features are made in a way that is not known."""
    try:
        return GeneralCLIP(_towers(module, tokenizer, own, preprocessing, name))
    except (AttributeError, NotImplementedError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = f"how a {module.config.model_type} makes features of images and texts is not known here"
        raise UserError(f"MODEL.BACKBONE.NAME {name}: {kind} ({brief(error)}); choose another model") from error


def _towers(module: Any, tokenizer: Tokenizer, own: Any, preprocessing: Preprocessing, name: str) -> Towers:
    pad, end = own.pad_token_id, own.eos_token_id
    reads_padding = module.config.model_type.startswith("siglip")  # trained without a mask, and read at the last place

    def encode_text(ids: Tensor) -> Tensor:
        # Where padding is the end of text, the first one ends the text.
        mask = (ids == end).cumsum(1) <= 1 if pad == end else ids != pad
        return _features(module.get_text_features(input_ids=ids, attention_mask=None if reads_padding else mask.long()))

    text, image = getattr(module, "text_model", module), _Image(module)
    with torch.no_grad():
        images = torch.zeros(1, 3, *preprocessing.size)
        own_way, ours = _features(module.get_image_features(**image.inputs(images))), image(images)
    if ours.shape != own_way.shape or not torch.allclose(ours, own_way, atol=1e-5):
        raise ValueError("its image features are not the projection of what its image encoder returns")
    return Towers(
        image=image,
        text=module,
        encode_text=encode_text,
        embedding=_embedding(text),
        tokenizer=tokenizer,
        preprocessing=preprocessing,
        scale=_scale(module),
        embed_dim=ours.shape[-1],
        pad=None if reads_padding else pad,
        name=name,
    )


def _embedding(text: Any) -> nn.Module:
    """The layer that looks up token ids."""
    try:
        return text.get_input_embeddings()
    except NotImplementedError:  # of models that say it nowhere
        return text.embeddings.token_embedding


def _scale(module: Any) -> float:
    """What cosines are multiplied by; ALIGN divides them by a temperature."""
    if hasattr(module, "temperature"):
        return 1 / float(module.temperature.detach())
    return float(module.logit_scale.detach().exp().flatten()[0])


def _features(output: Any) -> Tensor:
    """The features in what a model of transformers returns."""
    return output if isinstance(output, Tensor) else output.pooler_output


class _Image(nn.Module):
    """The image encoder of a model, with the projection behind it where there is one.

    SigLIP 2 takes patches of images of any shape (NaFlex); here they are those of a square.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        for name, child in module.named_children():
            if name.startswith(("vision", "visual")):
                self.add_module(name, child)
        self.patch = module.config.vision_config.patch_size if module.config.model_type == "siglip2" else 0

    def inputs(self, images: Tensor) -> dict[str, Tensor]:
        """What the model's own method takes for images [B, 3, R, R]."""
        if not self.patch:
            return {"pixel_values": images}
        number, edge = len(images), images.shape[-1] // self.patch
        cells = images.unflatten(3, (edge, self.patch)).unflatten(2, (edge, self.patch))  # [B, 3, rows, p, columns, p]
        return {
            "pixel_values": cells.permute(0, 2, 4, 3, 5, 1).reshape(number, edge**2, -1),
            "pixel_attention_mask": images.new_ones(number, edge**2, dtype=torch.int32),
            "spatial_shapes": torch.full((number, 2), edge, device=images.device),
        }

    def forward(self, images: Tensor) -> Tensor:
        parts: Any = self
        features = parts.vision_model(**self.inputs(images)).pooler_output
        return parts.visual_projection(features) if hasattr(self, "visual_projection") else features
