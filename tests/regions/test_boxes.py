"""Regions: from every source to fractions of what the model sees, and their features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.data.images import read_image
from oodprompt.data.transforms import RESIZE_MODES, build_transform
from oodprompt.errors import UserError
from oodprompt.regions.boxes import Regions, counts, digest, per_image, rows_of_images
from oodprompt.regions.sources import build_regions
from tests.helpers.boxes import SIZE, MakeImages, write_csv

# --- by image


ONE = Regions(torch.arange(20.0).reshape(5, 4), torch.tensor([0, 0, 2, 3, 3]), tuple("abcde"), "here")


def test_by_image() -> None:
    assert counts(ONE, 5).tolist() == [2, 0, 1, 2, 0]
    boxes = per_image(ONE, 5)
    assert [len(some) for some in boxes] == [2, 0, 1, 2, 0]
    assert torch.equal(torch.cat(boxes), ONE.boxes) and torch.equal(boxes[2], ONE.boxes[2:3])


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4], [3, 1, 0], [4, 1], [2, 2, 3], []], ids=str)
@pytest.mark.parametrize("form", [list, torch.tensor])
def test_rows_of_images(indices: list[int], form: Callable[[list[int]], Any]) -> None:
    rows, place = rows_of_images(ONE, form(indices))
    assert rows.tolist() == [row for i in indices for row in range(5) if ONE.owner[row] == i]
    assert place.tolist() == [new for new, i in enumerate(indices) for row in range(5) if ONE.owner[row] == i]


def test_digest_sees_boxes_owners_and_how() -> None:
    changed = ONE.boxes.clone()
    changed[3, 1] += 1e-6
    different = [
        digest(ONE, "crops"),
        digest(ONE, "patches"),
        digest(Regions(changed, ONE.owner), "crops"),
        digest(Regions(ONE.boxes, torch.tensor([0, 0, 1, 3, 3])), "crops"),
        digest(Regions(ONE.boxes[:3], ONE.owner[:3]), "crops"),
    ]
    assert len(set(different)) == len(different)
    assert digest(Regions(ONE.boxes, ONE.owner, (), "elsewhere"), "crops") == different[0]


# --- from pixels of the file to what the model sees


def marked(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """White where the box is, else black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("resize", RESIZE_MODES)
@pytest.mark.parametrize("input_size", [(48, 48), (48, 32), (32, 48)], ids=str)
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((100, 100), (10, 20, 60, 90)),
        ((200, 100), (70, 20, 130, 90)),
        ((101, 237), (10, 80, 60, 150)),
        ((30, 40), (3, 14, 20, 31)),
        ((333, 100), (150, 0, 190, 100)),
    ],
    ids=str,
)
def test_boxes_follow_the_test_transform(
    size: tuple[int, int], box: tuple[int, int, int, int], input_size: tuple[int, int], resize: str, tmp_path: Path
) -> None:
    """A white box goes through the project's own transform; the region is where the white is."""
    path = tmp_path / "x.png"
    marked(size, box).save(path)
    cfg = get_cfg_default()
    set_key(cfg, "INPUT.SIZE", input_size, "test")
    set_key(cfg, "INPUT.RESIZE", resize, "test")
    set_key(cfg, "INPUT.TRANSFORMS", (), "test")
    white = build_transform(cfg, is_train=False)(read_image(str(path)))[0].numpy()
    file = write_csv(tmp_path / "boxes.csv", [["x.png", *box, ""]])
    left, top, right, bottom = build_regions("boxes", [str(path)], input_size, file, resize=resize).boxes[0].tolist()
    height, width = input_size
    # How much white there is along a side, and where its middle lies, to half a pixel of the resized image.
    assert white.shape == input_size
    assert white.max(axis=0).sum() == pytest.approx((right - left) * width, abs=0.6)
    assert white.max(axis=1).sum() == pytest.approx((bottom - top) * height, abs=0.6)
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    assert (white * columns).sum() / white.sum() == pytest.approx((left + right) / 2 * width, abs=0.5)
    assert (white * rows).sum() / white.sum() == pytest.approx((top + bottom) / 2 * height, abs=0.5)


def test_a_box_by_hand(make_images: MakeImages, tmp_path: Path) -> None:
    """200 x 100 -> 96 x 48 -> columns 24 to 72, that is pixels 50 to 150 of the file."""
    paths = make_images(wide=(200, 100), tall=(100, 200))
    file = write_csv(
        tmp_path / "boxes.csv", [["wide.png", 75, 25, 100, 50, "a"], ["tall.png", 0, 125, 100, 160.5, "b"]]
    )
    regions = build_regions("boxes", paths, SIZE, file)
    expected = [[0.25, 0.25, 0.5, 0.5], [0, 0.75, 1, 1.0]]
    torch.testing.assert_close(regions.boxes, torch.tensor(expected))
    assert regions.boxes.dtype == torch.float32 and regions.owner.dtype == torch.int64
    assert regions.names == ("a", "b") and regions.owner.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((40, 0, 60, 100), [0, 0, 0.1, 1]),  # half of it
        ((140, 0, 179.9, 100), [0.9, 0, 1, 1]),  # a little more than a quarter
        ((140, 0, 180.1, 100), None),  # a little less
        ((0, 0, 49, 100), None),  # in the part that is cut off
        ((160, 0, 190, 100), None),
        ((60, -10, 80, 10), [0.1, 0, 0.3, 0.1]),  # beyond the image
        ((60, 120, 80, 130), None),
        ((60, 50, 60.001, 60), None),  # too narrow to be a region
    ],
    ids=str,
)
def test_clipping(
    box: tuple[float, ...], expected: list[float] | None, make_images: MakeImages, tmp_path: Path
) -> None:
    paths = make_images(x=(200, 100))
    file = write_csv(tmp_path / "boxes.csv", [["x.png", 50, 0, 150, 100, "whole"], ["x.png", *box, "this"]])
    regions = build_regions("boxes", paths, SIZE, file)
    torch.testing.assert_close(regions.boxes, torch.tensor([[0, 0, 1, 1.0]] + ([expected] if expected else [])))
    assert regions.names == ("whole", "this")[: len(regions.boxes)]
    dropped = "; 1 boxes that lie mostly outside what the model sees, or are empty, are left out"
    assert regions.source == f"{file}: {len(regions.boxes)} regions on 1 of 1 images" + ("" if expected else dropped)


# --- csv files


def test_csv(make_images: MakeImages, tmp_path: Path) -> None:
    """In the order of the images, of each in the file's; absolute paths, too; other images are passed over."""
    paths = make_images(sub__a=(100, 100), b=(100, 100), c=(100, 100))
    (tmp_path / "lists").mkdir()
    rows = [
        [paths[1], 0, 0, 50, 50, "one"],
        ["../other.png", 0, 0, 50, 50, "other"],
        ["..\\sub\\a.png", 0, 0, 100, 50, ""],
        ["../b.png", 50, 50, 100, 100, " two "],
    ]
    file = write_csv(tmp_path / "lists" / "boxes.csv", rows)
    regions = build_regions("boxes", paths, SIZE, file)
    assert regions.boxes.tolist() == [[0, 0, 1, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    assert regions.owner.tolist() == [0, 1, 1] and regions.names == ("", "one", "two")
    assert regions.source == f"{file}: 3 regions on 2 of 3 images"


def test_csv_without_labels_has_no_names(make_images: MakeImages, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "b.csv", [["a.png", 0, 0, 9, 9]], "image,left,top,right,bottom")
    assert build_regions("boxes", make_images(a=(20, 20)), SIZE, file).names == ()


@pytest.mark.parametrize(
    ("rows", "header", "problem"),
    [
        ([["a.png", 5, 0, 5, 9, ""]], None, "line 2: the box must have left < right and top < bottom, not 5, 0, 5, 9"),
        ([["a.png", 0, 9, 5, 3, ""]], None, "line 2: the box must have left < right"),
        ([["a.png", 0, 0, 5, 3, ""], ["a.png", 0, "x", 5, 3, ""]], None, "line 3: 'x' is not a number"),
        ([["a.png", 0, 0, "inf", 3, ""]], None, "line 2: 'inf' is not a number"),
        ([["a.png", 0, 0, 5, 3]], "image,x,y,right,bottom", "column left, top is missing; expected image, left"),
        ([["z.png", 0, 0, 5, 3, ""], ["y.png", 0, 0, 5, 3, ""]], None, "z.png, .*y.png, asked for are .*a.png"),
        ([], None, "none of its 0 images is among the 1 asked for; it names none, asked for are"),
        ([["a.png", 0, 20, 5, 30, ""]], None, "no region lies in what the model sees of the 1 images"),
    ],
    ids=str,
)
def test_wrong_csv_files(
    rows: list[list[Any]], header: str | None, problem: str, make_images: MakeImages, tmp_path: Path
) -> None:
    file = write_csv(tmp_path / "boxes.csv", rows, header or "image,left,top,right,bottom,label")
    with pytest.raises(UserError, match=problem) as error:
        build_regions("boxes", make_images(a=(20, 20)), SIZE, file)
    assert file in str(error.value) and "\n" not in str(error.value)
