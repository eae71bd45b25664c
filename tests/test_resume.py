"""A run that is killed and resumed ends exactly where the unbroken run ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oodprompt import cli
from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from tests.helpers.forks import Forks
from tests.helpers.runs import METRICS, Arguments, assert_same_outcome, interrupted_at

# Images are read and transformed at random at every step; CoOpOOD has parameters and state of its own.
KEYS = [
    *("TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_ALPHA", "0.1"),
    *("INPUT.TRANSFORMS", "('random_resized_crop', 'random_flip', 'normalize')", "OPTIM.MAX_EPOCH", "4"),
    *("TEST.FINAL_MODEL", "best_val"),
]


def test_killed_mid_epoch_and_resumed_equals_never_stopped(arguments: Arguments, tmp_path: Path, forks: Forks) -> None:
    cli.run(arguments("CoOpOOD", "unbroken", *KEYS))
    # A slow image reader holds the process inside an epoch, so that the kill falls there and not between epochs.
    slow = (
        "import time\nfrom oodprompt.data import loading\nread = loading.read_image\n"
        "def slowly(path, rules):\n    time.sleep(0.01)\n    return read(path, rules)\n"
        "loading.read_image = slowly\n"
    )
    process = forks.start(["train.py", *arguments("CoOpOOD", "killed", *KEYS)], first=slow)
    pointer = tmp_path / "killed" / "coopood" / "checkpoint"
    deadline = time.time() + 120
    while not (pointer.is_file() and pointer.read_text().strip() >= "model.pth.tar-2"):
        assert forks.ended(process) is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.3)  # an epoch takes 0.8 s of waiting alone
    os.kill(process.pid, signal.SIGKILL)
    assert forks.wait(process)[0].returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "results.json").exists()
    cli.run(arguments("CoOpOOD", "killed", *KEYS))
    assert_same_outcome(tmp_path / "unbroken", tmp_path / "killed", (4, None))
    log = (tmp_path / "killed" / "log.txt").read_text()
    assert "resuming after epoch" in log


LEARNERS = {
    "MaPLe": ["MaPLe"],
    "PromptSRC": ["PromptSRC", "TRAINER.PROMPTSRC.GPA_MEAN", 2],
    "PromptSRC, text prompts alone": ["PromptSRC", "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", 0],
    "CoCoOp": ["CoCoOp"],
    "CoOpOOD over MaPLe": ["CoOpOOD", "--base", "MaPLe", "TRAINER.COOPOOD.PHASES", "alternating"],
    "CoOpOOD anchored over MaPLe": ["CoOpOOD", "--base", "MaPLe", "TRAINER.COOPOOD.ANCHOR", "attributes"],
}


@pytest.mark.parametrize("case", LEARNERS)
def test_learners_interrupted_mid_epoch_end_where_the_unbroken_run_ends(
    case: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, *keys = LEARNERS[case]
    keys += [*KEYS[KEYS.index("INPUT.TRANSFORMS") :], "OPTIM.MAX_EPOCH", 3, "DATASET.SHAPES.NUM_TRAIN", 32]
    keys += ["OPTIM.LR", 0.02, "OPTIM.WARMUP_EPOCH", -1]
    cli.run(arguments(trainer, "unbroken", *keys))
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "forward_backward", interrupted_at(1, 1))
        with pytest.raises(KeyboardInterrupt):
            cli.run(arguments(trainer, "broken", *keys))
    assert not (tmp_path / "broken" / "results.json").exists()
    cli.run(arguments(trainer, "broken", *keys))
    assert "resuming after epoch 1 of 3" in (tmp_path / "broken" / "log.txt").read_text()
    assert_same_outcome(tmp_path / "unbroken", tmp_path / "broken", (3, None))


def test_checkpoint_of_one_model_ahead_of_the_other(arguments: Arguments, tmp_path: Path) -> None:
    """Killed between two files of one epoch: the older whole checkpoint is taken."""
    plain = ["TRAINER.COOPOOD.ANCHOR", "none", "TRAINER.COOPOOD.PHASES", "alternating"]  # whose turn it is, is state
    cli.run(arguments("CoOpOOD", "unbroken", *KEYS, *plain, "TRAIN.CHECKPOINT_FREQ", 1))
    torn = tmp_path / "torn"
    shutil.copytree(tmp_path / "unbroken", torn)
    (torn / "prompt_learner" / "checkpoint").write_text("model.pth.tar-3\n")
    (torn / "coopood" / "checkpoint").write_text("model.pth.tar-2\n")
    for file in [*torn.glob("*/model.pth.tar-4"), torn / "coopood" / "model.pth.tar-3", torn / "results.json"]:
        file.unlink()
    cli.run(arguments("CoOpOOD", "torn", *KEYS, *plain, "TRAIN.CHECKPOINT_FREQ", 1))
    assert_same_outcome(tmp_path / "unbroken", torn, (4, None))


def test_resume_flag_goes_on_in_that_folder(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "whole"))
    flags = arguments("CoOp", "unused", "--resume", tmp_path / "whole")
    start = flags.index("--output-dir")
    del flags[start : start + 2]
    cli.run(flags)
    assert not (tmp_path / "unused").exists()
    with pytest.raises(UserError, match="no checkpoint"):
        cli.run(arguments("CoOp", "new", "--resume", tmp_path / "nowhere"))


def test_resume_into_another_folder_takes_the_best_model_along(
    arguments: Arguments, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    best_val = ["TEST.FINAL_MODEL", "best_val"]
    first = run("CoOpOOD", "first", *best_val)
    second = run("CoOpOOD", "second", *best_val, "--resume", tmp_path / "first")
    assert {k: first[k] for k in METRICS} == {k: second[k] for k in METRICS}
    assert second["checkpoint"] == str(tmp_path / "second" / "prompt_learner" / "model-best.pth.tar")
    for name in ("prompt_learner", "coopood"):
        assert checkpoint.newest_epoch(tmp_path / "second", [name]) == 3
    assert second["time"]["step_ms_median"] == first["time"]["step_ms_median"] > 0


def test_random_seed_is_kept_over_a_resume(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "drawn", "--seed", -1))
    first = json.loads((tmp_path / "drawn" / "results.json").read_text())
    cli.run(arguments("CoOp", "drawn", "--seed", -1))
    assert json.loads((tmp_path / "drawn" / "results.json").read_text())["seed"] == first["seed"] > 0


def test_folder_of_another_run_is_refused(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "taken"))
    files = [tmp_path / "taken" / name for name in ("prompt_learner/model.pth.tar-3", "config.yaml", "results.json")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(UserError, match=r"another run.*OPTIM.LR was"):
        cli.run(arguments("CoOp", "taken", "OPTIM.LR", 0.5))
    with pytest.raises(UserError, match="images per step of all processes were 16, now 8"):
        cli.run(arguments("CoOp", "taken", "DATALOADER.TRAIN_X.BATCH_SIZE", 8))
    assert [file.read_bytes() for file in files] == before


def test_only_the_newest_checkpoint_is_kept_unless_asked(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "few"))
    cli.run(arguments("CoOp", "all", "TRAIN.CHECKPOINT_FREQ", 1))
    kept = {d: sorted(p.name for p in (tmp_path / d / "prompt_learner").glob("model*")) for d in ("few", "all")}
    assert kept == {"few": ["model.pth.tar-3"], "all": [f"model.pth.tar-{i}" for i in (1, 2, 3)]}


def test_eval_only_repeats_the_results(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    trained = run("CoOpOOD", "trained", "TRAINER.COOPOOD.ANCHOR", "attributes")
    again = run(
        *("CoOpOOD", "again", "--eval-only", "--model-dir", tmp_path / "trained"),
        *("TRAINER.COOPOOD.ANCHOR", "attributes"),
    )
    assert {k: trained[k] for k in METRICS} == {k: again[k] for k in METRICS}
    assert again["time"]["train_s"] == trained["time"]["train_s"] > 0
    assert (tmp_path / "again" / "config.yaml").is_file()
    with pytest.raises(UserError, match="has no folder coopood, which CoOpOOD needs"):
        run("CoOp", "coop")
        run("CoOpOOD", "mixed", "--eval-only", "--model-dir", tmp_path / "coop")
    with pytest.raises(UserError, match="model.pth.tar-9"):
        run("CoOpOOD", "missing", "--eval-only", "--model-dir", tmp_path / "trained", "--load-epoch", 9)


def test_evaluation_says_what_differs_from_training(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    run("CoOp", "end")
    flags = ["--eval-only", "--model-dir", tmp_path / "end", "TRAINER.COOP.CLASS_TOKEN_POSITION", "front"]
    run("CoOp", "front", *flags)
    assert "CLASS_TOKEN_POSITION was 'end', now 'front'" in (tmp_path / "front" / "log.txt").read_text()


def test_checkpoint_of_another_shape_is_refused(arguments: Arguments, run: Callable[..., Any], tmp_path: Path) -> None:
    run("CoOp", "four")
    with pytest.raises(UserError, match=r"ctx has shape \(4, 128\), the model \(8, 128\)"):
        cli.run(
            arguments("CoOp", "eight", "--eval-only", "--model-dir", tmp_path / "four")
            + ["TRAINER.COOP.CTX_INIT", "", "TRAINER.COOP.N_CTX", "8"]
        )
