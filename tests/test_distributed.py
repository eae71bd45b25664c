"""Two processes with batch B are one process with batch 2B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from oodprompt import cli
from oodprompt.engine import checkpoint
from oodprompt.errors import UserError
from tests.conftest import REPOSITORY

AUGMENTED = [
    "INPUT.TRANSFORMS",
    "('random_resized_crop', 'random_flip', 'normalize')",
    "DATALOADER.FEATURE_CACHE",
    "off",
]
CASES = {
    "CoOp, images at every step": ["CoOp", *AUGMENTED],
    "CoOpOOD, cached features": ["CoOpOOD", "TRAINER.COOPOOD.BETA", "5.0"],
    "CoOpOOD anchored, images, batch statistics": [
        *("CoOpOOD", *AUGMENTED, "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_STATISTICS", "batch"),
    ],
}


def torchrun(processes: int, arguments: list[str], script: str = "train.py") -> None:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--standalone", str(REPOSITORY / script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_through_gathered_rows_are_those_of_one_process(processes: int) -> None:
    torchrun(processes, [], "tests/gather_gradients.py")


def test_best_model_of_the_only_epoch_is_loaded_by_all(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    torchrun(2, arguments("CoOp", "best", "TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 1))
    assert json.loads((tmp_path / "best" / "results.json").read_text())["best_epoch"] == 1


def test_several_processes_need_a_seed(arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--seed is needed"):
        cli.run(arguments("CoOp", "unseeded", "--seed", -1))


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_summed_batch(
    case: str, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    trainer, *keys = CASES[case]
    keys += ["TEST.FINAL_MODEL", "best_val", "DATASET.SHAPES.NUM_TEST", "20", "DATALOADER.TEST.BATCH_SIZE", "19"]
    torchrun(1, arguments(trainer, "one", *keys, "DATALOADER.TRAIN_X.BATCH_SIZE", 32))
    torchrun(2, arguments(trainer, "two", *keys, "DATALOADER.TRAIN_X.BATCH_SIZE", 16))
    for name in ("prompt_learner", "coopood")[: 1 if trainer == "CoOp" else 2]:
        one, two = (checkpoint.load(checkpoint.file_of(tmp_path / d, name, 3))["state_dict"] for d in ("one", "two"))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    results = [json.loads((tmp_path / d / "results.json").read_text()) for d in ("one", "two")]
    for key in ("num_samples", "accuracy", "worst_group_accuracy", "groups"):
        assert results[0][key] == results[1][key]
