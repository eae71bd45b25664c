"""AFR, automatic feature reweighting: held-out images weigh more the worse a first, plain training predicts them.

The training images are split by class into a first part and a held-out part H, the share SHARE:

    theta_fit   the prompt learner after FIRST_EPOCHS epochs of cross-entropy alone on the first part
    mu_i  ~     beta_{y_i} exp(-GAMMA p_i)  for i in H,  normalised so that the mean over H is 1,
                p_i the probability that theta_fit gives to the true class of an image it has not seen
    L     =     mean_{i in H} mu_i CE_i  +  LAMBDA ||theta - theta_fit||^2,   from theta = theta_fit on

beta_y is 1 / (images of class y in H), as in the authors' code, or equalises the weights: 1 / sum of exp(-GAMMA p_i)
over class y (CLASSES). No group labels or attribute names are used. The authors retrain the last layer of an image
classifier; here the learner's parameters, which make the class vectors, are what is trained a second time. As prompts
start from zero-shot CLIP, the first training must be long enough to take to the shortcut that p_i is to show.

Source: Qiu, Potapczynski, Izmailov, Wilson, "Simple and fast group robustness by automatic feature reweighting",
ICML 2023 (arXiv 2306.11074), section 4; the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data.seeding import HELD_OUT, derive_seed
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.contracts import Context, Contribution, Debiaser, PromptLearner, Step
from oodprompt.methods.groups import per_group

declare(
    "TRAINER.AFR",
    {
        "FIRST_EPOCHS": Key(50, "Epochs of the first training, on the first part.", at_least=1),
        "SHARE": Key(
            0.2,
            "Share of each class's training images that is held out for the second training, by SEED.",
            above=0,
            below=1,
        ),
        "GAMMA": Key(
            4.0, "gamma: how strongly weights fall with the probability of the true class.", at_least=0, below=math.inf
        ),
        "LAMBDA": Key(
            0.0,
            "lambda: weight of the squared distance from the first training's parameters.",
            at_least=0,
            below=math.inf,
        ),
        "CLASSES": Key(
            "count",
            "beta_y: 1 / images of the class (count), or classes weigh the same (weight).",
            choices=("count", "weight"),
        ),
    },
)


class FeatureReweighting(Debiaser):
    """The held-out part, its weights mu and theta_fit; over any prompt learner."""

    model_name = "afr"
    held_out: Tensor
    mu: Tensor
    theta_fit: Tensor
    done: Tensor

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys, self.context = cfg.TRAINER.AFR, context
        rng = np.random.default_rng(derive_seed(cfg.SEED, HELD_OUT))
        held_out = hold_out(context.data.train.label.cpu().numpy(), self.keys.SHARE, rng, context.data.classnames)
        self.register_buffer("held_out", torch.from_numpy(held_out))  # [N], i in H
        self.register_buffer("mu", torch.zeros(len(held_out), dtype=torch.float64))  # [N], 0 outside H
        self.register_buffer("theta_fit", torch.zeros_like(flat(context.learner)))  # [P]
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))  # whether the first training is over

    def before_train(self) -> None:
        if self.done:  # resumed: the learner is past theta_fit
            return
        fitted, logits = self.context.first_stage.fit(self.keys.FIRST_EPOCHS, (~self.held_out).nonzero().flatten())
        H, y = self.held_out, self.context.data.train.label
        p = F.softmax(logits[H].double(), dim=1).gather(1, y[H].unsqueeze(1)).squeeze(1)
        self.mu[H] = afr_weights(p, y[H], self.keys.GAMMA, len(self.context.data.classnames), self.keys.CLASSES)
        with torch.no_grad():  # parameters alone: what a learner keeps of the epochs it has trained begins anew
            for own, start in zip(self.context.learner.parameters(), fitted.parameters(), strict=True):
                own.copy_(start)
            self.theta_fit.copy_(flat(fitted))
        self.done.fill_(True)
        logger.info(
            f"AFR: {int(H.sum()):,} of {len(H):,} training images are held out; the first training is right on "
            f"{(logits[H].argmax(dim=1) == y[H]).float().mean():.1%} of them, weights up to {self.mu.max():.3g}"
        )

    def epoch_order(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(np.flatnonzero(self.held_out.cpu().numpy()))

    def contribute(self, step: Step) -> Contribution:
        distance = (flat(self.context.learner) - self.theta_fit).square().sum()
        return Contribution(
            sample_weights=self.mu[step.index].to(step.logits.dtype),
            penalty=self.keys.LAMBDA * distance if self.keys.LAMBDA else None,
            log={"distance": distance.sqrt()},
        )


def flat(learner: PromptLearner) -> Tensor:
    """All parameters as one vector [P], which is empty for a learner without any."""
    return torch.cat([learner.clip.logit_scale.new_zeros(0), *(p.flatten() for p in learner.parameters())])


def hold_out(label: np.ndarray, share: float, rng: np.random.Generator, classnames: Sequence[str]) -> np.ndarray:
    """A mask [N] that is true for the share ``share`` of each class's images, one at least.

    Raises ``UserError`` where that would be all images of a class.
    """
    held_out = np.zeros(len(label), dtype=bool)
    for y in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == y))
        size = max(round(share * len(members)), 1)
        if size == len(members):
            raise UserError(
                f"TRAINER.AFR.SHARE: {share} holds out all training images of {classnames[y]!r} ({size}); both "
                "trainings need one"
            )
        held_out[members[:size]] = True
    return held_out


def afr_weights(p: Tensor, label: Tensor, gamma: float, classes: int, balance: str = "count") -> Tensor:
    """mu [n] of images whose true classes ``label`` [n] have the probabilities p [n]; their mean is 1."""
    mu = (-gamma * p).exp()
    total, count = per_group(mu, label, classes)
    mu = mu / (count if balance == "count" else total)[label]
    return mu / mu.mean()


@TRAINER_REGISTRY.register()
class AFR(PromptTrainer):
    """Trained on from a first training, on held-out images weighted by how badly it predicts them (Qiu et al. 2023)."""

    debiaser_class = FeatureReweighting
