"""Models of transformers, built from their config classes at small sizes: on our towers or as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.general import GeneralCLIP
from oodprompt.backbones.hugging_face import check_hugging_face
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.attributes import DiscoveredClusters
from oodprompt.methods.prompts import ContextPrompts, class_text_features, initial_context
from tests.helpers.hugging_face import off, write_tokenizer
from tests.helpers.runs import Run

NAMES = ["water bird", "land bird", "cat"]


def write_model(kind: str, folder: Path) -> Any:
    """A model of the kind with random weights in ``folder``, as ``save_pretrained`` writes it."""
    end = write_tokenizer(folder, pads_with_end=kind.startswith("clip"))
    processor: Any = CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32}, image_mean=[0.5] * 3)
    if kind == "siglip":
        processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    act = "quick_gelu" if kind == "clip quick_gelu" else "gelu"
    text = sizes | {"vocab_size": end + 1, "max_position_embeddings": 16, "eos_token_id": end, "pad_token_id": 1}
    image = sizes | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    if kind == "siglip":
        text |= {"projection_size": 64}
        model: Any = SiglipModel(SiglipConfig(text_config=text, vision_config=image))
    else:
        config = CLIPConfig(
            text_config=text | {"hidden_act": act}, vision_config=image | {"hidden_act": act}, projection_dim=48
        )
        model = CLIPModel(config)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.uniform_(0.5, 1.5)
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data.normal_(std=0.1)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["clip quick_gelu", "clip gelu", "siglip"])
def test_features_and_prompts_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = write_model(kind, tmp_path)
    clip: Any = load_backbone(f"hf:{tmp_path}")
    assert type(clip) is (GeneralCLIP if kind == "siglip" else CLIP)
    assert clip.preprocessing.size == (32, 32) and clip.preprocessing.mean == (0.5, 0.5, 0.5)
    assert clip.logit_scale.item() == pytest.approx(theirs.logit_scale.item())
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    pairs = [clip.encode_image(images), theirs.get_image_features(pixel_values=images).pooler_output]
    assert off(*pairs) < 1e-5
    gradients = [torch.autograd.grad(features[:, 0].sum(), images)[0] for features in pairs]
    assert off(*gradients) < 1e-4
    tokens = clip.tokenizer([f"a photo of a {name}." for name in NAMES])
    mask = None if kind == "siglip" else torch.ones_like(tokens)
    expected = theirs.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output
    assert off(clip.encode_text(tokens), expected) < 1e-5
    words, context = initial_context(clip, "key", 4, "a photo of a")
    holder = nn.Module()
    features = ContextPrompts(holder, clip, NAMES, words, context).text_features()
    assert (features - class_text_features(clip, NAMES, ["a photo of a {}."])).abs().max() < 1e-5
    features.square().sum().backward()
    assert holder.ctx.grad.any() and all(p.grad is None for p in clip.parameters())


def test_texts_that_are_too_long(tmp_path: Path) -> None:
    write_model("clip gelu", tmp_path)
    tokenizer: Any = load_backbone(f"hf:{tmp_path}").tokenizer
    assert not tokenizer.is_too_long("bird " * 14) and tokenizer.is_too_long("bird " * 15)
    with pytest.raises(UserError, match="has 17 tokens, the text encoder takes 16"):
        tokenizer(["bird " * 15])
    assert tokenizer(["bird " * 15], truncate=True).shape == (1, 16)


def test_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="names no model"):
        check_hugging_face("hf:")
    with pytest.raises(UserError, match=r"cannot get the configuration of hf:/.* give the folder of a model"):
        check_hugging_face(f"hf:{tmp_path}")
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert without an image and a text encoder"):
        check_hugging_face(f"hf:{tmp_path}")


def test_files_that_lack_weights(tmp_path: Path) -> None:
    """Which transformers would fill with random numbers, and say so in a line."""
    model = write_model("siglip", tmp_path)
    state = {key: value for key, value in model.state_dict().items() if "layers.1.mlp" not in key}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 8 weights of a SiglipModel \(text_model.encoder.layers.1.mlp.fc1.bias"):
        load_backbone(f"hf:{tmp_path}")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'oodprompt\[transformers\]'"):
        load_backbone("hf:openai/clip-vit-base-patch32")


@pytest.mark.parametrize(
    ("key", "words"), [("PATH", {"path": "x.pt"}), ("ACTIVATION", {"activation": "gelu"})], ids=["path", "activation"]
)
def test_keys_that_would_do_nothing_are_refused(key: str, words: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"MODEL.BACKBONE.{key}: hf:some"):
        load_backbone("hf:some", **words)


def test_a_copy_of_a_backbone_is_whole(tmp_path: Path) -> None:
    """FineTune copies the image tower."""
    write_model("siglip", tmp_path)
    clip: Any = load_backbone(f"hf:{tmp_path}")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(clip).encode_image(images), clip.encode_image(images))


# --- runs over a model that is not ours -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("siglip")
    write_model("siglip", folder)
    return f"hf:{folder}"


OWN_SIZE = ["INPUT.SIZE", "(32, 32)", "OPTIM.MAX_EPOCH", 1]


@pytest.mark.parametrize(
    "words",
    [
        ["CoOp"],
        ["CoOp", "TRAINER.COOP.CSC", "True", "TRAINER.COOP.CLASS_TOKEN_POSITION", "middle"],
        ["CoCoOp"],
        ["KgCoOp"],
        ["ProGrad"],
        ["LinearProbe"],
        ["ZeroshotCLIP"],
        ["FineTune"],
        ["MaPLe"],
        ["VPT"],
        ["IVLP"],
        ["PromptSRC"],
        ["CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes"],
        ["CoOpOOD", "--base", "MaPLe"],
        ["DebiasedPT"],
        ["GroupCoOp"],
        ["OrthCal"],
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_methods_train_over_it(words: list[Any], siglip: str, run: Run) -> None:
    short = [
        "TRAINER.COOP.N_CTX",
        2,
        "TRAINER.COCOOP.N_CTX",
        2,
        "TRAINER.GROUPCOOP.N_CTX",
        2,
        "TRAINER.COOP.CTX_INIT",
        "",
        *("TRAINER.IVLP.N_CTX_TEXT", 2, "TRAINER.IVLP.CTX_INIT", ""),
        *("TRAINER.PROMPTSRC.N_CTX_TEXT", 2, "TRAINER.PROMPTSRC.CTX_INIT", ""),
    ]
    result = run(words[0], "run", *words[1:], "--backbone", siglip, *OWN_SIZE, *short)
    assert 0 <= result["accuracy"] <= 1


def test_ravl_trains_over_it(siglip: str, build: Callable[..., PromptTrainer]) -> None:
    """Over a model of random weights discovery finds nothing, so a cluster is given."""
    trainer = build("RaVL", "--backbone", siglip, *OWN_SIZE, "TRAINER.COOP.N_CTX", 2)
    owner = trainer.region_features.regions("train").owner
    clusters = DiscoveredClusters((1,), {"train": torch.arange(len(owner)) % 3}, {"train": owner})
    trainer.attributes.discovered._found = clusters
    before = trainer.learner.ctx.detach().clone()
    trainer.before_train()
    trainer.before_epoch()
    trainer.run_epoch()
    assert trainer._epoch_means["L_R"] > 0 and not torch.equal(trainer.learner.ctx, before)


def test_finetuning_changes_the_image_tower(siglip: str, build: Callable[..., PromptTrainer]) -> None:
    trainer = build("FineTune", "--backbone", siglip, *OWN_SIZE)
    before = {name: value.clone() for name, value in trainer.learner.state_dict().items()}
    trainer.before_train()
    trainer.before_epoch()
    trainer.run_epoch()
    changed = [name for name, value in trainer.learner.state_dict().items() if not torch.equal(value, before[name])]
    assert any("vision_model.encoder" in name for name in changed)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("MaPLe", "takes none: choose a ViT"),
        ("VPT", "takes none"),
        ("IVLP", "the text tower, and that of this backbone"),
    ],
)
def test_what_it_cannot_take_is_refused(
    trainer: str, message: str, siglip: str, build: Callable[..., PromptTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over towers whose blocks are not found."""
    monkeypatch.setattr("oodprompt.backbones.general.find_blocks", lambda *_: None)
    with pytest.raises(UserError, match=message):
        build(trainer, "--backbone", siglip, *OWN_SIZE, "TRAINER.IVLP.N_CTX_TEXT", 2, "TRAINER.IVLP.CTX_INIT", "")


def test_ways_of_regions(siglip: str) -> None:
    clip: Any = load_backbone(siglip)
    images, whole = torch.randn(2, 3, 32, 32), torch.tensor([[[0.0, 0, 1, 1]]] * 2)
    for way in ("tokens", "crops"):
        assert torch.allclose(clip.region_features(images, whole, way)[:, 0], clip.encode_image(images), atol=1e-5)
    with pytest.raises(UserError, match="has no way 'masked'; give auto, tokens, crops"):
        clip.region_features(images, whole, "masked")


def test_the_input_is_that_of_the_backbone(siglip: str) -> None:
    """Where nobody says otherwise."""
    words = [
        "--trainer",
        "CoOp",
        "--backbone",
        siglip,
        "DATASET.NAME",
        "ShapesOnScenes",
        "INPUT.PIXEL_STD",
        "[1, 1, 1]",
    ]
    said: list[str] = []
    cfg = setup_cfg(build_parser().parse_intermixed_args(words), said.append)
    assert cfg.INPUT.SIZE == (32, 32) and cfg.INPUT.PIXEL_MEAN == [0.5] * 3 and cfg.INPUT.INTERPOLATION == "bicubic"
    assert cfg.INPUT.RESIZE == "squash"
    assert cfg.INPUT.PIXEL_STD == [1, 1, 1] and "was trained with INPUT.PIXEL_STD" in said[0]
