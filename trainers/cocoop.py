"""CoCoOp: conditional context optimisation. A small network shifts the context vectors by what it sees in the image.

    t_c(x) = [SOS] [V]_1 + pi(x) ... [V]_M + pi(x) [CLASS_c] . [EOT]      pi(x) = W_2 relu(W_1 z(x))

with z the L2-normalised image feature; prompts and text features w_c(x) depend on the image, [B, C, d].

Source: Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022; upstream file
CoOp/trainers/cocoop.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.defaults import precision_key
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.methods.prompts import NO_CONTEXT, ContextPrompts, context_of, words_or_flag

declare(
    "TRAINER.COCOOP",
    {
        "N_CTX": Key(16, "Number M of context vectors (without CTX_INIT).", at_least=1, error=NO_CONTEXT),
        "CTX_INIT": Key(
            "",
            "Words to start from, e.g. 'a photo of a'; empty or False: random, N(0, 0.02^2); True, as in ProGrad's "
            "files: the template's words in the last of N_CTX vectors, zeros ahead of them.",
            parse=words_or_flag,
        ),
        "PREC": precision_key(),
    },
)


class ConditionalContextLearner(PromptLearner):
    """Context vectors ``ctx`` [M, e] and the network ``meta_net`` (pi, d -> d / 16 -> e)."""

    not_loaded = ("token_prefix", "token_suffix")
    ctx: nn.Parameter

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        keys, width = cfg.TRAINER.COCOOP, clip.shape.embed_dim
        words, context = context_of(clip, keys, "TRAINER.COCOOP", template)
        self.prompts = ContextPrompts(self, clip, self.classnames, words, context)
        self.meta_net = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(width, width // 16),
                relu=nn.ReLU(),
                linear2=nn.Linear(width // 16, clip.shape.text_width),
            )
        )
        logger.info(f'Initial context: "{words}", {len(context)} tokens, shifted by the image')

    def forward(self, image_features: Tensor) -> Alignment:
        context = self.ctx + self.meta_net(image_features).unsqueeze(1)  # [B, M, e]
        return Alignment(image_features, self.prompts.text_features(context), self.clip.logit_scale.exp())

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER.COCOOP.PREC


@TRAINER_REGISTRY.register()
class CoCoOp(PromptTrainer):
    """Conditional context optimisation: context vectors shifted by each image (Zhou et al. 2022)."""

    learner_class = ConditionalContextLearner
