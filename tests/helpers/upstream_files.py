"""Checkpoints as upstream writes them, and the logits that their tensors give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.backbones import tokenize
from tests.helpers.towers import deep_prompts, plain_image, plain_text

State = dict[str, Tensor]
NAMES = ["circle", "diamond"]
WIDTH = 128  # of both towers of the embedded CLIP, whose images have 4 blocks and whose text has 3
WORDS = "a photo of a"


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
