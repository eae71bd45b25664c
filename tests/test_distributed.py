"""Two processes with batch B are one process with batch 2B."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from oodprompt import cli
from oodprompt.engine import checkpoint
from oodprompt.errors import UserError
from tests.helpers.forks import Forks
from tests.helpers.runs import torchrun, weights

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

LEARNERS = {
    "CoCoOp": ["CoCoOp"],
    "MaPLe": ["MaPLe"],
    "VPT": ["VPT", "TRAINER.VPT.PROMPT_DEPTH_VISION", 3],
    "IVLP": ["IVLP"],
    "KgCoOp": ["KgCoOp", "TRAINER.COOP.W", 8],
    "ProGrad": ["ProGrad", "TRAINER.COOP.CTX_INIT", ""],
    "PromptSRC": ["PromptSRC", *AUGMENTED, "TRAINER.PROMPTSRC.GPA_MEAN", 1],
    "PromptSRC, frozen features computed once": ["PromptSRC", "TRAINER.PROMPTSRC.GPA_MEAN", 1],
    "LinearProbe": ["LinearProbe", "TRAINER.LINEARPROBE.INIT", "text"],
    "CoOpOOD over MaPLe": ["CoOpOOD", "--base", "MaPLe", "TRAINER.COOPOOD.BETA", 5],
    "CoOpOOD anchored over MaPLe": [
        *("CoOpOOD", "--base", "MaPLe", "TRAINER.COOPOOD.ANCHOR", "attributes"),
        *("TRAINER.COOPOOD.ANCHOR_LR", 0.02, "TRAINER.COOPOOD.ANCHOR_GAMMA", 100),
    ],
}

DEBIASERS = {
    "DebiasedPT": ["DebiasedPT", "TRAINER.DEBIASEDPT.ETA", 5],
    "DebiasedPT, held out, over MaPLe": ["DebiasedPT", "--base", "MaPLe", "TRAINER.DEBIASEDPT.MEASURE", "held_out"],
    "DebiasedPT by steps under CoOpOOD": [
        *("CoOpOOD", "TRAINER.STACK", "['DebiasedPT']", "TRAINER.COOPOOD.ANCHOR", "attributes"),
        *("TRAINER.COOPOOD.ANCHOR_LR", 0.02, "TRAINER.COOPOOD.ANCHOR_START", "erased"),
        *("TRAINER.DEBIASEDPT.MEASURE", "step", "TRAINER.COOPOOD.ANCHOR_GAMMA", 100),
    ],
    "GroupDRO": ["GroupDRO", "TRAINER.GROUPDRO.STEP_SIZE", 0.5],
    "GroupCoOp": ["GroupCoOp", "TRAINER.GROUPCOOP.LR", 0.02],
    "JTT over MaPLe": ["JTT", "--base", "MaPLe", "TRAINER.JTT.FIRST_EPOCHS", 1],
    "AFR": ["AFR", "TRAINER.AFR.SHARE", 0.5, "TRAINER.AFR.LAMBDA", 0.1, "TRAINER.AFR.FIRST_EPOCHS", 1],
    "SUBG": ["SUBG", "DATASET.SHAPES.CORRELATION", 0.7],
    "RWG": ["RWG"],
}
# What no epoch after the first changes.
FIXED = (
    "token_prefix",
    "token_suffix",
    "text_features",
    "started",
    "measured",
    "error",
    "done",
    "held_out",
    "mu",
    "theta_fit",
)

# Few steps that change a lot; of 43 training images two processes encode 42 at once, so that one of them gets none of
# the last batch.
FAST = [
    *("DATASET.SHAPES.NUM_TRAIN", 43, "DATASET.SHAPES.NUM_TEST", 20, "DATALOADER.TEST.BATCH_SIZE", 21),
    *("OPTIM.MAX_EPOCH", 2, "OPTIM.LR", 0.02, "OPTIM.WARMUP_EPOCH", -1, "TRAINER.COOPOOD.LR", 0.02),
    *("TRAIN.CHECKPOINT_FREQ", 1, "DATALOADER.TRAIN_X.BATCH_SIZE"),
]


def test_gradients_through_gathered_rows_are_those_of_one_process(forks: Forks) -> None:
    forks.together(3, ["tests/helpers/gather_gradients.py"])


def test_processes_of_torchrun_find_one_another() -> None:
    """The other tests start processes with the variables that this command sets."""
    torchrun(2, [], "tests/helpers/gather_gradients.py")


def test_best_model_of_the_only_epoch_is_loaded_by_all(
    arguments: Callable[..., list[str]], tmp_path: Path, forks: Forks
) -> None:
    keys = ["TEST.FINAL_MODEL", "best_val", "OPTIM.MAX_EPOCH", 1]
    forks.together(2, ["train.py", *arguments("CoOp", "best", *keys)])
    assert json.loads((tmp_path / "best" / "results.json").read_text())["best_epoch"] == 1


def test_several_processes_need_a_seed(arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--seed is needed"):
        cli.run(arguments("CoOp", "unseeded", "--seed", -1))


def test_a_step_takes_one_gather_of_a_kind_and_one_reduction_of_what_is_on_the_device(
    arguments: Callable[..., list[str]], tmp_path: Path, forks: Forks
) -> None:
    """Features, whatever they are, go together, and so do labels, attributes and indices; so do all gradients."""
    step, regions = {"allgather_base": 2, "allreduce": 1}, {"allgather_base": 3, "allreduce": 1}
    runs = [
        (["CoOp", *AUGMENTED], step),
        (["CoCoOp"], step),  # with text features by image
        (["PromptSRC"], step),  # with frozen image features
        (["FineTune", "TRAINER.FINETUNE.CAPTIONS", 0.8], step),  # with those of captions
        (["CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.STACK", "['DebiasedPT']"], step),
        (["RaVL"], step),  # of kept features of regions, every process has all
        (["RaVL", "--base", "MaPLe"], regions),
    ]
    few = ["DATASET.SHAPES.NUM_TRAIN", 32, "DATASET.SHAPES.NUM_TEST", 8, "DATALOADER.TRAIN_X.BATCH_SIZE", 8]
    commands = [(arguments(run[0], str(i), *run[1:], *few), expected) for i, (run, expected) in enumerate(runs)]
    (tmp_path / "steps.json").write_text(json.dumps(commands))
    forks.together(2, ["tests/helpers/collectives.py", str(tmp_path / "steps.json")])


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_summed_batch(
    case: str, arguments: Callable[..., list[str]], tmp_path: Path, forks: Forks
) -> None:
    trainer, *keys = CASES[case]
    keys += ["TEST.FINAL_MODEL", "best_val", "DATASET.SHAPES.NUM_TEST", "20", "DATALOADER.TEST.BATCH_SIZE", "19"]
    forks.together(1, ["train.py", *arguments(trainer, "one", *keys, "DATALOADER.TRAIN_X.BATCH_SIZE", 32)])
    forks.together(2, ["train.py", *arguments(trainer, "two", *keys, "DATALOADER.TRAIN_X.BATCH_SIZE", 16)])
    for name in ("prompt_learner", "coopood")[: 1 if trainer == "CoOp" else 2]:
        one, two = (checkpoint.load(checkpoint.file_of(tmp_path / d, name, 3))["state_dict"] for d in ("one", "two"))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    results = [json.loads((tmp_path / d / "results.json").read_text()) for d in ("one", "two")]
    for key in ("num_samples", "accuracy", "worst_group_accuracy", "groups"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("cases", [LEARNERS, DEBIASERS], ids=["learners", "debiasers"])
def test_every_method_on_two_processes_equals_one_with_the_summed_batch(
    cases: dict[str, list[Any]], arguments: Callable[..., list[str]], tmp_path: Path, forks: Forks
) -> None:
    alone, together = (
        [arguments(trainer, f"{batch}/{name}", *FAST, batch, *keys) for name, (trainer, *keys) in cases.items()]
        for batch in (16, 8)
    )
    (tmp_path / "runs.json").write_text(json.dumps(together))
    forks.together(2, ["tests/helpers/run_many.py", str(tmp_path / "runs.json")])
    problems = []
    for name, command in zip(cases, alone, strict=True):
        cli.run(command)
        before, one, two = (
            weights(tmp_path / run, epoch) for run, epoch in ((f"16/{name}", 1), (f"16/{name}", 2), (f"8/{name}", 2))
        )
        assert one and one.keys() == two.keys(), name
        for key, value in one.items():
            value, other, former = (x.double() for x in (value, two[key], before[key]))
            if not torch.allclose(other, value, rtol=1e-5, atol=1e-6):  # measured: 9e-8 at most
                problems.append(f"{name}: {key} is off by {(other - value).abs().max():.3g}")
            if not key.endswith(FIXED) and (value - former).abs().max() < 1e-4:
                problems.append(f"{name}: {key} is hardly trained, which shows nothing")
        results = [json.loads((tmp_path / batch / name / "results.json").read_text()) for batch in ("16", "8")]
        if results[0]["groups"] != results[1]["groups"] or results[0]["num_samples"] != 20:
            problems.append(f"{name}: the results differ")
    assert problems == []
