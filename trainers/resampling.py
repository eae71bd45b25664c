"""SUBG and RWG: plain cross-entropy over epochs in which all groups have the same share.

N_g images are of group g, and G' groups have any:

    SUBG    an epoch is min_g N_g images of each group, drawn without replacement: G' min_g N_g images in all
    RWG     an epoch is N draws with replacement, P(i) = 1 / (G' N_{g_i}), so that each group has the chance 1 / G'

SUBG's epochs are short where a group is small: raise OPTIM.MAX_EPOCH to take as many steps as other methods.

Source: Idrissi, Arjovsky, Pezeshki, Lopez-Paz, "Simple data balancing achieves competitive worst-group-accuracy",
CLeaR 2022 (arXiv 2110.14503).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data.seeding import SUBSET, derive_seed
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import Context, Debiaser

declare(
    "TRAINER.SUBG",
    {"REDRAW": (True, "A fresh subset each epoch; else one subset, drawn with SEED, for all epochs.")},
)


def balanced_draws(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many draws with replacement as there are images, from ``group`` [N]; each group with images is equally likely."""
    N_g = np.bincount(group)
    return rng.choice(len(group), len(group), p=1 / ((N_g > 0).sum() * N_g[group]))


def balanced_subset(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices into ``group`` [N] of min_g N_g images of each group with images, in random order."""
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    size = min(len(m) for m in members)
    return rng.permutation(np.concatenate([rng.choice(m, size, replace=False) for m in members]))


class _Balanced(Debiaser):
    """An order of images by group; it has neither parameters nor state."""

    group_correction = "sampler"

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.cfg, self.context = cfg, context

    @cached_property
    def group(self) -> np.ndarray:
        """The group of every training image, [N]."""
        return self.context.attributes.groups(self.context.data.train).index.cpu().numpy()

    def epoch_order(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of the training images of an epoch, in order."""
        raise NotImplementedError

    def before_train(self) -> None:
        length = len(self.epoch_order(0, np.random.default_rng(0)))
        logger.info(
            f"{self.model_name.upper()}: epochs of {length:,} of {len(self.group):,} training images, "
            f"{len(np.unique(self.group))} groups with equal shares"
        )


class Subsampling(_Balanced):
    """Epochs of equally many images of each group."""

    model_name = "subg"

    @cached_property
    def subset(self) -> np.ndarray:
        return balanced_subset(self.group, np.random.default_rng(derive_seed(self.cfg.SEED, SUBSET)))

    def epoch_order(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        return balanced_subset(self.group, rng) if self.cfg.TRAINER.SUBG.REDRAW else rng.permutation(self.subset)


class Reweighting(_Balanced):
    """Epochs of draws with replacement that meet each group equally often, in the mean."""

    model_name = "rwg"

    def epoch_order(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        return balanced_draws(self.group, rng)


@TRAINER_REGISTRY.register()
class SUBG(PromptTrainer):
    """Epochs subsampled to equally many images of each group (Idrissi et al. 2022)."""

    debiaser_class = Subsampling


@TRAINER_REGISTRY.register()
class RWG(PromptTrainer):
    """Epochs drawn with replacement, each group equally likely (Idrissi et al. 2022)."""

    debiaser_class = Reweighting
