"""Backbones of one's own: two encoders that are no one model, aligned by ridge regression."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from oodprompt.backbones import load_backbone
from oodprompt.backbones.source import BackboneSource, align
from oodprompt.config.registry import BACKBONE_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from tests.helpers.hugging_face import write_tokenizer
from tests.helpers.runs import Run

ROOT = Path(__file__).parents[2]


def test_alignment_is_the_minimum() -> None:
    """The gradient of the objective is zero, and a ridge of next to nothing fits what can be fitted."""
    x, t = torch.randn(20, 5), torch.randn(20, 3)
    layer = align(x, t, ridge=0.1).double().requires_grad_(True)
    error = F.linear(F.normalize(x.double(), dim=-1), layer.weight, layer.bias) - F.normalize(t.double(), dim=-1)
    objective = error.square().sum(dim=1).mean() + 0.1 * layer.weight.square().sum()
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(objective, [layer.weight, layer.bias]))
    t = F.normalize(x, dim=-1) @ torch.randn(5, 3) + 0.5
    t = t / t.norm(dim=-1, keepdim=True)
    with pytest.raises(ValueError, match="20 image features, but 19 text features"):
        align(x, t[:19])
    t = F.normalize(x, dim=-1) @ torch.linalg.qr(torch.randn(5, 5)).Q
    assert torch.allclose(align(x, t, ridge=1e-9)(3 * x), t, atol=1e-4)


@pytest.fixture
def two_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The example over tiny's image encoder and a small BERT, with the flags of a run that has it."""
    folder = tmp_path / "bert"
    write_tokenizer(folder, pads_with_end=False)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes)).save_pretrained(folder)
    for auto in (transformers.AutoModel, transformers.AutoTokenizer):
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda _, load=load: load(folder))
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: load_backbone("tiny").visual)
    example = tmp_path / "two_towers.py"
    text = (ROOT / "docs/examples/two_towers.py").read_text()
    assert len(text.splitlines()) < 60 and "(224, 224)" in text
    example.write_text(text.replace("(224, 224)", "(48, 48)"))
    before = dict(BACKBONE_REGISTRY._objects)
    yield ["--import", str(example), "--backbone", "TwoTowers"]
    BACKBONE_REGISTRY._objects = before


def test_two_towers_of_the_example(
    two_towers: list[str], tmp_path: Path, build: Callable[..., PromptTrainer], run: Run
) -> None:
    dataset = build("CoOp").dataset
    pairs = [(item.impath, f"a photo of a {dataset.classnames[item.label]}.") for item in dataset.train_x]
    file = tmp_path / "pairs.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "caption"), *pairs])
    words = [*two_towers, "MODEL.BACKBONE.PATH", str(file)]
    result = run("CoOp", "run", *words, "TRAINER.COOP.N_CTX", 2, "TRAINER.COOP.CTX_INIT", "", "OPTIM.MAX_EPOCH", 3)
    assert result["accuracy"] > 0.7, result["accuracy"]


def test_what_a_source_must_give(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(BackboneSource):
        def load(self, path: str) -> Any:
            return nn.Linear(1, 1)

    monkeypatch.setitem(BACKBONE_REGISTRY._objects, "Wrong", Wrong)
    with pytest.raises(UserError, match=r"MODEL.BACKBONE.NAME Wrong: its load\(\) gave a Linear, not a CLIP"):
        load_backbone("Wrong")
    with pytest.raises(UserError, match="MODEL.BACKBONE.ACTIVATION"):
        load_backbone("Wrong", activation="gelu")
