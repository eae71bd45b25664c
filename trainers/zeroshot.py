"""Zero-shot CLIP: hand-written prompts, nothing trained.

Source: Radford et al. 2021, section 3.1; upstream file CoOp/trainers/zsclip.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.contracts import Alignment, PromptLearner
from oodprompt.engine.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.prompts import class_text_features


class FixedPrompts(PromptLearner):
    """Text features of the data set's template (``DATASET.TEMPLATE``) with each class name, computed once."""

    not_loaded = ("text_features",)

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        prompts = [template.replace("{}", name) for name in self.classnames]
        print(f"Prompts: {prompts[:4]}{' ...' if len(prompts) > 4 else ''}")
        self.register_buffer("text_features", class_text_features(clip, self.classnames, [template]))

    def forward(self, image_features: Tensor) -> Alignment:
        return Alignment(image_features, self.text_features, self.clip.logit_scale.exp())


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """CLIP with hand-written prompts; as TRAINER.BASE, frozen prompts under a debiaser's own parameters."""

    learner_class = FixedPrompts
