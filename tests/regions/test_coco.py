"""Boxes from a file in COCO's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from oodprompt.errors import UserError
from oodprompt.regions.sources import build_regions
from tests.helpers.boxes import SIZE, MakeImages, coco, write_json


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
