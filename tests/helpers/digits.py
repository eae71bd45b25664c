"""Items in MNIST's files, small enough for a test."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def put_items(folder: Path, per_class: dict[str, int]) -> None:
    """The four files; an item's first pixels say its part, label and number, so that it can be told in an image."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in per_class.items():
        labels = rng.permutation(np.repeat(np.arange(10), count)).astype(np.uint8)
        images = rng.integers(1, 255, (len(labels), 28, 28), dtype=np.uint8)
        number = np.arange(len(labels))
        images[:, 0, 0], images[:, 0, 1] = labels + 1, 100 if part == "train" else 200
        images[:, 0, 2], images[:, 0, 3] = number // 200 + 1, number % 200 + 1
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), 1))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
