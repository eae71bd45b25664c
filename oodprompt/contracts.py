"""What methods of others build on: prompt learners, debiasers, sources of groups (``oodprompt.methods``)."""

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
from oodprompt.methods.groups import Groups, per_group
from oodprompt.methods.splits import Split

__all__ = [
    "TOWERS",
    "Alignment",
    "Context",
    "Contribution",
    "Debiaser",
    "GroupSource",
    "Groups",
    "PromptLearner",
    "Split",
    "Step",
    "StepRegions",
    "per_group",
]
