"""Contexts of debiasers that lack something."""

from __future__ import annotations

from dataclasses import replace

from oodprompt.engine import PromptTrainer
from oodprompt.methods.attributes import PseudoAttributes
from oodprompt.methods.contracts import Context
from oodprompt.methods.groups import AttributeSources


def without_names(trainer: PromptTrainer) -> Context:
    """The context of ``trainer`` as if the data set named no attribute values."""
    context = trainer.context
    data, known = replace(context.data, attribute_names=()), context.attributes
    nameless = PseudoAttributes(context.clip, (), [])
    attributes = AttributeSources(
        known.choice, data, nameless, known.discovered, lambda: type(known.source)(trainer.cfg, changed)
    )
    changed = replace(context, data=data, attributes=attributes)
    return changed
