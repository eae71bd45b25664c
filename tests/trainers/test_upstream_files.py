"""Files of upstream's form: checkpoints of CoOp, CoCoOp, KgCoOp, ProGrad, MaPLe, VPT, IVLP and PromptSRC, and their yaml.

Each checkpoint is made here as those projects write it: Dassl's dict with a pickled scheduler, upstream's names, the
whole model where they save it whole, half precision where they train in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt import cli
from oodprompt.backbones import load_backbone, tokenize
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.config.keys import get_cfg_default, leaves, merge_file, merge_opts
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from tests.helpers.towers import assert_close, deep_prompts, gaussian, plain_image, plain_text

Build = Callable[..., PromptTrainer]
State = dict[str, Tensor]
NAMES = ["circle", "diamond"]
WIDTH = 128  # of both towers of the embedded CLIP, whose images have 4 blocks and whose text has 3
WORDS = "a photo of a"


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """OpenAI's CLIP with the weights of the embedded one."""
    clip = load_backbone("tiny", "")
    model = load_clip_file("model").CLIP(*astuple(clip.shape)).eval().requires_grad_(False)
    model.load_state_dict(clip.state_dict())
    return model


# --- checkpoints as upstream writes them -----------------------------------------------------------------------


def whole_model(theirs: nn.Module, half: bool) -> State:
    """The frozen part of upstream's CustomCLIP, in half precision as OpenAI's ``convert_weights`` leaves it."""
    state = {}
    for key, value in theirs.state_dict().items():
        if key.startswith("visual."):
            name = f"image_encoder.{key.removeprefix('visual.')}"
        elif key == "logit_scale":
            name = key
        elif not key.startswith("token_embedding."):
            name = f"text_encoder.{key}"
        else:
            continue
        converted = any(part in key for part in ("conv1", ".attn.", ".mlp.", "text_projection", "visual.proj"))
        state[name] = value.half() if half and converted else value.clone()
    return state


def noise(*shape: int, half: bool = False, std: float = 0.3) -> Tensor:
    """Far from what prompts start from, so that a value that is not loaded shows."""
    value = std * torch.randn(*shape)
    return value.half() if half else value


def prompts(n_ctx: int, half: bool, classes: int, prefix: str = "") -> State:
    """The context, and the frozen embeddings of other class names, or of as many, which none of ours should see."""
    return {
        f"{prefix}ctx": noise(n_ctx, WIDTH, half=half),
        f"{prefix}token_prefix": noise(classes, 1, WIDTH, half=half),
        f"{prefix}token_suffix": noise(classes, 76 - n_ctx, WIDTH, half=half),
    }


def block_prompts(tower: str, n_ctx: int, depth: int) -> State:
    return {f"{tower}.transformer.resblocks.{i}.VPT_shallow": noise(n_ctx, WIDTH) for i in range(1, depth)}


def coop_state(theirs: nn.Module, half: bool, classes: int) -> State:
    return prompts(16, half, classes)


def cocoop_state(theirs: nn.Module, half: bool, classes: int) -> State:
    shapes = {"linear1.weight": (8, 128), "linear1.bias": (8,), "linear2.weight": (128, 8), "linear2.bias": (128,)}
    return {
        **prompts(4, half, classes),
        **{f"meta_net.{name}": noise(*shape, half=half) for name, shape in shapes.items()},
    }


def kgcoop_state(theirs: nn.Module, half: bool, classes: int) -> State:
    extras = {"bias_vectors": (1, 512), "meta_net.linear1.weight": (512, 512), "meta_net.linear1.bias": (512,)}
    return {**prompts(4, half, classes), **{name: noise(*shape, half=half) for name, shape in extras.items()}}


def maple_state(theirs: nn.Module, half: bool, classes: int) -> State:
    own = prompts(2, half, classes, "prompt_learner.")
    own["prompt_learner.proj.weight"] = noise(WIDTH, WIDTH, half=True)  # half also where the rest is not
    own["prompt_learner.proj.bias"] = noise(WIDTH, half=True)
    for i in range(2):
        own[f"prompt_learner.compound_prompts_text.{i}"] = noise(2, WIDTH)
        own[f"prompt_learner.compound_prompt_projections.{i}.weight"] = noise(WIDTH, WIDTH)
        own[f"prompt_learner.compound_prompt_projections.{i}.bias"] = noise(WIDTH)
    return {**own, **whole_model(theirs, half)}


def vpt_state(theirs: nn.Module, half: bool, classes: int) -> State:
    """Upstream's VPT is in full precision whatever PREC says."""
    own = {"image_encoder.VPT": noise(3, WIDTH), **block_prompts("image_encoder", 3, 4)}
    return {**own, **whole_model(theirs, half=False)}


def ivlp_state(theirs: nn.Module, half: bool, classes: int) -> State:
    return {
        **prompts(4, half, classes, "prompt_learner."),
        "image_encoder.VPT": noise(2, WIDTH),
        **block_prompts("image_encoder", 2, 3),
        **block_prompts("text_encoder", 4, 2),
        **whole_model(theirs, half),
    }


def promptsrc_state(theirs: nn.Module, half: bool, classes: int) -> State:
    """With a second, frozen image tower, which is in half precision always."""
    frozen = {k: v for k, v in whole_model(theirs, half=True).items() if k.startswith("image_encoder.")}
    return {**ivlp_state(theirs, half, classes), **{f"prompt_learner.ZS_{key}": v for key, v in frozen.items()}}


class Method:
    """A method as upstream saves it: the state dict, the folder, the keys that fit it, and the plain logits."""

    def __init__(
        self, state: Callable[..., State], folder: str, keys: dict[str, Any], logits: Callable[..., Tensor]
    ) -> None:
        self.state, self.folder, self.logits = state, folder, logits
        self.keys = [text for key, value in keys.items() for text in (f"TRAINER.{key}", value)]


def normal(state: State) -> State:
    return {name: value.float() for name, value in state.items()}


def text_prompt_logits(words: str) -> Callable[..., Tensor]:
    def logits(theirs: nn.Module, p: State, images: Tensor) -> Tensor:
        w = torch.stack([plain_text(theirs, words, name, p["ctx"]) for name in NAMES])
        return theirs.logit_scale.exp() * plain_image(theirs, images) @ w.T

    return logits


def cocoop_logits(theirs: nn.Module, p: State, images: Tensor) -> Tensor:
    rows = []
    for z in plain_image(theirs, images):
        hidden = (p["meta_net.linear1.weight"] @ z + p["meta_net.linear1.bias"]).relu()
        ctx = p["ctx"] + p["meta_net.linear2.weight"] @ hidden + p["meta_net.linear2.bias"]
        rows.append(torch.stack([z @ plain_text(theirs, WORDS, name, ctx) for name in NAMES]))
    return theirs.logit_scale.exp() * torch.stack(rows)


def maple_logits(theirs: nn.Module, p: State, images: Tensor) -> Tensor:
    p = {name.removeprefix("prompt_learner."): value for name, value in p.items()}
    text = [p[f"compound_prompts_text.{i}"] for i in range(2)]
    w = torch.stack([plain_text(theirs, WORDS, name, p["ctx"], text) for name in NAMES])

    def project(x: Tensor, layer: str) -> Tensor:
        return F.linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"])

    image = [project(text[i], f"compound_prompt_projections.{i}") for i in range(2)]
    return theirs.logit_scale.exp() * plain_image(theirs, images, project(p["ctx"], "proj"), image) @ w.T


def vpt_logits(theirs: nn.Module, p: State, images: Tensor) -> Tensor:
    z = plain_image(theirs, images, p["image_encoder.VPT"], deep_prompts(p, "image_encoder"))
    w = F.normalize(theirs.encode_text(tokenize([f"{WORDS} {name}." for name in NAMES])), dim=-1)
    return theirs.logit_scale.exp() * z @ w.T


def ivlp_logits(theirs: nn.Module, p: State, images: Tensor) -> Tensor:
    ctx, text = p["prompt_learner.ctx"], deep_prompts(p, "text_encoder")
    w = torch.stack([plain_text(theirs, WORDS, name, ctx, text) for name in NAMES])
    z = plain_image(theirs, images, p["image_encoder.VPT"], deep_prompts(p, "image_encoder"))
    return theirs.logit_scale.exp() * z @ w.T


IVLP_KEYS = {"N_CTX_VISION": 2, "N_CTX_TEXT": 4, "PROMPT_DEPTH_VISION": 3, "PROMPT_DEPTH_TEXT": 2}
METHODS = {
    "CoOp": Method(
        coop_state, "prompt_learner", {"COOP.N_CTX": 16, "COOP.CTX_INIT": ""}, text_prompt_logits(" ".join("X" * 16))
    ),
    "CoCoOp": Method(cocoop_state, "prompt_learner", {"COCOOP.CTX_INIT": WORDS}, cocoop_logits),
    "KgCoOp": Method(kgcoop_state, "prompt_learner", {"COOP.CTX_INIT": "True"}, text_prompt_logits(WORDS)),
    "ProGrad": Method(
        coop_state,
        "prompt_learner",
        {"COOP.N_CTX": 16, "COOP.CTX_INIT": "True"},
        text_prompt_logits(" ".join([*"X" * 12, WORDS])),
    ),
    "MaPLe": Method(maple_state, "MultiModalPromptLearner", {"MAPLE.PROMPT_DEPTH": 3}, maple_logits),
    "VPT": Method(vpt_state, "prompt_learner", {"VPT.N_CTX_VISION": 3, "VPT.PROMPT_DEPTH_VISION": 12}, vpt_logits),
    "IVLP": Method(ivlp_state, "VLPromptLearner", {f"IVLP.{k}": v for k, v in IVLP_KEYS.items()}, ivlp_logits),
    "PromptSRC": Method(
        promptsrc_state, "VLPromptLearner", {f"PROMPTSRC.{k}": v for k, v in IVLP_KEYS.items()}, ivlp_logits
    ),
}
WHOLE = [name for name, method in METHODS.items() if method.state not in (coop_state, cocoop_state, kgcoop_state)]


def upstream_state(name: str, theirs: nn.Module, half: bool = True, classes: int = 5) -> State:
    torch.manual_seed(7)
    return METHODS[name].state(theirs, half, classes)


def write(directory: Path, folder: str, state: State, epoch: int = 50) -> Path:
    """A checkpoint as Dassl's ``save_checkpoint`` writes it after training with a warm-up."""
    weights = nn.Parameter(next(iter(state.values())).clone())
    optimizer = torch.optim.SGD([weights], 0.002, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50.0)
    weights.grad = torch.ones_like(weights)
    optimizer.step()
    scheduler = {
        "successor": cosine,  # the object itself, which holds the optimiser, which holds the weights
        "warmup_epoch": 1,
        "cons_lr": 1e-5,
        "base_lrs": [0.002],
        "last_epoch": 1,
        "_step_count": 2,
        "_get_lr_called_within_step": False,
        "_last_lr": [0.0],
        "verbose": False,
    }
    content = {"epoch": epoch, "optimizer": optimizer.state_dict(), "scheduler": scheduler, "val_result": None}
    (directory / folder).mkdir(parents=True)
    torch.save({"state_dict": state, **content}, directory / folder / f"model.pth.tar-{epoch}")
    (directory / folder / "checkpoint").write_text(f"model.pth.tar-{epoch}\n")
    return directory


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
    predict = PromptTrainer.predict

    def recorded(self: PromptTrainer, alignment: Any) -> Tensor:
        seen.append(predict(self, alignment))
        return seen[-1]

    monkeypatch.setattr(PromptTrainer, "predict", recorded)
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


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("key", ["image_encoder.conv1.weight", "text_encoder.ln_final.bias", "logit_scale"])
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


# --- yaml ------------------------------------------------------------------------------------------------------

# Backbone, batch size, epochs, learning rate, and what one method's file has behind the part that all have.
Sections = dict[str, dict[str, Any]]
FILES: dict[str, tuple[str, int, int, float, Sections]] = {
    "CoOp": ("RN50", 32, 50, 0.002, {}),
    "CoCoOp": ("ViT-B/16", 1, 10, 0.002, {"COCOOP": {"N_CTX": 4, "CTX_INIT": WORDS, "PREC": "fp16"}}),
    "CoCoOp, random": ("ViT-B/16", 1, 10, 0.002, {"COCOOP": {"N_CTX": 8, "CTX_INIT": "", "PREC": "fp16"}}),
    "MaPLe": (
        *("ViT-B/16", 4, 5, 0.0035),
        {"MAPLE": {"N_CTX": 2, "CTX_INIT": WORDS, "PREC": "fp16", "PROMPT_DEPTH": 9}},
    ),
    "VPT": (
        *("ViT-B/16", 4, 5, 0.0025),
        {"VPT": {"N_CTX_VISION": 8, "CTX_INIT": WORDS, "PREC": "fp16", "PROMPT_DEPTH_VISION": 12}},
    ),
    "IVLP": (
        *("ViT-B/16", 4, 5, 0.0035),
        {
            "IVLP": {
                **{"N_CTX_VISION": 2, "N_CTX_TEXT": 2, "CTX_INIT": WORDS, "PREC": "fp16"},
                **{"PROMPT_DEPTH_VISION": 12, "PROMPT_DEPTH_TEXT": 12},
            }
        },
    ),
    "KgCoOp": ("ViT-B/16", 128, 100, 0.002, {"COOP": {"CTX_INIT": True}}),
    "ProGrad": ("RN50", 32, 100, 0.002, {"LOSS": {"NAME": "prograd", "T": 1.0}, "COOP": {"CTX_INIT": True}}),
    "ProGrad, random": (
        *("RN50", 32, 100, 0.002),
        {"LOSS": {"GM": False, "T": 2, "LAMBDA": 1, "ALPHA": 0}, "COOP": {"CTX_INIT": False, "ALPHA": 1.0}},
    ),
    "PromptSRC": (
        *("ViT-B/16", 4, 20, 0.0025),
        {
            "PROMPTSRC": {
                **{"N_CTX_VISION": 4, "N_CTX_TEXT": 4, "CTX_INIT": WORDS, "PREC": "fp16"},
                **{"PROMPT_DEPTH_VISION": 9, "PROMPT_DEPTH_TEXT": 9},
                **{"TEXT_LOSS_WEIGHT": 25, "IMAGE_LOSS_WEIGHT": 10, "GPA_MEAN": 15, "GPA_STD": 1},
            }
        },
    ),
}


def yaml_text(backbone: str, batch: int, epochs: int, rate: float, sections: Sections) -> str:
    text = f"""# one of upstream's files
DATALOADER:
  TRAIN_X:
    BATCH_SIZE: {batch}
  TEST:
    BATCH_SIZE: 100
  NUM_WORKERS: 8

INPUT:
  SIZE: (224, 224)
  INTERPOLATION: "bicubic"
  PIXEL_MEAN: [0.48145466, 0.4578275, 0.40821073]
  PIXEL_STD: [0.26862954, 0.26130258, 0.27577711]
  TRANSFORMS: ["random_resized_crop", "random_flip", "normalize"]

OPTIM:
  NAME: "sgd"
  LR: {rate}
  MAX_EPOCH: {epochs}\x20
  LR_SCHEDULER: "cosine"
  WARMUP_EPOCH: 1
  WARMUP_TYPE: "constant"
  WARMUP_CONS_LR: 1e-5

TRAIN:
  PRINT_FREQ: 20

MODEL:
  BACKBONE:
    NAME: "{backbone}"
"""
    for section, values in sections.items():
        lines = [f'{key}: "{value}"' if isinstance(value, str) else f"{key}: {value}" for key, value in values.items()]
        head = [f"{section}:"] if section == "LOSS" else ["TRAINER:", f"  {section}:"]
        text += "\n".join(["", *head, *("  " * len(head) + line for line in lines), ""])
    return text.rstrip()  # upstream's files have no end of line


@pytest.mark.parametrize("name", FILES)
def test_upstreams_yaml_has_its_values(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(yaml_text(*FILES[name]))
    cfg, defaults = get_cfg_default(), leaves(get_cfg_default())
    merge_file(cfg, tmp_path / "file.yaml")
    backbone, batch, epochs, rate, sections = FILES[name]
    expected = {
        **{"MODEL.BACKBONE.NAME": backbone, "DATALOADER.TRAIN_X.BATCH_SIZE": batch, "OPTIM.MAX_EPOCH": epochs},
        **{"OPTIM.LR": rate, "OPTIM.NAME": "sgd", "OPTIM.WARMUP_EPOCH": 1, "OPTIM.WARMUP_CONS_LR": 1e-5},
        **{"INPUT.SIZE": (224, 224), "INPUT.PIXEL_MEAN": [0.48145466, 0.4578275, 0.40821073]},
        **{"INPUT.TRANSFORMS": ("random_resized_crop", "random_flip", "normalize"), "TRAIN.PRINT_FREQ": 20},
        **{"INPUT.INTERPOLATION": "bicubic", "DATALOADER.NUM_WORKERS": 8, "DATALOADER.TEST.BATCH_SIZE": 100},
    }
    for section, values in sections.items():
        for key, value in values.items():
            if key == "CTX_INIT":
                value = {True: "True", False: ""}.get(value, value)
            expected[f"{'' if section == 'LOSS' else 'TRAINER.'}{section}.{key}"] = value
    for key, value in leaves(cfg).items():
        assert type(value) is type(defaults[key]), key
        if key in expected:
            assert value == expected[key], key
        elif key not in ("INPUT.PIXEL_STD", "OPTIM.LR_SCHEDULER", "OPTIM.WARMUP_TYPE"):
            assert value == defaults[key], key
    assert expected.keys() <= leaves(cfg).keys()


def test_no_words_on_the_command_line() -> None:
    cfg = get_cfg_default()
    merge_opts(cfg, ["TRAINER.COOP.CTX_INIT", "False"])
    assert cfg.TRAINER.COOP.CTX_INIT == ""
