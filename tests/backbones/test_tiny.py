"""The CLIPs that the package carries: small, in OpenAI's layout, and good enough to learn prompts on."""

from __future__ import annotations

import gzip
import io
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest
import torch

from oodprompt.backbones import load_backbone, weights
from tests.helpers.runs import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("scripts/maintain/train_tiny_clip.py")


@pytest.fixture(scope="module")
def scores(script: ModuleType) -> dict[str, float]:
    return script.zero_shot(load_backbone("tiny").state_dict(), per_group=3)


@pytest.mark.parametrize("name", weights.EMBEDDED)
def test_file(name: str) -> None:
    file = weights.embedded_file(name)
    assert file.stat().st_size <= 8 * 2**20
    state = torch.load(io.BytesIO(gzip.decompress(file.read_bytes())), weights_only=True)
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("name", weights.EMBEDDED)
def test_layout(name: str) -> None:
    clip = load_backbone(name)
    assert (clip.shape.vocab_size, clip.shape.context_length) == (49408, 77)
    assert clip.shape == weights.EMBEDDED[name]
    assert clip.dtype == torch.float32 and not clip.training and not any(p.requires_grad for p in clip.parameters())


def test_no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **options: pytest.fail("asked the network"))
    for name in weights.EMBEDDED:
        load_backbone(name, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_test_templates_were_not_trained_on(script: ModuleType) -> None:
    assert not {*script.HELD_OUT_TEMPLATES, *script.HELD_OUT_SCENE_TEMPLATES} & {
        *script.TEMPLATES,
        *script.SCENE_TEMPLATES,
    }


@pytest.mark.parametrize(("kind", "least"), [("scene", 0.90), ("shape", 0.70)])
def test_zero_shot_on_held_out_renders(kind: str, least: float, scores: dict[str, float]) -> None:
    """Renders from a seed of their own, prompts from templates that training did not use; chance is 1/8 and 1/10."""
    assert scores[f"{kind} mean"] >= least, scores
    assert scores[f"{kind} worst template"] >= least - 0.1, scores
