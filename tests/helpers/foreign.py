"""Trainers of the shapes of upstream's, over a stand-in of Dassl, and debiasers made for tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import tokenize
from oodprompt.methods.contracts import Alignment, Context, Contribution, Debiaser, Step

Make = Callable[..., Any]
CLASSES = ("circle", "diamond")


class Nothing(Debiaser):
    """Adds nothing."""

    model_name = "nothing"


class Weighing(Debiaser):
    """Adds a bit of everything, in closed form."""

    model_name = "weighing"
    predicts = True

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.context, self.calls = context, []
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("epochs", torch.zeros(()))

    @classmethod
    def learning_rate(cls, cfg: CfgNode) -> float:
        return 0.5

    def predict(self, alignment: Alignment) -> Tensor:
        return alignment.logits + self.bias

    def other_predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        return {"turned round": -alignment.logits}

    def check(self) -> None:
        self.calls.append("check")

    def before_train(self) -> None:
        self.calls.append("before_train")
        torch.rand(1), np.random.rand(1)  # what a debiaser draws must not move the base's random numbers

    def before_epoch(self, epoch: int) -> None:
        self.calls.append(f"before {epoch}")
        torch.rand(1), np.random.rand(1)

    def after_epoch(self, epoch: int) -> None:
        self.calls.append(f"after {epoch}")
        self.epochs += 1

    def before_step(self) -> None:
        self.calls.append("step")

    def contribute(self, step: Step) -> Contribution:
        weights = 1.0 + step.attribute
        return Contribution(0.5 * step.label, weights, 3 * self.bias.sum() + 7, {"index": step.index.sum().float()})


class TheirText(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection

    def forward(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        x = self.transformer((prompts + self.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


class TheirPrompts(nn.Module):
    def __init__(self, clip: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.tokens = tokenize([f"X X {name}." for name in names])
        embedding = clip.token_embedding(self.tokens).detach()
        self.ctx = nn.Parameter(0.2 * torch.randn(2, embedding.shape[-1]))
        self.pixels = nn.Parameter(torch.zeros(3, 1, 1))  # moves images, in the trainer that has it trained
        self.half_layer = nn.Linear(1, 1).half()
        self.register_buffer("token_prefix", embedding[:, :1], persistent=False)
        self.register_buffer("token_suffix", embedding[:, 3:], persistent=False)

    def forward(self, shift: Tensor | float = 0.0) -> Tensor:
        ctx = (self.ctx + shift).expand(len(self.tokens), -1, -1)
        return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)


class TheirModel(nn.Module):
    """``kind``: logits (CoOp), loss in training and a trained image tower (MaPLe), image (CoCoOp), pair (KgCoOp)."""

    def __init__(self, clip: nn.Module, names: list[str], kind: str) -> None:
        super().__init__()
        self.prompt_learner, self.kind = TheirPrompts(clip, names), kind
        self.image_encoder, self.text_encoder = clip.visual, TheirText(clip)
        self.logit_scale, self.dtype = clip.logit_scale, clip.visual.conv1.weight.dtype

    def forward(self, image: Tensor, label: Tensor | None = None) -> Any:
        learner, tokens, scale = self.prompt_learner, self.prompt_learner.tokens, self.logit_scale.exp()
        if self.kind == "loss":
            image = image + learner.pixels * learner.half_layer(torch.ones(1)).detach().clamp(1, 1)
        z = self.image_encoder(image)
        z = z / z.norm(dim=-1, keepdim=True)
        if self.kind == "image":
            rows = []
            for z_i in z:
                w = self.text_encoder(learner(5 * z_i[0]), tokens)
                rows.append(scale * z_i @ (w / w.norm(dim=-1, keepdim=True)).t())
            logits = torch.stack(rows)
        else:
            w = self.text_encoder(learner(), tokens)
            logits = scale * z @ (w / w.norm(dim=-1, keepdim=True)).t()
        if self.kind == "pair":
            return logits, w.square().mean()
        return F.cross_entropy(logits, label) if self.kind == "loss" and learner.training else logits


def their_trainers(TrainerX: type) -> dict[str, type]:
    """Trainer classes as upstream writes them, over the stand-in's ``TrainerX``."""
    clip_module = sys.modules["clip.clip"]

    class CoOp(TrainerX):
        kind = "logits"

        def build_model(self) -> None:
            import dassl.optim

            clip = clip_module.build_model({})
            self.model = TheirModel(clip, self.dm.dataset.classnames, self.kind)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("prompt_learner.ctx" in name or (self.kind == "loss" and "pixels" in name))
            trained = self.model if self.kind == "loss" else self.model.prompt_learner
            self.optim = dassl.optim.build_optimizer(trained, self.cfg.OPTIM)
            self.sched = dassl.optim.build_lr_scheduler(self.optim, self.cfg.OPTIM)
            self.register_model("prompt_learner", trained, self.optim, self.sched)

        def parse_batch_train(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return batch["img"].to(self.device), batch["label"].to(self.device)

        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), label)

        def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
            loss = self.loss(*self.parse_batch_train(batch))
            self.model_backward_and_update(loss)
            if self.batch_idx + 1 == self.num_batches:
                self.update_lr()
            return {"loss": loss.item()}

    class MaPLe(CoOp):
        kind = "loss"

        def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
            loss = self.model(*self.parse_batch_train(batch))
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
            if self.batch_idx + 1 == self.num_batches:
                self.sched.step()
            return {"loss": loss.item()}

    class CoCoOp(CoOp):
        kind = "image"

    class KgCoOp(CoOp):
        kind = "pair"

        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            logits, score = self.model(image)
            return nn.CrossEntropyLoss()(logits, label) + 8 * score

        def model_inference(self, input: Tensor) -> Tensor:
            return self.model(input)[0]

    return {cls.__name__: cls for cls in (CoOp, MaPLe, CoCoOp, KgCoOp)}


@torch.no_grad()
def predictions(trainer: Any) -> Tensor:
    """Logits of the first test images."""
    trainer.set_model_mode("eval")
    return trainer.model_inference(next(iter(trainer.test_loader))["img"])
