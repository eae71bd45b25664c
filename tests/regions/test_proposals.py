"""Proposals of a detector are torchvision's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn

from oodprompt.data.images import PixelRules
from oodprompt.errors import UserError
from oodprompt.regions.boxes import counts, per_image
from oodprompt.regions.proposals import proposal_regions
from oodprompt.regions.sources import build_regions
from tests.helpers.boxes import SIZE, MakeImages


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """torchvision's own detector with random weights, of images enlarged to 64 pixels, and the file of its state."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=64, max_size=107).eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 0.0
                module.running_var.uniform_(0.5, 1.5)
                module.running_mean.normal_(std=0.1)
        for name, value in network.rpn.head.named_parameters():
            value.data.normal_(std=0.02 if name.endswith("weight") else 0.1)
    state = {k: v.half() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    network.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    file = tmp_path_factory.mktemp("weights") / "detector.pth"
    torch.save(state, file)
    return network, file


def proposed(network: torch.nn.Module, image: Tensor) -> Tensor:
    """What torchvision's detector hands on to its second stage, in pixels of the image."""
    kept: list[Tensor] = []
    with network.rpn.register_forward_hook(
        lambda _, inputs, output: kept.append((inputs[0].image_sizes[0], output[0][0]))
    ):
        with torch.no_grad():
            network([image])
    (height, width), boxes = kept[0]
    scale = torch.tensor([image.shape[2] / width, image.shape[1] / height] * 2)
    return boxes * scale


@pytest.mark.parametrize(
    ("size", "resize"),
    [
        ((40, 40), "shortest"),
        ((80, 40), "shortest"),
        ((30, 50), "shortest"),
        ((30, 50), "squash"),
        ((80, 40), "longest"),
    ],
    ids=str,
)
def test_proposals_are_torchvisions(
    size: tuple[int, int], resize: str, detector: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    """Of the square in the middle of the image, or of the whole image: what the model sees."""
    network, file = detector
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    regions = proposal_regions([str(tmp_path / "x.png")], SIZE, str(file), 5, short_edge=64, show=False, resize=resize)
    across, down = (min(size), min(size)) if resize == "shortest" else size
    left, top = (size[0] - across) // 2, (size[1] - down) // 2
    seen = T.functional.to_tensor(pixels[top : top + down, left : left + across].copy())
    width, height = (max(size), max(size)) if resize == "longest" else (across, down)
    black = torch.tensor([(width - across) / 2, (height - down) / 2] * 2)
    expected = (proposed(network, seen)[:5] + black) / torch.tensor([width, height] * 2)
    assert len(regions.boxes) == 5 and (expected - expected[:1]).abs().max() > 0.05
    torch.testing.assert_close(regions.boxes, expected, atol=1e-3, rtol=0)  # in double they differ by 1e-12
    assert regions.owner.tolist() == [0] * 5 and regions.names == ()
    assert regions.source == "proposals of detector.pth: 5 regions on 1 of 1 images"


def test_proposals_of_several_images_are_those_of_each(
    detector: tuple[torch.nn.Module, Path], make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(a=(40, 40), b=(60, 40))
    monkeypatch.setattr(
        proposal_regions, "__defaults__", (*proposal_regions.__defaults__[:2], 64, "cpu", False, PixelRules())
    )
    both = build_regions("proposals", paths, SIZE, str(detector[1]), per_image=3, show=False)
    assert counts(both, 2).tolist() == [3, 3]
    for i in range(2):
        one = build_regions("proposals", [paths[i]], SIZE, str(detector[1]), per_image=3, show=False)
        assert torch.equal(per_image(both, 2)[i], one.boxes)


def test_wrong_weights(
    detector: tuple[torch.nn.Module, Path], make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, address = make_images(a=(20, 20)), FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    usual = tmp_path / "hub" / "checkpoints" / address.rpartition("/")[2]
    with pytest.raises(UserError, match=f"no weights of the region proposal network at {usual}; download {address}"):
        build_regions("proposals", paths, SIZE)
    with pytest.raises(UserError, match=f"at {tmp_path}/gone.pth; download"):
        build_regions("proposals", paths, SIZE, str(tmp_path / "gone.pth"))
    usual.parent.mkdir(parents=True)
    usual.write_bytes(b"other")
    begins = hashlib.sha256(b"other").hexdigest()[:8]
    with pytest.raises(UserError, match=f"its SHA256 begins with {begins}, not 258fb6c6; download {address} again"):
        build_regions("proposals", paths, SIZE)
    torch.save({"backbone.x": torch.zeros(2)}, tmp_path / "x.pth")
    digest_of = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    right = (tmp_path / "x.pth").rename(tmp_path / f"x-{digest_of[:8]}.pth")
    with pytest.raises(UserError, match="is no state dict of torchvision's fasterrcnn_resnet50_fpn"):
        build_regions("proposals", paths, SIZE, str(right))
    with pytest.raises(UserError, match="0 proposals per image are not possible"):
        build_regions("proposals", paths, SIZE, str(detector[1]), per_image=0)
