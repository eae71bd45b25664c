"""The two contracts, for methods of others: a prompt learner and a debiaser (``oodprompt.methods.contracts``)."""

from oodprompt.methods.contracts import (
    TOWERS,
    Alignment,
    Context,
    Contribution,
    Debiaser,
    GroupSource,
    PromptLearner,
    Step,
    StepRegions,
)

__all__ = [
    "TOWERS",
    "Alignment",
    "Context",
    "Contribution",
    "Debiaser",
    "GroupSource",
    "PromptLearner",
    "Step",
    "StepRegions",
]
