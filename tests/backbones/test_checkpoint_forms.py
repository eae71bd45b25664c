"""The ways in which people save a CLIP: which load, what others are called, and that no code of theirs runs."""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oodprompt.backbones import CLIP, load_backbone, weights
from oodprompt.backbones.tensors import script_tensors
from oodprompt.errors import UserError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state(reference: Callable[[str], nn.Module]) -> State:
    return dict(reference("small ViT").state_dict())


@pytest.fixture(scope="module")
def clip(state: State) -> CLIP:
    return CLIP.from_state_dict(state)


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


OPTIMIZER = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
FORMS: dict[str, Callable[[State], Any]] = {
    "model": lambda s: {"model": s},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer_state_dict": OPTIMIZER, "loss": 0.25},
    "module": lambda s: {"module": s},
    "averaged alone": lambda s: {"model_ema": s, "optimizer": OPTIMIZER},
    "nested": lambda s: {"model": {"state_dict": s}},
    "open_clip": lambda s: {"epoch": 3, "name": "run", "state_dict": under("module.", s), "optimizer": OPTIMIZER},
    "lightning": lambda s: {"epoch": 3, "pytorch-lightning_version": "2.4.0", "state_dict": under("model.", s)},
    "clip. beside a head": lambda s: {"state_dict": under("clip.", s) | {"head.weight": torch.ones(2, 3)}},
    "module.model.": lambda s: under("module.model.", s),
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled, parallel, lightning": lambda s: {"state_dict": under("model.module._orig_mod.", s)},
    "one tower compiled": lambda s: {k.replace("visual.", "visual._orig_mod."): v for k, v in s.items()},
    "torch's average": lambda s: {"n_averaged": torch.tensor(7), **under("module.", s)},
    "sharded": lambda s: {"model": under("_fsdp_wrapped_module.", s)},
    "numpy scalar": lambda s: {"state_dict": under("module.", s), "scheduler": {"lr": np.float64(1e-4)}},
    "namespace": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=1e-4)},
    "parameters": lambda s: {"model": {k: nn.Parameter(v.float()) for k, v in s.items()}, "args": argparse.Namespace()},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_usual_forms_load(form: str, zipped: bool, state: State, tmp_path: Path) -> None:
    torch.save(FORMS[form](state), tmp_path / "clip.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_backbone("", tmp_path / "clip.pt").state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in state.items())


def test_parameters_with_attributes_of_their_own_load(state: State, tmp_path: Path) -> None:
    marked = {k: nn.Parameter(v) if v.ndim > 1 else v.detach().clone() for k, v in state.items()}
    for value in marked.values():
        value.of = "the optimiser's group"  # as large models have it
    torch.save({"model": marked, "args": argparse.Namespace()}, tmp_path / "clip.pt")
    loaded = load_backbone("", tmp_path / "clip.pt").state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in state.items())


def test_safetensors_load(state: State, tmp_path: Path) -> None:
    save_file({key: value.contiguous() for key, value in under("model.", state).items()}, tmp_path / "x.bin")
    loaded = load_backbone("", tmp_path / "x.bin").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    (tmp_path / "x.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*x\.bin: .*incomplete"):
        load_backbone("", tmp_path / "x.bin")


def test_what_is_passed_over_is_said(state: State, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"model": under("clip.", state) | {"head.weight": torch.ones(2), "head.bias": torch.ones(2)}}
    torch.save(content | {"model_ema": state}, tmp_path / "clip.pt")
    with caplog.at_level(logging.INFO, logger="oodprompt"):
        load_backbone("", tmp_path / "clip.pt")
    assert caplog.messages == [
        f"Note: {tmp_path}/clip.pt: weights are read from 'model', not from 'model_ema'",
        f"Note: {tmp_path}/clip.pt: 2 entries whose names do not begin with 'clip.' are not used (head.weight, ...)",
    ]


OTHERS: dict[str, tuple[Callable[[State, CLIP], Any], str]] = {
    "whole": (
        lambda s, c: c,
        r"is a whole model object, saved by torch\.save\(model\); save model\.state_dict\(\) instead",
    ),
    "whole in a dict": (
        lambda s, c: {"epoch": 1, "model": c},
        r"a whole model object.*oodprompt\.backbones\.model\.CLIP",
    ),
    "optimiser": (lambda s, c: OPTIMIZER, "the state of an optimiser and no weights"),
    "optimiser in a dict": (
        lambda s, c: {"optimizer": OPTIMIZER, "epoch": 3},
        "the state of an optimiser and no weights",
    ),
    "LoRA": (
        lambda s, c: {"base.visual.layer.lora_A.weight": torch.ones(2)},
        "an adapter .LoRA. without the CLIP below it",
    ),
    "transformers": (
        lambda s, c: {"vision_model.embeddings.class_embedding": torch.ones(2), "text_model.x": torch.ones(2)},
        "a model of Hugging Face's transformers",
    ),
    "prompt learner": (
        lambda s, c: {"state_dict": {"ctx": torch.ones(2, 3)}, "epoch": 3},
        "a trained prompt learner; .*INIT",
    ),
    "image tower": (lambda s, c: {k: v for k, v in s.items() if k.startswith("visual.")}, "an image tower alone"),
    "classifier": (lambda s, c: {"conv1.weight": torch.ones(2), "fc.weight": torch.ones(2)}, "an image classifier"),
    "two": (lambda s, c: under("student.", s) | under("teacher.", s), r"2 CLIPs, .* 'student\.', 'teacher\.'"),
    "mixed": (lambda s, c: {**s, "epoch": 3}, "its entry 'epoch' is none"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_named_for_what_they_are(kind: str, state: State, clip: CLIP, tmp_path: Path) -> None:
    make, words = OTHERS[kind]
    torch.save(make(state, clip), tmp_path / "other.pt")
    with pytest.raises(UserError, match=rf"other\.pt.* {words}") as error:
        load_backbone("", tmp_path / "other.pt")
    assert "\n" not in str(error.value)


class Writes(nn.Module):
    """Its code writes a file when TorchScript loads it."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.w, self.file = torch.ones(2), file

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, str, bool]:
        return self.w, self.file, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, str, bool]) -> None:
        self.w, self.file, self.training = state[0], state[1], state[2]
        self.w = self.w + 0 * torch.from_file(self.file, True, 10).sum()


@pytest.mark.filterwarnings("ignore")
def test_code_of_a_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    marker, buffer = tmp_path / "written", io.BytesIO()
    torch.jit.save(torch.jit.script(Writes(str(marker))), buffer)
    (tmp_path / "evil.pt").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="evil.pt"):
        load_backbone("", tmp_path / "evil.pt")
    assert not marker.exists()
    buffer.seek(0)
    torch.jit.load(buffer)
    assert marker.exists(), "the bait is live"


@pytest.mark.filterwarnings("ignore")
def test_tensors_of_a_torchscript_archive_are_its_state_dict() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(6.0).view(2, 3).T)  # not contiguous
            self.register_buffer("steps", torch.tensor([1, 2]))
            self.mask = torch.ones(2)  # neither a parameter nor a buffer

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight.sum() + self.mask.sum() + self.steps.sum()

    model, buffer = nn.Sequential(Part(), nn.Sequential(Part().half())), io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    expected, found = torch.jit.load(buffer).state_dict(), script_tensors(buffer.getvalue())
    assert list(found) == list(expected) == ["0.weight", "0.steps", "1.0.weight", "1.0.steps"]
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in expected.items())


@pytest.mark.filterwarnings("ignore")
def test_openais_own_archives_load_by_torchscript_if_need_be(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their SHA256 is known, so what they hold is known too."""
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(2))
    torch.jit.save(torch.jit.script(module), str(tmp_path / "known.pt"))
    monkeypatch.setattr("oodprompt.backbones.state_dicts.read_file", lambda file: 1 / 0)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        weights._read(tmp_path / "known.pt")
    monkeypatch.setitem(weights.OPENAI_WEIGHTS, "RN50", (weights._sha256(tmp_path / "known.pt"), "RN50.pt"))
    assert weights._read(tmp_path / "known.pt").keys() == {"weight"}


# ---------------------------------------------------------------------------------------------- activation


def test_the_activation_is_that_of_the_key(reference: Callable[[str], nn.Module], tmp_path: Path) -> None:
    """OpenAI's model with every activation replaced by PyTorch's GELU is what ``gelu`` computes, in both towers."""
    model = reference("small ViT")
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    quick, gelu = (load_backbone("", tmp_path / "clip.pt", activation=name) for name in ("auto", "gelu"))
    rng = torch.Generator().manual_seed(0)
    images, tokens = torch.randn(2, 3, 40, 40, generator=rng), torch.tensor([[98, 5, 7, 99, 0, 0, 0, 0, 0, 0, 0, 0]])
    for clip, replace in ((quick, False), (gelu, True)):
        for part in model.modules():
            if replace and hasattr(part, "gelu"):
                part.gelu = nn.GELU()
        with torch.no_grad():
            for ours, theirs in (
                (clip.encode_image(images), model.encode_image(images)),
                (clip.encode_text(tokens), model.encode_text(tokens)),
            ):
                assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (quick.encode_image(images) - gelu.encode_image(images)).abs().max() > 1e-3
    assert weights.digest(quick.visual) != weights.digest(gelu.visual), "else cached features would be mixed up"


def test_names_have_their_own_activation() -> None:
    with pytest.raises(UserError, match="MODEL.BACKBONE.ACTIVATION: tiny has quick_gelu; the key is for a file"):
        load_backbone("tiny", activation="gelu")
