"""The one place where models are evaluated and metrics computed: accuracy, macro F1, and accuracy by group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from sklearn.metrics import f1_score
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.registry import EVALUATOR_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum, attribute_name, told_apart
from oodprompt.data.distributed import gather_rows
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
    """Collects predictions batch by batch; ``evaluate`` computes, ``report`` reports.

    A *group* is a pair (class, attribute). Accuracies are fractions in [0, 1]; printed lines are Dassl's, in per cent.
    """

    def __init__(self, cfg: CfgNode, dataset: DatasetBase) -> None:
        self.cfg, self.dataset = cfg, dataset
        self.reset()

    def reset(self) -> None:
        self._prediction: list[Tensor] = []
        self._label: list[Tensor] = []
        self._attribute: list[Tensor] = []

    def process(self, logits: Tensor, label: Tensor, attribute: Tensor) -> None:
        """``logits`` [B, C], ``label`` [B], ``attribute`` [B] (-1: unknown)."""
        self._prediction.append(logits.argmax(dim=1).cpu())
        self._label.append(label.cpu())
        self._attribute.append(attribute.cpu())

    def evaluate(self, train: Sequence[Datum]) -> OrderedDict[str, Any]:
        """All metrics; ``train`` gives the training share of each group. The first value is the accuracy."""
        prediction, label, attribute = (torch.cat(x) for x in (self._prediction, self._label, self._attribute))
        return group_metrics(prediction, label, attribute, train, self.dataset)

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
        """Share of class i (row) predicted as class j (column), [C, C]; rows of absent classes are zero."""
        classes = self.dataset.num_classes
        counts = torch.bincount(torch.cat(self._label) * classes + torch.cat(self._prediction), minlength=classes**2)
        counts = counts.view(classes, classes).double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


def report_groups(metrics: dict[str, Any]) -> None:
    """Report worst-group accuracy and the groups, in lines of Dassl's form; nothing where attributes are unknown."""
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

    ``evaluator`` collects the prediction that counts; ``another()`` makes one of its kind. ``pseudo`` [N] are the
    pseudo-attributes of the split's images, where accuracy by pseudo-group is wanted.
    """

    def __init__(self, evaluator: Any, another: Callable[[], Any], pseudo: Tensor | None = None) -> None:
        evaluator.reset()
        self._evaluators, self._another, self._pseudo = {"": evaluator}, another, pseudo
        self._by_pseudo_group: Any = another() if pseudo is not None else None

    def process(self, predictions: dict[str, Tensor], label: Tensor, attribute: Tensor, index: Tensor) -> None:
        """``predictions``: logits [B, C] by name, the one that counts under ""; label, attribute, index [B]."""
        for name, logits in predictions.items():
            if name not in self._evaluators:
                self._evaluators[name] = self._another()
            self._evaluators[name].process(logits, label, attribute)
        if self._pseudo is not None:
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
        logits = {name: gather_rows(values) for name, values in predictions(batch).items()}
        evaluation.process(logits, *(gather_rows(batch[key].to(device)) for key in ("label", "attribute", "index")))
    return evaluation.metrics(train)


def group_metrics(
    prediction: Tensor, label: Tensor, attribute: Tensor, train: Sequence[Datum], dataset: DatasetBase
) -> OrderedDict[str, Any]:
    """Metrics of predicted classes [N] against labels [N], by group (class, attribute).

    ``worst_group_accuracy`` = the lowest accuracy of a group that has test images; ``adjusted_average_accuracy`` =
    sum over groups of (training share of the group) x (its accuracy), Sagawa et al. 2020's convention for
    Waterbirds; ``gap`` = accuracy - worst_group_accuracy. Groups are over the images whose attribute is known;
    ``num_without_attribute`` counts the others. Where there are no others, groups are empty and these three None.
    """
    correct = (prediction == label).double()
    metrics: OrderedDict[str, Any] = OrderedDict(
        accuracy=correct.mean().item(),
        macro_f1=float(f1_score(label.numpy(), prediction.numpy(), average="macro", labels=label.unique().numpy())),
        num_samples=len(label),
        worst_group_accuracy=None,
        adjusted_average_accuracy=None,
        gap=None,
        num_without_attribute=int((attribute < 0).sum()),
        groups=[],
        classes=[],
    )
    for i, name in enumerate(told_apart(dataset.classnames)):
        mine = label == i
        if mine.any():
            metrics["classes"].append(
                {"class": name, "num_samples": int(mine.sum()), "accuracy": correct[mine].mean().item()}
            )
    if metrics["num_without_attribute"] == len(label):
        return metrics
    in_train: dict[tuple[int, int], int] = {}
    for datum in train:
        key = (datum.label, datum.attribute)
        in_train[key] = in_train.get(key, 0) + 1
    for i, name in enumerate(told_apart(dataset.classnames)):
        for a in attribute[attribute >= 0].unique().tolist():
            mine = (label == i) & (attribute == a)
            if mine.any():
                metrics["groups"].append(
                    {
                        "class": name,
                        "attribute": attribute_name(dataset, a),
                        "num_samples": int(mine.sum()),
                        "num_train": in_train.get((i, a), 0),
                        "accuracy": correct[mine].mean().item(),
                    }
                )
    groups = metrics["groups"]
    metrics["worst_group_accuracy"] = min(group["accuracy"] for group in groups)
    weight = sum(group["num_train"] for group in groups)
    if weight:
        metrics["adjusted_average_accuracy"] = sum(g["num_train"] * g["accuracy"] for g in groups) / weight
    else:
        metrics["adjusted_average_accuracy"] = metrics["accuracy"]
    metrics["gap"] = metrics["accuracy"] - metrics["worst_group_accuracy"]
    return metrics


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
