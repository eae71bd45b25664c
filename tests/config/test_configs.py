"""The configs for real data run as they are, once files are in place: on miniature trees and a random CLIP of OpenAI's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from oodprompt import cli
from oodprompt.backbones import CLIPShape
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.engine.discovery import RunDiscovery
from oodprompt.methods.attributes import DiscoveredClusters
from tests.helpers.runs import REPOSITORY
from tests.helpers.trees import celeba, metashift, waterbirds

# 224 pixels as OpenAI's, but one narrow block per tower.
SHAPE = CLIPShape(32, 224, 1, 64, 32, 77, 49408, 64, 1, 1)
TREES: dict[str, Callable[[Path], Any]] = {
    "waterbirds": lambda root: waterbirds.tree(root / waterbirds.ARCHIVE),
    "celeba": lambda root: celeba.tree(root / "celeba"),
    "metashift": lambda root: metashift.tree(root / "metashift"),
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
    torch.save(load_clip_file("model").CLIP(*astuple(SHAPE)[:10]).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("data", "trainer"), [("waterbirds", "DebiasedPT"), ("celeba", "CoOpOOD"), ("metashift", "CoOpOOD")]
)
@pytest.mark.usefixtures("undrawn")
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


def first_of_four(discovery: RunDiscovery) -> DiscoveredClusters:
    """As if discovery had found the first quadrant of every image."""
    learner, regions = discovery.encoder.learner, discovery.region_features
    owner = regions.regions("train").owner
    assert regions.of("train", learner).shape == (len(owner), SHAPE.embed_dim)
    return DiscoveredClusters((0,), {"train": torch.arange(len(owner)) % 4}, {"train": owner})


@pytest.mark.usefixtures("undrawn")
def test_ravl_fine_tunes_a_resnet_on_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDiscovery, "find", first_of_four)
    torch.manual_seed(0)
    shape = CLIPShape(32, 224, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1)
    torch.save(load_clip_file("model").CLIP(*astuple(shape)[:10]).state_dict(), tmp_path / "clip.pt")
    rng, rows = np.random.default_rng(0), ["image,label,split,attribute,caption"]
    for i in range(24):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        name, split = ("cat", "dog")[i % 2], ("train", "val", "test")[i // 8]
        rows.append(f"{i}.png,{name},{split},{i // 2 % 2},a {name} in picture {i}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    files = ["--dataset-config-file", str(REPOSITORY / "configs/datasets/csv.yaml")]
    files += ["--config-file", str(REPOSITORY / "configs/trainers/RaVL/rn50_ep100.yaml")]
    flags = ["--root", str(tmp_path), "--trainer", "RaVL", "--seed", "1", "--output-dir", str(tmp_path / "out")]
    keys = ["MODEL.BACKBONE.PATH", str(tmp_path / "clip.pt"), "OPTIM.MAX_EPOCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    cli.run([*flags, *files, *keys])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["base"] == "FineTune"
    own = torch.load(next((tmp_path / "out" / "image_tower").glob("model.pth.tar-2")), weights_only=True)
    tower = {k.removeprefix("tower."): v for k, v in own["state_dict"].items() if k.startswith("tower.")}
    clip = torch.load(tmp_path / "clip.pt", weights_only=True)
    assert not torch.equal(tower["conv1.weight"], clip["visual.conv1.weight"])
    assert torch.equal(tower["bn1.running_mean"], clip["visual.bn1.running_mean"])
