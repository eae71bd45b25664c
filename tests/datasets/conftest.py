"""Miniature copies of the official file layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.data.dataset import DatasetBase, build_dataset
from tests.helpers.trees.writing import MakeDataset


@pytest.fixture
def build(tmp_path: Path) -> MakeDataset:
    """``build(name, **keys)``: a registered data set on the test's folder; ``CSV__FILE`` is DATASET.CSV.FILE."""

    def make(name: str, **keys: Any) -> DatasetBase:
        cfg = get_cfg_default()
        changes = {"ROOT": str(tmp_path), "NAME": name} | keys
        for key, value in changes.items():
            set_key(cfg, key if key == "SEED" else "DATASET." + key.replace("__", "."), value, "test")
        return build_dataset(cfg)

    return make
