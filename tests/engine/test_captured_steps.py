"""Whole trainings whose towers are replayed equal those whose towers are computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from oodprompt.backbones.captures import Captures
from oodprompt.engine.trainer import PromptTrainer
from tests.helpers.tape import Tape


@pytest.mark.parametrize(
    ("words", "recordings"),
    [
        (["CoOp"], 1),
        (["CoOp", "TRAINER.COOP.CSC", "True"], 1),
        (["CoCoOp"], 1),
        (["MaPLe"], 2),
        (["ProGrad"], 1),  # two backward passes through one forward pass
        (["PromptSRC"], 2),
        (["GroupCoOp"], 1),
        (["CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.STACK", "['DebiasedPT']"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_training(build: Callable[..., PromptTrainer], words: list[str], recordings: int) -> None:
    tapes: list[Tape] = []

    def recorder() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    states = []
    for captures in (None, Captures(after=1, recorder=recorder)):
        trainer = build(*words, "OPTIM.MAX_EPOCH", "2", "TEST.NO_TEST", "True")
        trainer.clip.captures = captures
        trainer.before_train()
        for trainer.epoch in range(2):  # noqa: B020
            trainer.before_epoch()
            trainer.run_epoch()
        states.append(
            {f"{n}.{k}": v.clone() for n, m in trainer.trained.models.items() for k, v in m.state_dict().items()}
        )
    assert len(tapes) == recordings and all(tape.replays > 2 for tape in tapes)
    plain, captured = states
    assert all(torch.equal(captured[key], value) for key, value in plain.items())


@pytest.mark.parametrize(("choice", "lines"), [("auto", 0), ("off", 0), ("graphs", 1)])
def test_without_a_gpu(
    choice: str, lines: int, build: Callable[..., PromptTrainer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert build("CoOp", "TRAIN.COMPILE", choice).clip.captures is None
    assert capsys.readouterr().out.count("TRAIN.COMPILE graphs needs a GPU") == lines
