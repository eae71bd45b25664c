"""The configs for real data run as they are, once files are in place: on miniature trees and a random CLIP of OpenAI's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from oodprompt import cli
from oodprompt.backbones import CLIPShape
from oodprompt.backbones.tokenizer import load_clip_file
from tests.conftest import REPOSITORY
from tests.datasets import test_celeba, test_metashift, test_waterbirds

# 224 pixels as OpenAI's, but one narrow block per tower.
SHAPE = CLIPShape(32, 224, 1, 64, 32, 77, 49408, 64, 1, 1)
TREES: dict[str, Callable[[Path], Any]] = {
    "waterbirds": lambda root: test_waterbirds.tree(root / test_waterbirds.ARCHIVE),
    "celeba": lambda root: test_celeba.tree(root / "celeba"),
    "metashift": lambda root: test_metashift.tree(root / "metashift"),
}
METHODS = {
    "DebiasedPT": "configs/trainers/DebiasedPT/vit_l14_ep50.yaml",
    "CoOpOOD": "configs/trainers/CoOpOOD/debiased_vit_l14_ep50.yaml",
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state dict in OpenAI's layout."""
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.manual_seed(0)
    torch.save(load_clip_file("model").CLIP(*astuple(SHAPE)).state_dict(), path)
    return path


@pytest.mark.parametrize("trainer", METHODS)
@pytest.mark.parametrize("data", TREES)
def test_runs_unchanged(data: str, trainer: str, weights: Path, tmp_path: Path) -> None:
    TREES[data](tmp_path / "data")
    flags = [
        "--root",
        str(tmp_path / "data"),
        "--trainer",
        trainer,
        "--seed",
        "1",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    files = ["--dataset-config-file", f"configs/datasets/{data}.yaml", "--config-file", METHODS[trainer]]
    files[1::2] = [str(REPOSITORY / file) for file in files[1::2]]
    cli.run([*flags, *files, "MODEL.BACKBONE.PATH", str(weights), "OPTIM.MAX_EPOCH", "3"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["trainer"] == trainer and results["groups"] and results["groups_by"] == "pseudo"
    assert results["stack"] == (["DebiasedPT"] if trainer == "CoOpOOD" else [])
    criteria = {row["criterion"] for row in results["selections"]}
    assert {"accuracy", "worst_group_accuracy", "worst_pseudo_group_accuracy", "last epoch"} == criteria
    assert results["pseudo_attribute_accuracy"]["train"] is not None
    for picture in ("groups.png", "training.png", "groups_by_epoch.png", "pseudo_attributes.png"):
        assert (tmp_path / "out" / picture).is_file()
