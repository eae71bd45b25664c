"""Source of groups ``denoised``: pseudo-attributes, corrected where a predictor trained on the others disagrees."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import GROUP_SOURCE_REGISTRY
from oodprompt.data.seeding import GROUP_SOURCE, derive_seed
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.contracts import Context, GroupSource
from oodprompt.methods.sources.predictor import AttributePredictor, as_numpy, predicted
from oodprompt.methods.splits import Split

declare(
    "TRAINER.GROUP_SOURCES.DENOISED",
    {
        "FOLDS": Key(
            5, "K: parts of the training images; each is labelled by a predictor that has not seen it.", at_least=2
        ),
        "C": Key(0.01, "C of the logistic regression; a smaller C follows wrong values less.", above=0),
    },
)


@GROUP_SOURCE_REGISTRY.register(name="denoised")
class DenoisedAttributes(GroupSource):
    """Pseudo-attributes, corrected by predictors that have not seen the image; names of the values, no labels.

    a_hat_i is what zero-shot CLIP sees of image i (``pseudo``). The training images are split into K parts. For each k a
    predictor p_k(a | z) is fitted to a_hat on all parts but part k, all values with the same total weight:

        value of an image of part k = argmax_a p_k(a | z_i)
        value of an image of another split = argmax_a sum_k p_k(a | z_i)

    A simple predictor cannot follow errors that are random given the image feature, so it corrects them. Errors that go with
    the image feature stay. The predictor is logistic regression on the standardised features z [d] of CLIP as it was
    released. Weights by group (y, a_hat) in place of values did harm: they raise the weight of wrong values in rare groups.

    Source: predictions out of sample, after Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset
    Labels", JAIR 2021. Ours: every label is replaced, where the paper prunes those that it finds wrong.
    """

    is_computed = True

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys = cfg.TRAINER.GROUP_SOURCES.DENOISED
        self.seen = context.attributes.pseudo
        self.names = self.seen.names
        self._predictors: list[AttributePredictor] = []
        self._train: Tensor | None = None

    def num_values(self, split: Split) -> int:
        return len(self.seen.text)

    def of(self, split: Split) -> Tensor:
        if self._train is None:
            self._train = self._corrected()
        if split.name == "train":
            return self._train.to(split.label.device)
        return predicted(self._predictors, split)

    def _corrected(self) -> Tensor:
        """The values of the training images; the predictors are kept."""
        train = self.context.data.train
        z, y, a = (as_numpy(x) for x in (train.features(), train.label, self.seen.of(train)))
        count = len(self.seen.text)
        if len(np.unique(a)) < 2:
            raise UserError(
                "TRAINER.GROUPS denoised: zero-shot CLIP sees one value in all training images, which tells nothing apart; "
                "take other names (TRAINER.PSEUDO_NAMES) or another source"
            )
        folds, group = self.keys.FOLDS, y * count + a
        order = np.random.default_rng(derive_seed(self.cfg.SEED, GROUP_SOURCE)).permutation(len(y))
        order = order[np.argsort(group[order], kind="stable")]  # so that every part has its share of each group
        part = np.empty_like(a)
        part[order] = np.arange(len(y)) % folds
        result = a.copy()
        for k in range(folds):
            rest, fold = part != k, part == k
            predictor = AttributePredictor(z[rest], a[rest], count, self.keys.C)
            self._predictors.append(predictor)
            if fold.any():
                result[fold] = predictor.probabilities(z[fold]).argmax(axis=1)
        logger.info(
            f"TRAINER.GROUPS denoised: {int((result != a).sum()):,} of {len(a):,} training images have another value than "
            "zero-shot CLIP sees"
        )
        return torch.from_numpy(result)
