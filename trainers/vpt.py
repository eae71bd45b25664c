"""VPT: visual prompt tuning. M learned tokens stand beside the patches; the text side is hand-written.

    image:  V_0 enters beside the patches; ahead of block i it is replaced by V_i,  i = 1 ... J - 1
    text:   w_c = l2norm(text_encoder("CTX_INIT [CLASS_c]."))

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, on CLIP; upstream file
multimodal-prompt-learning/trainers/vpt.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.defaults import precision_key
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import TOWERS, Alignment, PromptLearner
from oodprompt.methods.prompts import class_text_features, given_words, visual_prompts, words_or_flag

declare(
    "TRAINER.VPT",
    {
        "N_CTX_VISION": Key(2, "Number M of visual prompts per depth.", at_least=1),
        "CTX_INIT": Key("a photo of a", "Words ahead of the class name, which stay as they are.", parse=words_or_flag),
        "PREC": precision_key(),
        "PROMPT_DEPTH_VISION": Key(
            1,
            "Blocks J of the image tower whose prompts are learned; 1: shallow.",
            at_least=1,
            error="{key}: {value} leaves nothing to train",
        ),
    },
)


class VisualPromptLearner(PromptLearner):
    """``image_encoder`` holds V_0 (``VPT``) and V_1 ... (``transformer.resblocks.<i>.VPT_shallow``)."""

    foreign = TOWERS
    trains_image_tower = True
    text: Tensor  # text features [C, d]

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        keys = cfg.TRAINER.VPT
        self.image_encoder = visual_prompts(clip, "VPT", keys.N_CTX_VISION, keys.PROMPT_DEPTH_VISION)
        words = f"{given_words(keys, 'TRAINER.VPT')} {{}}.".strip()
        self.register_buffer("text", class_text_features(clip, self.classnames, [words]), persistent=False)
        logger.info(f'Fixed prompts "{words}", {keys.N_CTX_VISION} visual prompts in {self.image_encoder.depth} blocks')

    def visual_prompts(self) -> tuple[Any, ...]:
        return self.image_encoder.VPT, self.image_encoder.deep()

    def forward(self, image_features: Tensor) -> Alignment:
        return Alignment(image_features, self.text, self.clip.logit_scale.exp())

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER.VPT.PREC


@TRAINER_REGISTRY.register()
class VPT(PromptTrainer):
    """Visual prompt tuning: learned tokens in the image tower, hand-written text (Jia et al. 2022)."""

    learner_class = VisualPromptLearner
