"""RaVL: discover the regions that a model wrongly goes by, and train with a loss that knows them.

Stage 1 (``oodprompt.discovery``): the base is trained alone; regions of labelled validation images are clustered by its
features; the cluster whose presence moves accuracy most and which decides errors is called spurious.

Stage 2, in a batch of B images; f = normalised region feature, g = normalised text feature of a class, s = <f, g> / tau.
R_i^r are the regions of image i that are not spurious, R^s all spurious regions of the batch, U the labels in the batch;
m(i, c) = max_{r in R_i^r} s(r, c):

    L_R^i = -m(i, y_i) + log( sum_{c in U} exp m(i, c) + sum_{r in R^s} max_{c in U} exp s(r, c) )
    L_A^i = -m(i, y_i) + log( exp m(i, y_i) + sum_{j: y_j != y_i} exp m(j, y_i) + sum_{r in R^s} exp s(r, y_i) )
    L = lambda L_base + (1 - lambda) mean_i (L_R^i + L_A^i)

An image without a region that is not spurious has no L_R and L_A; its spurious regions still count. The engine adds
(1 - lambda) / lambda (L_R + L_A) to the base's own loss, which is L / lambda.

``TUNE image_encoder`` is the paper's form: the base is FineTune, L_base CLIP's loss on captions, region features are
those of the tower in training. ``TUNE prompts`` is ours: over any prompt learner, L_base its own loss, and the text
features learn; where the image tower is frozen, region features are computed once.

Source: Varma et al., "RaVL: Discovering and Mitigating Spurious Correlations in Fine-Tuned Vision-Language Models",
NeurIPS 2024, sections 3.1 and 3.3; the authors' code of stage 1. Stage 2 has no public code: sums over labels run over
distinct labels, and over images a mean is taken where the paper writes a sum, so that lambda does not depend on B.
"""

from __future__ import annotations

import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data.transforms import is_random
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.contracts import Context, Contribution, Debiaser, Step

declare(
    "TRAINER.RAVL",
    {
        "TUNE": Key(
            "prompts",
            "prompts: the loss trains a prompt learner (ours); image_encoder: it fine-tunes the image tower (the paper's). Says "
            "which base stands under an empty TRAINER.BASE: CoOp or FineTune.",
            choices=("prompts", "image_encoder"),
        ),
        "LAMBDA": Key(
            0.8,
            "Weight of the base's loss; 1 - LAMBDA that of L_R + L_A.",
            above=0,
            at_most=1,
            error="{key}: {value} is not above 0 and up to 1",
        ),
        "TEMPERATURE": Key(0.07, "tau of L_R and L_A.", above=0),
    },
)


class RegionAware(Debiaser):
    """L_R + L_A over any prompt learner. It has neither parameters nor state."""

    model_name = "ravl"
    takes_regions = True

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.cfg, self.keys, self.context = cfg, cfg.TRAINER.RAVL, context

    @classmethod
    def default_base(cls, cfg: CfgNode) -> str:
        return "CoOp" if cfg.TRAINER.RAVL.TUNE == "prompts" else "FineTune"

    def check(self) -> None:
        if not self.context.features_are_frozen and is_random(self.cfg):
            raise UserError(
                "RaVL: INPUT.TRANSFORMS crop or flip at random, which moves regions, and the base trains the image tower; "
                "use INPUT.TRANSFORMS \"['normalize']\""
            )

    def before_train(self) -> None:
        self.spurious = self.context.attributes.discovered.spurious(self.context.data.train)
        logger.info(
            f"RaVL: {int(self.spurious.sum()):,} of {len(self.spurious):,} regions of training images are spurious"
        )

    def contribute(self, step: Step) -> Contribution:
        text, regions = step.alignment.text_features, step.regions
        assert regions is not None, "takes_regions asks for them"
        if text.ndim == 3:  # prompts that depend on the image
            similarity = (text[regions.image] @ regions.features.unsqueeze(-1)).squeeze(-1)
        else:
            similarity = regions.features @ text.T
        L_R, L_A, counts = region_losses(
            similarity / self.keys.TEMPERATURE, regions.image, self.spurious[regions.index], step.label
        )
        # Images that have no loss of their own are left out of the mean.
        share = (1 - self.keys.LAMBDA) / self.keys.LAMBDA * len(step.label) / counts.sum().clamp(min=1)
        log = {"L_R": L_R.sum() / counts.sum().clamp(min=1), "L_A": L_A.sum() / counts.sum().clamp(min=1)}
        return Contribution(per_sample_loss=share * (L_R + L_A), log=log)


def region_losses(s: Tensor, image: Tensor, spurious: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """L_R [B], L_A [B] and which images have them [B] (bool); 0 where they have none.

    ``s`` [m, C] similarities of the batch's regions to the classes, over tau; ``image`` [m] the image of each, 0..B-1;
    ``spurious`` [m]; ``label`` [B].
    """
    B, C = len(label), s.shape[1]
    # Shapes are those of the batch, whatever is spurious: what has no part in a sum is minus infinity.
    absent = torch.ones(C, dtype=torch.bool, device=s.device).index_fill(0, label, False)
    core, sp = (s.masked_fill(mark.unsqueeze(1), -torch.inf) for mark in (spurious, ~spurious))  # [m, C]
    m = s.new_full((B, C), -torch.inf).scatter_reduce(0, image.unsqueeze(1).expand(-1, C), core, "amax")
    has = torch.zeros(B, dtype=torch.long, device=s.device).index_add(0, image, (~spurious).long()) > 0
    own_class = torch.where(has, m.gather(1, label.unsqueeze(1)).squeeze(1), 0)

    none = s.new_full((1,), -torch.inf)  # so that an empty sum has a logarithm
    P = torch.cat([sp.masked_fill(absent, -torch.inf).amax(dim=1), none]).logsumexp(dim=0)
    within = torch.where(has.unsqueeze(1), m, 0).masked_fill(absent, -torch.inf).logsumexp(dim=1)
    L_R = torch.logaddexp(within, P) - own_class

    others = m[:, label].T  # [i, j]: m(j, y_i)
    others = others.masked_fill((label.unsqueeze(1) == label.unsqueeze(0)) | ~has.unsqueeze(0), -torch.inf)
    attracted = torch.cat([own_class.unsqueeze(1), others, sp[:, label].T], dim=1)
    L_A = attracted.logsumexp(dim=1) - own_class
    return torch.where(has, L_R, 0), torch.where(has, L_A, 0), has


@TRAINER_REGISTRY.register()
class RaVL(PromptTrainer):
    """Discovered spurious regions pushed from the classes, the others drawn to them (Varma et al. 2024)."""

    debiaser_class = RegionAware
