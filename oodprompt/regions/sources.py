"""Where the regions of a split come from: a grid, a file of boxes, or a proposal network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oodprompt.config.keys import Key, declare
from oodprompt.data.images import PixelRules
from oodprompt.errors import UserError, nearest
from oodprompt.regions.boxes import Regions, coco_regions, csv_regions, given_file, is_json

SOURCES = ("grid", "boxes", "proposals")

declare(
    "REGIONS",
    {
        "SOURCE": Key(
            "grid",
            "Regions of an image: grid (GRID cells), boxes (of FILE), or proposals (of a detector, weights in FILE).",
            choices=SOURCES,
        ),
        "GRID": Key(
            (2, 2),
            "grid: rows and columns.",
            at_least=1,
            test=lambda grid: len(grid) == 2,
            error="{key}: rows and columns are two whole numbers of 1 or more, as (2, 2), not {value}",
        ),
        "OVERLAP": Key(
            0.0,
            "grid: the share of a cell that it has in common with the next.",
            at_least=0,
            below=1,
            error="{key} is a share from 0 to below 1, not {value}",
        ),
        "FILE": ("", "boxes: a COCO json or a csv (image, left, top, right, bottom, label); proposals: weights."),
        "PER_IMAGE": Key(32, "proposals: how many of an image.", at_least=1),
        "FEATURES": Key(
            "auto",
            "How features are made of a region: tokens, crops, masked or patches (ViT), roi, crops or patches (ResNet); auto: "
            "tokens or roi.",
            choices=("auto", "tokens", "crops", "masked", "patches", "roi"),
        ),
    },
)


def build_regions(
    source: str,
    paths: Sequence[str],
    input_size: tuple[int, int],
    file: str = "",
    grid: tuple[int, int] = (2, 2),
    overlap: float = 0.0,
    per_image: int = 32,
    device: torch.device | str = "cpu",
    show: bool = True,
    rules: PixelRules = PixelRules(),
    resize: str = "shortest",
) -> Regions:
    """The regions of the images ``paths``, in their order.

    ``source`` is "grid" (``grid`` rows and columns, see ``grid_regions``), "boxes" (of ``file``: a COCO json or a csv,
    by its content) or "proposals" (``per_image`` of the network whose weights ``file`` holds, with images read by
    ``rules``). ``input_size`` is the height and width of the test transform, and ``resize`` how images get it, see
    ``CentreView``. Images may be without regions; ``Regions.source`` says how many have some.
    Raises ``UserError`` for an unknown source, an unusable file, and where no image has a region.
    """
    if source == "grid":
        return grid_regions(len(paths), *grid, overlap)
    if source == "boxes":
        of_coco = is_json(given_file(file))
        return (coco_regions if of_coco else csv_regions)(file, paths, input_size, resize)
    if source == "proposals":
        from oodprompt.regions.proposals import proposal_regions  # here: it takes torchvision, which takes seconds

        return proposal_regions(
            paths, input_size, file, per_image, device=device, show=show, rules=rules, resize=resize
        )
    raise UserError(f"unknown source of regions {source!r}: {nearest(source, SOURCES)}")


def grid_regions(n_images: int, rows: int, cols: int, overlap: float = 0.0) -> Regions:
    """``rows`` x ``cols`` equal cells of every image, row by row; 2 x 2 are its quadrants.

    ``overlap`` o is the share of a cell that it has in common with the next, from 0 to below 1: of n cells along a
    side, each is 1 / (n - (n - 1) o) long and starts (1 - o) times its length after the one before.
    """
    if rows < 1 or cols < 1:
        raise UserError(f"a grid of {rows} x {cols} regions is not possible; give 1 or more of each")
    if not 0 <= overlap < 1:
        raise UserError(f"the overlap of regions is a share from 0 to below 1, not {overlap}")
    (top, bottom), (left, right) = _cells(rows, overlap), _cells(cols, overlap)
    boxes = torch.stack(
        [left.repeat(rows), top.repeat_interleave(cols), right.repeat(rows), bottom.repeat_interleave(cols)], 1
    )
    words = f"grid of {rows} x {cols}" + (f" with overlap {overlap:g}" if overlap else "")
    return Regions(boxes.repeat(n_images, 1), torch.arange(n_images).repeat_interleave(rows * cols), (), words)


def _cells(n: int, overlap: float) -> tuple[Tensor, Tensor]:
    length = 1 / (n - (n - 1) * overlap)
    start = torch.arange(n, dtype=torch.double) * (1 - overlap) * length
    return start.float(), (start + length).clamp(max=1).float()
