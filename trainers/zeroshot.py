"""Zero-shot CLIP: hand-written prompts, nothing trained.

    w_c = l2norm(text_encoder(template with the name of class c))           p(y = c | x) = softmax_c( s <z(x), w_c> )

Of several templates, each one's features are normalised before they are averaged: w_c = l2norm(mean over templates of
l2norm(text_encoder(template with the name))).

Source: Radford et al. 2021, section 3.1; upstream file CoOp/trainers/zsclip.py (ZeroshotCLIP, ZeroshotCLIP2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.keys import declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.methods.prompts import class_text_features
from oodprompt.methods.templates import IMAGENET_SELECT, expand_templates

declare(
    "TRAINER.ZEROSHOT",
    {
        "TEMPLATES": (
            (),
            "Templates with {} for the class name, whose text features are averaged; 'imagenet_select' (7) and "
            "'imagenet_60' name sets of them. Empty: the data set's own (DATASET.TEMPLATE); for ZeroshotCLIP2 "
            "imagenet_select and the data set's own.",
        ),
    },
)


class FixedPrompts(PromptLearner):
    """Text features ``text_features`` [C, d] of each class name in the templates, computed once.

    Raises ``UserError`` for a template without {}.
    """

    not_loaded = ("text_features",)
    sections = ("ZEROSHOT",)
    text_features: Tensor

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        templates = expand_templates(cfg.TRAINER.ZEROSHOT.TEMPLATES, "TRAINER.ZEROSHOT.TEMPLATES")
        templates = templates or self.default_templates(cfg, template)
        prompts = [templates[0].replace("{}", name) for name in self.classnames]
        more = f", and {len(templates) - 1} more templates" if len(templates) > 1 else ""
        logger.info(f"Prompts: {prompts[:4]}{' ...' if len(prompts) > 4 else ''}{more}")
        features = torch.stack([class_text_features(clip, self.classnames, [template]) for template in templates])
        ensemble = F.normalize(features.mean(dim=0), dim=-1) if len(templates) > 1 else features[0]
        self.register_buffer("text_features", ensemble)

    def default_templates(self, cfg: CfgNode, template: str) -> list[str]:
        """What stands for an empty TRAINER.ZEROSHOT.TEMPLATES."""
        return [template]

    def forward(self, image_features: Tensor) -> Alignment:
        return Alignment(image_features, self.text_features, self.clip.logit_scale.exp())


class EnsembledPrompts(FixedPrompts):
    """The seven templates of upstream's ZeroshotCLIP2, and but for ImageNet the data set's own."""

    def default_templates(self, cfg: CfgNode, template: str) -> list[str]:
        return [*IMAGENET_SELECT, *([template] if cfg.DATASET.NAME != "ImageNet" else [])]


@TRAINER_REGISTRY.register()
class ZeroshotCLIP(PromptTrainer):
    """CLIP with hand-written prompts; as TRAINER.BASE, frozen prompts under a debiaser's own parameters."""

    learner_class = FixedPrompts


@TRAINER_REGISTRY.register()
class ZeroshotCLIP2(PromptTrainer):
    """CLIP with the mean of several hand-written prompts (Radford et al. 2021)."""

    learner_class = EnsembledPrompts
