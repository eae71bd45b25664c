"""Whole runs in Dassl: trained, saved, loaded, resumed, and evaluated by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.foreign import Make, predictions


@pytest.mark.parametrize(
    ("base", "trainer", "opts"),
    [
        ("CoOp", "CoOpOOD", []),
        ("MaPLe", "CoOpOOD", ["TRAINER.COOPOOD.ANCHOR", "attributes"]),
        ("MaPLe", "DebiasedPT", ["TRAINER.DEBIASEDPT.MEASURE", "held_out"]),
        (
            "CoOp",
            "CoOpOOD",
            ["TRAINER.STACK", ("DebiasedPT",), "TRAINER.GROUPS", "true", "TRAINER.COOPOOD.ANCHOR", "attributes"],
        ),
    ],
)
def test_our_methods_train_save_and_load(make: Make, base: str, trainer: str, opts: list[Any]) -> None:
    run = make(trainer, base, *opts)
    start = [p.detach().clone() for d in run.companion.debiasers for p in d.parameters()]
    run.train()
    moved = [p for d in run.companion.debiasers for p in d.parameters()]
    assert all(np.isfinite(row["loss"]) for row in run.history) and len(run.history) == 6
    assert all(not torch.equal(before, after) for before, after in zip(start, moved, strict=True))
    again = make(trainer, base, *opts)
    again.load_model(run.output_dir, epoch=2)
    assert torch.equal(predictions(again), predictions(run))
    assert [d.model_name for d in run.companion.debiasers] == list(run._models)[1:]
    resumed = make(trainer, base, *opts, "OPTIM.MAX_EPOCH", 3)
    resumed.train()
    assert resumed.start_epoch == 2 and len(resumed.history) == 3


def test_plain_and_wrapped_checkpoints_fit_each_other(make: Make) -> None:
    make("CoOp", out="plain").train()
    wrapped = make("WithNothing", "CoOp", out="wrapped")
    wrapped.train()
    plain = make("CoOp", out="other")
    plain.load_model(wrapped.output_dir, epoch=2)
    assert torch.equal(plain.model.prompt_learner.ctx, wrapped.model.prompt_learner.ctx)


def test_debiasers_hear_of_epochs_before_they_are_saved(make: Make) -> None:
    trainer = make("WithWeighing", "MaPLe")
    trainer.train()
    calls = ["before 0", *["step"] * 3, "after 0", "before 1", *["step"] * 3, "after 1"]
    assert trainer.companion.debiasers[0].calls == ["check", "before_train", *calls]
    saved = torch.load(Path(trainer.output_dir) / "weighing" / "model.pth.tar-2", weights_only=True)
    assert saved["state_dict"]["epochs"] == 2 and torch.equal(
        saved["state_dict"]["bias"], trainer.companion.debiasers[0].bias
    )


def test_models_of_different_epochs_go_back_to_the_newest_of_all(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (1, 2):
        make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", epochs).train()
    run = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 3)
    out = Path(run.output_dir)
    (out / "weighing" / "checkpoint").write_text("model.pth.tar-1\n")  # killed between two saves
    run.before_train()
    first = torch.load(out / "prompt_learner" / "model.pth.tar-1", weights_only=False)["state_dict"]["ctx"]
    assert run.start_epoch == 1 and torch.equal(run.model.prompt_learner.ctx, first)
    assert run.companion.run.start_epoch == 1 and run.companion.debiasers[0].epochs == 1
    assert "going back to model.pth.tar-1, the newest that all models have" in capsys.readouterr().out
    # With FINAL_MODEL best_val Dassl's pointer names the best model, here of one epoch in both folders or of two.
    for name in run._models:
        (out / name / "model-best.pth.tar").write_bytes((out / name / "model.pth.tar-2").read_bytes())
        (out / name / "checkpoint").write_text("model-best.pth.tar\n")
    run = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 3)
    run.before_train()
    assert run.start_epoch == 2 and "going back" not in capsys.readouterr().out
    (out / "weighing" / "model-best.pth.tar").write_bytes((out / "weighing" / "model.pth.tar-1").read_bytes())
    run = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 3)
    run.before_train()
    assert run.start_epoch == 1 and "going back to model.pth.tar-1" in capsys.readouterr().out
    for file in out.glob("weighing/*"):  # killed ahead of the first save of a debiaser
        file.unlink()
    run = make("WithWeighing", "CoOp")
    run.before_train()
    assert run.start_epoch == 0 and "train from scratch" in capsys.readouterr().out


def test_a_finished_run_prepares_nothing(make: Make) -> None:
    make("WithWeighing", "CoOp").train()
    again = make("WithWeighing", "CoOp")
    again.train()
    assert again.companion.debiasers[0].calls == []


def test_base_to_new_classes(make: Make) -> None:
    keys = [
        "DATASET.SHAPES.CLASSES",
        ("circle", "diamond", "square"),
        "DATASET.SHAPES.SCENES",
        ("water", "land", "sky"),
    ]
    keys += ["DATASET.SHAPES.NUM_VAL", 9, "DATASET.SUBSAMPLE_CLASSES"]
    stack = ["TRAINER.STACK", ("CoOpOOD",), "TRAINER.COOPOOD.ANCHOR", "attributes"]
    run = make("DebiasedPT", "CoOp", *keys, "base", *stack)
    assert run.companion.dataset.num_classes == run.dm.num_classes == 2 and run.companion.debiasers[0].w.shape == (6,)
    run.train()
    new = make("DebiasedPT", "CoOp", *keys, "new", *stack, out="new")
    assert new.companion.dataset.num_classes == 1 and new.companion.debiasers[0].w.shape == (3,)
    new.load_model(run.output_dir, epoch=2)
    own, other = new.companion.debiasers[1].state_dict(), run.companion.debiasers[1].state_dict()
    assert torch.equal(own["h_u.weight"], other["h_u.weight"])
    assert new.test() == 100


def test_what_counts_for_other_classes_is_left(make: Make) -> None:
    trainer = make("CoOpOOD", "MaPLe", "TRAINER.COOPOOD.ANCHOR", "attributes")
    debiaser = trainer.companion.debiasers[0]
    state = {key: value.clone() + 1 for key, value in debiaser.state_dict().items()}
    other = {**state, "running.cross": torch.zeros(5, 2, 2), "running.count": torch.zeros(5)}
    before = debiaser.running.cross.clone()
    debiaser.load_state_dict(other, strict=False)
    assert torch.equal(debiaser.running.cross, before) and torch.equal(debiaser.h_u.weight, state["h_u.weight"])
    debiaser.load_state_dict(state)
    assert torch.equal(debiaser.running.cross, state["running.cross"])


def test_groups_are_reported_and_the_prediction_is_the_debiasers(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make("WithWeighing", "CoOp")
    with torch.no_grad():
        trainer.companion.debiasers[0].bias[:] = torch.tensor([1e4, 0])  # every image is a circle
    accuracy = trainer.test()
    out = capsys.readouterr().out
    assert accuracy == 50 and "* worst_group: 0.0%" in out and "* gap: 50.0%" in out
    assert "* group: circle / water\ttotal: 3\t" in out and "* turned round: accuracy 8.3%, worst group 0.0%" in out
    assert trainer.scalars["test/worst_group_accuracy"] == 0 and trainer.scalars["test/gap"] == pytest.approx(0.5)
    trainer.companion.attributes["val"][:] = 0
    val, trainer.val_loader, trainer.scalars = trainer.val_loader, None, {}
    trainer.test(split="val")
    assert "test/gap" in trainer.scalars, "without validation images Dassl tests"
    capsys.readouterr()
    trainer.val_loader = val
    trainer.test(split="val")
    assert trainer.scalars["val/gap"] == pytest.approx(0.5) and "/ land" not in capsys.readouterr().out


def test_without_attributes_there_are_no_groups(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make("WithNothing", "CoOp")
    trainer.companion.attributes["test"][:] = -1
    trainer.test()
    assert "worst_group" not in capsys.readouterr().out
