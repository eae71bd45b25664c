"""Files with boxes of images: csv and COCO."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIZE = (48, 48)
MakeImages = Callable[..., list[str]]


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
