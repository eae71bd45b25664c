"""OpenCLIP's architectures, ``open_clip:ARCH`` and ``open_clip:ARCH/TAG``: on our fast path where it knows the towers.

What open_clip calls an architecture is a file of settings; a tag names weights that were trained for one. Weights with a
ViT or a ResNet and a text tower as OpenAI's have OpenAI's names, and are loaded into our own towers. All others are
open_clip's own modules under the face of ``MixedCLIP`` or ``GeneralCLIP``.

Source: Ilharco et al., OpenCLIP, github.com/mlfoundations/open_clip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodprompt.backbones.bidirectional import BidirectionalCLIP, BidirectionalMixedCLIP
from oodprompt.backbones.general import GeneralCLIP, MixedCLIP, Towers
from oodprompt.backbones.model import CLIP
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.backbones.quiet import quiet
from oodprompt.backbones.state_dicts import brief, fitted, read_state_dict, without_prefix
from oodprompt.backbones.tokenizer import LibraryTokenizer, OpenAITokenizer, Tokenizer
from oodprompt.errors import UserError, nearest
from oodprompt.log import logger

PREFIX = "open_clip:"
_UNREACHABLE = (
    "cannot get the {what} of {name} ({reason}); open_clip keeps them in the cache of Hugging Face (HF_HOME). Download them "
    "where there is a network, or give a folder of open_clip's files, or an architecture with MODEL.BACKBONE.PATH"
)
_MISSING = "{name} needs the package open_clip_torch, which is not installed: pip install 'oodprompt[open_clip]'"


@dataclass(frozen=True)
class _Architecture:
    """What a name says: open_clip's ``identifier``, the ``tag`` of weights ("": none), ``preprocess`` as its files have it."""

    identifier: str
    tag: str
    tags: tuple[str, ...]
    preprocess: dict[str, Any]


def _named(name: str) -> tuple[Any, _Architecture]:
    """The package and the architecture. ``UserError`` where one of them is not there."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(_MISSING.format(name=name)) from error
    rest = name.removeprefix(PREFIX)
    facts: dict[str, Any] = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    if not rest:
        raise UserError(
            f"MODEL.BACKBONE.NAME {name} names no architecture: give {PREFIX}ARCH/TAG, as {PREFIX}ViT-B-32/openai"
        )
    if rest.startswith("hf-hub:") or Path(rest).expanduser().is_dir():
        config = _config_file(name, rest)
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            size = content["model_cfg"]["vision_cfg"].get("image_size", 224)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"MODEL.BACKBONE.NAME {name}: {config} is no configuration of open_clip ({brief(error)})"
            ) from error
        identifier = rest if rest.startswith("hf-hub:") else f"local-dir:{config.parent}"
        return open_clip, _Architecture(
            identifier, "", (), {**facts, "size": size, **content.get("preprocess_cfg", {})}
        )
    architecture, _, tag = rest.partition("/")
    if architecture not in open_clip.list_models():
        near = nearest(architecture, open_clip.list_models(), "oodprompt backbones")
        raise UserError(
            f"MODEL.BACKBONE.NAME {name}: open_clip has no architecture and there is no folder {architecture!r}: {near}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise UserError(f"MODEL.BACKBONE.NAME {name}: unknown tag {tag!r}: {nearest(tag, tags)}")
    of_tag = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    size = open_clip.get_model_config(architecture)["vision_cfg"].get("image_size", 224)
    known = {key: value for key, value in of_tag.items() if value is not None}
    return open_clip, _Architecture(architecture, tag, tuple(tags), {**facts, "size": size, **known})


def _config_file(name: str, rest: str) -> Path:
    """open_clip's own configuration of a folder, or of a repository of the hub, which is downloaded."""
    if not rest.startswith("hf-hub:"):
        file = Path(rest).expanduser() / "open_clip_config.json"
        if not file.is_file():
            raise UserError(
                f"MODEL.BACKBONE.NAME {name}: there is no {file}, which open_clip writes beside its weights"
            )
        return file
    from huggingface_hub import hf_hub_download  # a part of open_clip's own requirements

    try:
        return Path(hf_hub_download(rest.removeprefix("hf-hub:"), "open_clip_config.json"))
    except Exception as error:  # the hub's errors are of many kinds
        raise UserError(_UNREACHABLE.format(what="configuration", name=name, reason=brief(error))) from error


@quiet("open_clip")
def check_open_clip(name: str, path: str | Path = "") -> Preprocessing:
    """What the tower of a name was trained on, without its weights. ``UserError`` as ``load_open_clip``, as far as known."""
    return _with_weights(name, _named(name)[1], path)


def _with_weights(name: str, found: _Architecture, path: str | Path) -> Preprocessing:
    """What the architecture was trained on; ``UserError`` where nothing says which weights are meant."""
    if not (found.tag or path or ":" in found.identifier):
        tags = found.tags
        some = (
            f"one of its tags ({PREFIX}{found.identifier}/{tags[0]}, ...)" if tags else "a file in MODEL.BACKBONE.PATH"
        )
        raise UserError(f"MODEL.BACKBONE.NAME {name} names an architecture without weights: give {some}")
    return _preprocessing(found.preprocess)


def _preprocessing(facts: dict[str, Any]) -> Preprocessing:
    size = facts["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    interpolation, resize = facts.get("interpolation") or "bicubic", facts.get("resize_mode") or "shortest"
    if resize == "longest" and (colour := facts.get("fill_color")):
        logger.info(f"Note: the images of this model were padded with the colour {colour}; here it is black")
    return Preprocessing(size, tuple(facts["mean"]), tuple(facts["std"]), interpolation, resize)


@quiet("open_clip")
def load_open_clip(name: str, path: str | Path = "", cache_dir: str | Path = "") -> CLIP:
    """The backbone ``open_clip:ARCH[/TAG]``, in fp32 on the CPU, in evaluation mode, with no gradients.

    Weights are those of ``path``, else of the tag, which open_clip downloads into ``cache_dir`` or its own cache.
    ``UserError`` where open_clip is not installed, for unknown architectures and tags, where there are no weights, and
    where they do not fit.
    """
    open_clip, found = _named(name)
    preprocessing = _with_weights(name, found, path)
    module = _module(open_clip, name, found, path, cache_dir).eval()
    return adapt(module, _tokenizer(open_clip, name, found.identifier, module), preprocessing, name)


def _module(open_clip: Any, name: str, found: _Architecture, path: str | Path, cache_dir: str | Path) -> nn.Module:
    """open_clip's own module, filled."""
    folder = str(cache_dir) or None
    quick_gelu = bool(found.preprocess.get("quick_gelu"))  # of the tag, whose architecture may have another one
    if not path:
        try:
            return open_clip.create_model(
                found.identifier,
                pretrained=found.tag or None,
                require_pretrained=True,
                cache_dir=folder,
                force_quick_gelu=quick_gelu,
            )
        except Exception as error:  # the hub's errors are of many kinds
            raise UserError(_UNREACHABLE.format(what="weights", name=name, reason=brief(error))) from error
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"MODEL.BACKBONE.PATH: no file at {file}; give a checkpoint, or leave the key empty")
    module = open_clip.create_model(
        found.identifier,
        load_weights=False,
        pretrained_text=False,
        cache_dir=folder,
        force_quick_gelu=quick_gelu,
    )
    own, weights = module.state_dict(), read_state_dict(file)
    first = next(key for key, value in own.items() if key.startswith("visual.") and value.ndim > 1)
    weights = without_prefix(weights, [first], file) or weights
    if not hasattr(module, "positional_embedding"):  # older files have no text tower of its own name
        weights = open_clip.model.convert_to_custom_text_state_dict(weights)
    module.load_state_dict(fitted(weights, own, file, name))
    return module


def _tokenizer(open_clip: Any, name: str, architecture: str, module: Any) -> Tokenizer:
    """That of the architecture; ``UserError`` where it cannot be had."""
    text = getattr(module, "text", module)
    try:
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # the hub's errors are of many kinds
        raise UserError(_UNREACHABLE.format(what="tokenizer", name=name, reason=brief(error))) from error
    length = int(tokenizer.context_length)  # the module's own is that of positions: 514 of RoBERTa, 0 of mT5
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return OpenAITokenizer(length)
    own = tokenizer.tokenizer
    pooled, end = pooling_of(text)

    def plain(words: str) -> list[int]:  # cleaned as whole texts are
        return own(tokenizer.clean_fn(words), add_special_tokens=False).input_ids

    return LibraryTokenizer(tokenizer, plain, length, end if pooled == "eos" else None)


def adapt(module: Any, tokenizer: Tokenizer, preprocessing: Preprocessing, name: str) -> CLIP:
    """open_clip's ``module`` on our fast path where it knows its towers, else as it is; frozen."""
    backbone: CLIP = _fast(module, preprocessing, name) or _general(module, tokenizer, preprocessing, name)
    backbone.tokenizer, backbone.preprocessing = tokenizer, preprocessing
    return backbone.eval().requires_grad_(False)


def pooling_of(text: Any) -> tuple[str, int | None]:
    """Where open_clip's text tower is read ("argmax", "eos", "last", ...), and the id of its end of text."""
    kinds = [getattr(text, name, None) for name in ("text_pool_type", "pool_type")]
    ends = [getattr(text, name, None) for name in ("text_eos_id", "eos_id")]
    return next(filter(None, kinds), "argmax"), next((end for end in ends if end is not None), None)


def path_of(module: Any) -> str:
    """How open_clip's ``module`` is computed: "fast", "fast text" (beside its own image tower) or "general"."""
    if not _text_is_ours(getattr(module, "text", module)):
        return "general"
    activation = _activation(getattr(module, "text", module).transformer.resblocks)
    return "fast" if _image_is_ours(module.visual, activation) else "fast text"


def _text_is_ours(text: Any) -> bool:
    """Whether our text towers, causal or not, compute what open_clip's ``text`` does."""
    if not hasattr(text, "token_embedding") or not isinstance(getattr(text, "text_projection", None), nn.Parameter):
        return False
    if getattr(text, "cls_emb", None) is not None:
        return False
    ends, both_ways = pooling_of(text)[0] in ("argmax", "eos"), text.attn_mask is None
    own = (ends or pooling_of(text)[0] == "last") and not getattr(text, "use_pad_mask", False) if both_ways else ends
    return own and bool(_activation(text.transformer.resblocks)) and _is_plain(text.ln_final)


def path_of_settings(settings: dict[str, Any]) -> str:
    """As ``path_of``, from the settings of an architecture, without building it."""
    image, text = settings["vision_cfg"], settings["text_cfg"]
    special = ("hf_model_name", "proj_bias", "proj_type", "norm_kwargs", "act_kwargs", "embed_cls")
    plain = not any(text.get(key) for key in special) and "multimodal_cfg" not in settings
    both_ways, pooled = text.get("no_causal_mask"), text.get("pool_type", "argmax")
    if not plain or (both_ways and text.get("use_pad_mask")):
        return "general"
    if pooled not in (("argmax", "eos", "last") if both_ways else ("argmax", "eos")):
        return "general"
    plain = not any(image.get(key) for key in ("timm_model_name", "attentional_pool", "qk_norm"))
    return "fast" if plain and image.get("pool_type", "tok") in ("tok", "avg") else "fast text"


def _fast(module: Any, preprocessing: Preprocessing, name: str) -> CLIP | None:
    """The same weights in our towers, or our text tower beside open_clip's image tower; None where text is of another kind."""
    path = path_of(module)
    if path == "general":
        return None
    text, visual = getattr(module, "text", module), module.visual
    weights = {key.removeprefix("text."): value for key, value in module.state_dict().items() if key != "logit_bias"}
    weights = {key: value for key, value in weights.items() if not key.endswith(("attn_mask", "num_batches_tracked"))}
    weights["logit_scale"] = weights["logit_scale"].reshape(())
    both_ways = text.attn_mask is None
    activation, heads = _activation(text.transformer.resblocks), text.transformer.resblocks[0].attn.num_heads
    if path == "fast":
        kind: type[CLIP] = BidirectionalCLIP if both_ways else CLIP
        vit = type(visual).__name__ == "VisionTransformer"
        image_heads, pool = (visual.transformer.resblocks[0].attn.num_heads, _pool_of(visual)) if vit else (0, "token")
        clip = kind.from_state_dict(_without_scales(weights), activation, image_heads, heads, pool)
    else:
        kind = BidirectionalMixedCLIP if both_ways else MixedCLIP
        weights = {key: value for key, value in weights.items() if not key.startswith("visual.")}
        clip = kind.from_state_dict(_without_scales(weights), activation, 0, heads)
        assert isinstance(clip, MixedCLIP), "a class builds its own kind"
        clip.take(visual, preprocessing, name)
    if isinstance(clip, BidirectionalCLIP):
        clip.reads_end = pooling_of(text)[0] != "last"
    return clip


def _without_scales(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights without layer scale, which multiplies what attention and MLP give: it goes into their last layers."""
    result = {key: value for key, value in weights.items() if not key.endswith((".ls_1.gamma", ".ls_2.gamma"))}
    for key in weights.keys() - result.keys():
        block, scale, _ = key.rsplit(".", 2)
        layer = f"{block}.attn.out_proj" if scale == "ls_1" else f"{block}.mlp.c_proj"
        result[f"{layer}.weight"] = weights[key].unsqueeze(1) * weights[f"{layer}.weight"]
        result[f"{layer}.bias"] = weights[key] * weights[f"{layer}.bias"]
    return result


def _image_is_ours(visual: Any, activation: str) -> bool:
    """Whether our image towers compute what open_clip's ``visual`` does."""
    if type(visual).__name__ == "ModifiedResNet":
        return True
    if type(visual).__name__ != "VisionTransformer":
        return False
    plain = visual.pool_type in ("tok", "avg") and visual.attn_pool is None and isinstance(visual.proj, nn.Parameter)
    plain = plain and (isinstance(visual.ln_pre, nn.Identity) or _is_plain(visual.ln_pre)) and _is_plain(visual.ln_post)
    return plain and _activation(visual.transformer.resblocks) == activation


def _pool_of(visual: Any) -> str:
    """What open_clip's ViT reads, by our name."""
    if visual.pool_type == "tok":
        return "token"
    return "norm of mean" if visual.final_ln_after_pool else "mean"


def _activation(blocks: Any) -> str:
    """The activation of transformer blocks by our name; "" where they have parts that ours have not."""
    kinds = {type(block.mlp.gelu).__name__ for block in blocks}
    names = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
    if len(kinds) != 1 or not kinds <= names.keys() or any(map(_is_special, blocks)):
        return ""
    if any(getattr(block.mlp.gelu, "approximate", "none") != "none" for block in blocks):
        return ""
    return names[kinds.pop()]


def _is_plain(norm: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.eps == 1e-5


def _is_special(block: Any) -> bool:
    """Whether a block has parts that ours have not."""
    own = isinstance(block.attn, nn.MultiheadAttention) and _is_plain(block.ln_1) and _is_plain(block.ln_2)
    return not own or hasattr(block, "ln_1_kv")


def _general(module: Any, tokenizer: Tokenizer, preprocessing: Preprocessing, name: str) -> GeneralCLIP:
    """The module as it is."""
    text = getattr(module, "text", None) or module
    own = getattr(text, "token_embedding", None)
    embedding = own if own is not None else text.transformer.get_input_embeddings()
    image = _First(module.visual) if hasattr(module, "text_decoder") else module.visual
    with torch.no_grad():
        d = image(torch.zeros(2, 3, *preprocessing.size)).shape[-1]
    return GeneralCLIP(
        Towers(
            image=image,
            text=text,
            encode_text=module.encode_text,
            embedding=embedding,
            tokenizer=tokenizer,
            preprocessing=preprocessing,
            scale=float(module.logit_scale.detach().exp().flatten()[0]),
            embed_dim=d,
            pad=_pad(text),
            name=name,
        )
    )


class _First(nn.Module):
    """The first of what an image tower returns: CoCa's feature, ahead of its tokens."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor) -> Tensor:
        return self.tower(images)[0]


def _pad(text: Any) -> int | None:
    """The id of padding that may be cut off: of a Hugging Face tower, which has an attention mask.

    open_clip's own towers take their mask, or the place from where they are read, at full length.
    """
    return int(text.config.pad_token_id) if hasattr(text, "pooler") else None
