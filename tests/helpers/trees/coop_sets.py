"""Miniatures of CoOp's data sets in its folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.trees.writing import put, write

# Registered name: folder of the data set, folder of the images in it, class prompt; all as in CoOp.
FACTS = {
    "Caltech101": ("caltech-101", "101_ObjectCategories", "a photo of a {}."),
    "OxfordPets": ("oxford_pets", "images", "a photo of a {}, a type of pet."),
    "StanfordCars": ("stanford_cars", "", "a photo of a {}."),
    "OxfordFlowers": ("oxford_flowers", "jpg", "a photo of a {}, a type of flower."),
    "Food101": ("food-101", "images", "a photo of {}, a type of food."),
    "SUN397": ("sun397", "SUN397", "a photo of a {}."),
    "DescribableTextures": ("dtd", "images", "{} texture."),
    "EuroSAT": ("eurosat", "2750", "a centered satellite photo of {}."),
    "UCF101": ("ucf101", "UCF-101-midframes", "a photo of a person doing {}."),
}
SPLIT: dict[str, list[list[Any]]] = {
    "train": [[f"cars_train/{c}/{i}.jpg", y, c] for y, c in enumerate(("ant", "big_bee", "cat")) for i in "1234"],
    "val": [["cars_train/big_bee/5.jpg", 1, "big_bee"]],
    "test": [["cars_test/6.jpg", 2, "cat"], ["cars_test/ant/7.jpg", 0, "ant"]],
}


def tree(root: Path, name: str, split: Any = SPLIT) -> Path:
    """The file of ``split``, and the images of ``SPLIT``."""
    folder, images, _ = FACTS[name]
    put(root / folder / images, *(entry[0] for entries in SPLIT.values() for entry in entries))
    return write(root / folder / f"split_zhou_{name}.json", json.dumps(split))


def aircraft(root: Path) -> None:
    variants = ("707-320", "DR-400", "MD 80 (a)")
    write(root / "fgvc_aircraft/variants.txt", *variants)
    for split, numbers in (("train", "12"), ("val", "3"), ("test", "45")):
        lines = [f"{i}{y} {name}" for y, name in enumerate(variants) for i in numbers]
        write(root / f"fgvc_aircraft/images_variant_{split}.txt", *lines)
        put(root / "fgvc_aircraft/images", *(f"{line.split()[0]}.jpg" for line in lines))
