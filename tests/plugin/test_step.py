"""The wrapped step: nothing added changes nothing, the objective by hand, rates and random numbers."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.errors import UserError
from oodprompt.methods.contracts import Contribution, Step
from tests.helpers.foreign import Make, TheirModel, predictions


def test_cross_entropy_is_exchanged_however_it_is_called(plugin: ModuleType) -> None:
    from torch.nn.functional import cross_entropy

    Instead = importlib.import_module("oodprompt.plugin.trainers").CrossEntropyInstead
    x, y, given = torch.randn(3, 2), torch.tensor([0, 1, 1]), []

    def replace(logits: Tensor, target: Tensor, **rest: Any) -> Tensor | None:
        given.append((logits is x and target is y, rest["reduction"]))
        return torch.tensor(5.0) if rest["reduction"] == "mean" else None

    plain = F.cross_entropy(x, y, reduction="none")
    with Instead(replace):
        assert F.cross_entropy(x, y) == cross_entropy(x, y) == nn.CrossEntropyLoss()(x, y) == 5
        assert torch.equal(F.cross_entropy(x, y, reduction="none"), plain)
        assert F.mse_loss(x, x) == 0
    assert F.cross_entropy(x, y) == pytest.approx(plain.mean().item()) and given == [(True, "mean")] * 3 + [
        (True, "none")
    ]


@pytest.mark.parametrize("base", ["CoOp", "MaPLe", "CoCoOp", "KgCoOp"])
def test_nothing_added_changes_nothing(make: Make, theirs: dict[str, type], base: str) -> None:
    small = ["DATALOADER.TRAIN_X.BATCH_SIZE", 4, "OPTIM.MAX_EPOCH", 1] if base == "CoCoOp" else []
    plain = make(base, "", *small, out="plain")
    plain.model.float()
    plain.train()
    wrapped = make("WithNothing", base, *small, out="wrapped")
    wrapped.train()
    a, b = ([row["loss"] for row in trainer.history] for trainer in (plain, wrapped))
    assert len(a) == len(b) > 5 and a[0] != a[-1]
    assert np.abs(np.subtract(a, b)).max() < 1e-5
    for key, value in plain._models["prompt_learner"].state_dict().items():
        torch.testing.assert_close(wrapped._models["prompt_learner"].state_dict()[key], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predictions(wrapped), predictions(plain), atol=1e-4, rtol=1e-4)
    assert theirs[base] in type(wrapped).__mro__ and type(wrapped).__name__ == f"WithNothingOver{base}"


@pytest.mark.parametrize("base", ["CoOp", "MaPLe", "KgCoOp"])
def test_the_objective_and_one_step_by_hand(make: Make, base: str) -> None:
    trainer = make("WithWeighing", base)
    debiaser = trainer.companion.debiasers[0]
    trainer.before_train(), trainer.before_epoch(), trainer.set_model_mode("train")
    batch = next(iter(trainer.train_loader_x))
    label, data = batch["label"], trainer.dm.dataset.train_x
    attribute = torch.tensor([data[i].attribute for i in batch["index"]])
    with torch.no_grad():
        trainer.set_model_mode("eval")
        output = trainer.model(batch["img"])
        logits, score = output if base == "KgCoOp" else (output, None)
        trainer.set_model_mode("train")
        weights = 1.0 + attribute
        expected = (weights * (F.cross_entropy(logits, label, reduction="none") + 0.5 * label)).mean() + 7
        extra = 0 if score is None else 8 * score
        probability = logits.softmax(dim=1) - F.one_hot(label, 2)
        gradient = (weights.unsqueeze(1) * probability).mean(dim=0) + 3
    trainer.num_batches, trainer.batch_idx = 9, 0
    summary = trainer.forward_backward(batch)
    assert summary["loss"] == pytest.approx(float(expected + extra), rel=1e-5)
    assert summary["index"] == batch["index"].sum() and "acc" in summary
    # Warm-up: 1e-3 for every group; decay of a zero bias is zero. The bias has moved once, not twice.
    torch.testing.assert_close(debiaser.bias.detach(), -1e-3 * gradient, atol=1e-6, rtol=1e-4)
    assert debiaser.calls == ["check", "before_train", "before 0", "step"]


def test_debiasers_compute_in_full_precision(make: Make, theirs: dict[str, type]) -> None:
    seen = []

    class Mixed(theirs["CoOp"]):
        def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward_backward(batch)

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Mixed)
    trainer = make("WithWeighing", "Mixed")
    contribute = trainer.companion.debiasers[0].contribute

    def watched(step: Step) -> Contribution:
        seen.append((torch.is_autocast_enabled("cpu"), step.logits.dtype, step.alignment.image_features.dtype))
        return contribute(step)

    trainer.companion.debiasers[0].contribute = watched
    trainer.train()
    assert set(seen) == {(False, torch.float32, torch.float32)}


def test_the_debiasers_own_rate_follows_the_schedule(make: Make) -> None:
    trainer = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 4)
    base, own = trainer.optim.param_groups
    assert own["params"] == [trainer.companion.debiasers[0].bias] and own["weight_decay"] == base["weight_decay"]
    rates = []
    for _ in range(4):
        rates.append((base["lr"], own["lr"]))
        trainer.optim.step(), trainer.update_lr()
    cosine = [(1 + np.cos(np.pi * t / 4)) / 2 for t in range(3)]
    assert rates == [(1e-3, 1e-3)] + [pytest.approx((0.01 * c, 0.5 * c)) for c in cosine]
    assert trainer.sched is trainer._scheds["prompt_learner"] and list(trainer._optims.values())[1] is None


def test_random_numbers_stay_those_of_the_base(make: Make) -> None:
    plain = make("CoOp", out="plain")
    after_plain = torch.rand(3)
    wrapped = make("WithWeighing", "CoOp", out="wrapped")
    assert torch.equal(torch.rand(3), after_plain)
    torch.manual_seed(0), np.random.seed(0)
    wrapped.before_train(), wrapped.before_epoch()
    drawn = torch.rand(1), np.random.rand(1)
    torch.manual_seed(0), np.random.seed(0)
    assert drawn == (torch.rand(1), np.random.rand(1))
    torch.testing.assert_close(wrapped.model.prompt_learner.ctx, plain.model.prompt_learner.ctx)


def test_only_the_cross_entropy_of_the_prediction_is_exchanged(make: Make, theirs: dict[str, type]) -> None:
    class Twice(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            logits = self.model(image)
            other = F.cross_entropy(logits.detach().roll(1, dims=1), label)
            return other + F.cross_entropy(logits, label) + F.cross_entropy(logits, label)

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Twice)
    trainer = make("WithWeighing", "Twice")
    trainer.before_train(), trainer.set_model_mode("train")
    batch = next(iter(trainer.train_loader_x))
    trainer.num_batches, trainer.batch_idx = 9, 0
    with torch.no_grad():
        logits, label = trainer.model(batch["img"]), batch["label"]
        weights = 1.0 + torch.tensor([trainer.dm.dataset.train_x[i].attribute for i in batch["index"]])
        own = (weights * (F.cross_entropy(logits, label, reduction="none") + 0.5 * label)).mean() + 7
        expected = own + F.cross_entropy(logits.roll(1, dims=1), label) + F.cross_entropy(logits, label)
    assert trainer.forward_backward(batch)["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_several_gpus_are_one(make: Make, theirs: dict[str, type], capsys: pytest.CaptureFixture[str]) -> None:
    class Parallel(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            self.model = nn.DataParallel(self.model)

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Parallel)
    assert isinstance(make("WithNothing", "Parallel").model, TheirModel)
    assert "one is used" in capsys.readouterr().out


def test_without_an_optimiser_nothing_is_wrapped(make: Make, theirs: dict[str, type]) -> None:
    class Frozen(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            self._optims["prompt_learner"] = None

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Frozen)
    with pytest.raises(UserError, match="Frozen: it has no optimiser"):
        make("WithNothing", "Frozen")
