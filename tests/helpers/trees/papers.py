"""Miniatures of the benchmarks of papers that hold every group in every split, so that every method can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from tests.helpers.trees import celeba, domains, metashift, waterbirds
from tests.helpers.trees.writing import put, write


def groups() -> Iterator[tuple[int, int, int, int]]:
    """(number, split, class, attribute): two images of every group in every split."""
    for number, (split, label, attribute, _) in enumerate(product(range(3), range(2), range(2), range(2)), 1):
        yield number, split, label, attribute


def waterbirds_tree(root: Path) -> None:
    folder = root / "waterbirds" / waterbirds.ARCHIVE
    rows = [f"{n},001.Albatross/A_{n:04d}.jpg,{y},{split},{a},/o/ocean/{n}.jpg" for n, split, y, a in groups()]
    put(folder, *(row.split(",")[1] for row in rows))
    write(folder / "metadata.csv", waterbirds.HEADER, *rows)


def celeba_tree(root: Path) -> None:
    names = {n: f"{n:06d}.jpg" for n, *_ in groups()}
    values = [f"{names[n]} -1 {2 * y - 1} {2 * a - 1} -1" for n, _, y, a in groups()]
    put(root / "celeba" / "img_align_celeba", *names.values())
    write(root / "celeba" / "list_attr_celeba.txt", str(len(names)), " ".join(celeba.NAMES), *values)
    write(root / "celeba" / "list_eval_partition.txt", *(f"{names[n]} {split}" for n, split, *_ in groups()))


def metashift_tree(root: Path) -> None:
    metashift.tree(root / "metashift")


TREES = {
    "waterbirds": waterbirds_tree,
    "celeba": celeba_tree,
    "metashift": metashift_tree,
    "pacs": domains.pacs_lists,
}
