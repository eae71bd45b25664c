"""Files of weights for an architecture of OpenCLIP (MODEL.BACKBONE.PATH): which load, and what is said of others."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import factory
from safetensors.torch import save_file
from torch import Tensor, nn

from oodprompt.backbones import load_backbone
from oodprompt.backbones.open_clip_models import load_open_clip
from oodprompt.errors import UserError
from tests.helpers.tiny_written import as_open_clip, transformers_names

State = dict[str, Tensor]
OPTIMIZER = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    as_open_clip(folder)
    return f"open_clip:{folder}"


@pytest.fixture(scope="module")
def state() -> State:
    return dict(load_backbone("tiny").state_dict())


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "state dict": lambda s: s,
    "training of OpenCLIP": lambda s: {
        "epoch": 3,
        "name": "run",
        "state_dict": under("module.", s),
        "optimizer": OPTIMIZER,
        "scaler": {"scale": 65536.0, "growth_tracker": 3},
    },
    "compiled and parallel": lambda s: {"state_dict": under("module._orig_mod.", s), "optimizer": OPTIMIZER},
    "compiled": lambda s: under("_orig_mod.", s),
    "model_ema alone": lambda s: {"model_ema": s, "optimizer": OPTIMIZER},
    "state_dict_ema alone": lambda s: {"state_dict_ema": under("module.", s), "epoch": 3},
    "model_ema beside": lambda s: {"model": s, "model_ema": other(s), "optimizer": OPTIMIZER},
    "state_dict_ema beside": lambda s: {"state_dict": s, "state_dict_ema": other(s), "optimizer": OPTIMIZER},
    "torch's average": lambda s: {"n_averaged": torch.tensor(7), **under("module.", s)},
    "lightning": lambda s: {"state_dict": under("model.", s), "hparams": argparse.Namespace(lr=1e-4)},
    "a head beside": lambda s: {"state_dict": under("clip.", s) | {"head.weight": torch.ones(2, 3)}},
    "sharded": lambda s: {"model": under("_fsdp_wrapped_module.", s)},
    "bias of sigmoid losses": lambda s: {"state_dict": s | {"logit_bias": torch.tensor([-10.0])}},
    "scale with a dimension": lambda s: s | {"logit_scale": s["logit_scale"].reshape(1)},
    "numpy beside": lambda s: {"state_dict": s, "best": np.float64(0.7)},
    "constants of OpenAI's": lambda s: s | {"input_resolution": torch.tensor(48), "vocab_size": torch.tensor(49408)},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["weights.pt", "weights.bin"])
def test_forms_that_load(form: str, name: str, tiny: str, state: State, tmp_path: Path) -> None:
    torch.save(FORMS[form](state), tmp_path / name, _use_new_zipfile_serialization=name.endswith("pt"))
    loaded = load_backbone(tiny, tmp_path / name).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_safetensors_load(tiny: str, state: State, tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in under("module.", state).items()}, tmp_path / "x.safetensors")
    loaded = load_backbone(tiny, tmp_path / "x.safetensors").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_half_precision_is_read_as_single(tiny: str, state: State, tmp_path: Path) -> None:
    torch.save({key: value.bfloat16() for key, value in state.items()}, tmp_path / "x.pt")
    loaded = load_backbone(tiny, tmp_path / "x.pt").state_dict()
    assert all(torch.equal(loaded[key], value.bfloat16().float()) for key, value in state.items())


def test_what_is_passed_over_is_said(tiny: str, state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "x.pt"
    torch.save({"state_dict": under("clip.", state) | {"head.weight": torch.ones(2)}, "model_ema": state}, file)
    with caplog.at_level(logging.INFO, logger="oodprompt"):
        load_backbone(tiny, file)
    assert caplog.messages == [
        f"Note: {file}: weights are read from 'state_dict', not from 'model_ema'",
        f"Note: {file}: 1 entries whose names do not begin with 'clip.' are not used (head.weight, ...)",
    ]


OTHERS: dict[str, tuple[Callable[[State], Any], str]] = {
    "whole": (lambda s: load_backbone("tiny"), "is a whole model object"),
    "optimiser": (lambda s: {"optimizer": OPTIMIZER, "epoch": 3}, "the state of an optimiser and no weights"),
    "transformers": (
        lambda s: transformers_names(load_backbone("tiny")),
        "it is a model of Hugging Face's transformers",
    ),
    "LoRA": (lambda s: {"visual.x.lora_A.weight": torch.ones(2)}, "it is an adapter"),
    "two": (lambda s: under("student.", s) | under("teacher.", s), r"2 CLIPs, .* 'student\.', 'teacher\.'"),
    "a layer less": (
        lambda s: {key: value for key, value in s.items() if ".resblocks.1." not in key},
        r"does not fit open_clip:.*: of \d+ weights \d+ are missing \(transformer.resblocks.1.attn.in_proj_bias, ...\); is it",
    ),
    "an adapter beside": (
        lambda s: s | {"adapter.fc.weight": torch.ones(2)},
        r"1 are unknown \(adapter.fc.weight, ...\)",
    ),
    "larger images": (
        lambda s: s | {"visual.positional_embedding": torch.zeros(50, 128)},
        r"1 have another shape \(visual.positional_embedding: \(50, 128\) in the file, .* here\); .* or image size\?",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_end_with_one_line(kind: str, tiny: str, state: State, tmp_path: Path) -> None:
    make, words = OTHERS[kind]
    torch.save(make(state), tmp_path / "other.pt")
    with pytest.raises(UserError, match=rf"other\.pt.* {words}") as error:
        load_backbone(tiny, tmp_path / "other.pt")
    assert "\n" not in str(error.value)


# --- architectures with towers that are not ours ----------------------------------------------------------------------

SIGLIP = {
    "embed_dim": 32,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {
        "width": 32,
        "heads": 2,
        "layers": 1,
        "vocab_size": 49408,
        "no_causal_mask": True,
        "pool_type": "last",
    },
}


@pytest.fixture
def siglip(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Under the name ViT-B-32."""
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", SIGLIP)
    return open_clip.create_model("ViT-B-32", load_weights=False)


@pytest.mark.parametrize("form", ["with its bias", "without its bias", "of older names", "in training"])
def test_a_general_architecture(form: str, siglip: nn.Module, tmp_path: Path) -> None:
    """The bias of sigmoid losses plays no part; older files have the text tower without a name of its own."""
    state = siglip.state_dict()
    assert "logit_bias" in state
    if form != "with its bias":
        del state["logit_bias"]
    if form == "of older names":
        state = {key.removeprefix("text."): value for key, value in state.items()}
    content = {"state_dict": under("module.", state)} if form == "in training" else state
    torch.save(content, tmp_path / "x.pt")
    clip: Any = load_open_clip("open_clip:ViT-B-32", tmp_path / "x.pt")
    tokens, images = clip.tokenizer(["a bird"]), torch.randn(2, 3, 32, 32)
    siglip.eval()
    assert torch.allclose(clip.encode_text(tokens), siglip.encode_text(tokens), atol=1e-5)
    assert torch.allclose(clip.encode_image(images), siglip.encode_image(images), atol=1e-5)


# --- the activation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["path", "tag"])
@pytest.mark.parametrize(("tag", "expected"), [("openai", "QuickGELU"), ("laion2b_e16", "GELU")])
def test_the_activation_is_that_of_the_tag(
    by: str, tag: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ViT-B-32 has GELU, and some of its tags were trained with QuickGELU, of which open_clip only warns."""
    config = {key: value for key, value in SIGLIP.items() if key not in ("init_logit_bias", "custom_text")}
    config["text_cfg"] = {"width": 64, "heads": 1, "layers": 1}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "ViT-B-32", config)
    create = open_clip.create_model
    torch.save(create("ViT-B-32", load_weights=False).state_dict(), tmp_path / "x.pt")

    def without_weights(name: str, pretrained: str = "", require_pretrained: bool = False, **more: Any) -> nn.Module:
        return create(name, load_weights=False, **{key: value for key, value in more.items() if key != "load_weights"})

    monkeypatch.setattr(open_clip, "create_model", without_weights)
    clip = load_backbone(f"open_clip:ViT-B-32/{tag}", tmp_path / "x.pt" if by == "path" else "")
    kinds = {type(module).__name__ for module in clip.modules() if "GELU" in type(module).__name__}
    assert kinds == {expected}
