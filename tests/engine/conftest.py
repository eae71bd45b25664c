"""Small configs and small data sets for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from yacs.config import CfgNode

from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.data.dataset import Datum

MakeCfg = Callable[..., CfgNode]
MakeData = Callable[..., list[Datum]]

_TINY = {
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


@pytest.fixture
def make_cfg(data_root: Path) -> MakeCfg:
    """A config of small ShapesOnScenes; keywords are keys with ``__`` for the dot: ``OPTIM__LR=0.1``."""

    def make(**keys: Any) -> CfgNode:
        cfg = get_cfg_default()
        changes = _TINY | {"DATASET.ROOT": str(data_root)} | {k.replace("__", "."): v for k, v in keys.items()}
        for key, value in changes.items():
            set_key(cfg, key, value, "test")
        return cfg

    return make


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Images of random pixels: one for each label, with the domain and attribute given beside."""

    def make(labels: list[int], domains: list[int] | None = None, attributes: list[int] | None = None) -> list[Datum]:
        rng = np.random.default_rng(0)
        data = []
        for i, label in enumerate(labels):
            path = tmp_path / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
            domain, attribute = (column[i] if column else 0 for column in (domains, attributes))
            data.append(Datum(str(path), label, domain, f"class {label}", attribute))
        return data

    return make
