"""GroupDRO: the loss of the worst group, by weights q_g that grow where the loss is high.

In every step, with l_g the mean cross-entropy of the batch's images of group g (0 where it has none):

    q_g <- q_g exp(STEP_SIZE (l_g + C / sqrt(N_g))),  renormalised so that sum_g q_g = 1
    L    = sum_g q_g l_g  =  mean_i w_i CE_i  with  w_i = q_{g_i} B / n_{g_i}

B images are in the batch, n_g of them of group g; N_g training images are of group g, and C is ADJUSTMENT. q starts
equal over the groups that have training images; others take no part. A group that a batch lacks has no part in its L,
so q rests on batches that hold every group: BALANCED draws them with replacement, each group equally likely, as the
authors do.

Source: Sagawa, Koh, Hashimoto, Liang, "Distributionally robust neural networks for group shifts", ICLR 2020
(arXiv 1911.08731), algorithm 1; the authors' loss.py.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from oodprompt.trainers.resampling import balanced_draws
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.contracts import Context, Contribution, Debiaser, Step
from oodprompt.methods.groups import Groups, per_group

declare(
    "TRAINER.GROUPDRO",
    {
        "STEP_SIZE": Key(
            0.01, "How fast q follows the losses of the groups; 0 leaves the groups equal.", at_least=0, below=math.inf
        ),
        "ADJUSTMENT": Key(
            0.0, "C: C / sqrt(N_g) is added to the loss of group g where q is updated.", at_least=0, below=math.inf
        ),
        "BALANCED": (True, "Batches by draws with replacement, each group equally likely; else the sampler's."),
    },
)


class GroupRobustness(Debiaser):
    """The weights q, which follow the losses of the groups; over any prompt learner."""

    model_name = "groupdro"
    q: Tensor
    group_correction = "batch"

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys, self.context = cfg.TRAINER.GROUPDRO, context
        self.epoch_order = self._groups_equally if self.keys.BALANCED else None
        count = context.attributes.num_groups()
        self.register_buffer("q", torch.zeros(count, dtype=torch.float64))  # [G]; all 0 before training

    @cached_property
    def groups(self) -> Groups:
        """The groups of the training images."""
        return self.context.attributes.groups(self.context.data.train)

    @cached_property
    def of_images(self) -> np.ndarray:
        """The group of every training image, on the host, [N]."""
        return self.groups.index.cpu().numpy()

    def before_train(self) -> None:
        self.N_g, self.names = self.groups.count, self.groups.names
        if not self.q.any():
            present = self.N_g > 0
            self.q = present.double() / present.sum()
        self.before_epoch(0)

    def before_epoch(self, epoch: int) -> None:
        self.loss_sum, self.seen = torch.zeros_like(self.q), torch.zeros_like(self.q)

    def _groups_equally(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        return balanced_draws(self.of_images, rng)

    def contribute(self, step: Step) -> Contribution:
        g = self.groups.index[step.index]
        ce = F.cross_entropy(step.logits.detach(), step.label, reduction="none")
        total, n = per_group(ce, g, len(self.q))
        self.loss_sum, self.seen = self.loss_sum + total, self.seen + n
        self.q = self._updated(total / n.clamp(min=1))
        return Contribution(sample_weights=(self.q * len(g) / n.clamp(min=1))[g].to(step.logits.dtype))

    def _updated(self, loss: Tensor) -> Tensor:
        """q [G] after the losses [G] of a batch. In logarithms, where exp cannot overflow and q = 0 stays 0."""
        adjusted = loss + self.keys.ADJUSTMENT / self.N_g.clamp(min=1).sqrt()
        return (self.q.log() + self.keys.STEP_SIZE * adjusted).softmax(dim=0)

    def by_group(self) -> dict[str, dict[str, float]]:
        mean = self.loss_sum / self.seen.clamp(min=1)
        return {
            "weight of the group, $q_g$": {self.names[i]: self.q[i].item() for i in _where(self.N_g)},
            "loss of the group": {self.names[i]: mean[i].item() for i in _where(self.seen)},
        }


def _where(values: Tensor) -> list[int]:
    return values.nonzero().flatten().tolist()


@TRAINER_REGISTRY.register()
class GroupDRO(PromptTrainer):
    """Loss of the worst group, by weights that follow the groups' losses (Sagawa et al. 2020)."""

    debiaser_class = GroupRobustness
