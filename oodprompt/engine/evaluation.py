"""The one place where metrics are computed: accuracy, macro F1, and accuracy by group."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from sklearn.metrics import f1_score
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.registry import EVALUATOR_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum, attribute_name

# What an epoch can be chosen by on validation data. Pseudo-groups (class, pseudo-attribute) need no attribute labels.
CRITERIA = ("accuracy", "worst_group_accuracy", "worst_pseudo_group_accuracy")


@EVALUATOR_REGISTRY.register()
class Classification:
    """Collects predictions batch by batch; ``evaluate`` computes and prints.

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
        """Print the metrics in Dassl's lines, which upstream's ``parse_test_res.py`` reads."""
        print("=> result")
        print(f"* total: {metrics['num_samples']:,}")
        print(f"* correct: {round(metrics['accuracy'] * metrics['num_samples']):,}")
        print(f"* accuracy: {100 * metrics['accuracy']:.1f}%")
        print(f"* error: {100 * (1 - metrics['accuracy']):.1f}%")
        print(f"* macro_f1: {100 * metrics['macro_f1']:.1f}%")
        if metrics["groups"]:
            print(f"* worst_group: {100 * metrics['worst_group_accuracy']:.1f}%")
            print(f"* adjusted_average: {100 * metrics['adjusted_average_accuracy']:.1f}%")
            print(f"* gap: {100 * metrics['gap']:.1f}%")
            for group in metrics["groups"]:
                print(
                    f"* group: {group['class']} / {group['attribute']}\ttotal: {group['num_samples']:,}\t"
                    f"train: {group['num_train']:,}\tacc: {100 * group['accuracy']:.1f}%"
                )
        if self.cfg.TEST.PER_CLASS_RESULT:
            print("=> per-class result")
            for i, row in enumerate(metrics["classes"]):
                correct = round(row["accuracy"] * row["num_samples"])
                print(
                    f"* class: {i} ({row['class']})\ttotal: {row['num_samples']:,}\t"
                    f"correct: {correct:,}\tacc: {100 * row['accuracy']:.1f}%"
                )
            average = sum(row["accuracy"] for row in metrics["classes"]) / len(metrics["classes"])
            print(f"* average: {100 * average:.1f}%")

    def confusion_matrix(self) -> Tensor:
        """Share of class i (row) predicted as class j (column), [C, C]; rows of absent classes are zero."""
        classes = self.dataset.num_classes
        counts = torch.bincount(torch.cat(self._label) * classes + torch.cat(self._prediction), minlength=classes**2)
        counts = counts.view(classes, classes).double()
        return counts / counts.sum(1, keepdim=True).clamp(min=1)


def group_metrics(
    prediction: Tensor, label: Tensor, attribute: Tensor, train: Sequence[Datum], dataset: DatasetBase
) -> OrderedDict[str, Any]:
    """Metrics of predicted classes [N] against labels [N], by group (class, attribute).

    ``worst_group_accuracy`` = the lowest accuracy of a group that has test images; ``adjusted_average_accuracy`` =
    sum over groups of (training share of the group) x (its accuracy), Sagawa et al. 2020's convention for
    Waterbirds; ``gap`` = accuracy - worst_group_accuracy. Group entries are empty and these three None when an
    attribute is unknown.
    """
    correct = (prediction == label).double()
    metrics: OrderedDict[str, Any] = OrderedDict(
        accuracy=correct.mean().item(),
        macro_f1=float(f1_score(label.numpy(), prediction.numpy(), average="macro", labels=label.unique().numpy())),
        num_samples=len(label),
        worst_group_accuracy=None,
        adjusted_average_accuracy=None,
        gap=None,
        groups=[],
        classes=[],
    )
    for i, name in enumerate(dataset.classnames):
        mine = label == i
        if mine.any():
            metrics["classes"].append(
                {"class": name, "num_samples": int(mine.sum()), "accuracy": correct[mine].mean().item()}
            )
    if (attribute < 0).any():
        return metrics
    in_train: dict[tuple[int, int], int] = {}
    for datum in train:
        key = (datum.label, datum.attribute)
        in_train[key] = in_train.get(key, 0) + 1
    for i, name in enumerate(dataset.classnames):
        for a in attribute.unique().tolist():
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
    for i, name in enumerate(dataset.classnames):
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
