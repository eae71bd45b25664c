"""Miniatures of ImageNet and the sets that test its classifiers."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.trees.writing import put, write

NAMES = {f"n0{i:02d}": name for i, name in enumerate(["tench", "goldfish", "great white shark", *(f"thing {i}" for i in range(3, 12))])}  # fmt: skip


def names(folder: Path) -> None:
    write(folder / "classnames.txt", *(f"{wnid} {name}" for wnid, name in NAMES.items()))


def imagenet(root: Path, images: str = "imagenet/images", classes: int = 12) -> None:
    names(root / "imagenet")
    for wnid in list(NAMES)[:classes]:
        put(root / images, *(f"train/{wnid}/{wnid}_{i}.JPEG" for i in range(10)))
        put(root / images, *(f"val/{wnid}/ILSVRC2012_val_{i}.JPEG" for i in range(2)))


def v2(root: Path) -> None:
    put(
        root / "imagenetv2/imagenetv2-matched-frequency-format-val", *(f"{i}/{j}.jpeg" for i in range(12) for j in "ab")
    )


def sketch(root: Path) -> None:
    put(root / "imagenet-sketch/images", *(f"{wnid}/sketch_{i}.JPEG" for wnid in NAMES for i in "12"))


def adversarial(root: Path) -> None:
    folder = root / "imagenet-adversarial/imagenet-a"
    put(folder, *(f"{wnid}/{i}.jpg" for wnid in ("n011", "n002", "n005") for i in "12"))
    write(folder / "README.txt", "text")


def rendition(root: Path) -> None:
    folder = root / "imagenet-rendition/imagenet-r"
    put(folder, *(f"{wnid}/art_{i}.jpg" for wnid in ("n001", "n010") for i in "12"))
    write(folder / "README.txt", "text")


VARIANTS = {
    "ImageNetV2": (v2, "imagenetv2"),
    "ImageNetSketch": (sketch, "imagenet-sketch"),
    "ImageNetA": (adversarial, "imagenet-adversarial"),
    "ImageNetR": (rendition, "imagenet-rendition"),
}
