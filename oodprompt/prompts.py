"""Learned and hand-written prompts, for methods of others (``oodprompt.methods.prompts``)."""

from oodprompt.methods.prompts import (
    ContextPrompts,
    TowerPrompts,
    class_text_features,
    context_of,
    depth_within,
    given_words,
    initial_context,
    need_vit,
    padded_context,
    visual_prompts,
    words_of_template,
)

__all__ = [
    "ContextPrompts",
    "TowerPrompts",
    "class_text_features",
    "context_of",
    "depth_within",
    "given_words",
    "initial_context",
    "need_vit",
    "padded_context",
    "visual_prompts",
    "words_of_template",
]
