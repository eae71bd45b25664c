"""FineTune: CLIP's image tower trained whole, on captions or labels; the text tower stays frozen.

    L = c L_CL + (1 - c) CE(<z(x), w> / tau, y)
    L_CL = (CE over captions of each image + CE over images of each caption) / 2 at temperature tau, in the batch

z is the L2-normalised feature of the trained tower, w_c the text feature of class c (of several templates, normalised
and averaged), c is CAPTIONS. An image without a caption takes the data set's template with its class name. RaVL's
"standard fine-tuning" is c = 1, its baseline VL-ERM c = 0.8 with balanced draws (over it: the debiaser RWG), VL-GDRO the
same under GroupDRO.

Source: Radford et al. 2021, section 2.3 (L_CL); Varma et al., "RaVL", NeurIPS 2024, section 4 (settings, baselines).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from oodprompt.trainers.zeroshot import FixedPrompts
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.defaults import precision_key
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.contracts import Alignment

declare(
    "TRAINER.FINETUNE",
    {
        "CAPTIONS": Key(
            1.0,
            "c, the weight of the contrastive loss on captions; the rest is cross-entropy on class prompts.",
            at_least=0,
            at_most=1,
            error="{key} is a share from 0 to 1, not {value}",
        ),
        "TEMPERATURE": Key(0.07, "tau, fixed.", above=0),
        "PREC": precision_key("fp32"),
    },
)


class ImageTower(FixedPrompts):
    """The trained image tower ``tower``, a copy of CLIP's; text features of TRAINER.ZEROSHOT.TEMPLATES, computed once.

    Statistics of a ResNet's batch normalisation stay those of CLIP, as its weights were released for evaluation.
    """

    model_name = "image_tower"
    trains_image_tower = True
    scale: Tensor
    _image_clip: CLIP

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        keys = cfg.TRAINER.FINETUNE
        self.captions, self.ce_weight = keys.CAPTIONS, 1 - keys.CAPTIONS
        self.needs_captions = keys.CAPTIONS > 0
        self.tower = copy.deepcopy(clip.visual).requires_grad_(True)
        own = copy.copy(clip)
        own._modules = {**clip._modules, "visual": self.tower}
        self.__dict__["_image_clip"] = own
        self.register_buffer("scale", torch.tensor(1 / keys.TEMPERATURE), persistent=False)

    @property
    def image_clip(self) -> CLIP:
        return self._image_clip

    def train(self, mode: bool = True) -> ImageTower:
        super().train(mode)
        for module in self.tower.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, image_features: Tensor) -> Alignment:
        return Alignment(image_features, self.text_features, self.scale)

    def penalty(self, alignment: Alignment) -> Tensor | None:
        if alignment.caption_features is None:
            return None
        return self.captions * contrastive_loss(alignment.image_features, alignment.caption_features, self.scale)

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER.FINETUNE.PREC


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss of pairs: normalised image and text features, both [B, d] -> scalar."""
    logits = scale * image @ text.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@TRAINER_REGISTRY.register()
class FineTune(PromptTrainer):
    """The image tower fine-tuned whole on captions or labels, text tower frozen (Radford et al. 2021)."""

    learner_class = ImageTower
