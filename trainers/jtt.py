"""JTT, just train twice: images that a first, plain training gets wrong weigh more in the second.

    E   = { i : argmax_c f_T(x_i)_c != y_i }    with f_T trained by cross-entropy alone for T = FIRST_EPOCHS epochs
    w_i ~ UP for i in E, 1 for all others,      normalised so that the mean weight over the training images is 1
    L   = mean_i w_i CE_i

No group labels or attribute names are used. The authors repeat the images of E UP times; the weights have the same
expectation. T decides what E holds: prompts start from zero-shot CLIP, so that too short a first training leaves the
errors of CLIP in E, and only one that has taken to the shortcut errs on the images that go against it. The warm-up and
the schedule of OPTIM count for the first training too, run through in its T epochs.

Source: Liu et al., "Just train twice: improving group robustness without training group information", ICML 2021
(arXiv 2107.09044), algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import Context, Contribution, Debiaser, Step

declare(
    "TRAINER.JTT",
    {
        "FIRST_EPOCHS": Key(50, "T: epochs of the first training, whose errors weigh more.", at_least=1),
        "UP": Key(50.0, "lambda_up: how many times as much an image of the error set weighs.", above=0, below=math.inf),
    },
)


class ErrorSet(Debiaser):
    """The error set of a first training, and weights by it; over any prompt learner."""

    model_name = "jtt"
    error: Tensor  # [N]
    done: Tensor

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys, self.context = cfg.TRAINER.JTT, context
        self.register_buffer("error", torch.zeros(len(context.data.train.label), dtype=torch.bool))  # [N], i in E
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))  # whether E is known

    def before_train(self) -> None:
        if not self.done:
            _, logits = self.context.first_stage.fit(self.keys.FIRST_EPOCHS, None)
            self.error = logits.argmax(dim=1) != self.context.data.train.label
            self.done.fill_(True)
        logger.info(
            f"JTT: the error set has {int(self.error.sum()):,} of {len(self.error):,} training images "
            f"({self.error.float().mean():.1%}), which weigh {self.keys.UP:g} times as much as others"
        )
        w = torch.where(self.error, self.keys.UP, 1.0)
        self.w = w / w.mean()  # [N]

    def contribute(self, step: Step) -> Contribution:
        return Contribution(sample_weights=self.w[step.index])


@TRAINER_REGISTRY.register()
class JTT(PromptTrainer):
    """Trained twice, the second time with more weight on what the first got wrong (Liu et al. 2021)."""

    debiaser_class = ErrorSet
