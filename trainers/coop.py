"""CoOp: context optimisation. The words around the class name become learned vectors.

    t_c = [SOS] [V]_1 ... [V]_M [CLASS_c] . [EOT]        p(y = c | x) = softmax_c( s <z(x), w_c> )

with z the L2-normalised image feature, w_c = l2norm(text_encoder(t_c)) and s = exp(logit_scale), all of CLIP frozen.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022; upstream file CoOp/trainers/coop.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.defaults import precision_key
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.methods.prompts import INIT_STD, NO_CONTEXT, ContextPrompts, context_of, words_or_flag

declare(
    "TRAINER.COOP",
    {
        "N_CTX": Key(16, "Number M of context vectors (without CTX_INIT).", at_least=1, error=NO_CONTEXT),
        "CSC": (False, "Class-specific contexts: M vectors for each class instead of M shared ones."),
        "CTX_INIT": Key(
            "",
            "Words to start from, e.g. 'a photo of a'; empty or False: random, N(0, 0.02^2); True, as in ProGrad's "
            "files: the template's words in the last of N_CTX vectors, zeros ahead of them.",
            parse=words_or_flag,
        ),
        "PREC": precision_key(),
        "CLASS_TOKEN_POSITION": Key(
            "end",
            "Where the class name stands.",
            choices=("end", "middle", "front"),
            error="{key}: unknown place {value!r}: {known}",
        ),
        "W": (1.0, "KgCoOp: weight of the distance to the hand-written prompts (lambda)."),
        "ALPHA": (1.0, "Kept for KgCoOp's and ProGrad's files, where nothing reads it."),
    },
)


class ContextLearner(PromptLearner):
    """Context vectors ``ctx`` [M, e] (or [C, M, e] with CSC) ahead of, around or behind the class names."""

    not_loaded = ("token_prefix", "token_suffix")
    sections = ("COOP",)
    ctx: nn.Parameter

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        keys = cfg.TRAINER.COOP
        words, context = self.start(cfg, template)
        if keys.CSC:
            count = len(self.classnames)
            known = bool(keys.CTX_INIT)
            context = context.repeat(count, 1, 1) if known else INIT_STD * torch.randn(count, *context.shape)
        self.prompts = ContextPrompts(self, clip, self.classnames, words, context, keys.CLASS_TOKEN_POSITION)
        logger.info(f'Initial context: "{words}", {context.shape[-2]} tokens{", one per class" if keys.CSC else ""}')

    def start(self, cfg: CfgNode, template: str) -> tuple[str, Tensor]:
        """The text ahead of the class name and the initial context vectors [M, e]."""
        return context_of(self.clip, cfg.TRAINER.COOP, "TRAINER.COOP", template)

    def forward(self, image_features: Tensor) -> Alignment:
        return Alignment(image_features, self.prompts.text_features(), self.clip.logit_scale.exp())

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER.COOP.PREC


@TRAINER_REGISTRY.register()
class CoOp(PromptTrainer):
    """Context optimisation: learned context vectors on the text side (Zhou et al. 2022)."""

    learner_class = ContextLearner
