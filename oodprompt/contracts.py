"""What the files of others build on: prompt learners, debiasers, sources of groups, backbones."""

from oodprompt.backbones.general import GeneralCLIP, Towers
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.backbones.source import BackboneSource, align
from oodprompt.backbones.tokenizer import LibraryTokenizer
from oodprompt.config.registry import BACKBONE_REGISTRY
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
from oodprompt.methods.heads import Head
from oodprompt.methods.splits import Split

__all__ = [
    "BACKBONE_REGISTRY",
    "BackboneSource",
    "GeneralCLIP",
    "LibraryTokenizer",
    "Preprocessing",
    "Towers",
    "align",
    "TOWERS",
    "Alignment",
    "Context",
    "Contribution",
    "Debiaser",
    "GroupSource",
    "Groups",
    "Head",
    "PromptLearner",
    "Split",
    "Step",
    "StepRegions",
    "per_group",
]
