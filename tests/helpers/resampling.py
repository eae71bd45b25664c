"""What every method that resamples or reweights is held to by a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oodprompt import cli
from oodprompt.engine.first_stage import FirstStage
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.features.encoder import Encoder
from oodprompt.methods.splits import Split
from tests.helpers.runs import Arguments, Run, assert_same_outcome, interrupted_at

TINY = [
    *("DATASET.SHAPES.NUM_TRAIN", 40, "DATALOADER.TRAIN_X.BATCH_SIZE", 8, "OPTIM.MAX_EPOCH", 2),
    *("OPTIM.LR", 0.02, "OPTIM.WARMUP_EPOCH", -1),
]
# Frozen features, an image tower that is trained, prompts that depend on the image; what resumes is pseudo over CoOp.
OVER = [("CoOp", "true"), ("MaPLe", "pseudo"), ("CoCoOp", "true")]


def assert_runs_over(run: Run, trainer: str, base: str, groups: str, *keys: Any) -> dict[str, Any]:
    """A run of two short epochs over ``base`` ends, and reports what was asked for."""
    results = run(trainer, "out", "--base", base, "TRAINER.GROUPS", groups, *TINY, *keys)
    takes_groups = trainer not in ("AFR", "JTT")
    assert (results["trainer"], results["base"]) == (trainer, base)
    assert results["groups_by"] == (groups if takes_groups else None)
    assert 0 <= results["worst_group_accuracy"] <= results["accuracy"] <= 1
    return results


def assert_resumes(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, *keys: Any
) -> None:
    """A run that is interrupted in the middle of an epoch, then goes on, ends where the unbroken one ends.

    The second half must not train a first learner again.
    """
    keys = (*TINY, "OPTIM.MAX_EPOCH", 3, *keys)
    cli.run(arguments(trainer, "unbroken", *keys))

    def again(*args: Any) -> None:
        raise AssertionError("a resumed run trains the first learner again")

    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "forward_backward", interrupted_at(1, 1))
        with pytest.raises(KeyboardInterrupt):
            cli.run(arguments(trainer, "broken", *keys))
    with monkeypatch.context() as patch:
        patch.setattr(FirstStage, "fit", again)
        cli.run(arguments(trainer, "broken", *keys))
    assert "resuming after epoch 1 of 3" in (tmp_path / "broken" / "log.txt").read_text()
    assert_same_outcome(tmp_path / "unbroken", tmp_path / "broken", (3,))


def without_labels(monkeypatch: pytest.MonkeyPatch, only: str = "", images: slice = slice(None)) -> None:
    """From here on, these images (of the split ``only``, where it is given) have no attribute label."""
    split = Encoder.split

    def unlabelled(self: Encoder, name: str) -> Split:
        known = split(self, name)
        attribute = known.attribute.clone()
        attribute[images] = -1
        return known if only not in ("", name) else replace(known, attribute=attribute)

    monkeypatch.setattr(Encoder, "split", unlabelled)


def order_of(trainer: PromptTrainer, epoch: int) -> np.ndarray:
    """What the engine takes for the order of an epoch."""
    batches = trainer.train_loader_x.batches
    batches.epoch = epoch
    return np.concatenate(batches.batches())


def groups_of(trainer: PromptTrainer) -> np.ndarray:
    return np.array([2 * datum.label + datum.attribute for datum in trainer.dataset.train_x])
