"""open_clip's architectures with random weights and few layers, as tests and scripts/maintain/architectures.py build them."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import open_clip
import timm
import tokenizers
import torch
import transformers
from open_clip import factory, hf_model
from torch import Tensor, nn

from oodprompt.backbones.open_clip_models import pooling_of
from oodprompt.backbones.preprocessing import Preprocessing

VOCABULARY = 600
# Text towers of the hub, which are not downloaded: the config class, and the width of the real one.
HUB = {
    "roberta-base": (transformers.RobertaConfig, 768),
    "xlm-roberta-base": (transformers.XLMRobertaConfig, 768),
    "xlm-roberta-large": (transformers.XLMRobertaConfig, 1024),
    "google/mt5-base": (transformers.MT5Config, 768),
    "google/mt5-xl": (transformers.MT5Config, 2048),
    "facebook/nllb-200-distilled-600M": (transformers.M2M100Config, 1024),
    "facebook/nllb-200-distilled-1.3B": (transformers.M2M100Config, 1024),
}


class WordTokenizer:
    """One id for each word; start, words, end, padding."""

    before = 1

    def __init__(self, length: int, vocabulary: int, pad: int = 0) -> None:
        self.context_length, self.pad, self.end, self.start = length, pad, vocabulary - 1, vocabulary - 2

    def encode(self, text: str) -> list[int]:
        return [10 + sum(map(ord, word)) % 500 for word in text.replace(".", " .").split()]

    def is_too_long(self, text: str) -> bool:
        return len(self.encode(text)) + 2 > self.context_length

    def ends(self, tokens: Tensor) -> Tensor:
        return (tokens == self.end).int().argmax(dim=-1)

    def __call__(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
        rows = torch.full((len(texts), self.context_length), self.pad)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start, *self.encode(text), self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def tokenizer_of(name: str, module: Any) -> WordTokenizer:
    """A tokenizer of words as long as the real one of the architecture, with the ids that the text tower goes by."""
    text = getattr(module, "text", module)
    length = open_clip.get_model_config(name)["text_cfg"].get("context_length", 77)
    pad = text.config.pad_token_id if hasattr(text, "pooler") else getattr(text, "pad_id", 0)
    tokenizer = WordTokenizer(length, VOCABULARY, pad)
    pooled, end = pooling_of(text)
    if pooled == "eos":
        assert end is not None
        tokenizer.end = end
    return tokenizer


def as_trained(module: Any) -> Preprocessing:
    size = module.visual.image_size
    return Preprocessing((size, size) if isinstance(size, int) else tuple(size), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


_IMAGE_TOWERS = {
    "vit_base_mci": "MobileCLIP's ViT",
    "vit_pe": "PE",
    "vitamin": "ViTamin",
    "fastvit": "FastViT",
    "convnext": "ConvNeXt",
    "eva": "EVA",
    "swin": "Swin",
    "vit": "ViT",
}
_TEXT_TOWERS = {"roberta": "RoBERTa", "xlm": "XLM-RoBERTa", "mt5": "mT5", "nllb": "NLLB"}


def family(name: str) -> str:
    """What the towers of an architecture are: that of images, then that of text where it is of a kind of its own."""
    settings = open_clip.get_model_config(name)
    timm_name, of_hub = settings["vision_cfg"].get("timm_model_name"), settings["text_cfg"].get("hf_model_name", "")
    if timm_name:
        image = next(kind for start, kind in _IMAGE_TOWERS.items() if timm_name.startswith(start)) + " of timm"
    else:
        image = "ResNet" if isinstance(settings["vision_cfg"]["layers"], list) else "ViT"
    own = next((kind for kind in ("SigLIP2", "SigLIP", "CLIPA") if kind in name and not of_hub), "")
    text = _TEXT_TOWERS[of_hub.split("/")[-1].split("-")[0]] if of_hub else own
    parts = [image, f"text as {text}" if text and not of_hub else f"text of {text}" if text else ""]
    return ("CoCa: " if "coca" in name else "") + ", ".join(filter(None, parts))


def _small_image_tower(vision: dict[str, Any], real_size: bool) -> None:
    name, layers = vision.get("timm_model_name", ""), vision.get("layers")
    if not name:
        vision["layers"] = [1, 1, 1, 1] if isinstance(layers, list) else 2
    if not real_size and not name.startswith("swin"):  # whose windows need the size
        patch = re.search(r"patch(\d+)", name)
        if name.startswith(("convnext", "fastvit")) or isinstance(layers, list):
            vision["image_size"] = 128
        else:
            vision["image_size"] = 4 * (int(patch[1]) if patch else 16 if name else vision["patch_size"])


def small(name: str, real_size: bool = False) -> dict[str, Any]:
    """The settings of an architecture with few layers, images of few patches and a small vocabulary; widths are real."""
    config = copy.deepcopy(factory._MODEL_CONFIGS[name])
    _small_image_tower(config["vision_cfg"], real_size)
    config["text_cfg"].update(layers=2, vocab_size=VOCABULARY)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] |= {"layers": 1, "vocab_size": VOCABULARY}
    return config


def _cut(name: str) -> dict[str, Any]:
    """What timm is told so that the tower has few blocks."""
    if name.startswith(("convnext", "swin")):
        return {"depths": (1, 1, 2, 1)}
    if name.startswith("fastvit"):
        return {"layers": (1,) * (5 if name.endswith(("mci3", "mci4")) else 4)}
    return {"depth": 2}


def _config_of_hub(name: str, *_: Any, **__: Any) -> Any:
    kind, width = HUB[name]
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0 if kind is transformers.MT5Config else 1}
    if kind is transformers.MT5Config:
        sizes |= {"d_model": width, "d_ff": 2 * width, "num_layers": 2, "num_heads": width // 64}
    elif kind is transformers.M2M100Config:
        sizes |= {"d_model": width, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 4 * width}
    else:
        sizes |= {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": width // 64}
        sizes |= {"intermediate_size": 4 * width, "max_position_embeddings": 514}
    return kind(**sizes)


@contextlib.contextmanager
def few_layers(settings: dict[str, Any], name: str) -> Iterator[None]:
    """Meanwhile open_clip builds the architecture by ``settings``, timm's towers are cut, and none comes from the hub."""
    create, size, timm_name = timm.create_model, settings["vision_cfg"]["image_size"], ""
    timm_name = settings["vision_cfg"].get("timm_model_name", "")
    sized = {} if timm_name.startswith(("convnext", "fastvit")) else {"img_size": size}

    def shallow(of: str, *args: Any, **keys: Any) -> nn.Module:
        return create(of, *args, **keys, **_cut(of), **sized)

    with (
        mock.patch.dict(factory._MODEL_CONFIGS, {name: settings}),
        mock.patch.object(timm, "create_model", shallow),
        mock.patch.object(hf_model.AutoConfig, "from_pretrained", _config_of_hub),
    ):
        yield


def built_of(name: str, real_size: bool = False) -> str:
    """What ``build_small`` makes of an architecture; the same for two that differ in the size of their images alone."""
    settings = small(name, real_size)
    vision = settings["vision_cfg"]
    if "timm_model_name" in vision and not real_size:
        vision["timm_model_name"] = re.sub(r"_\d+$", "", vision["timm_model_name"])
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):  # which a tokenizer of words stands in for
        settings["text_cfg"].pop(key, None)
    return json.dumps(settings, sort_keys=True)


@torch.no_grad()
def _disturb(module: nn.Module) -> None:
    """Other values for what starts at a constant, which would hide that it is left out: norms, biases, layer scale, tokens."""
    for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)):
        if norm.weight is not None:
            norm.weight.uniform_(0.5, 1.5)
    for name, value in module.named_parameters():
        if name.endswith("gamma"):
            value.uniform_(0.1, 0.5)
        elif value.ndim and value.numel() < 2**17:
            value.add_(torch.randn_like(value), alpha=0.02)


def build_small(name: str, seed: int = 0, real_size: bool = False) -> Any:
    """open_clip's own module of the architecture, with random weights, layers cut, in evaluation mode."""
    torch.manual_seed(seed)
    with few_layers(small(name, real_size), name):
        module = open_clip.create_model(name, pretrained=None, load_weights=False, pretrained_text=False).eval()
    _disturb(module)
    return module


# --- models of transformers -------------------------------------------------------------------------------------------

_WORDS = ["<unk>", "<pad>", "<s>", "</s>", "a", "photo", "of", "X", "water", "land", "bird", "cat", "."]
_SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = _SIZES | {
    "vocab_size": 20,
    "max_position_embeddings": 24,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_IMAGE = _SIZES | {"image_size": 32, "patch_size": 16}
HUGGING_FACE: dict[str, Callable[[], Any]] = {
    "CLIPModel, QuickGELU": lambda: transformers.CLIPConfig(
        text_config=_TEXT | {"hidden_act": "quick_gelu"},
        vision_config=_IMAGE | {"hidden_act": "quick_gelu"},
        projection_dim=48,
    ),
    "CLIPModel, GELU": lambda: transformers.CLIPConfig(
        text_config=_TEXT | {"hidden_act": "gelu"}, vision_config=_IMAGE | {"hidden_act": "gelu"}, projection_dim=48
    ),
    "SiglipModel": lambda: transformers.SiglipConfig(text_config=_TEXT | {"projection_size": 64}, vision_config=_IMAGE),
    "AltCLIPModel": lambda: transformers.AltCLIPConfig(
        text_config=_TEXT | {"project_dim": 64}, vision_config=_IMAGE, projection_dim=48
    ),
    "MetaClip2Model": lambda: transformers.MetaClip2Config(text_config=_TEXT, vision_config=_IMAGE, projection_dim=48),
    "ChineseCLIPModel": lambda: transformers.ChineseCLIPConfig(
        text_config=_TEXT, vision_config=_IMAGE, projection_dim=48
    ),
}


def words_of_hub() -> Any:
    """A tokenizer of words as transformers has it, with start, end and padding."""
    ids = {word: i for i, word in enumerate(_WORDS)}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    vocabulary.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    vocabulary.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
