"""Models of Hugging Face's transformers, ``hf:REPOSITORY`` and ``hf:FOLDER``: ``CLIPModel`` on our fast path, others as they are.

``CLIPModel`` has OpenAI's towers under other names, with queries, keys and values apart. All other models that have an
image encoder and a text encoder (SigLIP, AltCLIP, ChineseCLIP, ...) are used under the face of ``GeneralCLIP``.

Source: Wolf et al., Transformers, github.com/huggingface/transformers.
"""

from __future__ import annotations

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

PREFIX = "hf:"
_MISSING = "{name} needs the package transformers, which is not installed: pip install oodprompt[transformers]"
_UNREACHABLE = (
    "cannot get the {what} of {name} ({reason}). Transformers keeps them in the cache of Hugging Face (HF_HOME): download them "
    "where there is a network, or give the folder of a model that was saved by save_pretrained"
)
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
    transformers = _transformers(name)
    config = _of_library(name, "configuration", transformers.AutoConfig.from_pretrained)
    if not (hasattr(config, "vision_config") and hasattr(config, "text_config")):
        raise UserError(f"MODEL.BACKBONE.NAME {name} is a {config.model_type} without an image and a text encoder")
    facts = _of_library(name, "preprocessor", transformers.ImageProcessingMixin.get_image_processor_dict)[0]
    size = int(getattr(config.vision_config, "image_size", 224))
    mean, std = facts.get("image_mean") or [0.5] * 3, facts.get("image_std") or [0.5] * 3
    return Preprocessing(
        (size, size), tuple(mean), tuple(std), _RESAMPLE.get(facts.get("resample", 3), "bicubic"), _resize_mode(facts)
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
    preprocessing, transformers = check_hugging_face(name), _transformers(name)

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
    tokenizer = _tokenizer(module, own)
    clip = _fast(module) if _is_ours(module) else None
    backbone: CLIP = clip or _general(module, tokenizer, own, preprocessing, name)
    backbone.tokenizer, backbone.preprocessing = tokenizer, preprocessing
    return backbone.eval().requires_grad_(False)


def _tokenizer(module: Any, own: Any) -> Tokenizer:
    text = module.config.text_config
    length = int(text.max_position_embeddings)

    def call(texts: Sequence[str], context_length: int) -> Tensor:
        batch = own(list(texts), padding="max_length", truncation=True, max_length=context_length, return_tensors="pt")
        return batch.input_ids

    end = getattr(own, "eos_token_id", None)
    return LibraryTokenizer(call, lambda text: own(text, add_special_tokens=False).input_ids, length, end)


def _is_ours(module: Any) -> bool:
    """Whether our towers compute what ``module`` does."""
    if module.config.model_type != "clip" or not hasattr(module, "text_projection"):
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
    """The module as it is."""
    pad = own.pad_token_id
    reads_padding = module.config.model_type.startswith("siglip")  # trained without a mask, and read at the last place

    def encode_text(ids: Tensor) -> Tensor:
        mask = None if reads_padding else (ids != pad).long()
        return _features(module.get_text_features(input_ids=ids, attention_mask=mask))

    text, image = getattr(module, "text_model", module), _Image(module)
    with torch.no_grad():
        zeros = torch.zeros(1, 3, *preprocessing.size)
        own_way, ours = _features(module.get_image_features(pixel_values=zeros)), image(zeros)
    if ours.shape != own_way.shape or not torch.allclose(ours, own_way, atol=1e-5):
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: how a {module.config.model_type} makes its image features is not known"
        )
    return GeneralCLIP(
        Towers(
            image=image,
            text=module,
            encode_text=encode_text,
            embedding=text.get_input_embeddings(),
            tokenizer=tokenizer,
            preprocessing=preprocessing,
            scale=float(module.logit_scale.detach().exp().flatten()[0]),
            embed_dim=ours.shape[-1],
            pad=None if reads_padding else pad,
            name=name,
        )
    )


def _features(output: Any) -> Tensor:
    """The features in what a model of transformers returns."""
    return output if isinstance(output, Tensor) else output.pooler_output


class _Image(nn.Module):
    """The image encoder of a model, with the projection behind it where there is one."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        for name, child in module.named_children():
            if name.startswith(("vision", "visual")):
                self.add_module(name, child)

    def forward(self, images: Tensor) -> Tensor:
        parts: Any = self
        features = parts.vision_model(pixel_values=images).pooler_output
        return parts.visual_projection(features) if hasattr(self, "visual_projection") else features
