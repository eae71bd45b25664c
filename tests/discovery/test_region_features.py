"""Features of regions: those of each region alone, shared by processes, kept in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import load_backbone
from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.data.dataset import Datum
from oodprompt.data.images import read_image
from oodprompt.data.loading import Loader
from oodprompt.data.sampling import EpochBatches
from oodprompt.data.transforms import build_transform
from oodprompt.discovery.region_features import extract_region_features, region_view
from oodprompt.features.cache import FeatureCache
from oodprompt.regions.boxes import Regions
from oodprompt.regions.sources import grid_regions
from tests.helpers.boxes import SIZE


@pytest.fixture
def cfg(data_root: Path, tmp_path: Path) -> CfgNode:
    cfg = get_cfg_default()
    keys = {
        "INPUT.SIZE": SIZE,
        "INPUT.TRANSFORMS": ("normalize",),
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.TEST.BATCH_SIZE": 4,
        "DATALOADER.FEATURE_CACHE": "disk",
        "DATALOADER.CACHE_DIR": str(tmp_path / "cache"),
    }
    for key, value in keys.items():
        set_key(cfg, key, value, "test")
    return cfg


@pytest.fixture
def data(tmp_path: Path) -> list[Datum]:
    """Ten images of random pixels."""
    rng, data = np.random.default_rng(1), []
    for i in range(10):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(path)
        data.append(Datum(str(path), i % 2))
    return data


def make_loader(cfg: CfgNode, data: list[Datum], rank: int = 0, processes: int = 1) -> Loader:
    batches = EpochBatches(cfg, data, False, rank, processes)
    return Loader(cfg, data, build_transform(cfg, False), batches)


NINE = Regions(
    torch.tensor([[0.1 * i, 0.05 * i, 0.1 * i + 0.1, 1] for i in range(9)]), torch.tensor([1, 1, 2, 4, 4, 4, 5, 8, 8])
)


def test_features_are_those_of_each_region_alone(cfg: CfgNode, data: list[Datum]) -> None:
    clip, loader, seen = load_backbone("tiny"), make_loader(cfg, data), []

    def encode(images: Tensor, boxes: list[Tensor]) -> Tensor:
        seen.append(len(images))
        return clip.region_features(images, boxes, "crops")

    features = extract_region_features(encode, loader, NINE, show=False)
    assert seen == [4, 4, 2] and features.shape == (9, 128) and not features.requires_grad
    transform = build_transform(cfg, False)
    for row, (box, owner) in enumerate(zip(NINE.boxes, NINE.owner.tolist(), strict=True)):
        image = transform(read_image(data[owner].impath))[None]
        with torch.no_grad():
            expected = F.normalize(clip.region_features(image, [box[None]], "crops"), dim=-1)[0]
        torch.testing.assert_close(features[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_share_the_work(
    processes: int, cfg: CfgNode, data: list[Datum], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the rows of its own images, the others zeros; a process may get none of a batch's images."""
    cfg.DATALOADER.TEST.BATCH_SIZE = 1

    def encode(images: Tensor, boxes: list[Tensor]) -> Tensor:
        assert len(images) == len(boxes)
        return torch.cat(
            [image.mean() + box[:, :3] for image, box in zip(images, boxes, strict=True)] or [torch.zeros(0, 3)]
        )

    whole = extract_region_features(encode, make_loader(cfg, data), NINE, show=False)
    assert (whole.norm(dim=1) - 1).abs().max() < 1e-6
    parts = [
        extract_region_features(encode, make_loader(cfg, data, rank, processes), NINE, show=False)
        for rank in range(processes)
    ]
    assert torch.equal(sum(parts), whole)
    assert (torch.stack(parts).abs().amax(dim=-1) > 0).sum() == 9


def test_features_are_kept_in_files(cfg: CfgNode, data: list[Datum]) -> None:
    clip, computed, said = load_backbone("tiny"), [], []

    def view(regions: Regions, how: str) -> np.ndarray:
        def encode(images: Tensor, boxes: list[Tensor]) -> Tensor:
            computed.append(how)
            return clip.region_features(images, boxes, how)

        cache = FeatureCache(cfg, clip, "fp32", torch.device("cpu"), said.append)
        views = region_view("val", make_loader(cfg, data), encode, regions, how, show=False, cache=cache)
        assert len(views) == 1 and views[0].shape == (len(regions.owner), 128)
        return np.array(views[0])

    first = view(NINE, "patches")
    assert len(computed) == 3 and np.array_equal(view(NINE, "patches"), first) and len(computed) == 3
    assert said[0].startswith("Image features: regions of val written to") and "read from" in said[1]
    memory = region_view(
        "val", make_loader(cfg, data), lambda x, b: clip.region_features(x, b, "patches"), NINE, "patches", show=False
    )
    assert torch.equal(torch.from_numpy(first), memory[0])
    others = [
        view(NINE, "crops"),
        view(Regions(NINE.boxes.flip(0), NINE.owner), "patches"),
        view(grid_regions(10, 1, 1), "patches"),
    ]
    assert len(computed) == 12 and len(list(Path(cfg.DATALOADER.CACHE_DIR).glob("*.npy"))) == 4
    assert not any(np.array_equal(other[:9], first) for other in others)
