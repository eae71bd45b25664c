"""A miniature Waterbirds in the layout of its archive."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.trees.writing import put, write

ARCHIVE = "waterbird_complete95_forest2water2"
HEADER = "img_id,img_filename,y,split,place,place_filename"
ROWS = [
    "1,001.Albatross/A_0001.jpg,1,0,1,/o/ocean/1.jpg",
    "2,001.Albatross/A_0002.jpg,1,0,0,/f/forest/2.jpg",
    "3,002.Wren/W_0001.jpg,0,0,0,/b/bamboo/3.jpg",
    "4,002.Wren/W_0002.jpg,0,1,1,/l/lake/4.jpg",
    "5,002.Wren/W_0003.jpg,0,2,1,/l/lake/5.jpg",
    "6,001.Albatross/A_0003.jpg,1,2,0,/f/forest/6.jpg",
]


def tree(folder: Path, *rows: str, header: str = HEADER) -> Path:
    put(folder, *(row.split(",")[1] for row in ROWS))
    return write(folder / "metadata.csv", header, *(rows or ROWS))
