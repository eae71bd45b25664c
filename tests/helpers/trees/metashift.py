"""A miniature MetaShift in SubpopBench's build."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.trees.writing import put

BUILD = "MetaShift-Cat-Dog-indoor-outdoor"
COUNTS = {  # folder: images, (class, attribute)
    "train/cat/cat(indoor)": (12, (1, 1)),
    "train/dog/dog(outdoor)": (9, (0, 0)),
    "test/cat/cat(outdoor)": (7, (1, 0)),
    "test/dog/dog(indoor)": (11, (0, 1)),
}


def tree(folder: Path) -> list[tuple[str, tuple[int, int]]]:
    """Makes the tree; returns (image, group) in SubpopBench's order of folders, names sorted."""
    pool = []
    for group, (count, pair) in COUNTS.items():
        names = sorted(f"{group}/{number * 37 % 1000}.jpg" for number in range(1, count + 1))
        put(folder / BUILD, *names)
        pool += [(name, pair) for name in names]
    put(folder / BUILD, "train/cat/cat(outdoor)/1.jpg", "train/cat/cat(indoor)/x.png")  # not part of the benchmark
    return pool
