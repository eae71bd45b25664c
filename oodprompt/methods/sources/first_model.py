"""Sources of groups that ask where a first model, trained by cross-entropy alone, is wrong: ``errors`` and ``eiil``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import GROUP_SOURCE_REGISTRY
from oodprompt.data.dataset import told_apart
from oodprompt.data.seeding import GROUP_SOURCE, derive_seed
from oodprompt.log import logger
from oodprompt.methods.contracts import Context, GroupSource, PromptLearner
from oodprompt.methods.splits import Split

declare(
    "TRAINER.GROUP_SOURCES.ERRORS",
    {
        "FIRST_EPOCHS": Key(0, "T: epochs of the first model; 0: OPTIM.MAX_EPOCH.", at_least=0),
        "VALUE": Key(
            "error",
            "The value of an image: whether the first model errs on it (error, as in JTT), or the class that it predicts "
            "(prediction, as in CNC). The groups of two classes are the same either way.",
            choices=("error", "prediction"),
        ),
    },
)
declare(
    "TRAINER.GROUP_SOURCES.EIIL",
    {
        "FIRST_EPOCHS": Key(0, "Epochs of the first model, the reference; 0: OPTIM.MAX_EPOCH.", at_least=0),
        "STEPS": Key(10_000, "Steps of Adam over the assignments.", at_least=1),
        "LR": Key(0.001, "Learning rate of Adam.", above=0),
    },
)


def first_model(source: GroupSource, epochs: int) -> tuple[PromptLearner, Tensor]:
    """A learner of the run's kind after ``epochs`` epochs of cross-entropy alone (0: OPTIM.MAX_EPOCH), its logits [N, C]."""
    return source.context.first_stage.fit(epochs or source.cfg.OPTIM.MAX_EPOCH, None)


def first_logits(source: GroupSource, epochs: int, split: Split) -> Tensor:
    """The logits [N, C] of that learner on a split."""
    learner, logits = first_model(source, epochs)
    return logits if split.name == "train" else source.context.first_stage.outputs(split, learner)[1]


class _FirstModel(GroupSource):
    """A source that looks at the logits of a first model."""

    is_computed = True
    section: str

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys = cfg.TRAINER.GROUP_SOURCES[self.section]

    def _logits(self, split: Split) -> Tensor:
        """[N, C]."""
        return first_logits(self, self.keys.FIRST_EPOCHS, split)


@GROUP_SOURCE_REGISTRY.register(name="errors")
class FirstModelErrors(_FirstModel):
    """Whether a first model errs on an image (JTT), or what it predicts (CNC); neither labels nor names.

        a_i = [argmax_c f_T(x_i)_c != y_i]   (VALUE error)      or   a_i = argmax_c f_T(x_i)_c   (VALUE prediction)

    f_T is the run's prompt learner after T = FIRST_EPOCHS epochs of cross-entropy alone. A model that has taken to the
    shortcut errs on the images that go against it.

    Source: Liu et al., "Just Train Twice", ICML 2021 (arXiv 2107.09044), whose error set this is, with T = 60 on Waterbirds
    and 1 on CelebA; Zhang et al., "Correct-N-Contrast", ICML 2022 (arXiv 2203.01517), whose stage 1 takes predictions. That
    T defaults to the epochs of the run is ours.
    """

    section = "ERRORS"

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        predicted = tuple(f"predicted {name}" for name in told_apart(context.data.classnames))
        self.names = predicted if self.keys.VALUE == "prediction" else ("right", "wrong")

    def of(self, split: Split) -> Tensor:
        predicted = self._logits(split).argmax(dim=1)
        wrong = predicted != split.label
        logger.info(
            f"TRAINER.GROUPS errors: the first model errs on {int(wrong.sum()):,} of {len(wrong):,} images ({split.name})"
        )
        return predicted if self.keys.VALUE == "prediction" else wrong.long()


@GROUP_SOURCE_REGISTRY.register(name="eiil")
class InferredEnvironments(_FirstModel):
    """Two environments between which a reference model is least invariant (EIIL); neither labels nor names.

        r_i    = d/ds CE(s f(x_i), y_i) at s = 1  =  sum_c p_c f_c - f_{y_i}
        q      = argmax_q  (mean_i q_i r_i)^2 + (mean_i (1 - q_i) r_i)^2,     q_i = sigmoid(w_i) in (0, 1)
        a_i    = [q_i > 1/2]

    The objective is the penalty of IRMv1 in both environments. It is greatest where q_i = 1 for r_i > 0 and 0 for others, or
    the other way round. With two classes r_i > 0 where f errs, so that the groups become those of ``errors``. f is the run's prompt learner after FIRST_EPOCHS epochs of
    cross-entropy alone. Adam takes STEPS steps of rate LR from w_i ~ N(0, 1), drawn with SEED. A validation image goes to
    the environment that its r_i draws it to, which is where those steps lead.

    Source: Creager, Jacobsen, Zemel, "Environment Inference for Invariant Learning", ICML 2021 (arXiv 2010.07249), and the
    authors' opt_utils.py: the objective, Adam with 10,000 steps of 0.001, the start. Others take one epoch of the reference on
    Waterbirds; ours is as many as the run has, since prompts start from zero-shot CLIP. Ours too: the objective is taken
    times the number of images, so that Adam's epsilon does not hold back the images of large data sets.
    """

    section = "EIIL"
    names = ("environment 0", "environment 1")
    _direction = 0.0

    def of(self, split: Split) -> Tensor:
        logits = self._logits(split).double()
        r = (F.softmax(logits, dim=1) * logits).sum(dim=1) - logits.gather(1, split.label.unsqueeze(1)).squeeze(1)
        if split.name != "train":
            if not self._direction:
                self.of(self.context.data.train)
            return (self._direction * r > 0).long()
        q = self._assignments(r)
        self._direction = float((q * r).sum() - ((1 - q) * r).sum()) or 1.0
        return (q > 0.5).long()

    def _assignments(self, r: Tensor) -> Tensor:
        """q [N] from r [N]."""
        generator = torch.Generator().manual_seed(derive_seed(self.cfg.SEED, GROUP_SOURCE))
        w = torch.randn(len(r), generator=generator, dtype=torch.float64).to(r.device)
        adam = torch.optim.Adam([w], lr=self.keys.LR)
        for _ in range(self.keys.STEPS):
            q = w.sigmoid()
            # The gradient of -N times the objective; (q r) and ((1 - q) r) are the derivatives of the two risks.
            w.grad = -2 * ((2 * q - 1) * r).mean() * r * q * (1 - q)
            adam.step()
        return w.sigmoid()
