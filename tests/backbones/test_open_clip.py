"""open_clip's architectures, with random weights and few layers: on our towers or as they are, against open_clip's own."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from torch import Tensor, nn

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.general import GeneralCLIP, MixedCLIP
from oodprompt.backbones.open_clip_models import (
    adapt,
    check_open_clip,
    load_open_clip,
    path_of,
    path_of_settings,
)
from oodprompt.backbones.tokenizer import OpenAITokenizer
from oodprompt.errors import UserError
from oodprompt.methods.prompts import ContextPrompts, class_text_features, initial_context
from tests.helpers.architectures import VOCABULARY, WordTokenizer, as_trained
from tests.helpers.hugging_face import off
from tests.helpers.open_clip_small import NAMES, small, tokenizer_of
from tests.helpers.tiny_written import as_open_clip

# Name -> what is computed how.
KINDS = {
    "ViT-B-32": "fast",  # GELU
    "ViT-B-32-quickgelu": "fast",
    "ViT-H-14": "fast",  # heads of 80
    "RN50": "fast",
    "ViT-H-14-worldwide": "fast",  # read at the id of the end of text, which is not the highest
    "EVA02-B-16": "fast text",
    "ViT-B-16-SigLIP": "general",  # text that sees both ways, read at its last place
    "ViT-M-16-alt": "fast",  # layer scale
    "ViT-L-14-CLIPA": "fast",  # text that sees both ways, the mean of patches
    "coca_ViT-B-32": "general",
    "MobileCLIP-S1": "fast text",  # text that sees both ways, read at its end
}


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    def make(name: str) -> Any:
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, small(name))
        logging.disable(logging.WARNING)
        torch.manual_seed(0)
        module = open_clip.create_model(name, pretrained=None, load_weights=False, pretrained_text=False).eval()
        logging.disable(logging.NOTSET)
        for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d)):
            norm.weight.data.uniform_(0.5, 1.5)
        return module

    return make


@pytest.mark.parametrize("name", KINDS)
def test_features_are_those_of_open_clip(name: str, build: Callable[[str], Any]) -> None:
    module = build(name)
    tokenizer = tokenizer_of(module)
    theirs = copy.deepcopy(module)
    clip = adapt(module, tokenizer, as_trained(module), f"open_clip:{name}")
    kind = "general" if isinstance(clip, GeneralCLIP) else "fast text" if isinstance(clip, MixedCLIP) else "fast"
    assert kind == KINDS[name]
    images = torch.randn(2, 3, *as_trained(theirs).size, requires_grad=True)
    tokens = tokenizer([f"a photo of a {n}." for n in NAMES])
    for ours, expected in (
        (clip.encode_image(images), theirs.encode_image(images)),
        (clip.encode_text(tokens), theirs.encode_text(tokens)),
    ):
        if name.startswith("coca"):
            ours, expected = (torch.nn.functional.normalize(x, dim=-1) for x in (ours, expected))
        assert off(ours, expected) < 1e-5
    gradients = [
        torch.autograd.grad(torch.nn.functional.normalize(model.encode_image(images), dim=-1)[:, 0].sum(), images)[0]
        for model in (clip, theirs)
    ]
    assert off(*gradients) < 1e-4 and not any(p.requires_grad for p in clip.parameters())


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-H-14-worldwide", "EVA02-B-16", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "MobileCLIP-S1"]
)
def test_prompts_of_the_same_words_have_the_same_features(name: str, build: Callable[[str], Any]) -> None:
    """Context vectors that are the embeddings of words give what the words give, wherever the name stands."""
    module = build(name)
    clip = adapt(module, tokenizer_of(module), as_trained(module), name)
    expected = class_text_features(clip, NAMES, ["a photo of a {}."])
    words, context = initial_context(clip, "key", 4, "a photo of a")
    holder = nn.Module()
    prompts = ContextPrompts(holder, clip, NAMES, words, context)
    features = prompts.text_features()
    assert (features - expected).abs().max() < 1e-5
    features.square().sum().backward()
    assert holder.ctx.grad.any() and all(p.grad is None for p in clip.parameters())
    by_image = prompts.text_features(torch.stack([holder.ctx, 2 * holder.ctx]))
    assert (by_image[0] - features).abs().max() < 1e-5 and (by_image[1] - features).abs().max() > 1e-3
    front = ContextPrompts(nn.Module(), clip, NAMES, words, context, "front").text_features()
    moved = class_text_features(clip, NAMES, ["{} a photo of a."])
    assert (front - moved).abs().max() < 1e-5


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_prompts_behind_other_numbers_of_special_tokens(
    before: int, position: str, build: Callable[[str], Any]
) -> None:
    """A causal text encoder whose tokenizer puts none or two of them ahead of a text."""

    class Other(WordTokenizer):
        def __call__(self, texts: Sequence[str], truncate: bool = False) -> Tensor:
            rows = super().__call__(texts, truncate)
            start = rows[:, :1].expand(-1, before)
            return torch.cat([start, rows[:, 1:]], dim=1)[:, : self.context_length]

    Other.before = before
    module = build("ViT-B-32")
    clip = adapt(module, Other(module.context_length, VOCABULARY), as_trained(module), "this")
    assert clip.shares_prefixes
    words, context = initial_context(clip, "key", 4, "a photo of a")
    template = {"end": "a photo of a {}.", "middle": "a photo {} of a.", "front": "{} a photo of a."}[position]
    expected = class_text_features(clip, NAMES, [template])
    for own in (context, context.expand(len(NAMES), -1, -1)):
        features = ContextPrompts(nn.Module(), clip, NAMES, words, own.clone(), position).text_features()
        assert (features - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_the_path_follows_from_the_settings(name: str, build: Callable[[str], Any]) -> None:
    assert path_of_settings(small(name)) == path_of(build(name)) == KINDS[name]
    assert path_of_settings(open_clip.get_model_config(name)) == KINDS[name]


@pytest.mark.parametrize(
    ("tower", "changes", "path"),
    [
        ("vision_cfg", {}, "fast"),
        ("vision_cfg", {"attentional_pool": True}, "fast text"),
        ("text_cfg", {"pool_type": "last"}, "general"),
        ("text_cfg", {"embed_cls": True}, "general"),
        ("text_cfg", {"act_kwargs": {"approximate": "tanh"}}, "general"),
        ("text_cfg", {"norm_kwargs": {"eps": 1e-6}}, "general"),
    ],
    ids=str,
)
def test_what_our_towers_cannot_compute(
    tower: str, changes: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small("ViT-B-32")
    settings[tower] |= changes
    settings["custom_text"] = True
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", settings)
    module = open_clip.create_model("ViT-B-32", pretrained=None, load_weights=False)
    assert path_of(module) == path_of_settings(settings) == path


@pytest.mark.parametrize(
    ("tower", "changes"),
    [
        ("vision_cfg", {"no_ln_pre": True}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"pool_type": "avg", "final_ln_after_pool": True}),
        ("vision_cfg", {"ls_init_value": 0.3}),
        ("text_cfg", {"ls_init_value": 0.3}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"no_causal_mask": True, "pool_type": "last"}),
    ],
    ids=str,
)
def test_what_our_towers_compute_as_well(tower: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, texts, gradients to images, and chosen patches, as open_clip's module has them."""
    settings = small("ViT-B-32")
    settings[tower] |= changes
    settings["custom_text"] = True
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", settings)
    torch.manual_seed(0)
    module = open_clip.create_model("ViT-B-32", pretrained=None, load_weights=False).eval()
    for norm in (m for m in module.modules() if isinstance(m, nn.LayerNorm)):
        norm.weight.data.uniform_(0.5, 1.5)
    tokenizer = tokenizer_of(module)
    clip = adapt(module, tokenizer, as_trained(module), "this")
    assert path_of(module) == path_of_settings(settings) == "fast" and not isinstance(clip, MixedCLIP)
    images, tokens = torch.randn(2, 3, *as_trained(module).size, requires_grad=True), tokenizer(NAMES)
    pairs = [clip.encode_image(images), module.encode_image(images)]
    assert off(*pairs) < 1e-5 and off(clip.encode_text(tokens), module.encode_text(tokens)) < 1e-5
    assert off(*(torch.autograd.grad(features[:, 0].sum(), images)[0] for features in pairs)) < 1e-4
    whole, half = ((torch.tensor([[[0.0, 0, 1, side]]] * 2)) for side in (1, 0.5))
    both = torch.cat([whole, half], dim=1)
    assert off(clip.region_features(images, both, "tokens")[:, 0], pairs[1]) < 1e-5
    with_others = clip.region_features(images, both, "tokens")[:, 1]
    assert off(with_others, clip.region_features(images, half, "tokens")[:, 0]) < 1e-5


@pytest.mark.parametrize("name", ["ViT-L-14-CLIPA", "ViT-B-16-SigLIP"])
def test_prompts_in_parts(name: str, build: Callable[[str], Any]) -> None:
    """Where the activations of all would take too much memory: the same features and gradients."""
    module = build(name)
    clip = adapt(module, tokenizer_of(module), as_trained(module), name)
    words, context = initial_context(clip, "key", 4, "a photo of a")
    holder = nn.Module()
    prompts = ContextPrompts(holder, clip, NAMES, words, context)
    deep, found, at_once = torch.randn(4, clip.shape.text_width, requires_grad=True), [], []
    encode = clip._encode_embedded

    def counted(tokens: Tensor, *others: Any) -> Tensor:
        at_once.append(len(tokens))
        return encode(tokens, *others)

    clip.__dict__["_encode_embedded"] = counted
    for limit in (4 << 30, 1):
        clip.activation_limit = limit
        features = prompts.text_features(deep=[deep])
        found.append((features, *torch.autograd.grad(features[:, 0].sum(), [holder.ctx, deep])))
    assert at_once == [3, *[1] * 6]  # forward, and again in the backward pass
    assert all(off(part, whole) < 1e-5 for part, whole in zip(*found, strict=True))


@pytest.mark.slow  # last run on 2026-11-27
def test_the_paths_of_all_architectures(build: Callable[[str], Any]) -> None:
    """With a small ViT of open_clip's in the place of each image tower of timm; towers of the hub cannot be had here."""
    found: Counter[str] = Counter()
    for name in open_clip.list_models():
        settings = small(name, any_image_tower=False)
        if "hf_model_name" in settings["text_cfg"]:
            continue
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(factory._MODEL_CONFIGS, name, settings)
            module = open_clip.create_model(name, pretrained=None, load_weights=False)
        path = path_of_settings(settings)
        assert path == path_of(module), name
        found[path_of_settings(open_clip.get_model_config(name))] += 1
    assert found["fast"] >= 55 and found["fast"] + found["fast text"] >= 100


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny`` as open_clip keeps a model, and as a checkpoint of its training."""
    folder = tmp_path_factory.mktemp("tiny_open_clip")
    as_open_clip(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "mode"), [("ViT-B-16-SigLIP/webli", "squash"), ("ViT-B-32/openai", "shortest")], ids=str
)
def test_images_get_their_size_as_in_training(name: str, mode: str) -> None:
    assert check_open_clip(f"open_clip:{name}").keys()["INPUT.RESIZE"] == mode


def test_another_colour_around_images_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"resize_mode": "longest", "fill_color": 255}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.INFO, logger="oodprompt"):
        assert check_open_clip(f"open_clip:{tmp_path}").resize_mode == "longest"
    assert caplog.messages == ["Note: the images of this model were padded with the colour 255; here it is black"]


@pytest.mark.parametrize("path", ["", "epoch_3.checkpoint"])
def test_tiny_written_out_is_tiny(folder: Path, path: str) -> None:
    clip = load_backbone(f"open_clip:{folder}", folder / path if path else "")
    assert type(clip) is CLIP
    tiny = load_backbone("tiny")
    for name, value in tiny.state_dict().items():
        assert torch.equal(clip.state_dict()[name], value), name
    assert isinstance(clip.tokenizer, OpenAITokenizer) and clip.preprocessing.size == (48, 48)


@pytest.mark.parametrize(
    ("name", "path", "message"),
    [
        ("open_clip:ViT-B-23/openai", "", "ViT-B-32"),
        ("open_clip:ViT-B-32/openia", "", "openai"),
        ("open_clip:ViT-B-32", "", "give one of its tags"),
        ("open_clip:ViT-B-32", "missing.pt", "no file at missing.pt"),
        ("open_clip:", "", "names no architecture"),
    ],
)
def test_wrong_names(name: str, path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_backbone(name, path)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="open_clip_config.json, which open_clip writes"):
        check_open_clip(f"open_clip:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="is no configuration of open_clip"):
        check_open_clip(f"open_clip:{tmp_path}")


def test_weights_of_another_architecture(folder: Path) -> None:
    with pytest.raises(UserError, match="does not fit open_clip:ViT-S-32"):
        load_open_clip("open_clip:ViT-S-32", folder / "epoch_3.checkpoint")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'oodprompt\[open_clip\]'"):
        load_backbone("open_clip:ViT-B-32/openai")
