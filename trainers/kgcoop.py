"""KgCoOp: knowledge-guided context optimisation. CoOp, held near the text features of hand-written prompts.

    L = CE + W (1 - mean_c cos(w_c, w_c^clip))

with w_c the text features of the learned prompts and w_c^clip those of the data set's template.

Source: Yao et al., "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization", CVPR 2023; upstream
file KgCoOp/trainers/kgcoop.py, whose keys are CoOp's and TRAINER.COOP.W.
"""

from __future__ import annotations

from collections.abc import Sequence

from oodprompt.trainers.coop import ContextLearner
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.contracts import Alignment
from oodprompt.methods.prompts import class_text_features, initial_context


class KnowledgeGuidedLearner(ContextLearner):
    """Context vectors and the fixed text features ``hand_written`` [C, d] of the template."""

    foreign = r"meta_net\.|bias_vectors"  # in upstream's checkpoints, and used by nothing there
    hand_written: Tensor

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        self.weight = cfg.TRAINER.COOP.W
        self.register_buffer("hand_written", class_text_features(clip, self.classnames, [template]), persistent=False)

    def start(self, cfg: CfgNode, template: str) -> tuple[str, Tensor]:
        if cfg.TRAINER.COOP.CTX_INIT == "True":  # upstream's files mean these words, whatever the template
            words = "a photo of a"
            return initial_context(self.clip, "TRAINER.COOP.N_CTX", len(words.split()), words)
        return super().start(cfg, template)

    def penalty(self, alignment: Alignment) -> Tensor:
        return self.weight * (1 - (alignment.text_features * self.hand_written).sum(dim=-1).mean())


@TRAINER_REGISTRY.register()
class KgCoOp(PromptTrainer):
    """CoOp held near hand-written prompts by a penalty on the text features (Yao et al. 2023)."""

    learner_class = KnowledgeGuidedLearner
