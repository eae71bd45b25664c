"""The first stage is trained by the loop that trains a run, with its checks."""

from __future__ import annotations

import pytest
import torch

from oodprompt.engine.first_stage import FirstStage
from oodprompt.engine.objective import Objective
from oodprompt.errors import UserError
from tests.helpers.runs import Build


def test_a_loss_that_is_not_finite_is_named_in_the_middle_of_an_epoch(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build("JTT", "DATALOADER.TRAIN_X.BATCH_SIZE", 16)
    objective, steps = Objective.__call__, []

    def broken_at_the_second(self: Objective, *args: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss, scalars = objective(self, *args)
        steps.append(loss)
        return (loss * float("nan") if len(steps) == 2 else loss), scalars

    monkeypatch.setattr(Objective, "__call__", broken_at_the_second)
    stage = trainer.context.first_stage
    assert isinstance(stage, FirstStage) and len(trainer.encoder.batches("train")) > 2
    with pytest.raises(
        UserError, match=r"the loss became nan in epoch 1 of the first stage, batch 2\. Lower OPTIM\.LR"
    ):
        stage.fit(1)
    assert len(steps) == 2
