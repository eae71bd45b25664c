"""A golden run of the plugin: CoOpOOD over a CoOp written as upstream writes it, inside Dassl's stand-in of the tests.

PYTHONPATH=CHECKOUT:CHECKOUT/tests/stand_in python golden_plugin.py OUTPUT_DIR DATA
"""

from __future__ import annotations

import json
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oodprompt.plugin  # noqa: F401  registers our trainers with Dassl; before Dassl's own modules

from dassl.config import get_cfg_default  # isort: skip
from dassl.engine import TRAINER_REGISTRY, TrainerX, build_trainer  # isort: skip
from dassl.optim import build_lr_scheduler, build_optimizer  # isort: skip
from oodprompt.backbones import load_backbone, tokenize
from oodprompt.backbones.tokenizer import load_clip_file


class TextEncoder(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection

    def forward(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        x = self.transformer((prompts + self.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


class PromptLearner(nn.Module):
    def __init__(self, clip: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.tokens = tokenize([f"X X {name}." for name in names])
        embedding = clip.token_embedding(self.tokens).detach()
        self.ctx = nn.Parameter(0.2 * torch.randn(2, embedding.shape[-1]))
        self.register_buffer("token_prefix", embedding[:, :1])
        self.register_buffer("token_suffix", embedding[:, 3:])

    def forward(self) -> Tensor:
        return torch.cat([self.token_prefix, self.ctx.expand(len(self.tokens), -1, -1), self.token_suffix], dim=1)


class CustomCLIP(nn.Module):
    def __init__(self, clip: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.prompt_learner = PromptLearner(clip, names)
        self.image_encoder, self.text_encoder = clip.visual, TextEncoder(clip)
        self.logit_scale, self.dtype = clip.logit_scale, clip.visual.conv1.weight.dtype

    def forward(self, image: Tensor) -> Tensor:
        z = self.image_encoder(image)
        w = self.text_encoder(self.prompt_learner(), self.prompt_learner.tokens)
        z, w = (x / x.norm(dim=-1, keepdim=True) for x in (z, w))
        return self.logit_scale.exp() * z @ w.t()


@TRAINER_REGISTRY.register()
class CoOp(TrainerX):
    def build_model(self) -> None:
        tiny = load_backbone("tiny")
        clip = load_clip_file("model").CLIP(*astuple(tiny.shape)[:10]).eval().requires_grad_(False)
        clip.load_state_dict({key: value.half().float() for key, value in tiny.state_dict().items()})  # as upstream's
        self.model = CustomCLIP(clip, self.dm.dataset.classnames)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("prompt_learner" in name)
        self.optim = build_optimizer(self.model.prompt_learner, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)

    def parse_batch_train(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        image, label = self.parse_batch_train(batch)
        loss = F.cross_entropy(self.model(image), label)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item()}


def run(out: Path, data: str) -> None:
    cfg = get_cfg_default()
    cfg.merge_from_list(["TRAINER.NAME", "CoOpOOD", "TRAINER.BASE", "CoOp", "SEED", 1, "DATASET.ROOT", data])
    cfg.merge_from_list(["DATASET.NAME", "OODShapesOnScenes", "DATASET.SHAPES.NUM_TRAIN", 160])
    cfg.merge_from_list(["DATASET.SHAPES.NUM_VAL", 40, "DATASET.SHAPES.NUM_TEST", 80, "INPUT.SIZE", (48, 48)])
    cfg.merge_from_list(["INPUT.TRANSFORMS", ("normalize",), "DATALOADER.TRAIN_X.BATCH_SIZE", 16, "OPTIM.LR", 0.01])
    cfg.merge_from_list(["OPTIM.MAX_EPOCH", 4, "OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_CONS_LR", 1e-3])
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "tiny", "OUTPUT_DIR", str(out)])
    cfg.freeze()
    torch.manual_seed(cfg.SEED)
    trainer = build_trainer(cfg)
    trainer.train()
    # Dassl's stand-in keeps the summaries of all steps; they are this run's results beside its checkpoints.
    (out / "results.json").write_text(json.dumps({"steps": trainer.history, "accuracy": float(trainer.test())}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
