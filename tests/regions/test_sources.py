"""Where regions come from: grids, files told apart by content, and words that name no source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oodprompt.errors import UserError
from oodprompt.regions.sources import build_regions, grid_regions
from tests.helpers.boxes import SIZE, MakeImages, write_csv


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
