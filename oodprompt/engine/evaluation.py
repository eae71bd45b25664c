"""The one place where models are evaluated and metrics computed: accuracy, macro F1, and accuracy by group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.registry import EVALUATOR_REGISTRY
from oodprompt.data.columns import Images
from oodprompt.data.dataset import DatasetBase, attribute_name, attribute_values, told_apart
from oodprompt.data.datum import Datum
from oodprompt.data.distributed import gather_together, numbers_of_all, whole_index
from oodprompt.data.loading import Batch
from oodprompt.log import logger

# What an epoch can be chosen by on validation data. Pseudo-groups (class, pseudo-attribute) need no attribute labels.
CRITERIA = ("accuracy", "worst_group_accuracy", "worst_pseudo_group_accuracy")


def epoch_row(
    epoch: int,
    learning_rate: float,
    means: dict[str, float],
    validation: dict[str, Any] | None,
    by_group: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What is kept of an epoch (1 is the first): rate, means of its scalars, validation metrics, curves by group.

    ``validation`` are the metrics of validation data, None where they were not evaluated; ``by_group`` are the curves
    that debiasers keep, to which accuracy by group is added.
    """
    row: dict[str, Any] = {"epoch": epoch, "lr": learning_rate, **means}
    if validation is not None:
        known = {key: validation[key] for key in CRITERIA}
        if known["worst_pseudo_group_accuracy"] is None:
            del known["worst_pseudo_group_accuracy"]
        row.update({f"val_{key}": value for key, value in known.items()})
    if by_group:
        if validation and validation["groups"]:
            accuracies = {f"{g['class']} / {g['attribute']}": g["accuracy"] for g in validation["groups"]}
            by_group = {**by_group, "validation accuracy": accuracies}
        row["by_group"] = by_group
    return row


@EVALUATOR_REGISTRY.register()
class Classification:
    """Counts predictions batch by batch; ``evaluate`` computes, ``report`` reports.

    A *group* is a pair (class, attribute). Accuracies are fractions in [0, 1]; printed lines are Dassl's, in per cent.
    """

    def __init__(self, cfg: CfgNode, dataset: DatasetBase) -> None:
        self.cfg, self.dataset = cfg, dataset
        self.reset()

    def reset(self) -> None:
        values = attribute_values(self.dataset)
        self.counts = GroupCounts(self.dataset.num_classes, values, confusion=self.cfg.TEST.COMPUTE_CMAT)

    def process(self, logits: Tensor, label: Tensor, attribute: Tensor) -> None:
        """``logits`` [B, C], ``label`` [B], ``attribute`` [B] (-1: unknown)."""
        self.counts.add(logits.argmax(dim=1), label, attribute)

    def evaluate(self, train: Sequence[Datum]) -> OrderedDict[str, Any]:
        """All metrics; ``train`` gives the training share of each group. The first value is the accuracy."""
        return self.counts.metrics(train, self.dataset)

    def report(self, metrics: dict[str, Any]) -> None:
        """Report the metrics in Dassl's lines, which upstream's ``parse_test_res.py`` reads."""
        logger.info("=> result")
        logger.info(f"* total: {metrics['num_samples']:,}")
        logger.info(f"* correct: {round(metrics['accuracy'] * metrics['num_samples']):,}")
        logger.info(f"* accuracy: {100 * metrics['accuracy']:.1f}%")
        logger.info(f"* error: {100 * (1 - metrics['accuracy']):.1f}%")
        logger.info(f"* macro_f1: {100 * metrics['macro_f1']:.1f}%")
        report_groups(metrics)
        if self.cfg.TEST.PER_CLASS_RESULT:
            logger.info("=> per-class result")
            for i, row in enumerate(metrics["classes"]):
                correct = round(row["accuracy"] * row["num_samples"])
                logger.info(
                    f"* class: {i} ({row['class']})\ttotal: {row['num_samples']:,}\t"
                    f"correct: {correct:,}\tacc: {100 * row['accuracy']:.1f}%"
                )
            average = sum(row["accuracy"] for row in metrics["classes"]) / len(metrics["classes"])
            logger.info(f"* average: {100 * average:.1f}%")

    def confusion_matrix(self) -> Tensor:
        """Share of class i (row) predicted as class j (column), [C, C]; rows of absent classes are zero.

        It is counted where TEST.COMPUTE_CMAT asks for it.
        """
        assert self.counts.confusion is not None, "TEST.COMPUTE_CMAT counts it"
        counts = self.counts.confusion.cpu().double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


def report_groups(metrics: dict[str, Any]) -> None:
    """Report worst-group accuracy and the groups, in lines of Dassl's form; nothing where all attributes are unknown."""
    if not metrics["groups"]:
        return
    logger.info(f"* worst_group: {100 * metrics['worst_group_accuracy']:.1f}%")
    logger.info(f"* adjusted_average: {100 * metrics['adjusted_average_accuracy']:.1f}%")
    logger.info(f"* gap: {100 * metrics['gap']:.1f}%")
    if unknown := metrics.get("num_without_attribute", 0):
        logger.info(f"* without attribute, in no group: {unknown:,} of {metrics['num_samples']:,} images")
    for group in metrics["groups"]:
        logger.info(
            f"* group: {group['class']} / {group['attribute']}\ttotal: {group['num_samples']:,}\t"
            f"train: {group['num_train']:,}\tacc: {100 * group['accuracy']:.1f}%"
        )


def report_other_predictions(metrics: dict[str, Any]) -> None:
    """Report what debiasers predict otherwise, a line each."""
    for name, other in metrics["other_predictions"].items():
        worst = other["worst_group_accuracy"]
        worst_text = "" if worst is None else f", worst group {100 * worst:.1f}%"
        logger.info(f"* {name}: accuracy {100 * other['accuracy']:.1f}%{worst_text}")


class Evaluation:
    """Metrics of every prediction on a split, batch by batch.

    ``evaluator`` collects the prediction that counts; ``another()`` makes one of its kind. Where accuracy by pseudo-group
    is wanted, ``by_pseudo_group`` is an evaluator of these, with the pseudo-attributes [N] of the split's images.
    """

    def __init__(
        self, evaluator: Any, another: Callable[[], Any], by_pseudo_group: tuple[Any, Tensor] | None = None
    ) -> None:
        evaluator.reset()
        self._evaluators, self._another = {"": evaluator}, another
        self._by_pseudo_group: Any = by_pseudo_group[0] if by_pseudo_group else None
        self._pseudo: Tensor | None = by_pseudo_group[1] if by_pseudo_group else None

    def process(self, predictions: dict[str, Tensor], label: Tensor, attribute: Tensor, index: Tensor) -> None:
        """``predictions``: logits [B, C] by name, the one that counts under ""; label, attribute, index [B]."""
        for name, logits in predictions.items():
            if name not in self._evaluators:
                self._evaluators[name] = self._another()
            self._evaluators[name].process(logits, label, attribute)
        if self._by_pseudo_group is not None and self._pseudo is not None:
            self._by_pseudo_group.process(predictions[""], label, self._pseudo[index])

    def metrics(self, train: Sequence[Datum]) -> dict[str, Any]:
        """Metrics of the prediction that counts; those of the others under ``other_predictions``."""
        metrics = {name: evaluator.evaluate(train) for name, evaluator in self._evaluators.items()}
        result = metrics.pop("")
        by_pseudo = self._by_pseudo_group.evaluate(train) if self._by_pseudo_group is not None else {}
        result["worst_pseudo_group_accuracy"] = by_pseudo.get("worst_group_accuracy")
        keys = ("accuracy", "worst_group_accuracy", "gap")
        result["other_predictions"] = {name: {key: m[key] for key in keys} for name, m in metrics.items()}
        return result


@torch.no_grad()
def evaluate(
    batches: Iterable[Batch],
    predictions: Callable[[Batch], dict[str, Tensor]],
    evaluation: Evaluation,
    train: Sequence[Datum],
    device: torch.device,
) -> dict[str, Any]:
    """The only evaluation loop: metrics of a split over all processes, as ``Evaluation.metrics`` has them.

    ``predictions(batch)`` gives logits by name, as ``Objective.predictions``. Models must be in evaluation mode.
    """
    for batch in batches:
        logits = predictions(batch)
        values = gather_together([*logits.values()], len(whole_index(batch)))
        evaluation.process(dict(zip(logits, values, strict=True)), *numbers_of_all(batch, device))
    return evaluation.metrics(train)


class GroupCounts:
    """How many images of each group were predicted right, whatever the number of images: nothing is kept of one.

    ``total`` and ``right`` [C, A + 2] count the images of a class (row) by attribute (column; the first is unknown, the
    last is none of the A values), ``predicted`` [C] the predictions of each class, ``confusion`` [C, C] (where it is asked
    for) class by prediction. Counts are on the device of the predictions until ``metrics``.
    """

    def __init__(self, num_classes: int, num_attributes: int, confusion: bool = False) -> None:
        self.total = torch.zeros(num_classes, num_attributes + 2, dtype=torch.long)
        self.right, self.predicted = self.total.clone(), torch.zeros(num_classes, dtype=torch.long)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long) if confusion else None

    def add(self, prediction: Tensor, label: Tensor, attribute: Tensor) -> None:
        """Count a batch: predicted classes, labels, and attributes (-1: unknown), all [B]. The host does not wait."""
        if self.total.device != prediction.device:
            self.total, self.right, self.predicted = (
                counts.to(prediction.device) for counts in (self.total, self.right, self.predicted)
            )
            self.confusion = None if self.confusion is None else self.confusion.to(prediction.device)
        label, attribute = (x.to(prediction.device, non_blocking=True) for x in (label, attribute))
        classes, columns = self.total.shape
        place, one = label * columns + attribute.clamp(min=-1, max=columns - 2) + 1, torch.ones_like(label)
        self.total.view(-1).index_add_(0, place, one)
        self.right.view(-1).index_add_(0, place, (prediction == label).long())
        self.predicted.index_add_(0, prediction, one)
        if self.confusion is not None:
            self.confusion.view(-1).index_add_(0, label * classes + prediction, one)

    def metrics(self, train: Sequence[Datum], dataset: DatasetBase) -> OrderedDict[str, Any]:
        """Metrics of all images that were counted, by group (class, attribute).

        ``worst_group_accuracy`` = the lowest accuracy of a group that has test images; ``adjusted_average_accuracy`` =
        sum over groups of (training share of the group) x (its accuracy), Sagawa et al. 2020's convention for
        Waterbirds; ``gap`` = accuracy - worst_group_accuracy. Groups are those of the images whose attribute is known;
        ``num_without_attribute`` are the others. Where no attribute is known, there are no groups, and these three are
        None.
        """
        by_group, right_by_group, predicted = self.total.cpu(), self.right.cpu(), self.predicted.cpu()
        if by_group[:, -1].any():
            raise ValueError(
                f"an image has an attribute above {by_group.shape[1] - 3}, the last of those to be counted"
            )
        total, right, names = by_group.sum(1), right_by_group.sum(1), told_apart(dataset.classnames)
        images = int(total.sum())
        f1 = 2 * right.double() / (total + predicted)
        metrics: OrderedDict[str, Any] = OrderedDict(
            accuracy=int(right.sum()) / images,
            macro_f1=float(np.average(f1[total > 0].numpy())),
            num_samples=images,
            num_without_attribute=int(by_group[:, 0].sum()),
            worst_group_accuracy=None,
            adjusted_average_accuracy=None,
            gap=None,
            groups=[],
            classes=[],
        )
        for i, name in enumerate(names):
            if count := int(total[i]):
                metrics["classes"].append({"class": name, "num_samples": count, "accuracy": int(right[i]) / count})
        in_train = _group_sizes(Images.of(train))
        for i, name in enumerate(names):
            for a in by_group[i, 1:].nonzero()[:, 0].tolist():
                count = int(by_group[i, a + 1])
                metrics["groups"].append(
                    {
                        "class": name,
                        "attribute": attribute_name(dataset, a),
                        "num_samples": count,
                        "num_train": in_train.get((i, a), 0),
                        "accuracy": int(right_by_group[i, a + 1]) / count,
                    }
                )
        groups = metrics["groups"]
        if not groups:
            return metrics
        metrics["worst_group_accuracy"] = min(group["accuracy"] for group in groups)
        weight = sum(group["num_train"] for group in groups)
        if weight:
            metrics["adjusted_average_accuracy"] = sum(g["num_train"] * g["accuracy"] for g in groups) / weight
        else:
            metrics["adjusted_average_accuracy"] = metrics["accuracy"]
        metrics["gap"] = metrics["accuracy"] - metrics["worst_group_accuracy"]
        return metrics


def _group_sizes(images: Images) -> dict[tuple[int, int], int]:
    """(label, attribute) -> number of images."""
    pairs, counts = np.unique(np.stack([images.label, images.attribute]), axis=1, return_counts=True)
    return {(int(label), int(a)): int(n) for label, a, n in zip(*pairs, counts, strict=True)}


def group_metrics(
    prediction: Tensor, label: Tensor, attribute: Tensor, train: Sequence[Datum], dataset: DatasetBase
) -> OrderedDict[str, Any]:
    """Metrics of predicted classes [N] against labels [N], as ``GroupCounts.metrics`` has them."""
    counts = GroupCounts(dataset.num_classes, max(int(attribute.max()) + 1, 0))
    counts.add(prediction, label, attribute)
    return counts.metrics(train, dataset)


def attribute_metrics(pseudo: Tensor, label: Tensor, attribute: Tensor, dataset: DatasetBase) -> dict[str, Any]:
    """How far pseudo-attributes [N] agree with the attribute labels [N] (-1: unknown), overall and by group.

    ``accuracy`` is None without labels; ``counts`` [C][A] are the images of each pseudo-group; ``confusion`` [A][A] the
    share of images of an attribute (row) that were given each pseudo-attribute (column).
    """
    pseudo, label, attribute = (x.cpu() for x in (pseudo, label, attribute))
    values = len(dataset.attribute_prompts)
    counts = torch.bincount(label * values + pseudo, minlength=dataset.num_classes * values)
    row: dict[str, Any] = {
        "accuracy": None,
        "groups": [],
        "counts": counts.view(dataset.num_classes, values).tolist(),
        "confusion": [],
    }
    known = (attribute >= 0) & (attribute < values)
    if not known.any():
        return row
    right = (pseudo == attribute).double()
    row["accuracy"] = right[known].mean().item()
    for i, name in enumerate(told_apart(dataset.classnames)):
        for a in range(values):
            mine = (label == i) & (attribute == a)
            if mine.any():
                row["groups"].append(
                    {
                        "class": name,
                        "attribute": attribute_name(dataset, a),
                        "num_samples": int(mine.sum()),
                        "accuracy": right[mine].mean().item(),
                    }
                )
    table = torch.bincount(attribute[known] * values + pseudo[known], minlength=values**2).view(values, values).double()
    row["confusion"] = (table / table.sum(1, keepdim=True).clamp(min=1)).tolist()
    return row
