"""LinearProbe: one vector per class on CLIP's frozen image features.

    p(y = c | x) = softmax_c( s <z(x), v_c> )

with z the L2-normalised image feature, s = exp(logit_scale) of CLIP and v_c learned, of any length, without a bias.

Source: Radford et al. 2021, section 3.2 (linear probe); starting from text features: Wortsman et al., "Robust
fine-tuning of zero-shot models", CVPR 2022.
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
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.methods.prompts import class_text_features

declare(
    "TRAINER.LINEARPROBE",
    {
        "INIT": Key(
            "zero",
            "The class vectors start as zero, or as the text features of the template (text).",
            choices=("zero", "text"),
        ),
        "PREC": precision_key(),
    },
)


class ClassVectors(PromptLearner):
    """The vectors ``weight`` [C, d], which stand in the place of text features."""

    model_name = "linear_probe"

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        if cfg.TRAINER.LINEARPROBE.INIT == "text":
            start = class_text_features(clip, self.classnames, [template])
        else:
            start = torch.zeros(len(self.classnames), clip.shape.embed_dim)
        self.weight = nn.Parameter(start)

    def forward(self, image_features: Tensor) -> Alignment:
        return Alignment(image_features, self.weight, self.clip.logit_scale.exp())

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER.LINEARPROBE.PREC


@TRAINER_REGISTRY.register()
class LinearProbe(PromptTrainer):
    """One learned vector per class on frozen image features (Radford et al. 2021)."""

    learner_class = ClassVectors
