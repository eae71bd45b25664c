"""ProGrad: prompt-aligned gradient. CoOp whose steps never go against what zero-shot CLIP knows.

With g the gradient of the objective and h that of KL(zero-shot prediction || prediction), both by the context vectors,

    g <- g - LAMBDA <g, h> h / |h|^2   where <g, h> < 0          KL(p_zs || p) = -T^2 sum_c p_zs log p + const

at temperature T. The objective is the engine's, so that a debiaser's losses are guided too.

Source: Zhu et al., "Prompt-aligned Gradient for Prompt Tuning", ICCV 2023; upstream files
Prompt-align/ProGrad.public/trainers/prograd.py and dassl/engine/trainer.py. Keys are CoOp's and LOSS.*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from oodprompt.trainers.coop import ContextLearner
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.contracts import Alignment
from oodprompt.methods.prompts import class_text_features, padded_context, words_of_template

declare(
    "LOSS",
    {
        "NAME": ("", "Kept for ProGrad's files, which say prograd."),
        "T": Key(
            1.0,
            "ProGrad: temperature of the distillation from zero-shot CLIP.",
            above=0,
            error="{key}: {value} is no temperature; give a number above 0",
        ),
        "LAMBDA": (1.0, "ProGrad: share of the conflicting part of the gradient that is taken away."),
        "GM": (False, "Kept for ProGrad's files."),
        "ALPHA": (0.0, "Kept for ProGrad's files."),
    },
)


class PromptAlignedLearner(ContextLearner):
    """Context vectors and the fixed text features ``hand_written`` [C, d] of the template."""

    hand_written: Tensor

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        self.temperature, self.share = cfg.LOSS.T, cfg.LOSS.LAMBDA
        self.register_buffer("hand_written", class_text_features(clip, self.classnames, [template]), persistent=False)

    def start(self, cfg: CfgNode, template: str) -> tuple[str, Tensor]:
        """CTX_INIT's words (True: the template's) are the last of N_CTX vectors; those ahead of them are zero."""
        keys = cfg.TRAINER.COOP
        words = words_of_template(template) if keys.CTX_INIT == "True" else keys.CTX_INIT.replace("_", " ").strip()
        if not words:
            return super().start(cfg, template)
        return padded_context(self.clip, "TRAINER.COOP.N_CTX", keys.N_CTX, words)

    def guide(self, alignment: Alignment) -> Tensor:
        """T^2 times the cross-entropy from zero-shot CLIP's prediction to the learned one, mean over the batch."""
        T = self.temperature
        zero_shot = alignment.logit_scale * alignment.image_features @ self.hand_written.T
        teacher = (zero_shot / T).softmax(dim=-1).detach()
        return -(T**2) * (teacher * (alignment.logits / T).log_softmax(dim=-1)).sum(dim=-1).mean()

    def backward(self, loss: Tensor, alignment: Alignment, scale: Callable[[Tensor], Tensor]) -> None:
        (h,) = torch.autograd.grad(scale(self.guide(alignment)), self.ctx, retain_graph=True)
        super().backward(loss, alignment, scale)
        g, size = self.ctx.grad, torch.linalg.norm(h)
        assert g is not None, "the loss reaches the context vectors"
        direction = h / size.clamp(min=torch.finfo(h.dtype).tiny)
        conflict = (g * direction).sum().clamp(max=0)
        # Where the prediction is zero-shot CLIP's own, h is rounding noise and its direction says nothing.
        conflict = torch.where(size > 1e-5 * torch.linalg.norm(g), conflict, 0)
        g -= self.share * conflict * direction


@TRAINER_REGISTRY.register()
class ProGrad(PromptTrainer):
    """CoOp with gradients that never oppose zero-shot CLIP's (Zhu et al. 2023)."""

    learner_class = PromptAlignedLearner
