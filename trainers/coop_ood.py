"""CoOpOOD: decoupled prompt tuning with an invariant and a spurious projection (CoOPood), plain and anchored.

Two linear layers look at the frozen image feature z; w_c are the text features of the base learner's prompts:

    z_u = l2norm(h_u(z))  invariant          z_s = l2norm(h_s(z))  spurious
    L = L_ce^u + alpha L_s + beta L_c        predict argmax_c <z_u, w_c>

    L_ce^u = CE(s z_u w^T, y)                          pull the text to the invariant feature
    L_s    = KL(Uniform || softmax(s z_s w^T))         push the text from the spurious feature (L_S uniform), or
             log(1 + exp(s z_s w_y))                   push the text of the class alone (L_S repel)

L_c couples the branches. The authors' figure feeds it with the two rows of similarities u = s z_u w^T, v = s z_s w^T [C]:

    contrast       log(1 + exp(v_y - u_y))             the text of the class is closer to z_u than to z_s
    contrast_rows  -log(exp u_y / (sum_c exp u_c + sum_c exp v_c))
    mi_rows        mean over classes of the mutual information of softmax(u) and softmax(v) within the class
    hsic_rows      mean over classes of HSIC(u, v) within the class
    hsic, xcov, club    mean over classes of dep(z_u, z_s | y): these act on the features, and send no gradient to the text

**Anchored** (our extension; ``ANCHOR: attributes``): nothing above says *which* branch is the spurious one. Names of
the spurious attribute's values, no labels, settle it. t_a are the text features of the attribute's prompts:

    L_a = CE(s z_s t^T, a_hat), a_hat = argmax_a <z, t_a>      z_s carries the attribute that zero-shot CLIP sees
    L_s with z_s held fixed, so that it moves the prompt alone
    L_c = sum_c n_c || mean_c (x - mean_c x) q^T ||_F^2 / (A sum_c n_c tr Cov_c(x)): the share of the variance within
          classes that the attribute explains, with q [A] its posterior, standardised within the class. In [0, 1] and
          free of scale, so that shrinking the feature cannot satisfy it. x = h_u(z) over the whole training set where
          z is constant (exact, one small product per step), else x = z_u of the batch

``ANCHOR: regions`` takes the presence of the regions that RaVL's discovery finds (absent, present) for the attribute, and
the means of the frozen features of images without and with them for t_a: then not even names are needed. ``groups`` does
the same with the values of TRAINER.GROUPS.

Source: Zhang et al., "Amend to Alignment: Decoupled Prompt Tuning for Mitigating Spurious Correlation in
Vision-Language Models", ICML 2024 (PMLR 235). The abstract and the authors' figure settle the two linear layers, the
three losses and what they act on; the loss formulas are a reconstruction. Every point that the sources at hand leave
open is a key below, marked [open].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.attributes import DiscoveredAttributes, PseudoAttributes
from oodprompt.methods.contracts import Alignment, Context, Contribution, Debiaser, Step
from oodprompt.methods.dependence import (
    Club,
    RunningShare,
    batch_share,
    cross_covariance,
    eraser,
    explained_share,
    hsic,
    mutual_information,
    standardise_within,
    within_class_moments,
    within_classes,
)
from oodprompt.methods.groups import GroupAttributes
from oodprompt.methods.heads import Head

declare(
    "TRAINER.COOPOOD",
    {
        "ALPHA": Key(0.1, "Weight of L_s. [open]", at_least=0),
        "BETA": Key(0.3, "Weight of L_c of the plain method. [open]", at_least=0),
        "L_C": Key(
            "hsic_rows",
            "L_c of the plain method (above): on the rows of similarities, as in the authors' figure (contrast, contrast_rows, "
            "mi_rows, hsic_rows), or on the features, which the figure excludes (hsic, xcov, club). [open]",
            choices=("contrast", "contrast_rows", "mi_rows", "hsic_rows", "hsic", "xcov", "club", "none"),
        ),
        "L_S": Key(
            "repel",
            "L_s of the plain method (above): classes equally likely by z_s (uniform), or the text of the class far from z_s "
            "(repel). [open]",
            choices=("uniform", "repel"),
        ),
        "MIN_PER_CLASS": Key(
            4,
            "L_c leaves out classes with fewer images in the batch.",
            at_least=2,
            error="{key}: one image tells nothing of dependence; give 2 or more",
        ),
        "LR": Key(1e-4, "Learning rate of the projections. [open]", at_least=0),
        "BIAS": (True, "Projections have a bias. [open]"),
        "INIT": Key(
            "identity",
            "Projections start as identity plus noise, or random (torch's default). [open]",
            choices=("identity", "random"),
        ),
        "INIT_NOISE": Key(0.01, "Standard deviation of the noise on the identity. [open]", at_least=0),
        "NORMALIZE_INPUT": (
            True,
            "Projections see the normalised image feature; else one of CLIP's usual length 10. [open]",
        ),
        "DETACH_HS": (False, "L_s moves the prompt alone, not h_s (always so when anchored). [open]"),
        "PHASES": Key(
            "alternating",
            "joint: one loss; alternating: a step on (prompt, h_u), then one on (prompt, h_s). Plain only. [open]",
            choices=("joint", "alternating"),
        ),
        "INFERENCE": Key(
            "invariant",
            "Predict from z_u (invariant) or z (raw); the other is reported too. [open]",
            choices=("invariant", "raw"),
        ),
        "ANCHOR": Key(
            "none",
            "none: the method of the paper; attributes: anchored on the names of the attribute; regions: on the presence of "
            "the regions that discovery finds (DISCOVERY.*), without names; groups: on the values of TRAINER.GROUPS.",
            choices=("none", "attributes", "regions", "groups"),
        ),
        "ANCHOR_ALPHA": Key(0.0, "Weight of L_s when anchored.", at_least=0),
        "ANCHOR_BETA": Key(3000.0, "Weight of L_c when anchored and the image tower is frozen.", at_least=0),
        "ANCHOR_BETA_TOWER": Key(
            100.0,
            "Weight of L_c when anchored and the base trains the image tower, which the penalty then steers too.",
            at_least=0,
        ),
        "ANCHOR_L_C": Key(
            "share",
            "L_c when anchored: share (of variance, above), or xcov, the squared covariance of z_u in the batch.",
            choices=("share", "xcov"),
        ),
        "ANCHOR_STATISTICS": Key(
            "auto",
            "L_c when anchored over the training set (train), each batch alone (batch), the batches so far (running), "
            "or auto: train where features are frozen, else running.",
            choices=("auto", "train", "batch", "running"),
        ),
        "ANCHOR_MOMENTUM": Key(
            0.95,
            "Statistics over the batches so far fade by this factor per batch.",
            at_least=0,
            below=1,
            error="{key}: {value} is not in [0, 1)",
        ),
        "ANCHOR_GAMMA": Key(1.0, "Weight of L_a, which trains h_s alone.", at_least=0),
        "ANCHOR_START": Key(
            "identity",
            "h_u starts as INIT says (identity) or as the map that erases the attribute (erased).",
            choices=("identity", "erased"),
        ),
        "ANCHOR_LR": Key(1e-3, "Learning rate of the projections when anchored.", at_least=0),
    },
)


class DecoupledProjections(Debiaser):
    """The projections h_u, h_s and their losses, over any prompt learner."""

    model_name = "coopood"
    predicts = True
    steps: Tensor
    attribute_text: Tensor  # [A, d]
    not_loaded = (
        "running.cross",
        "running.variance",
        "running.count",
    )  # of the classes trained on, and of no use later

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys = keys = cfg.TRAINER.COOPOOD
        takes_turns = keys.ANCHOR == "none" and keys.PHASES == "alternating"
        if takes_turns and keys.DETACH_HS and (keys.L_C == "none" or not keys.BETA):
            raise UserError(
                "TRAINER.COOPOOD.DETACH_HS: without L_c (L_C none or BETA 0) nothing trains h_s in its turn; set "
                "DETACH_HS False or PHASES joint"
            )
        width = context.clip.shape.embed_dim
        self.h_u, self.h_s = (self._projection(width) for _ in range(2))
        self.club = Club(width) if keys.L_C == "club" and keys.ANCHOR == "none" else None
        self.scale = context.clip.logit_scale.exp().item()
        self._latest: tuple[Alignment | None, Tensor | None] = None, None
        self.context, self.anchored = context, keys.ANCHOR != "none"
        self.alternating, self.spurious_turn = keys.PHASES == "alternating" and not self.anchored, False
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))  # tells whose turn it is
        self.steps_taken = 0  # the same where the host need not wait for it
        if self.anchored:
            # [A, d]; not in the checkpoint: they follow from CLIP and the names, or from what discovery found
            count = GroupAttributes(context.attributes).count if keys.ANCHOR == "groups" else 2
            text = context.attributes.pseudo.text if keys.ANCHOR == "attributes" else torch.zeros(count, width)
            self.register_buffer("attribute_text", text, persistent=False)
        statistics = keys.ANCHOR_STATISTICS
        if statistics == "auto":
            statistics = "train" if context.features_are_frozen else "running"
        if self.anchored and statistics == "train" and not context.features_are_frozen:
            raise UserError(
                "TRAINER.COOPOOD.ANCHOR_STATISTICS train: the base trains the image tower; use running, batch or auto"
            )
        if self.anchored and statistics == "running":
            attributes = len(self.attribute_text)
            self.running = RunningShare(len(context.data.classnames), width, attributes, keys.ANCHOR_MOMENTUM)
        self.statistics = statistics

    def _projection(self, width: int) -> nn.Linear:
        layer = nn.Linear(width, width, bias=self.keys.BIAS)
        if self.keys.INIT == "identity":
            with torch.no_grad():
                layer.weight.copy_(torch.eye(width) + self.keys.INIT_NOISE * torch.randn(width, width))
                if layer.bias is not None:
                    layer.bias.zero_()
        return layer

    @classmethod
    def learning_rate(cls, cfg: CfgNode) -> float:
        keys = cfg.TRAINER.COOPOOD
        return keys.LR if keys.ANCHOR == "none" else keys.ANCHOR_LR

    def check(self) -> None:
        if not self.context.learner.ce_weight:
            raise UserError(
                "CoOpOOD learns its projections by cross-entropy, which has no part in the base's loss; give it one, as with "
                "TRAINER.FINETUNE.CAPTIONS 0.8"
            )

    def before_train(self) -> None:
        self.steps_taken = int(self.steps)
        if self.anchored:
            train, attributes = self.context.data.train, self.context.attributes
            anchor: PseudoAttributes | DiscoveredAttributes | GroupAttributes = attributes.pseudo
            if self.keys.ANCHOR in ("regions", "groups"):
                anchor = attributes.discovered if self.keys.ANCHOR == "regions" else GroupAttributes(attributes)
                self.attribute_text = anchor.prototypes(train)
            self.pseudo_attribute = anchor.of(train)
            self.posterior = standardise_within(anchor.posterior(train), train.label)  # [N, A]
            if self.statistics == "train":
                self.moments = within_class_moments(train.features(), self.posterior, train.label)
            if self.keys.ANCHOR_START == "erased" and not self.steps_taken:
                self._start_erased(train.features(), train.label)

    @torch.no_grad()
    def _start_erased(self, z: Tensor, label: Tensor) -> None:
        """h_u becomes the map that erases the attribute; a bias keeps the mean of z [N, d]."""
        W = eraser(z, self.posterior, label)
        self.h_u.weight.copy_(W)
        if self.h_u.bias is not None:
            scale = 1 if self.keys.NORMALIZE_INPUT else 10
            self.h_u.bias.copy_(scale * (z.mean(dim=0) - W @ z.mean(dim=0)))

    def project(self, layer: nn.Linear, z: Tensor) -> Tensor:
        """z [B, d], normalised -> l2norm(layer(z))."""
        return F.normalize(layer(z if self.keys.NORMALIZE_INPUT else 10 * z), dim=-1)

    def before_step(self) -> None:
        if self.alternating:
            self.spurious_turn = self.steps_taken % 2 == 1
            # The layer whose turn it is not gets no gradient at all, so that momentum and weight decay rest too.
            self.h_u.requires_grad_(not self.spurious_turn)
            self.h_s.requires_grad_(self.spurious_turn)

    def predict(self, alignment: Alignment) -> Tensor:
        if self.keys.INFERENCE == "raw" and not self.training:
            return alignment.logits
        z_u = self.project(self.h_u, alignment.image_features)
        if self.training:
            self._latest = alignment, z_u  # the losses of this alignment take the same projection
        return alignment.compare(z_u)

    def head(self, head: Head) -> Head:
        if self.keys.INFERENCE == "raw":
            return head
        return head.through((1 if self.keys.NORMALIZE_INPUT else 10) * self.h_u.weight, self.h_u.bias)

    def other_predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        if self.keys.INFERENCE == "raw":
            return {"through z_u": alignment.compare(self.project(self.h_u, alignment.image_features))}
        return {"through raw z": alignment.logits}

    def contribute(self, step: Step) -> Contribution:
        z, y = step.alignment.image_features, step.label
        (alignment, z_u), self._latest = self._latest, (None, None)
        if z_u is None or alignment is not step.alignment:
            z_u = self.project(self.h_u, z)
        z_s = self.project(self.h_s, z)
        contribution = self._anchored(step, z_u, z_s) if self.anchored else self._plain(step.alignment, y, z_u, z_s)
        self.steps += 1
        self.steps_taken += 1
        return contribution

    def _plain(self, alignment: Alignment, y: Tensor, z_u: Tensor, z_s: Tensor) -> Contribution:
        keys = self.keys
        if self.alternating:  # the branch whose turn it is not is held fixed
            z_u, z_s = (z_u.detach(), z_s) if self.spurious_turn else (z_u, z_s.detach())
        spurious = alignment.compare(z_s.detach() if keys.DETACH_HS else z_s)
        L_s = uniformity_loss(spurious) if keys.L_S == "uniform" else F.softplus(_of_class(spurious, y))
        L_c = self._coupling(alignment, y, z_u, z_s) if keys.BETA else None
        log = {"L_s": L_s.mean()} | ({"L_c": L_c} if L_c is not None else {})
        penalty = keys.BETA * L_c if L_c is not None else None
        if not self.alternating:
            return Contribution(per_sample_loss=keys.ALPHA * L_s, penalty=penalty, log=log)
        if not self.spurious_turn:
            return Contribution(penalty=penalty, log=log)
        penalty = keys.ALPHA * L_s.mean() + (0 if penalty is None else penalty)
        return Contribution(sample_weights=torch.zeros_like(L_s), penalty=penalty, log=log)

    def _coupling(self, alignment: Alignment, y: Tensor, z_u: Tensor, z_s: Tensor) -> Tensor | None:
        """L_c of the plain method."""
        name = self.keys.L_C
        if name == "none":
            return None
        if name.startswith("contrast"):
            return (contrast if name == "contrast" else contrast_rows)(
                alignment.compare(z_u), alignment.compare(z_s), y
            )
        x, x_s = (alignment.compare(z_u), alignment.compare(z_s)) if name.endswith("_rows") else (z_u, z_s)
        if name == "mi_rows":
            x, x_s = F.softmax(x, dim=1), F.softmax(x_s, dim=1)
        measures = {
            "hsic": hsic,
            "hsic_rows": hsic,
            "mi_rows": mutual_information,
            "xcov": cross_covariance,
            "club": self.club,
        }
        dependence = measures[name]
        assert dependence is not None, "CLUB is made where L_C asks for it"
        return within_classes(dependence, x, x_s, y, self.keys.MIN_PER_CLASS)

    def _anchored(self, step: Step, z_u: Tensor, z_s: Tensor) -> Contribution:
        keys = self.keys
        L_a = F.cross_entropy(
            self.scale * z_s @ self.attribute_text.T, self.pseudo_attribute[step.index], reduction="none"
        )
        per_sample = keys.ANCHOR_GAMMA * L_a
        with torch.set_grad_enabled(torch.is_grad_enabled() and keys.ANCHOR_ALPHA > 0):  # else it is only looked at
            L_s = uniformity_loss(step.alignment.compare(z_s.detach()))
        if keys.ANCHOR_ALPHA:
            per_sample = keys.ANCHOR_ALPHA * L_s + per_sample
        if keys.ANCHOR_L_C == "xcov":
            L_c = within_classes(cross_covariance, z_u, self.posterior[step.index], step.label, keys.MIN_PER_CLASS)
        elif self.statistics == "train":
            L_c = explained_share(*self.moments, self.h_u.weight)
        elif self.statistics == "running":
            L_c = self.running(z_u, self.posterior[step.index], step.label)
        else:
            L_c = batch_share(z_u, self.posterior[step.index], step.label)
        return Contribution(
            per_sample_loss=per_sample,
            penalty=(keys.ANCHOR_BETA if self.context.features_are_frozen else keys.ANCHOR_BETA_TOWER) * L_c,
            log={"L_s": L_s.mean(), "L_c": L_c, "L_a": L_a.mean()},
        )


def uniformity_loss(logits: Tensor) -> Tensor:
    """KL(Uniform || softmax(logits)), [B, C] -> [B]; 0 when all classes are equally likely.

    Equals -mean_c log p_c - log C.
    """
    return -F.log_softmax(logits, dim=1).mean(dim=1) - math.log(logits.shape[1])


def _of_class(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1)).squeeze(1)


def contrast(u: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """mean_i -log sigma(u_iy - v_iy) of rows u, v [B, C]: the class's text against the two features of an image."""
    return F.softplus(_of_class(v - u, y)).mean()


def contrast_rows(u: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """mean_i -log( exp u_iy / (sum_c exp u_ic + sum_c exp v_ic) ) of rows u, v [B, C]: InfoNCE with both rows below."""
    return F.cross_entropy(torch.cat([u, v], dim=1), y)


@TRAINER_REGISTRY.register()
class CoOpOOD(PromptTrainer):
    """CoOPood: decoupled prompt tuning over any base; plain, or anchored on attribute names (Zhang et al. 2024)."""

    debiaser_class = DecoupledProjections
