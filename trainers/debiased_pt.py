"""DebiasedPT: cross-entropy weighted by group, with weights that follow how badly each group is predicted (DPT).

Groups g = (y, a_hat) need no labels: a_hat is the attribute that zero-shot CLIP sees (``TRAINER.GROUPS pseudo``).
N_g images are of group g, p_g is the mean predicted probability of the true class in it:

    w_hat_g ~ (1 / N_g) exp(eta (1 - p_g)),  normalised so that sum_g N_g w_g = N      (the mean weight is 1)
    w_g     <- mu w_g + (1 - mu) w_hat_g                                               after each epoch
    L        = mean_i w_{g_i} CE_i

So m_g = N_g w_g / N, the share of group g in the loss, follows softmax_g(eta (1 - p_g)): eta = 0 balances the groups, and
no group weighs more than e^eta times another. Groups without images take no part.

Source: Jiang, Yang, Hu, Sang, "Debiased Prompt Tuning in Vision-Language Model without Annotations", arXiv 2503.08368.
The weight rule, its moving average, the loss and the pseudo-groups are the paper's; what the sources at hand leave open
is a key below, marked [open].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.contracts import Context, Contribution, Debiaser, Step
from oodprompt.methods.groups import per_group

declare(
    "TRAINER.DEBIASEDPT",
    {
        "ETA": Key(
            1.0,
            "eta: how strongly weights follow 1 - p_g; 0 balances the groups. [open]",
            at_least=0,
            at_most=100,
            error="{key}: {value} is not between 0 and 100",
        ),
        "EMA": Key(
            0.5,
            "mu: how much of the former weights stays at an update. [open]",
            at_least=0,
            below=1,
            error="{key}: {value} is not in [0, 1)",
        ),
        "MEASURE": Key(
            "epoch",
            "When p_g is measured: epoch (over the steps of each epoch), pass (by a pass over the training images ahead "
            "of each epoch), step (a running mean, with an update of the weights after every step), or held_out (ours: by a "
            "pass over the validation images, which the prompts have not seen). [open]",
            choices=("epoch", "pass", "step", "held_out"),
        ),
        "MOMENTUM": Key(
            0.9,
            "MEASURE step: how much of the former p_g stays. [open]",
            at_least=0,
            below=1,
            error="{key}: {value} is not in [0, 1)",
        ),
        "NORMALIZE": Key(
            "mean",
            "mean: sum_g N_g w_g = N; groups: the w_g of the groups with images sum to their number; none: as they are, "
            "times N. [open]",
            choices=("mean", "groups", "none"),
        ),
        "START": Key(
            "balanced",
            "Weights before the first update: balanced (equal shares) or uniform (all 1). [open]",
            choices=("balanced", "uniform"),
        ),
    },
)


class GroupWeights(Debiaser):
    """The weights w_g and what they follow; over any prompt learner."""

    model_name = "debiasedpt"
    w: Tensor
    p: Tensor
    measured: Tensor
    started: Tensor
    sums: Tensor
    group_correction = "size"

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys, self.context = cfg.TRAINER.DEBIASEDPT, context
        count = context.attributes.num_groups()
        self.register_buffer("w", torch.ones(count, dtype=torch.float64))  # [G]
        self.register_buffer("p", torch.zeros(count, dtype=torch.float64))  # [G], as last measured
        self.register_buffer("measured", torch.zeros(count, dtype=torch.bool))  # [G], whether p_g ever was
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # Of the epoch, by group: sum of the probabilities of the true class, and number of images. [2, G]
        self.register_buffer("sums", torch.zeros(2, count, dtype=torch.float64), persistent=False)

    def check(self) -> None:
        if self.keys.MEASURE == "held_out":
            if self.context.data.val is None:
                raise UserError("TRAINER.DEBIASEDPT.MEASURE held_out: the data set has no validation images; use epoch")
            self.context.attributes.check_groups(self.context.data.val)

    def before_train(self) -> None:
        groups = self.context.attributes.groups(self.context.data.train)
        self.g, self.N_g, self.names = groups.index, groups.count, groups.names
        if not self.started and self.keys.START == "balanced":
            self.w.copy_(self._weights(torch.zeros_like(self.w), eta=0.0))
        self.started.fill_(True)

    def before_epoch(self, epoch: int) -> None:
        self.sums.zero_()
        if self.keys.MEASURE in ("pass", "held_out"):
            split = self.context.data.train if self.keys.MEASURE == "pass" else self.context.data.val
            assert split is not None, "check has seen to it"
            _, logits = self.context.first_stage.outputs(split)
            groups = self.context.attributes.groups(split)
            known = groups.known
            self.sums = self._measured(logits[known], split.label[known], groups.index[known])
            self._update(self.sums)

    def _measured(self, logits: Tensor, y: Tensor, g: Tensor) -> Tensor:
        """Sum over the images of each group of the probability of the true class, and their number, [2, G]."""
        p_y = F.softmax(logits.detach(), dim=1).gather(1, y.unsqueeze(1)).squeeze(1)
        return torch.stack(per_group(p_y, g, len(self.w)))

    def _update(self, sums: Tensor, keep: float = 0.0) -> None:
        """New p_g of the groups that were measured (``sums``; ``keep`` of the former stays), then new weights.

        A group that never was (no validation image, or none yet) counts as the mean of the others.
        """
        total, count = sums
        mean, now = total / count.clamp(min=1), count > 0
        p = torch.where(now, torch.where(self.measured, keep * self.p + (1 - keep) * mean, mean), self.p)
        self.measured = self.measured | now
        of_others = torch.where(self.measured, p, 0).sum() / self.measured.sum()
        self.p = torch.where(self.measured | ~self.measured.any(), p, of_others)
        self.w = self.keys.EMA * self.w + (1 - self.keys.EMA) * self._weights(self.p, self.keys.ETA)

    def _weights(self, p: Tensor, eta: float) -> Tensor:
        """w_hat [G] from p_g [G]; zero for groups without images."""
        return group_weights(p, self.N_g, eta, self.keys.NORMALIZE)

    def contribute(self, step: Step) -> Contribution:
        g = self.g[step.index]
        weights = self.w[g].to(step.logits.dtype)
        if self.keys.MEASURE == "epoch":
            self.sums += self._measured(step.logits, step.label, g)
        elif self.keys.MEASURE == "step":
            self._update(self._measured(step.logits, step.label, g), self.keys.MOMENTUM)
        return Contribution(sample_weights=weights)

    def after_epoch(self, epoch: int) -> None:
        if self.keys.MEASURE == "epoch":
            self._update(self.sums)

    def by_group(self) -> dict[str, dict[str, float]]:
        share = self.N_g * self.w / len(self.g)
        present = [i for i, n in enumerate(self.N_g.tolist()) if n]
        return {
            "share of the loss, $N_g w_g / N$": {self.names[i]: share[i].item() for i in present},
            "probability of the true class, $p_g$": {self.names[i]: self.p[i].item() for i in present},
        }


def group_weights(p: Tensor, count: Tensor, eta: float, normalize: str = "mean") -> Tensor:
    """w_hat_g = (1 / N_g) exp(eta (1 - p_g)) for p_g and N_g [G], normalised; zero where N_g is.

    ``mean``: sum_g N_g w_g = N; ``groups``: sum_g w_g = number of groups with images; ``none``: times N.
    """
    present = count > 0
    rate = torch.where(present, (eta * (1 - p)).exp() / count.clamp(min=1), 0)
    if normalize == "mean":
        return rate * count.sum() / (rate * count).sum()
    if normalize == "groups":
        return rate * present.sum() / rate.sum()
    return rate * count.sum()


@TRAINER_REGISTRY.register()
class DebiasedPT(PromptTrainer):
    """DPT: loss weighted by (pseudo-)group, more where the true class is less likely (Jiang et al. 2025)."""

    debiaser_class = GroupWeights
