"""Metrics by hand, and the printed lines that the ecosystem's scripts read."""

from __future__ import annotations

import pickle
import re
from types import SimpleNamespace

import pytest
import torch

from oodprompt.config.keys import get_cfg_default
from oodprompt.config.registry import EVALUATOR_REGISTRY
from oodprompt.data.dataset import attribute_values
from oodprompt.data.datum import Datum
from oodprompt.engine.evaluation import Classification, GroupCounts, group_metrics

BIRDS = SimpleNamespace(classnames=["landbird", "waterbird"], num_classes=2, attribute_names=("land", "water"))
BIRDS.train_x = BIRDS.val = BIRDS.test = ()

#            landbird on land | on water | waterbird on water | on land
LABEL = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
PLACE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0])
GUESS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0])


def train_of(counts: dict[tuple[int, int], int]) -> list[Datum]:
    return [Datum.unchecked("", y, 0, "", a, "") for (y, a), n in counts.items() for _ in range(n)]


TRAIN = train_of({(0, 0): 6, (0, 1): 1, (1, 1): 2, (1, 0): 1})


def test_metrics_by_hand() -> None:
    metrics = group_metrics(GUESS, LABEL, PLACE, TRAIN, BIRDS)
    assert next(iter(metrics)) == "accuracy"
    assert metrics["num_samples"] == 12
    assert metrics["accuracy"] == pytest.approx(8 / 12)
    # landbird: 5 found of 6, 8 named; waterbird: 3 of 6, 4 named; F1 = 2 found / (there + named)
    assert metrics["macro_f1"] == pytest.approx((10 / 14 + 6 / 10) / 2)
    assert metrics["worst_group_accuracy"] == pytest.approx(1 / 3)
    assert metrics["adjusted_average_accuracy"] == pytest.approx((6 * 1 + 1 / 2 + 2 * 2 / 3 + 1 / 3) / 10)
    assert metrics["gap"] == pytest.approx(8 / 12 - 1 / 3)
    assert [tuple(group.values()) for group in metrics["groups"]] == [
        ("landbird", "land", 4, 6, 1.0),
        ("landbird", "water", 2, 1, 0.5),
        ("waterbird", "land", 3, 1, pytest.approx(1 / 3)),
        ("waterbird", "water", 3, 2, pytest.approx(2 / 3)),
    ]
    assert [tuple(row.values()) for row in metrics["classes"]] == [
        ("landbird", 6, pytest.approx(5 / 6)),
        ("waterbird", 6, pytest.approx(1 / 2)),
    ]


def test_groups_without_test_images_do_not_count() -> None:
    there = LABEL == 0
    metrics = group_metrics(GUESS[there], LABEL[there], PLACE[there], TRAIN, BIRDS)
    assert [(group["class"], group["attribute"]) for group in metrics["groups"]] == [
        ("landbird", "land"),
        ("landbird", "water"),
    ]
    assert metrics["worst_group_accuracy"] == 0.5
    assert metrics["adjusted_average_accuracy"] == pytest.approx((6 * 1 + 1 * 0.5) / 7)
    assert [row["class"] for row in metrics["classes"]] == ["landbird"]
    assert metrics["macro_f1"] == pytest.approx(10 / 11)  # only classes that are there, as Dassl has it


def test_groups_without_training_images_weigh_nothing() -> None:
    metrics = group_metrics(GUESS, LABEL, PLACE, train_of({(1, 0): 5}), BIRDS)
    assert metrics["adjusted_average_accuracy"] == pytest.approx(1 / 3)
    metrics = group_metrics(GUESS, LABEL, PLACE, train_of({(0, -1): 3}), BIRDS)
    assert metrics["adjusted_average_accuracy"] == metrics["accuracy"]


def test_groups_are_over_the_images_whose_attribute_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    place = PLACE.clone()
    place[[3, 9]] = -1  # a landbird on land that is right, and the only waterbird on land that is
    judge = evaluator()
    judge.process(torch.nn.functional.one_hot(GUESS, 2), LABEL, place)
    metrics = judge.evaluate(TRAIN)
    assert metrics["num_without_attribute"] == 2 and metrics["num_samples"] == 12
    assert metrics["accuracy"] == pytest.approx(8 / 12)
    assert [(g["num_samples"], g["accuracy"]) for g in metrics["groups"]] == [
        (3, 1.0),
        (2, 0.5),
        (2, 0.0),
        (3, pytest.approx(2 / 3)),
    ]
    assert metrics["worst_group_accuracy"] == 0 and metrics["gap"] == pytest.approx(8 / 12)
    assert metrics["adjusted_average_accuracy"] == pytest.approx((6 * 1 + 1 / 2 + 2 * 2 / 3 + 0) / 10)
    judge.report(metrics)
    assert "* without attribute, in no group: 2 of 12 images\n" in capsys.readouterr().out
    assert group_metrics(GUESS, LABEL, PLACE, TRAIN, BIRDS)["num_without_attribute"] == 0


def test_no_known_attribute_gives_no_groups() -> None:
    metrics = group_metrics(GUESS, LABEL, torch.full_like(PLACE, -1), TRAIN, BIRDS)
    assert metrics["groups"] == [] and metrics["num_without_attribute"] == 12
    assert {metrics[key] for key in ("worst_group_accuracy", "adjusted_average_accuracy", "gap")} == {None}
    assert metrics["accuracy"] == pytest.approx(8 / 12)
    assert metrics["num_without_attribute"] == 12


def test_memory_of_an_evaluation_does_not_grow_with_the_images() -> None:
    counts = GroupCounts(2, 2)
    sizes = []
    for _ in range(3):
        counts.add(GUESS, LABEL, PLACE)
        sizes.append(len(pickle.dumps(counts)))
    assert len(set(sizes)) == 1
    assert counts.metrics(TRAIN, BIRDS)["num_samples"] == 36


def test_attributes_without_names_are_numbered() -> None:
    metrics = group_metrics(GUESS, LABEL, PLACE + 1, TRAIN, BIRDS)
    assert {group["attribute"] for group in metrics["groups"]} == {"water", "2"}


def test_an_attribute_beyond_those_that_are_counted_is_an_error() -> None:
    counts = GroupCounts(2, 2)
    counts.add(GUESS, LABEL, PLACE + 2 * (LABEL == 0))
    with pytest.raises(ValueError, match="an attribute above 1"):
        counts.metrics(TRAIN, BIRDS)


def test_counts_are_those_of_every_attribute_that_an_image_or_a_name_has() -> None:
    birds = SimpleNamespace(**{**vars(BIRDS), "test": train_of({(0, 4): 1})})
    assert (attribute_values(BIRDS), attribute_values(birds)) == (2, 5)
    cfg = get_cfg_default()
    judge = EVALUATOR_REGISTRY.get("Classification")(cfg, birds)
    judge.process(torch.eye(2), torch.tensor([0, 0]), torch.tensor([4, -1]))
    metrics = judge.evaluate(TRAIN)
    assert [(g["attribute"], g["accuracy"]) for g in metrics["groups"]] == [("4", 1.0)]
    assert metrics["num_without_attribute"] == 1


def test_classes_of_one_name_are_told_apart() -> None:
    cranes = SimpleNamespace(**{**vars(BIRDS), "classnames": ["crane", "crane"]})
    metrics = group_metrics(GUESS, LABEL, PLACE, TRAIN, cranes)
    assert [row["class"] for row in metrics["classes"]] == ["crane (class 0)", "crane (class 1)"]
    assert [row["class"] for row in metrics["groups"]] == ["crane (class 0)"] * 2 + ["crane (class 1)"] * 2


def evaluator(per_class: bool = False) -> Classification:
    cfg = get_cfg_default()
    cfg.TEST.PER_CLASS_RESULT, cfg.TEST.COMPUTE_CMAT = per_class, True
    return EVALUATOR_REGISTRY.get("Classification")(cfg, BIRDS)


def test_evaluator_collects_batches_and_forgets_on_reset() -> None:
    judge = evaluator()
    for _ in range(2):
        judge.reset()
        for part in (slice(0, 5), slice(5, 5), slice(5, 12)):
            judge.process(torch.nn.functional.one_hot(GUESS, 2)[part] * 3.5 - 9, LABEL[part], PLACE[part])
        assert judge.evaluate(TRAIN) == group_metrics(GUESS, LABEL, PLACE, TRAIN, BIRDS)
    expected = torch.tensor([[5, 1], [3, 3]], dtype=torch.double) / 6
    assert torch.equal(judge.confusion_matrix(), expected)


def test_confusion_matrix_of_an_absent_class_is_zero() -> None:
    judge = evaluator()
    judge.process(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor([0]))
    assert judge.confusion_matrix().tolist() == [[0, 1], [0, 0]]


def test_printed_lines_are_dassls(capsys: pytest.CaptureFixture[str]) -> None:
    correct = torch.arange(1200) < 1024
    label = torch.arange(1200) % 2
    judge = evaluator(per_class=True)
    judge.process(torch.nn.functional.one_hot(torch.where(correct, label, 1 - label), 2), label, label)
    judge.report(judge.evaluate(TRAIN))
    out = capsys.readouterr().out
    assert out.splitlines()[:5] == [
        "=> result",
        "* total: 1,200",
        "* correct: 1,024",
        "* accuracy: 85.3%",
        "* error: 14.7%",
    ]
    assert re.findall(r"\* accuracy: ([\.\deE+-]+)%", out) == ["85.3"]  # the expression of CoOp's parse_test_res.py
    assert "* macro_f1: 85.3%\n* worst_group: 85.3%\n* adjusted_average: 85.3%\n* gap: 0.0%\n" in out
    assert "* group: waterbird / water\ttotal: 600\ttrain: 2\tacc: 85.3%" in out
    assert "=> per-class result\n* class: 0 (landbird)\ttotal: 600\tcorrect: 512\tacc: 85.3%\n" in out
    assert out.endswith("* average: 85.3%\n")


def test_printed_lines_without_groups(capsys: pytest.CaptureFixture[str]) -> None:
    judge = evaluator()
    judge.process(torch.eye(2), torch.tensor([0, 1]), torch.tensor([-1, -1]))
    judge.report(judge.evaluate(TRAIN))
    assert capsys.readouterr().out.endswith("* error: 0.0%\n* macro_f1: 100.0%\n")
