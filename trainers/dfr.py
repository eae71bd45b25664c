"""DFR, deep feature reweighting: after plain training, a new last layer fitted on group-balanced validation images.

z are the image features of the trained model, [d]; mean and std those of the training images, per dimension:

    base        trained by cross-entropy alone; its prediction stays in force until the last epoch is over
    z~          (z - mean) / std
    (a, b)(S)   L1-regularised logistic regression (inverse strength c) of y on z~ over the images S
    c           chosen among C: fitted on a group-balanced subset of half of the validation images (each group halved),
                the one with the best worst-group accuracy on the other half; the first of equals
    a, b        mean of (a, b)(S_k) over NUM_RETRAINS group-balanced subsets S_k of all validation images
    logits      W z + v   with W = a / std, v = b - W mean: the same function on features as they are

Two classes: logits (-f/2, f/2) of the one decision f. More: one regression per class against the rest, whose decisions
are the logits. A balanced subset has min_g n_g images of each group that validation images have.

Validation images are used up by the fit: accuracy on them says little afterwards, and they cannot choose an epoch
(TEST.FINAL_MODEL best_val is refused). Over learners that leave the image tower alone, z is CLIP's own, so that the
prediction no longer depends on the prompts; what they predict is reported beside it.

Source: Kirichenko, Izmailov, Wilson, "Last layer re-training is sufficient for robustness to spurious correlations",
ICLR 2023 (arXiv 2204.02937), DFR on validation data; the authors' dfr_evaluate_spurious.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from oodprompt.trainers.resampling import balanced_subset
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data.seeding import HEAD, derive_seed
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.contracts import Alignment, Context, Contribution, Debiaser, Step
from oodprompt.methods.heads import Head

declare(
    "TRAINER.DFR",
    {
        "C": Key(
            (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01),
            "Inverse strengths of the L1 penalty, among which half of the validation images choose.",
            above=0,
            test=bool,
            error="{key}: {value} is not possible; give numbers above 0, as (1.0, 0.1)",
        ),
        "NUM_RETRAINS": Key(
            20, "Group-balanced subsets of the validation images over which the last layer is averaged.", at_least=1
        ),
    },
)


def l1_penalty() -> dict[str, Any]:
    """The options of scikit-learn's ``LogisticRegression`` that say L1: version 1.8 calls it by l1_ratio."""
    from sklearn.linear_model import LogisticRegression

    old = getattr(LogisticRegression(), "penalty", "deprecated") != "deprecated"
    return {"penalty": "l1"} if old else {"l1_ratio": 1}


class LastLayer(Debiaser):
    """The last layer, which is fitted when training is over; over any prompt learner."""

    model_name = "dfr"
    predicts = True
    fitted: Tensor

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.cfg, self.keys, self.context = cfg, cfg.TRAINER.DFR, context
        classes = len(context.data.classnames)
        self.weight = nn.Parameter(torch.zeros(classes, context.clip.shape.embed_dim))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    @cached_property
    def waits(self) -> bool:
        """Whether groups are asked for after the training, whose model is the first model that makes them.

        That is where DFR is alone: its base is then trained by cross-entropy alone.
        """
        return self.cfg.TRAINER.NAME == "DFR" and not self.cfg.TRAINER.STACK and self.context.attributes.are_computed

    def check(self) -> None:
        val = self.context.data.val
        if val is None:
            raise UserError("DFR fits its last layer on validation data, and the data set has none")
        if self.cfg.OPTIM.MAX_EPOCH < 1:
            raise UserError("OPTIM.MAX_EPOCH: DFR fits its last layer after the last epoch; give 1 or more")
        if self.cfg.TEST.FINAL_MODEL == "best_val":
            raise UserError(
                "TEST.FINAL_MODEL best_val: DFR uses the validation data up to fit its last layer, after the last "
                "epoch; use last_step"
            )
        self.context.attributes.check_groups(val)
        label = val.label[val.attribute >= 0] if self.context.attributes.choice == "true" else val.label
        count = torch.bincount(label, minlength=len(self.context.data.classnames)).tolist()
        if 0 in count:
            which = " with an attribute label" if len(label) < len(val.label) else ""
            raise UserError(
                f"DFR: the validation data have no image of {self.context.data.classnames[count.index(0)]!r}{which}"
            )

    def before_train(self) -> None:
        if not self.waits:
            self._look_at_groups()
        if self.cfg.TEST.SPLIT == "val":
            logger.warning("Note: DFR fits its last layer on validation data, so results on them are too good")

    def _look_at_groups(self) -> None:
        val = self.context.data.val
        assert val is not None, "check has seen to it"
        groups = self.context.attributes.groups(val)
        self.g, self.known = groups.index[groups.known].cpu().numpy(), groups.known.cpu().numpy()
        if not self.known.all():
            logger.warning(
                f"Note: {(~self.known).sum():,} of {len(self.known):,} validation images have no attribute label; DFR is "
                "fitted on the others"
            )

    def predict(self, alignment: Alignment) -> Tensor:
        if self.training or not self.fitted:
            return alignment.logits
        return F.linear(alignment.image_features, self.weight, self.bias)

    def head(self, head: Head) -> Head:
        return Head(torch.ones(()), self.weight, self.bias) if self.fitted else head

    def other_predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        return {"base learner": alignment.logits}

    def contribute(self, step: Step) -> Contribution:
        return Contribution(penalty=0 * self.weight.sum())  # there is a gradient even where the base has no parameters

    def after_epoch(self, epoch: int) -> None:
        if epoch + 1 < self.cfg.OPTIM.MAX_EPOCH:
            return
        held_out = self.context.data.val
        assert held_out is not None, "check has seen to it"
        if self.waits:
            self.context.first_stage.adopt(epoch + 1)
            self._look_at_groups()
        train, val = (
            self.context.first_stage.outputs(s)[0].double().cpu().numpy() for s in (self.context.data.train, held_out)
        )
        val, y = val[self.known], held_out.label.cpu().numpy()[self.known]
        rng = np.random.default_rng(derive_seed(self.cfg.SEED, HEAD))
        from sklearn.preprocessing import StandardScaler  # here: it takes more than a second

        scaler = StandardScaler().fit(train)
        z = scaler.transform(val)
        c, worst = choose_c(z, y, self.g, self.keys.C, rng)
        logger.info(
            f"DFR: C {c:g}, with {worst:.1%} of the worst group right on the half of the validation images not fitted"
        )
        heads = [
            logistic(z[S], y[S], c, rng) for S in (balanced_subset(self.g, rng) for _ in range(self.keys.NUM_RETRAINS))
        ]
        a, b = (np.mean(part, axis=0) for part in zip(*heads, strict=True))
        W = a / scaler.scale_
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(W))
            self.bias.copy_(torch.from_numpy(b - W @ scaler.mean_))
        self.fitted.fill_(True)


def logistic(x: np.ndarray, y: np.ndarray, c: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """L1-regularised logistic regression of labels y [n] on x [n, d]: weights [C, d] and biases [C] of the logits."""
    classes = y.max() + 1
    from sklearn.linear_model import LogisticRegression

    seed, rows = int(rng.integers(2**31)), []
    for one in [1] if classes == 2 else range(classes):
        model = LogisticRegression(C=c, solver="liblinear", max_iter=1000, random_state=seed, **l1_penalty()).fit(
            x, y == one
        )
        rows.append(np.append(model.coef_[0], model.intercept_))
    head = np.stack([-rows[0] / 2, rows[0] / 2] if classes == 2 else rows)
    return head[:, :-1], head[:, -1]


def choose_c(
    x: np.ndarray, y: np.ndarray, g: np.ndarray, choices: Sequence[float], rng: np.random.Generator
) -> tuple[float, float]:
    """The c of the best worst-group accuracy on images that are not fitted, and that accuracy."""
    fit, judge = halves(g, rng)
    chosen = fit[balanced_subset(g[fit], rng)]
    best, best_worst = choices[0], -1.0
    for c in choices:
        a, b = logistic(x[chosen], y[chosen], c, rng)
        right = (x[judge] @ a.T + b).argmax(axis=1) == y[judge]
        worst = min((right[g[judge] == one].mean() for one in np.unique(g[judge])), default=0.0)
        if worst > best_worst:
            best, best_worst = c, worst
    return best, best_worst


def halves(g: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two halves of every group of g [n]; the odd image goes to the first."""
    first, second = [], []
    for one in np.unique(g):
        members = rng.permutation(np.flatnonzero(g == one))
        cut = -(-len(members) // 2)
        first.append(members[:cut])
        second.append(members[cut:])
    return np.concatenate(first), np.concatenate(second)


@TRAINER_REGISTRY.register()
class DFR(PromptTrainer):
    """Plain training, then a last layer fitted on group-balanced validation images (Kirichenko et al. 2023)."""

    debiaser_class = LastLayer
