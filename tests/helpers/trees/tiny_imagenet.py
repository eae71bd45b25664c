"""A miniature of Tiny ImageNet's published tree: the classes that PhotosOnPlaces is made from, and some others."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.trees.writing import write

WORDS = {  # lines of words.txt
    "n02085620": "Chihuahua",
    "n02094433": "Yorkshire terrier",
    "n02099601": "golden retriever",
    "n02099712": "Labrador retriever",
    "n02106662": "German shepherd, German shepherd dog, German police dog, alsatian",
    "n02113799": "standard poodle",
    "n02123045": "tabby, tabby cat",
    "n02123394": "Persian cat",
    "n02124075": "Egyptian cat",
    "n02793495": "barn",
    "n09193705": "alp",
    "n09332890": "lakeside, lakeshore",
    "n09428293": "seashore, coast, seacoast, sea-coast",
    "n01443537": "goldfish, Carassius auratus",
}
NUMBERS = (0, 399, *range(400, 406))  # of the photographs of a training folder; published are 0 to 499
TESTS = 2  # validation photographs of a class; published are 50


def photograph(seed: int) -> bytes:
    """A JPEG of 64 pixels: a disc in one colour on another, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :64]
    disc = ((rows - 32) ** 2 + (columns - 32) ** 2 < 22**2)[..., None]
    pixels = np.where(disc, rng.integers(0, 256, 3), rng.integers(0, 256, 3)) + rng.normal(0, 6, (64, 64, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def tree(root: Path, wnids: Iterable[str] = tuple(WORDS)) -> Path:
    """Write ``root``/tiny-imagenet-200 with the classes ``wnids``; returns the folder."""
    folder, wnids = root / "tiny-imagenet-200", list(wnids)
    write(folder / "wnids.txt", *reversed(wnids))
    write(folder / "words.txt", "n00001740\tentity", *(f"{wnid}\t{WORDS[wnid]}" for wnid in wnids))
    (folder / "val" / "images").mkdir(parents=True)
    tests = []
    for c, wnid in enumerate(wnids):
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for number in NUMBERS:
            (images / f"{wnid}_{number}.JPEG").write_bytes(photograph(1000 * c + number))
        write(folder / "train" / wnid / f"{wnid}_boxes.txt", *(f"{wnid}_{n}.JPEG\t10\t10\t53\t53" for n in NUMBERS))
        for i in range(TESTS):
            name = f"val_{i * len(wnids) + c}.JPEG"
            (folder / "val" / "images" / name).write_bytes(photograph(1000 * c + 500 + i))
            tests.append(f"{name}\t{wnid}\t10\t10\t53\t53")
    write(folder / "val" / "val_annotations.txt", *tests)
    return folder


def zipped(root: Path, archive: Path) -> Path:
    """The tree in ``root`` as an archive in the published form."""
    return Path(shutil.make_archive(str(archive.with_suffix("")), "zip", root, "tiny-imagenet-200"))
