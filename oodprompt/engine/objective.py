"""The objective: a prompt learner and its debiasers, summed up to one loss and one prediction."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.data.distributed import numbers_of_all
from oodprompt.data.loading import Batch
from oodprompt.data.sampling import EpochOrder
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.contracts import Alignment, Debiaser, PromptLearner, Step, StepRegions


class Objective:
    """loss = mean(weight * (ce_weight CE(prediction, y) + per-sample losses)) + penalties.

    ``debiasers`` are added in their order; ``names`` are their trainers' names and ``base_name`` that of the learner,
    for messages. Raises ``UserError`` for a stack that cannot be: two predictions, two orders of images, or two
    debiasers that both make up for the sizes of groups.
    """

    def __init__(
        self,
        learner: PromptLearner,
        debiasers: Sequence[Debiaser] = (),
        names: Sequence[str] = (),
        base_name: str = "",
    ) -> None:
        self.learner, self.debiasers, self.names, self.base_name = learner, list(debiasers), list(names), base_name
        predicting = {n: d for n, d in self._named() if d.predicts}
        ordering = {n: d for n, d in self._named() if d.epoch_order is not None}
        self.predictor = _only_one(predicting, "replace the prediction")
        aligning = [n for n, d in self._named() if d.aligns]
        if aligning and self.predictor is not None and self.predictor.has_own_text:
            raise UserError(
                f"TRAINER.STACK: {aligning[0]} changes the text features of the base, and {next(iter(predicting))} compares "
                "with its own; leave one out"
            )
        chooser = _only_one(ordering, "choose the images of an epoch")
        self.epoch_order: EpochOrder | None = chooser.epoch_order if chooser is not None else None
        self._refuse_two_corrections()

    def _named(self) -> list[tuple[str, Debiaser]]:
        return list(zip(self.names, self.debiasers, strict=True))

    def _refuse_two_corrections(self) -> None:
        """``UserError`` where two debiasers make up for the sizes of groups, which turns the imbalance round."""
        ways = {name: d.group_correction for name, d in self._named() if d.group_correction}
        weighing = [name for name, way in ways.items() if way in ("size", "batch")]
        drawing = [name for name, way in ways.items() if way in ("size", "sampler")]
        names = weighing if len(weighing) > 1 else drawing if "sampler" in ways.values() else []
        if len(names) > 1:
            raise UserError(
                f"TRAINER.STACK: {' and '.join(names)} each make up for the sizes of groups, and both together turn the "
                "imbalance round; leave one out (GroupCoOp stays with TRAINER.GROUPCOOP.BALANCE False)"
            )

    @property
    def takes_regions(self) -> bool:
        """Whether steps need the regions of the images."""
        return any(debiaser.takes_regions for debiaser in self.debiasers)

    def note_what_does_nothing(self) -> None:
        """Say so where nothing is trained and debiasers only change training."""
        names = [name for name, debiaser in self._named() if not (debiaser.predicts or debiaser.aligns)]
        if names:
            logger.info(f"Note: nothing is trained over {self.base_name}, so {', '.join(names)} changes nothing")

    def check(self) -> None:
        """Debiasers refuse what cannot be, ahead of any long work."""
        for debiaser in self.debiasers:
            debiaser.check()

    def before_train(self) -> None:
        """Debiasers get ready for training."""
        for debiaser in self.debiasers:
            debiaser.before_train()

    def before_epoch(self, epoch: int) -> None:
        for debiaser in self.debiasers:
            debiaser.before_epoch(epoch)

    def after_epoch(self, epoch: int) -> None:
        for debiaser in self.debiasers:
            debiaser.after_epoch(epoch)

    def by_group(self) -> dict[str, dict[str, float]]:
        """What debiasers draw by epoch: name of a quantity -> name of a group -> its value."""
        return {name: values for debiaser in self.debiasers for name, values in debiaser.by_group().items()}

    def align(self, alignment: Alignment) -> Alignment:
        """The alignment of which the prediction and the debiasers' terms are made: the learner's, changed in turn."""
        for debiaser in self.debiasers:
            alignment = debiaser.align(alignment) if debiaser.aligns else alignment
        return alignment

    def predict(self, alignment: Alignment) -> Tensor:
        """Logits [B, C] of the learner's alignment: the predicting debiaser's, else those of the changed alignment."""
        return self._predict(self.align(alignment))

    def _predict(self, alignment: Alignment) -> Tensor:
        return self.predictor.predict(alignment) if self.predictor else alignment.logits

    def predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        """Logits [B, C] by name: the prediction under "", and what debiasers predict otherwise."""
        aligned = self.align(alignment)
        found = {"": self._predict(aligned)}
        for debiaser in self.debiasers:
            found.update(debiaser.other_predictions(alignment if debiaser.aligns else aligned))
        return found

    def __call__(
        self, alignment: Alignment, batch: Batch, regions: StepRegions | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and scalars to print. ``alignment`` and ``regions`` are those of all processes, ``batch`` the own."""
        for debiaser in self.debiasers:
            debiaser.before_step()
        label, attribute, index = numbers_of_all(batch, alignment.image_features.device)
        aligned = self.align(alignment)
        logits = self._predict(aligned)
        step = Step(aligned, logits, label, attribute, index, regions)
        per_sample = F.cross_entropy(logits, label, reduction="none")
        if self.learner.ce_weight != 1:
            per_sample = self.learner.ce_weight * per_sample
        weights: list[Tensor] = []
        penalties = [p for p in [self.learner.penalty(alignment)] if p is not None]
        log: dict[str, Tensor] = {}
        for debiaser in self.debiasers:
            contribution = debiaser.contribute(step)
            if contribution.per_sample_loss is not None:
                per_sample = per_sample + contribution.per_sample_loss
            if contribution.sample_weights is not None:
                self._check_weighed(debiaser)
                weights.append(contribution.sample_weights)
            if contribution.penalty is not None:
                penalties.append(contribution.penalty)
            log.update(contribution.log)
        weighed = functools.reduce(operator.mul, [*weights, per_sample]) if weights else per_sample
        loss = weighed.mean()
        if penalties:
            loss = loss + sum(penalties[1:], start=penalties[0])
        accuracy = 100 * (logits.argmax(1) == label).mean(dtype=torch.float32)
        return loss, {"loss": loss.detach(), "acc": accuracy, **{k: v.detach() for k, v in log.items()}}

    def _check_weighed(self, debiaser: Debiaser) -> None:
        if not self.learner.ce_weight:
            raise UserError(
                f"{debiaser.model_name} weighs the cross-entropy of images, which has no part in the loss of "
                f"{self.base_name}; give it one, as with TRAINER.FINETUNE.CAPTIONS 0.8"
            )


def _only_one(having: dict[str, Debiaser], does: str) -> Debiaser | None:
    """The one debiaser of ``having``, if any; ``UserError`` where several each do what ``does`` says."""
    if len(having) > 1:
        raise UserError(f"TRAINER.STACK: {' and '.join(having)} each {does}; only one of a stack can")
    return next(iter(having.values()), None)
