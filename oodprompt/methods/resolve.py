"""From the names in TRAINER.NAME, BASE and STACK to the classes of a prompt learner and its debiasers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from yacs.config import CfgNode

from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.errors import UserError, nearest

if TYPE_CHECKING:  # names resolve without PyTorch, which the contracts take
    from oodprompt.methods.contracts import Debiaser, PromptLearner


def resolve_methods(cfg: CfgNode) -> tuple[str, type[PromptLearner], list[type[Debiaser]]]:
    """From TRAINER.NAME, BASE and STACK: the base's name, its learner, and the debiasers in order."""
    main = TRAINER_REGISTRY.get(cfg.TRAINER.NAME, "--trainer")
    bases = [name for name, trainer in TRAINER_REGISTRY.items() if trainer.learner_class]
    others = [name for name, trainer in TRAINER_REGISTRY.items() if trainer.debiaser_class]
    debiasers = [main.debiaser_class] if main.debiaser_class else []
    base_name = base_of(cfg)
    if base_name in others:
        raise UserError(f"TRAINER.BASE: {base_name} is a debiaser, not a prompt learner; bases are: {', '.join(bases)}")
    if base_name not in bases:
        raise UserError(f"TRAINER.BASE: unknown prompt learner {base_name!r}: {nearest(base_name, bases)}")
    for name in cfg.TRAINER.STACK:
        if name in bases:
            raise UserError(f"TRAINER.STACK: {name} is a prompt learner; debiasers are: {', '.join(others)}")
        if name not in others:
            raise UserError(f"TRAINER.STACK: unknown debiaser {name!r}: {nearest(name, others)}")
        debiasers.append(TRAINER_REGISTRY.get(name).debiaser_class)
    return base_name, TRAINER_REGISTRY.get(base_name).learner_class, debiasers


def base_of(cfg: CfgNode) -> str:
    """The name of the prompt learner: TRAINER.BASE under a debiaser (its own choice when empty), else TRAINER.NAME."""
    debiaser = TRAINER_REGISTRY.get(cfg.TRAINER.NAME, "--trainer").debiaser_class
    return (cfg.TRAINER.BASE or debiaser.default_base(cfg)) if debiaser else cfg.TRAINER.NAME
