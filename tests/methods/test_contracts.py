"""Debiasers stack by the contract, whatever they contribute, and a new prompt learner goes under all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.contracts import Alignment, Contribution, Debiaser, PromptLearner, Step


class Reweighting(Debiaser):
    """Doubles the weight of class 1, pulls its own parameter to zero and counts steps and epochs."""

    model_name = "reweighting"

    def __init__(self, cfg: Any, context: Any) -> None:
        super().__init__(cfg, context)
        self.own = nn.Parameter(torch.ones(3))
        self.register_buffer("epochs", torch.zeros((), dtype=torch.long))
        self.calls: list[str] = []

    def before_train(self) -> None:
        self.calls.append("before_train")

    def before_epoch(self, epoch: int) -> None:
        self.calls.append(f"before_epoch {epoch}")

    def after_epoch(self, epoch: int) -> None:
        self.calls.append(f"after_epoch {epoch}")
        self.epochs += 1

    def contribute(self, step: Step) -> Contribution:
        weights = 1.0 + (step.label == 1).float()
        return Contribution(per_sample_loss=0.1 * weights, sample_weights=weights, penalty=(self.own**2).sum())


class ImageConditioned(PromptLearner):
    """Text features that depend on the image, [B, C, d], and a trained image side."""

    model_name = "conditioned"
    trains_image_tower = True

    def __init__(self, cfg: Any, classnames: Any, template: str, clip: Any) -> None:
        super().__init__(cfg, classnames, template, clip)
        self.shift = nn.Parameter(torch.zeros(clip.shape.embed_dim))
        self.register_buffer("text", F.normalize(torch.randn(len(classnames), clip.shape.embed_dim), dim=1))

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.clip.encode_image(images) + self.shift, dim=-1)

    def forward(self, image_features: Tensor) -> Alignment:
        text = F.normalize(self.text + 0.1 * image_features.unsqueeze(1), dim=-1)
        return Alignment(image_features, text, self.clip.logit_scale.exp())

    def penalty(self, alignment: Alignment) -> Tensor:
        return 0.5 * (self.shift**2).sum()


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, parts in {
        "Reweighting": {"debiaser_class": Reweighting},
        "ImageConditioned": {"learner_class": ImageConditioned},
    }.items():
        monkeypatch.setitem(TRAINER_REGISTRY._objects, name, type(name, (PromptTrainer,), parts))
    yield


def test_contributions_of_a_stack_add_up(build: Callable[..., PromptTrainer]) -> None:
    keys = ["TRAINER.COOPOOD.PHASES", "joint", "TRAINER.COOPOOD.ALPHA", 0.7, "TRAINER.COOPOOD.BETA", 0.3]
    alone = build("CoOpOOD", *keys)
    stacked = build("CoOpOOD", *keys, "TRAINER.STACK", "('Reweighting',)")
    batch = next(iter(alone.encoder.batches("train")))
    alignment = alone.encoder.align(batch)
    step = Step(alignment, alone.objective.predict(alignment), batch["label"], batch["attribute"], batch["index"])
    theirs = alone.debiasers[0].contribute(step)
    w = 1.0 + batch["label"].float()
    per_sample = F.cross_entropy(step.logits, batch["label"], reduction="none") + theirs.per_sample_loss
    expected = (w * (per_sample + 0.1 * w)).mean() + theirs.penalty + 3.0
    loss, _ = stacked.objective(stacked.encoder.align(batch), batch)
    torch.testing.assert_close(loss, expected)


def test_stacked_state_is_saved_and_its_hooks_are_called(run: Callable[..., Any], tmp_path: Path) -> None:
    results = run("CoOp", "stack", "TRAINER.STACK", "('Reweighting',)")
    assert (results["trainer"], results["base"], results["stack"]) == ("CoOp", "CoOp", ["Reweighting"])
    state = checkpoint.load(checkpoint.file_of(tmp_path / "stack", "reweighting", 3))["state_dict"]
    assert int(state["epochs"]) == 3 and (state["own"] < 1).all()


def test_hooks_come_in_order(build: Callable[..., PromptTrainer]) -> None:
    trainer = build("Reweighting", "OPTIM.MAX_EPOCH", 2, "TEST.NO_TEST", True)
    trainer.train()
    expected = ["before_train", "before_epoch 0", "after_epoch 0", "before_epoch 1", "after_epoch 1"]
    assert trainer.debiasers[0].calls == expected


@pytest.mark.parametrize("keys", [[], ["TRAINER.COOPOOD.ANCHOR", "attributes"]])
def test_debiaser_over_a_learner_that_trains_the_image_side(
    keys: list[str], run: Callable[..., Any], tmp_path: Path
) -> None:
    results = run("CoOpOOD", "conditioned", "--base", "ImageConditioned", *keys)
    assert results["base"] == "ImageConditioned"
    state = checkpoint.load(checkpoint.file_of(tmp_path / "conditioned", "conditioned", 3))["state_dict"]
    assert state["shift"].abs().max() > 0
    assert "computed at every step" in (tmp_path / "conditioned" / "log.txt").read_text()
