"""Nothing is kept per batch that grows: a run with workers needs no more open files for many batches than for few."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.forks import Forks
from tests.helpers.runs import Arguments

_LIMITED = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
# Batches of one image: 260 of each kind that is read, more than there may be open files.
_KEYS = (
    *("DATASET.SHAPES.NUM_TRAIN", 260, "DATASET.SHAPES.NUM_VAL", 260, "DATASET.SHAPES.NUM_TEST", 260),
    *("DATALOADER.TEST.BATCH_SIZE", 1, "DATALOADER.TRAIN_X.BATCH_SIZE", 64, "DATALOADER.NUM_WORKERS", 1),
    *("OPTIM.MAX_EPOCH", 1, "DATALOADER.FEATURE_CACHE", "off"),
)


def _runs_within(
    limit: str, trainer: str, more: tuple[object, ...], arguments: Arguments, forks: Forks, tmp_path: Path
) -> None:
    process = forks.start(["train.py", *map(str, arguments(trainer, "out", *_KEYS, *more))], first=limit)
    (done,) = forks.wait(process)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "results.json").is_file()


def test_test_images_are_read_within_256_open_files(arguments: Arguments, forks: Forks, tmp_path: Path) -> None:
    few = ("DATASET.SHAPES.NUM_TRAIN", 40, "DATASET.SHAPES.NUM_VAL", 8)
    _runs_within(_LIMITED, "MaPLe", few, arguments, forks, tmp_path)


@pytest.mark.slow  # last run on 27 November 2026: all passed
@pytest.mark.parametrize(
    ("trainer", "more"),
    [
        ("ZeroshotCLIP", ()),
        ("CoOp", ("TEST.FINAL_MODEL", "best_val")),
        ("CoCoOp", ()),
        ("VPT", ()),
        ("IVLP", ()),
        ("PromptSRC", ()),
        ("FineTune", ()),
        ("LinearProbe", ()),
        ("JTT", ("TRAINER.BASE", "MaPLe")),  # reads the training images in order after its first stage
        ("AFR", ("TRAINER.BASE", "MaPLe")),
        ("DebiasedPT", ("TRAINER.BASE", "MaPLe")),
    ],
)
def test_every_learner_that_reads_images_stays_within_256_open_files(
    trainer: str, more: tuple[object, ...], arguments: Arguments, forks: Forks, tmp_path: Path
) -> None:
    _runs_within(_LIMITED, trainer, more, arguments, forks, tmp_path)
