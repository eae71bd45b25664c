"""Files of upstream's form: checkpoints of CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe, VPT, IVLP and PromptSRC.

Each checkpoint is made here as those projects write it: Dassl's dict with a pickled scheduler, upstream's names, the
whole model where they save it whole, half precision where they train in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oodprompt import cli
from oodprompt.backbones import load_backbone
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.engine.objective import Objective
from oodprompt.errors import UserError
from tests.helpers.runs import Build
from tests.helpers.towers import assert_close, gaussian
from tests.helpers.upstream_files import (
    METHODS,
    NAMES,
    WHOLE,
    State,
    noise,
    normal,
    prompts,
    text_prompt_logits,
    upstream_state,
    write,
)


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """OpenAI's CLIP with the weights of the embedded one."""
    clip = load_backbone("tiny", "")
    model = load_clip_file("model").CLIP(*astuple(clip.shape)[:10]).eval().requires_grad_(False)
    model.load_state_dict(clip.state_dict())
    return model


# --- checkpoints as upstream writes them -----------------------------------------------------------------------


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_upstreams_checkpoints_give_the_logits_of_their_tensors(
    name: str, half: bool, theirs: nn.Module, build: Build, tmp_path: Path
) -> None:
    method, trainer = METHODS[name], build(name, *METHODS[name].keys)
    state = upstream_state(name, theirs, half, classes=5 if half else len(NAMES))
    trainer.learner.eval()
    batch = next(iter(trainer.test_loader))
    expected = method.logits(theirs, normal(state), batch["img"])
    with torch.no_grad():
        before = trainer.encoder.align(batch).logits
        trainer.load_model(write(tmp_path / "theirs", method.folder, state), 50)
        assert_close(trainer.encoder.align(batch).logits, expected, "logits")
    assert (before - expected).abs().max() > 0.1  # what was loaded counts
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in trainer.clip.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_upstreams_checkpoints_are_evaluated_by_the_command_line(
    name: str,
    theirs: nn.Module,
    arguments: Callable[..., list[str]],
    build: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method, seen = METHODS[name], []
    state = upstream_state(name, theirs)
    directory = write(tmp_path / "theirs", method.folder, state)
    predictions = Objective.predictions

    def recorded(self: Objective, alignment: Any) -> dict[str, Tensor]:
        found = predictions(self, alignment)
        seen.append(found[""])
        return found

    monkeypatch.setattr(Objective, "predictions", recorded)
    epoch = ["--load-epoch", 50] if name in ("CoOp", "MaPLe") else []  # else the one that the file `checkpoint` names
    cli.run(arguments(name, "ours", *method.keys, "--eval-only", "--model-dir", directory, *epoch))
    batches = list(build(name, *method.keys).test_loader)
    expected = torch.cat([method.logits(theirs, normal(state), batch["img"]) for batch in batches])
    assert_close(torch.cat(seen), expected, "logits")
    right = expected.argmax(1) == torch.cat([batch["label"] for batch in batches])
    result = json.loads((tmp_path / "ours" / "results.json").read_text())
    assert result["num_samples"] == len(right) == 24
    assert result["accuracy"] == pytest.approx(right.float().mean().item())
    assert result["checkpoint"].endswith(f"{method.folder}/model.pth.tar-50")


@pytest.mark.parametrize("name", ["CoOp", "MaPLe"])
def test_training_starts_from_upstreams_checkpoint(name: str, theirs: nn.Module, build: Build, tmp_path: Path) -> None:
    method, state = METHODS[name], upstream_state(name, theirs)
    file = write(tmp_path / "theirs", method.folder, state) / method.folder / "model.pth.tar-50"
    trainer = build(name, *method.keys, "MODEL.INIT_WEIGHTS", file)
    for key, parameter in trainer.learner.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, state[key].float()), key


@pytest.mark.parametrize(
    ("name", "key"),
    list(zip(WHOLE, cycle(["image_encoder.conv1.weight", "text_encoder.ln_final.bias", "logit_scale"]), strict=False)),
)
def test_prompts_of_another_clip_are_refused(
    name: str, key: str, theirs: nn.Module, build: Build, tmp_path: Path
) -> None:
    state = upstream_state(name, theirs)
    state[key] = state[key] + 0.02
    trainer = build(name, *METHODS[name].keys)
    before = {k: v.clone() for k, v in trainer.learner.state_dict().items()}
    with pytest.raises(UserError, match=f"another CLIP: its {key} is not that of the backbone") as error:
        trainer.load_model(write(tmp_path / "theirs", METHODS[name].folder, state), 50)
    assert "\n" not in str(error.value) and "--backbone" in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in trainer.learner.state_dict().items())


def test_prompts_of_a_clip_of_another_size_are_refused(theirs: nn.Module, build: Build, tmp_path: Path) -> None:
    state = upstream_state("MaPLe", theirs)
    state["image_encoder.positional_embedding"] = noise(197, 768)
    with pytest.raises(UserError, match="another CLIP: its image_encoder.positional_embedding"):
        build("MaPLe", *METHODS["MaPLe"].keys).load_model(write(tmp_path, "MultiModalPromptLearner", state), 50)


@pytest.mark.parametrize(
    ("epochs", "mean", "std"),
    [
        (20, 15, 1),
        (20, 6, 10),
        (50, 30, 30),
        (50, 45, 5),
    ],
)
def test_towers_that_upstream_averaged_over_epochs_are_still_those_of_the_backbone(
    epochs: int, mean: float, std: float, theirs: nn.Module, build: Build, tmp_path: Path
) -> None:
    """Upstream's PromptSRC averages the whole model, frozen towers too, in half precision: the sum is not exact."""
    state = upstream_state("PromptSRC", theirs)
    averaged: State = {}
    for weight in gaussian(epochs, mean, std):
        averaged = {key: averaged.get(key, 0) + weight * value for key, value in state.items()}
    assert all(averaged[key].dtype == value.dtype for key, value in state.items())
    assert not torch.equal(averaged["image_encoder.conv1.weight"], state["image_encoder.conv1.weight"])
    trainer = build("PromptSRC", *METHODS["PromptSRC"].keys)
    trainer.load_model(write(tmp_path / "theirs", "VLPromptLearner", averaged), 50)
    assert torch.equal(trainer.learner.prompt_learner.ctx, averaged["prompt_learner.ctx"].float())


@pytest.mark.parametrize(
    ("name", "key", "value", "problem"),
    [
        ("MaPLe", "TRAINER.MAPLE.N_CTX", 4, r"ctx has shape \(2, 128\), the model \(4, 128\)"),
        ("MaPLe", "TRAINER.MAPLE.PROMPT_DEPTH", 2, "compound_prompts_text.1 is unknown"),
        ("MaPLe", "TRAINER.MAPLE.PROMPT_DEPTH", 4, "compound_prompts_text.2 is missing"),
        ("IVLP", "TRAINER.IVLP.PROMPT_DEPTH_TEXT", 3, "text_encoder.*VPT_shallow is missing"),
        ("VPT", "TRAINER.VPT.N_CTX_VISION", 8, r"VPT has shape \(3, 128\), the model \(8, 128\)"),
        ("VPT", "TRAINER.VPT.PROMPT_DEPTH_VISION", 1, "is unknown"),
        ("IVLP", "TRAINER.IVLP.PROMPT_DEPTH_VISION", 0, "is unknown"),
        ("IVLP", "TRAINER.IVLP.PROMPT_DEPTH_TEXT", 1, "is unknown"),
        ("PromptSRC", "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", 2, "is unknown"),
    ],
)  # fmt: skip
def test_prompts_of_another_shape_are_refused(
    name: str, key: str, value: int, problem: str, theirs: nn.Module, build: Build, tmp_path: Path
) -> None:
    directory = write(tmp_path / "theirs", METHODS[name].folder, upstream_state(name, theirs))
    with pytest.raises(UserError, match=problem):
        build(name, *METHODS[name].keys, key, value).load_model(directory, 50)


@pytest.mark.parametrize(("name", "n_ctx"), [("ProGrad", 16), ("CoOp", 8)])
def test_words_with_punctuation_stand_where_upstream_puts_them(
    name: str, n_ctx: int, theirs: nn.Module, build: Build, tmp_path: Path
) -> None:
    """ProGrad's template of OxfordPets has 8 words and 9 tokens: the last "a" is no longer learned."""
    words = "a type of pet, a photo of a"
    init = "True" if name == "ProGrad" else words
    keys = ["DATASET.TEMPLATE", f"{words} {{}}.", "TRAINER.COOP.N_CTX", 16, "TRAINER.COOP.CTX_INIT", init]
    trainer = build(name, *keys)
    state = prompts(n_ctx, half=False, classes=2)
    trainer.load_model(write(tmp_path / "theirs", "prompt_learner", state), 50)
    batch = next(iter(trainer.test_loader))
    logits = text_prompt_logits(" ".join(["X"] * (n_ctx - 8) + [words]))
    assert_close(trainer.encoder.align(batch).logits, logits(theirs, state, batch["img"]), "logits")


# --- our files in upstream's hands -----------------------------------------------------------------------------


def module_of(state: State) -> nn.Module:
    """A module with these parameters."""
    root = nn.Module()
    for key, value in state.items():
        *path, leaf = key.split(".")
        module = root
        for name in path:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        module.register_parameter(leaf, nn.Parameter(value.clone()))
    return root


@pytest.mark.parametrize("name", METHODS)
def test_our_checkpoints_fill_upstreams_models(name: str, theirs: nn.Module, build: Build, tmp_path: Path) -> None:
    method, trainer = METHODS[name], build(name, *METHODS[name].keys)
    trainer.history.append({"epoch": 1})
    trainer.save_model(1)
    file = tmp_path / "built" / method.folder / "model.pth.tar-1"
    ours = torch.load(file, weights_only=True)["state_dict"]
    upstream = upstream_state(name, theirs, classes=len(NAMES))
    never_trained = ("image_encoder.", "text_encoder.", "logit_scale", "prompt_learner.ZS_")
    if name == "KgCoOp":
        never_trained += ("bias_vectors", "meta_net.")
    of_towers = {key for key in upstream if key.startswith(never_trained) and "VPT" not in key}
    assert ours.keys() - {"gpa"} == upstream.keys() - of_towers
    assert ("gpa" in ours) == (name == "PromptSRC")
    model = module_of(upstream)
    fixed = {key: ours.pop(key) for key in list(ours) if key.endswith(("token_prefix", "token_suffix"))}
    assert len(fixed) == (0 if name == "VPT" else 2)
    missing, unexpected = model.load_state_dict(ours, strict=False)  # raises where a shape differs
    assert set(missing) == of_towers | fixed.keys() and set(unexpected) == ours.keys() & {"gpa"}
    for key, parameter in trainer.learner.named_parameters():
        assert torch.equal(model.get_parameter(key), parameter.to(upstream[key].dtype)), key
