"""Source of groups ``ssa``: attribute labels of a few images, spread over all others by semi-supervised learning."""

from __future__ import annotations

from dataclasses import dataclass

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

_SECTION = "TRAINER.GROUP_SOURCES.SSA"
declare(
    _SECTION,
    {
        "SPLIT": Key("val", "Split whose attribute labels are used.", choices=("val", "train")),
        "SHARE": Key(
            1.0, "Share of that split's images with a label whose label is used, drawn with SEED.", above=0, at_most=1
        ),
        "THRESHOLD": Key(
            0.95, "tau: probability from which a pseudo-label of the smallest group counts.", above=0, at_most=1
        ),
        "FOLDS": Key(
            3, "K: parts of the training images; each is labelled by a predictor that has not seen it.", at_least=2
        ),
        "ROUNDS": Key(5, "How often pseudo-labels are chosen and the predictor is fitted again.", at_least=0),
    },
)


@GROUP_SOURCE_REGISTRY.register(name="ssa")
class SpreadLabels(GroupSource):
    """Attribute labels of a few images, spread over all others by a predictor of the attribute (SSA).

    L are the labelled images, U_1 ... U_K equal parts of the training images without label. For each k a predictor
    p_k(a | z) of the attribute is fitted on L, then ROUNDS times on L and the pseudo-labelled images of all U_j but U_k:

        a_hat_i = argmax_a p(a | z_i),   g_hat_i = (y_i, a_hat_i)
        of the group with the fewest labels, those with p(a_hat_i | z_i) >= THRESHOLD count
        of any other group g as many, the most certain first, as make its labelled and pseudo-labelled images as many

    Images of U_k have the value argmax_a p_k(a | z_i), those of L their label. An image of another split without a used
    label has that of the mean of all p_k. The predictor is logistic regression, the values of a balanced weight, on the
    standardised features z [d] of CLIP as it was released.

    Source: Nam, Kim, Lee, Shin, "Spread Spurious Attribute: Improving Worst-group Accuracy with Spurious Attribute
    Estimation", ICLR 2022 (arXiv 2204.02070): labels of the validation split, the thresholds by group with tau = 0.95, and
    K = 3. Ours: a linear predictor on frozen features in rounds, where the authors train a network step by step.
    """

    is_computed = True

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys = cfg.TRAINER.GROUP_SOURCES.SSA
        self.names = tuple(context.data.attribute_names)
        self._predictors: list[AttributePredictor] = []
        self._train: Tensor | None = None

    def num_values(self, split: Split) -> int:
        source = self._labelled_split
        used = self._used(source)
        values = torch.unique(source.attribute[used])
        if len(values) < 2:
            raise UserError(
                f"TRAINER.GROUPS ssa: of the images of the {source.name} split, {int(used.sum())} have an attribute label that "
                f"is used, with {len(values)} value{'s' * (len(values) != 1)}; it needs two: raise {_SECTION}.SHARE, or set "
                f"{_SECTION}.SPLIT"
            )
        return max(len(self.names), self.context.data.num_attribute_values)

    @property
    def _labelled_split(self) -> Split:
        data = self.context.data
        split = data.train if self.keys.SPLIT == "train" else data.val
        if split is None:
            raise UserError(f"{_SECTION}.SPLIT val: the data set has no validation images; set it to train")
        return split

    def _used(self, split: Split) -> Tensor:
        """Which images of a split have a label that is used, [N] bool."""
        used = torch.zeros_like(split.label, dtype=torch.bool)
        if split.name == self.keys.SPLIT:
            known = (split.attribute >= 0).nonzero().flatten().cpu()
            rng = np.random.default_rng(derive_seed(self.cfg.SEED, GROUP_SOURCE))
            chosen = rng.permutation(len(known))[: max(round(self.keys.SHARE * len(known)), 1)]
            used[known[torch.from_numpy(chosen)]] = True
        return used

    def of(self, split: Split) -> Tensor:
        if self._train is None:
            self._train = self._spread()
        if split.name == "train":
            return self._train.to(split.label.device)
        return torch.where(self._used(split), split.attribute, predicted(self._predictors, split))

    def _spread(self) -> Tensor:
        """The values of the training images; the predictors are kept."""
        source, train = self._labelled_split, self.context.data.train
        labelled, values = self._used(source), self.num_values(train)
        own = self._used(train)
        rest = (~own).nonzero().flatten().cpu().numpy()
        rng = np.random.default_rng(derive_seed(self.cfg.SEED, GROUP_SOURCE, 1))
        folds = np.array_split(rng.permutation(rest), self.keys.FOLDS)
        known = _Labelled(
            as_numpy(source.features())[as_numpy(labelled)],
            as_numpy(source.label[labelled]),
            as_numpy(source.attribute[labelled]),
        )
        z, y = as_numpy(train.features()), as_numpy(train.label)
        result = as_numpy(train.attribute).copy()
        for k, fold in enumerate(folds):
            others = np.concatenate([f for j, f in enumerate(folds) if j != k])
            predictor = self._fitted(known, z[others], y[others], values)
            self._predictors.append(predictor)
            if len(fold):
                result[fold] = predictor.probabilities(z[fold]).argmax(axis=1)
        logger.info(
            f"TRAINER.GROUPS ssa: {len(known.label):,} attribute labels ({source.name}) give {len(rest):,} training images "
            "a pseudo-label"
        )
        return torch.from_numpy(result)

    def _fitted(self, known: _Labelled, z: np.ndarray, y: np.ndarray, values: int) -> AttributePredictor:
        """The predictor that labels and, round by round, the pseudo-labels of images z [n, d] of classes y [n] make."""
        predictor = AttributePredictor(known.features, known.attribute, values)
        for _ in range(self.keys.ROUNDS if len(z) else 0):
            p = predictor.probabilities(z)
            guess = p.argmax(axis=1)
            chosen = confident(
                p.max(axis=1), y * values + guess, known.label * values + known.attribute, self.keys.THRESHOLD
            )
            predictor = AttributePredictor(
                np.concatenate([known.features, z[chosen]]), np.concatenate([known.attribute, guess[chosen]]), values
            )
        return predictor


def confident(p: np.ndarray, group: np.ndarray, labelled: np.ndarray, threshold: float) -> np.ndarray:
    """Indices of the pseudo-labels that count: certainties p [n], pseudo-groups [n], groups of the labelled images [l].

    Groups without a label count as those with the fewest.
    """
    number = np.bincount(labelled, minlength=int(group.max(initial=0)) + 1)
    present = np.union1d(labelled, group)
    smallest = present[number[present].argmin()]
    of_smallest = np.flatnonzero((group == smallest) & (p >= threshold))
    most = number[smallest] + len(of_smallest)
    chosen = [of_smallest]
    for g in present[present != smallest]:
        members = np.flatnonzero(group == g)
        order = members[np.argsort(-p[members], kind="stable")]
        chosen.append(order[: max(most - number[g], 0)])
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class _Labelled:
    """Labelled images: ``features`` [l, d], ``label`` [l] of the class, ``attribute`` [l]."""

    features: np.ndarray
    label: np.ndarray
    attribute: np.ndarray
