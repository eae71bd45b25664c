"""Regions: from every source to fractions of what the model sees, and their features."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms as T
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights, fasterrcnn_resnet50_fpn
from yacs.config import CfgNode

from oodprompt.backbones import load_backbone
from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.data.dataset import Datum
from oodprompt.data.images import read_image
from oodprompt.data.loading import Loader
from oodprompt.data.sampling import EpochBatches
from oodprompt.data.transforms import build_transform
from oodprompt.discovery.region_features import extract_region_features, region_view
from oodprompt.errors import UserError
from oodprompt.features.cache import FeatureCache
from oodprompt.regions.boxes import Regions, counts, digest, per_image, rows_of_images
from oodprompt.regions.proposals import proposal_regions
from oodprompt.regions.sources import build_regions, grid_regions

SIZE = (48, 48)
MakeImages = Callable[..., list[str]]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """Grey images of the given names and sizes (width, height) -> their paths."""

    def make(**sizes: tuple[int, int]) -> list[str]:
        paths = []
        for name, size in sizes.items():
            path = tmp_path / f"{name.replace('__', '/')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (90, 90, 90)).save(path)
            paths.append(str(path))
        return paths

    return make


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: str = "image,left,top,right,bottom,label") -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return str(path)


def coco(images: Sequence[tuple[int, str]], annotations: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """(id, file name) of images and (image, bbox, category[, crowd]) of annotations; categories 7 cat and 9 dog."""
    return {
        "images": [{"id": i, "file_name": name} for i, name in images],
        "annotations": [
            {"image_id": i, "bbox": list(bbox), "category_id": category, "iscrowd": int(bool(crowd))}
            for i, bbox, category, *crowd in annotations
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
    }


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


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


# --- grids


def test_quadrants() -> None:
    quadrants = grid_regions(3, 2, 2)
    expected = [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert quadrants.boxes.dtype == torch.float32 and quadrants.boxes.tolist() == expected * 3
    assert quadrants.owner.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert quadrants.names == () and quadrants.source == "grid of 2 x 2"


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 3), (4, 2)])
def test_grids(rows: int, cols: int, overlap: float) -> None:
    regions = build_regions("grid", ["a", "b"], SIZE, grid=(rows, cols), overlap=overlap)
    left, top, right, bottom = regions.boxes[: rows * cols].reshape(rows, cols, 4).double().unbind(-1)
    for low, high in ((left, right), (top.T, bottom.T)):
        length = high - low
        torch.testing.assert_close(length, length[:1, :1].expand_as(length))
        assert (low[:, 0] == 0).all() and (high[:, -1] - 1).abs().max() < 1e-6 and high.max() <= 1
        shared = high[:, :-1] - low[:, 1:]
        torch.testing.assert_close(shared, overlap * length[:, 1:], atol=1e-6, rtol=0)
        assert (low == low[:1]).all()
    assert len(regions.owner) == 2 * rows * cols
    assert regions.source == f"grid of {rows} x {cols}" + (f" with overlap {overlap}" if overlap else "")


@pytest.mark.parametrize(("rows", "cols", "overlap"), [(0, 2, 0.0), (2, -1, 0.0), (2, 2, 1.0), (2, 2, -0.1)])
def test_impossible_grids(rows: int, cols: int, overlap: float) -> None:
    with pytest.raises(UserError, match="not possible|from 0 to below 1"):
        grid_regions(1, rows, cols, overlap)


# --- from pixels of the file to what the model sees


def marked(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """White where the box is, else black."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


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
    size: tuple[int, int], box: tuple[int, int, int, int], input_size: tuple[int, int], tmp_path: Path
) -> None:
    """A white box goes through the project's own transform; the region is where the white is."""
    path = tmp_path / "x.png"
    marked(size, box).save(path)
    cfg = get_cfg_default()
    set_key(cfg, "INPUT.SIZE", input_size, "test")
    set_key(cfg, "INPUT.TRANSFORMS", (), "test")
    white = build_transform(cfg, is_train=False)(read_image(str(path)))[0].numpy()
    file = write_csv(tmp_path / "boxes.csv", [["x.png", *box, ""]])
    left, top, right, bottom = build_regions("boxes", [str(path)], input_size, file).boxes[0].tolist()
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
        ["../sub/a.png", 0, 0, 100, 50, ""],
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


# --- COCO


def test_coco(make_images: MakeImages, tmp_path: Path) -> None:
    paths = make_images(val__1=(100, 100), val__2=(100, 100), val__3=(200, 100))
    content = coco(
        [(31, "3.png"), (11, "1.png"), (51, "5.png")],
        [
            (31, (50, 0, 50, 100), 9),
            (11, (0, 0, 50, 100), 7),
            (51, (0, 0, 9, 9), 7),
            (11, (0, 0, 100, 100), 7, "crowd"),
            (11, (0, 50, 100, 50), 8),
            (11, (3, 3, 0, 50), 7),
        ],
    )
    file = write_json(tmp_path / "instances", content)
    regions = build_regions("boxes", paths, SIZE, file)
    assert regions.boxes.tolist() == [[0, 0, 0.5, 1], [0, 0.5, 1, 1], [0, 0, 0.5, 1]]
    assert regions.owner.tolist() == [0, 0, 2] and regions.names == ("cat", "", "dog")
    assert regions.source.startswith(f"{file}: 3 regions on 2 of 3 images; 1 boxes")


@pytest.mark.parametrize(
    ("names", "images", "expected"),
    [
        (["a/1.png", "b/1.png"], ["b/1.png", "a/1.png"], [1, 0]),  # the longer end
        (["1.png", "b/1.png"], ["a/1.png", "b/1.png"], [0, 1]),
        (["x/y/a/1.png", "x/y/a/2.png"], ["a/1.png", "a/2.png"], [0, 1]),  # by the file's name
        (["x/1.png", "x/2.png"], ["a/2.png"], [1]),
        (["./a\\1.png", "11.png"], ["a/1.png"], [0]),
        (["x/1.png", "a/2.png"], ["a/1.png", "b/1.png", "a/2.png"], [1]),  # which 1.png? neither
        (["x/1.png", "y/1.png", "2.png"], ["a/1.png", "a/2.png"], [2]),
        (["a/1.png", "b/1.png", "c/1.png"], ["c/1.png"], [2]),
        (["a/1.png", "c/1.png"], ["ba/1.png", "c/1.png"], [1]),  # a is no folder of the first
    ],
    ids=str,
)
def test_coco_images_by_the_end_of_their_path(
    names: list[str], images: list[str], expected: list[int], make_images: MakeImages, tmp_path: Path
) -> None:
    paths = make_images(**{name.removesuffix(".png").replace("/", "__"): (100, 100) for name in images})
    boxes = [(i, (10 * i, 0, 10, 10), 7) for i in range(len(names))]
    regions = build_regions("boxes", paths, SIZE, write_json(tmp_path / "x.json", coco(list(enumerate(names)), boxes)))
    assert (regions.boxes[:, 0] * 10).round().int().tolist() == expected


def test_coco_of_the_same_image_twice(make_images: MakeImages, tmp_path: Path) -> None:
    (path,) = make_images(a=(100, 100))
    file = write_json(tmp_path / "x.json", coco([(0, "a.png")], [(0, (0, 0, 50, 50), 7)]))
    assert build_regions("boxes", [path, path], SIZE, file).owner.tolist() == [0, 1]


def test_coco_boxes_of_an_image_of_another_size(make_images: MakeImages, tmp_path: Path) -> None:
    """The file gives the size its boxes are of; the image was reduced since."""
    content = coco([(0, "a.png")], [(0, (200, 100, 200, 150), 7)])
    content["images"][0] |= {"width": 400, "height": 600}
    file = write_json(tmp_path / "x.json", content)
    regions = build_regions("boxes", make_images(a=(40, 60)), SIZE, file)
    torch.testing.assert_close(regions.boxes, torch.tensor([[0.5, 0, 1, 0.375]]))
    content["images"][0] |= {"width": 600, "height": 400}
    write_json(tmp_path / "x.json", content)
    with pytest.raises(
        UserError, match="the size 600 x 400, but the file has 40 x 60: the image was cropped or turned"
    ):
        build_regions("boxes", make_images(a=(40, 60)), SIZE, file)


def _without(content: dict[str, Any], key: str, field: str = "") -> dict[str, Any]:
    if field:
        del content[key][0][field]
    else:
        del content[key]
    return content


WHOLE_COCO = [(0, "a.png")], [(0, (0, 0, 10, 10), 7)]
WRONG_COCO: dict[str, tuple[Any, str]] = {
    "no images": (lambda: _without(coco(*WHOLE_COCO), "images"), "no list 'images'"),
    "no annotations": (lambda: _without(coco(*WHOLE_COCO), "annotations"), "no list 'annotations'"),
    "a list": (lambda: [1, 2], "no list 'categories'|no list 'images'"),
    "no bbox": (lambda: _without(coco(*WHOLE_COCO), "annotations", "bbox"), "entry 0 of annotations has no bbox"),
    "no name": (lambda: _without(coco(*WHOLE_COCO), "images", "file_name"), "entry 0 of images has no file_name"),
    "no dict": (lambda: coco(*WHOLE_COCO) | {"annotations": [3]}, "entry 0 of annotations has no image_id, bbox"),
    "a size in words": (
        lambda: coco(*WHOLE_COCO) | {"images": [{"id": 0, "file_name": "a.png", "width": "w", "height": 3}]},
        "image 0: 'w' is not a number",
    ),
    "three numbers": (
        lambda: coco(WHOLE_COCO[0], [(0, (0, 0, 10), 7)]),
        r"annotation 0: bbox is \[x, y, width, height\]",
    ),
    "words": (lambda: coco(WHOLE_COCO[0], [(0, (0, "a", 1, 1), 7)]), "annotation 0: 'a' is not a number"),
    "negative": (lambda: coco(WHOLE_COCO[0], [(0, (0, 0, -1, 1), 7)]), "annotation 0: bbox .* negative width"),
    "unknown image": (lambda: coco(WHOLE_COCO[0], [(4, (0, 0, 1, 1), 7)]), "annotation 0 is of image 4, which"),
    "no match": (
        lambda: coco([(0, "x.png"), (1, "y.png"), (2, "z.png")], []),
        "none of its 3 images is among the 1 asked for; it names x.png, y.png, asked for are .*a.png$",
    ),
    "the same name twice": (
        lambda: coco([(0, "a.png"), (1, "a.png")], []),
        "2 of its images have the file_name 'a.png'",
    ),
    "only crowds": (lambda: coco(WHOLE_COCO[0], [(0, (0, 0, 9, 9), 7, 1)]), "no region lies in what the model sees"),
    "no boxes": (lambda: coco(WHOLE_COCO[0], []), "no region lies in what the model sees"),
}


@pytest.mark.parametrize("wrong", WRONG_COCO)
def test_wrong_coco_files(wrong: str, make_images: MakeImages, tmp_path: Path) -> None:
    content, problem = WRONG_COCO[wrong]
    file = write_json(tmp_path / "x.json", content())
    with pytest.raises(UserError, match=problem) as error:
        build_regions("boxes", make_images(a=(20, 20)), SIZE, file)
    assert file in str(error.value) and "\n" not in str(error.value)


def test_one_entry_for_two_images_is_refused(make_images: MakeImages, tmp_path: Path) -> None:
    paths = make_images(a__1=(20, 20), b__1=(20, 20))
    file = write_json(tmp_path / "x.json", coco([(0, "1.png")], [(0, (0, 0, 9, 9), 7)]))
    with pytest.raises(UserError, match="'1.png' fits .*a/1.png and .*b/1.png; give file_name with its folders"):
        build_regions("boxes", paths, SIZE, file)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("x.json", b"image,left\n", "x.json is not json: Expecting value"),
        ("x.csv", b'{"images": [', "x.csv is not json"),
        ("x.csv", b"  \n[", "x.csv is not json"),
        ("x.csv", b"\xff\xfe\x00", "x.csv is not a csv file"),
        ("x.csv", b"", "x.csv: column image, left, top, right, bottom is missing"),
        ("x.txt", b'\xef\xbb\xbf{"images": []}', "no list 'annotations'"),
    ],
)
def test_json_or_csv_by_content(
    name: str, content: bytes, problem: str, make_images: MakeImages, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        build_regions("boxes", make_images(a=(20, 20)), SIZE, str(tmp_path / name))


def test_unknown_source_and_missing_files(make_images: MakeImages, tmp_path: Path) -> None:
    paths = make_images(a=(20, 20))
    with pytest.raises(UserError, match="unknown source of regions 'boxs': did you mean 'boxes'"):
        build_regions("boxs", paths, SIZE)
    with pytest.raises(UserError, match="regions from boxes need a file"):
        build_regions("boxes", paths, SIZE)
    with pytest.raises(UserError, match="no file of regions at .*gone.csv"):
        build_regions("boxes", paths, SIZE, str(tmp_path / "gone.csv"))
    file = write_csv(tmp_path / "boxes.csv", [["a.png", 0, 0, 5, 5, ""]])
    Path(paths[0]).write_text("no image")
    with pytest.raises(UserError, match="cannot read the image .*a.png"):
        build_regions("boxes", paths, SIZE, file)


# --- proposals


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


@pytest.mark.parametrize("size", [(40, 40), (80, 40), (30, 50)], ids=str)
def test_proposals_are_torchvisions(
    size: tuple[int, int], detector: tuple[torch.nn.Module, Path], tmp_path: Path
) -> None:
    """Of the square in the middle of the image, which is what the model sees."""
    network, file = detector
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    regions = proposal_regions([str(tmp_path / "x.png")], SIZE, str(file), 5, short_edge=64, show=False)
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    square = T.functional.to_tensor(pixels[top : top + side, left : left + side].copy())
    expected = proposed(network, square)[:5] / side
    assert len(regions.boxes) == 5 and (expected - expected[:1]).abs().max() > 0.05
    torch.testing.assert_close(regions.boxes, expected, atol=1e-3, rtol=0)  # in double they differ by 1e-12
    assert regions.owner.tolist() == [0] * 5 and regions.names == ()
    assert regions.source == "proposals of detector.pth: 5 regions on 1 of 1 images"


def test_proposals_of_several_images_are_those_of_each(
    detector: tuple[torch.nn.Module, Path], make_images: MakeImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(a=(40, 40), b=(60, 40))
    monkeypatch.setattr(proposal_regions, "__defaults__", (*proposal_regions.__defaults__[:2], 64, "cpu", False))
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


# --- features


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
