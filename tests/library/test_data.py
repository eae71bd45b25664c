"""Data in memory become files of a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oodprompt.data.feature_files import read_feature_file
from oodprompt.errors import UserError
from oodprompt.library.data import keys_of_data, written_data


def arrays(**changed: Any) -> dict[str, Any]:
    words = {"label": ["a", "b"], "split": ["train", "test"], "attribute": ["x", "y"], "domain": [0, 1]}
    return {"image_features": np.eye(2, dtype=np.float32), **words, "template": "a {}", **changed}


def test_the_same_arrays_are_the_same_data(tmp_path: Path) -> None:
    for _ in range(8):  # the entries of a file of safetensors are in no fixed order
        with written_data(arrays(), tmp_path) as keys:
            assert keys == {"DATASET.FEATURES.FILE": str(tmp_path / "data.safetensors")}
    (tmp_path / "results.json").touch()
    for other in (arrays(label=["b", "a"]), arrays(template="{}"), arrays(image_features=np.ones((2, 2)))):
        with pytest.raises(UserError, match="has the data of another run"), written_data(other, tmp_path):
            pass


def test_a_folder_of_images_is_its_own_root(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    assert keys_of_data(tmp_path, None) == {"DATASET.NAME": "Folders", "DATASET.ROOT": str(tmp_path)}
    with pytest.raises(UserError, match=f"root=: the folder of data= is the root, {tmp_path}; leave root= out"):
        keys_of_data(tmp_path, "data")


def test_data_of_which_nothing_was_trained_give_way(tmp_path: Path) -> None:
    """A run that is refused after its config was written has the table that is then mended."""
    (tmp_path / "config.yaml").touch()
    for data in (arrays(), arrays(label=["b", "a"])):
        with written_data(data, tmp_path):
            pass
    assert read_feature_file(tmp_path / "data.safetensors").rows["label"].tolist() == ["b", "a"]
    (tmp_path / "prompt_learner").mkdir()
    (tmp_path / "prompt_learner" / "model.pth.tar-1").touch()
    with pytest.raises(UserError, match="has the data of another run"), written_data(arrays(), tmp_path):
        pass
