"""What small configs are made of; the fixtures ``make_cfg`` and ``make_data`` are in ``tests/conftest.py``."""

from __future__ import annotations

from collections.abc import Callable

from yacs.config import CfgNode

from oodprompt.data.dataset import Datum

MakeCfg = Callable[..., CfgNode]
MakeData = Callable[..., list[Datum]]

TINY = {
    "DATASET.NAME": "ShapesOnScenes",
    "DATASET.SHAPES.NUM_TRAIN": 22,
    "DATASET.SHAPES.NUM_VAL": 4,
    "DATASET.SHAPES.NUM_TEST": 10,
    "MODEL.BACKBONE.NAME": "tiny",
    "INPUT.SIZE": (48, 48),
    "INPUT.TRANSFORMS": ("normalize",),
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 5,
    "DATALOADER.TEST.BATCH_SIZE": 4,
    "SEED": 1,
}
RANDOM = ("random_resized_crop", "normalize")  # a training transform whose views differ
