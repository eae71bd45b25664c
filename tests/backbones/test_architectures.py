"""Architectures of OpenCLIP beyond the kinds of test_open_clip.py: text towers of the hub, and the programs that go through all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file

from oodprompt.backbones import load_backbone
from oodprompt.backbones.general import GeneralCLIP
from oodprompt.errors import UserError
from oodprompt.methods.prompts import class_text_features
from tests.helpers.architectures import HUGGING_FACE, family, words_of_hub
from tests.helpers.runs import load_script

architectures = load_script("scripts/maintain/architectures.py")
backbone_differences = load_script("scripts/maintain/backbone_differences.py")


@pytest.mark.parametrize("name", ["mt5-base-ViT-B-32", "nllb-clip-base", "coca_roberta-ViT-B-32"])
def test_text_towers_of_the_hub(name: str) -> None:
    ((_, _, compute),) = backbone_differences.cases([name + "$"])
    assert max(compute().values()) < 1e-5


def test_models_of_transformers() -> None:
    found = {name: compute() for _, name, compute in backbone_differences.cases(["Model"])}
    assert len(found) == len(HUGGING_FACE) and max(max(values.values()) for values in found.values()) < 1e-5


def test_a_folder_with_a_text_tower_of_the_hub(tmp_path: Path) -> None:
    """mT5 says nothing of its number of positions, so that its tokenizer's length counts."""
    sizes = {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 20, "pad_token_id": 1}
    transformers.MT5Config(**sizes).save_pretrained(tmp_path / "text")
    own = words_of_hub()
    own.save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path / "text"), "hf_tokenizer_name": "any", "context_length": 12}
    image = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 64}
    config = {"model_cfg": {"embed_dim": 48, "vision_cfg": image, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    module = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False, pretrained_text=False)
    weights = {key: value.clone().contiguous() for key, value in module.state_dict().items()}
    save_file(weights, tmp_path / "open_clip_model.safetensors")
    clip: Any = load_backbone(f"open_clip:{tmp_path}")
    assert isinstance(clip, GeneralCLIP) and clip.tokenizer.context_length == 12
    ids = own(["a photo of a cat ."], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = torch.nn.functional.normalize(module.eval().encode_text(ids), dim=-1)
    assert torch.allclose(class_text_features(clip, ["cat"], ["a photo of a {}."]), expected, atol=1e-6)
    with pytest.raises(UserError, match="has 13 tokens, the text encoder takes 12"):
        clip.tokenizer(["cat " * 11])


def test_the_program_says_what_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["architectures.py", "ViT-S-16-alt", "convnext_tiny"])
    assert architectures.main() == 0
    out, progress = capsys.readouterr()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert cells[-2] == ["convnext_tiny", "fast text", "128", "roi, crops", "yes", "refused [1]", "yes", "yes"]
    assert cells[-1] == ["ViT-S-16-alt", "fast", "64", "tokens, crops, masked, patches", "yes", "yes", "yes", "yes"]
    assert "[1] refused: MaPLe puts prompts" in out and progress.startswith("1/2 convnext_tiny: fast text, CoOp yes")


def test_the_program_tells_failures_from_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(architectures, "one_step", fail)
    monkeypatch.setattr(sys, "argv", ["architectures.py", "ViT-S-16-alt"])
    assert architectures.main() == 1


@pytest.mark.slow  # last run on 2026-11-27
def test_one_architecture_of_each_family_equals_that_of_the_library() -> None:
    """``scripts/maintain/backbone_differences.py`` goes through all."""
    smallest: dict[str, str] = {}
    for name in sorted(open_clip.list_models(), key=lambda name: -open_clip.get_model_config(name)["embed_dim"]):
        smallest[family(name)] = f"{name}$"
    found = {name: compute() for _, name, compute in backbone_differences.cases(list(smallest.values()))}
    assert len(found) >= len(smallest) >= 20
    assert {name: values for name, values in found.items() if max(values.values()) > 1e-5} == {}
