"""A miniature UrbanCars as its scripts write it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from tests.helpers.trees.writing import put

SPLITS = {
    "train": "bg-0.95_co_occur_obj-0.95/train",
    "val": "bg-0.5_co_occur_obj-0.5/val",
    "test": "bg-0.5_co_occur_obj-0.5/test",
}
KINDS = ("urban", "country")


def tree(root: Path) -> None:
    for split, folder in SPLITS.items():
        for i, (car, scene, thing) in enumerate(product(KINDS, repeat=3)):
            group = root / folder / f"obj-{car}_bg-{scene}_co_occur_obj-{thing}"
            for n in range(1 + i if split == "train" else 2):
                put(group, f"{n:03d}.jpg", f"{n:03d}_mask.png", f"{n:03d}_co_occur_obj_mask.png")
