"""Region proposals of torchvision's Faster R-CNN."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.functional import to_tensor

from oodprompt.backbones.state_dicts import read_state_dict
from oodprompt.data.images import PixelRules, read_image
from oodprompt.data.transforms import CentreView
from oodprompt.errors import UserError
from oodprompt.log import progress
from oodprompt.regions.boxes import Box, Regions, in_view

_ROUNDING = 1e-6  # pixels by which an edge may miss a whole number through rounding


def proposal_regions(
    paths: Sequence[str],
    input_size: tuple[int, int],
    weights_file: str = "",
    per_image: int = 32,
    short_edge: int = 800,
    device: torch.device | str = "cpu",
    show: bool = True,
    rules: PixelRules = PixelRules(),
    resize: str = "shortest",
) -> Regions:
    """Proposals of torchvision's Faster R-CNN (Ren et al. 2015; ResNet-50 with a feature pyramid), class-agnostic.

    Of each image the part that the model sees is enlarged to ``short_edge`` pixels, at the file's own resolution; after
    non-maximum suppression (0.7) the ``per_image`` boxes with the highest objectness are kept, the highest first.
    ``weights_file`` is torchvision's state dict; empty: where torch.hub would put it. Raises ``UserError`` where it is
    missing, has not the SHA256 that its name ends in, or is of another network.
    """
    if per_image < 1:
        raise UserError(f"{per_image} proposals per image are not possible; give 1 or more")
    weights = _weights(weights_file)
    network = _proposal_network(weights, short_edge).to(device)
    matches: dict[int, list[Box]] = {}
    bar = progress.over(paths, "Region proposals", "image", show=show)
    for i, name in enumerate(bar):
        image = read_image(name, rules)
        window = CentreView(input_size, resize=resize).window(*image.size)
        left, top = (max(math.floor(edge + _ROUNDING), 0) for edge in window[:2])
        ends = zip(window[2:], image.size, strict=True)
        right, bottom = (min(math.ceil(edge - _ROUNDING), whole) for edge, whole in ends)
        seen = image.crop((left, top, right, bottom))
        boxes = _propose(network, to_tensor(seen).to(device))[:per_image].cpu() + torch.tensor([left, top, left, top])
        matches[i] = [Box(x1, y1, x2, y2, "") for x1, y1, x2, y2 in boxes.tolist()]
    return in_view(f"proposals of {weights.name}", matches, paths, input_size, resize)


def _weights(file: str) -> Path:
    """The file of the proposal network's weights, checked against the digest that its name ends in, if it does."""
    address = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url
    path = Path(file).expanduser() if file else Path(torch.hub.get_dir()) / "checkpoints" / Path(address).name
    if not path.is_file():
        raise UserError(f"no weights of the region proposal network at {path}; download {address} and put it there")
    prefix = re.search(r"-([0-9a-f]{8,64})$", path.stem)
    if prefix:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if not found.startswith(prefix[1]):
            raise UserError(f"{path}: its SHA256 begins with {found[:8]}, not {prefix[1]}; download {address} again")
    return path


def _proposal_network(path: Path, short_edge: int) -> FasterRCNN:
    """Faster R-CNN up to its proposals, with the weights of ``path``, in evaluation mode."""
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0  # as torchvision sets it for the weights it publishes
    largest = round(short_edge * 1333 / 800)  # torchvision's proportion
    heads = {"box_head": nn.Identity(), "box_predictor": nn.Identity()}
    network = FasterRCNN(backbone, min_size=short_edge, max_size=largest, **heads)
    weights = {k: v for k, v in read_state_dict(path).items() if k.startswith(("backbone.", "rpn."))}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path} is no state dict of torchvision's fasterrcnn_resnet50_fpn; "
            f"download {FasterRCNN_ResNet50_FPN_Weights.COCO_V1.url}"
        ) from error
    return network.eval()


@torch.no_grad()
def _propose(network: FasterRCNN, image: Tensor) -> Tensor:
    """Image [3, h, w] in 0..1 -> proposals [m, 4] in its pixels, by falling objectness."""
    images, _ = network.transform([image])
    (boxes,), _ = network.rpn(images, network.backbone(images.tensors))
    height, width = (now / then for now, then in zip(image.shape[-2:], images.image_sizes[0], strict=True))
    return boxes * boxes.new_tensor([width, height, width, height])
