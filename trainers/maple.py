"""MaPLe: multi-modal prompts. Deep prompts in both towers, those of the image projected from those of the text.

    text:   tokens 1..M of the prompt are P_0; ahead of block i they are replaced by P_i,  i = 1 ... J - 1
    image:  M tokens F_0(P_0) stand beside the patches; ahead of block i they are replaced by F_i(P_i)

with one linear layer F_i per depth, J = PROMPT_DEPTH. P_0 (``ctx``) starts from the first M tokens of CTX_INIT.

Source: Khattak et al., "MaPLe: Multi-modal Prompt Learning", CVPR 2023; upstream file
multimodal-prompt-learning/trainers/maple.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.defaults import precision_key
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import TOWERS, Alignment, PromptLearner
from oodprompt.methods.prompts import (
    INIT_STD,
    NO_CONTEXT,
    ContextPrompts,
    depth_within,
    given_words,
    initial_context,
    need_vit,
    words_or_flag,
)

declare(
    "TRAINER.MAPLE",
    {
        "N_CTX": Key(2, "Number M of prompts per depth.", at_least=1, error=NO_CONTEXT),
        "CTX_INIT": Key(
            "a photo of a",
            "Words to start from where N_CTX is 4 or less; else, or empty: N(0, 0.02^2).",
            parse=words_or_flag,
        ),
        "PREC": precision_key(),
        "PROMPT_DEPTH": Key(
            9,
            "Blocks J whose prompts are learned; 1: shallow.",
            at_least=1,
            error="{key}: {value} is less than 1, the shallow prompts",
        ),
    },
)


class MultiModalPromptLearner(PromptLearner):
    """``prompt_learner`` holds P_0 (``ctx``), P_1 ... (``compound_prompts_text``) and F_0 (``proj``), F_1 ...."""

    model_name = "MultiModalPromptLearner"
    not_loaded = ("prompt_learner.token_prefix", "prompt_learner.token_suffix")
    foreign = TOWERS
    trains_image_tower = True

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        keys, e, width = cfg.TRAINER.MAPLE, clip.shape.text_width, clip.shape.vision_width
        need_vit(clip, "MaPLe")
        text_layers, vision_layers = clip.shape.text_layers, clip.shape.vision_layers
        assert isinstance(vision_layers, int), "a ViT has one number of them"
        depth = depth_within(keys.PROMPT_DEPTH, max(text_layers, vision_layers), "MaPLe")
        words = given_words(keys, "TRAINER.MAPLE") if keys.N_CTX <= 4 else ""
        words, context = initial_context(clip, "TRAINER.MAPLE.N_CTX", keys.N_CTX, words)
        self.prompt_learner = nn.Module()
        self.prompts = ContextPrompts(self.prompt_learner, clip, self.classnames, words, context)
        self.prompt_learner.proj = nn.Linear(e, width)
        self.prompt_learner.compound_prompts_text = nn.ParameterList(
            nn.Parameter(INIT_STD * torch.randn(keys.N_CTX, e)) for _ in range(depth - 1)
        )
        layer = nn.Linear(e, width)  # all deep projections start from the same values
        self.prompt_learner.compound_prompt_projections = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth - 1))
        text, image = (min(depth, layers) for layers in (text_layers, vision_layers))
        logger.info(f'Initial context: "{words}", {keys.N_CTX} tokens; prompts in {text} text and {image} image blocks')

    def visual_prompts(self) -> tuple[Any, ...]:
        own: Any = self.prompt_learner
        layers = zip(own.compound_prompt_projections, own.compound_prompts_text, strict=True)
        return own.proj(own.ctx), [layer(prompts) for layer, prompts in layers]

    def forward(self, image_features: Tensor) -> Alignment:
        own: Any = self.prompt_learner
        text_features = self.prompts.text_features(deep=list(own.compound_prompts_text))
        return Alignment(image_features, text_features, self.clip.logit_scale.exp())

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER.MAPLE.PREC


@TRAINER_REGISTRY.register()
class MaPLe(PromptTrainer):
    """Multi-modal prompts: deep prompts in both towers, coupled by linear layers (Khattak et al. 2023)."""

    learner_class = MultiModalPromptLearner
