"""IVLP: independent vision-language prompts. Deep prompts in both towers that know nothing of each other.

    text:   tokens 1..M_t of the prompt are P_0; ahead of block i they are replaced by P_i,  i = 1 ... J_t - 1
    image:  M_v tokens V_0 stand beside the patches; ahead of block i they are replaced by V_i,  i = 1 ... J_v - 1

Source: the ablation of Khattak et al., "MaPLe", CVPR 2023; upstream file
multimodal-prompt-learning/trainers/independentVL.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.defaults import precision_key
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.contracts import TOWERS, Alignment, PromptLearner
from oodprompt.methods.prompts import (
    NO_CONTEXT,
    ContextPrompts,
    TowerPrompts,
    depth_within,
    given_words,
    initial_context,
    visual_prompts,
    words_or_flag,
)

ONLY_VISUAL = "{key}: {value} is less than 1; for visual prompts alone take --trainer VPT"

declare(
    "TRAINER.IVLP",
    {
        "N_CTX_VISION": Key(2, "Number M_v of visual prompts per depth.", at_least=0),
        "N_CTX_TEXT": Key(2, "Number M_t of text prompts per depth.", at_least=1, error=NO_CONTEXT),
        "CTX_INIT": Key(
            "a photo of a",
            "Words to start from where N_CTX_TEXT is 4 or less; else, or empty: random.",
            parse=words_or_flag,
        ),
        "PREC": precision_key(),
        "PROMPT_DEPTH_VISION": Key(9, "Blocks J_v of the image tower whose prompts are learned; 0: none.", at_least=0),
        "PROMPT_DEPTH_TEXT": Key(
            9, "Blocks J_t of the text tower whose prompts are learned.", at_least=1, error=ONLY_VISUAL
        ),
    },
)


class VLPromptLearner(PromptLearner):
    """``prompt_learner.ctx`` is P_0; the other prompts are in ``text_encoder`` and ``image_encoder``."""

    model_name = "VLPromptLearner"
    name = "IVLP"
    not_loaded: tuple[str, ...] = ("prompt_learner.token_prefix", "prompt_learner.token_suffix")
    foreign = TOWERS

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        name, section = self.name, self.name.upper()
        keys = cfg.TRAINER[section]
        words = given_words(keys, f"TRAINER.{section}") if keys.N_CTX_TEXT <= 4 else ""
        words, context = initial_context(clip, f"TRAINER.{section}.N_CTX_TEXT", keys.N_CTX_TEXT, words)
        self.prompt_learner = nn.Module()
        self.prompts = ContextPrompts(self.prompt_learner, clip, self.classnames, words, context)
        if keys.PROMPT_DEPTH_TEXT > 1 and not clip.takes_deep_text_prompts:
            raise UserError(
                f"{name} puts prompts into the blocks of the text tower, and that of this backbone takes none: set "
                f"TRAINER.{name.upper()}.PROMPT_DEPTH_TEXT 1, or choose a text prompt learner (CoOp, CoCoOp, KgCoOp, ProGrad)"
            )
        depth = depth_within(keys.PROMPT_DEPTH_TEXT, clip.shape.text_layers, f"{name}, text tower")
        self.text_encoder = TowerPrompts(keys.N_CTX_TEXT, clip.shape.text_width, depth, enters=False)
        self.image_encoder = visual_prompts(clip, name, keys.N_CTX_VISION, keys.PROMPT_DEPTH_VISION)
        self.trains_image_tower = keys.PROMPT_DEPTH_VISION > 0
        logger.info(
            f'Initial context: "{words}", {keys.N_CTX_TEXT} tokens in {depth} blocks; {keys.N_CTX_VISION} visual '
            f"prompts in {self.image_encoder.depth} blocks"
        )

    @property
    def encodes_as_clip(self) -> bool:
        return not self.trains_image_tower

    def visual_prompts(self) -> tuple[Any, ...]:
        return (self.image_encoder.VPT, self.image_encoder.deep()) if self.trains_image_tower else ()

    def forward(self, image_features: Tensor) -> Alignment:
        text_features = self.prompts.text_features(deep=self.text_encoder.deep())
        return Alignment(image_features, text_features, self.clip.logit_scale.exp())

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER[cls.name.upper()].PREC


@TRAINER_REGISTRY.register()
class IVLP(PromptTrainer):
    """Independent deep prompts in both towers (Khattak et al. 2023)."""

    learner_class = VLPromptLearner
