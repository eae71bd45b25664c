"""Miniatures of the sets of domain generalisation, in the layouts of Dassl and DomainBed."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.trees.writing import put, write

PACS = ("art_painting", "cartoon", "photo", "sketch")
BROKEN = "sketch/dog/n02103406_4068-1.png"


def pacs_lists(root: Path) -> None:
    """Dassl's: two training images and one of cross-validation of dog (1) and guitar (2) in each domain."""
    for domain in PACS:
        for part, numbers in (("train", "12"), ("crossval", "3"), ("test", "123")):
            images = [(f"{domain}/{c}/{i}.jpg", label) for label, c in enumerate(("dog", "guitar"), 1) for i in numbers]
            put(root / "pacs/images", *(image for image, _ in images))
            lines = [f"{image} {label}" for image, label in images]
            lines += [f"{BROKEN} 1"] if domain == "sketch" and part != "crossval" else []
            write(root / f"pacs/splits/{domain}_{part}_kfold.txt", *lines)


def plain(root: Path, domains: tuple[str, ...], classes: tuple[str, ...], count: int = 3) -> None:
    """DomainBed's: <domain>/<class>/*.jpg; the i-th domain has i more images of every class."""
    for extra, domain in enumerate(domains):
        put(root, *(f"{domain}/{c}/{i}.jpg" for c in classes for i in range(count + extra)))


def vlcs_folders(root: Path) -> None:
    for domain in ("CALTECH", "LABELME", "PASCAL", "SUN"):
        for part, count in (("train", 3), ("crossval", 1), ("test", 2), ("full", 6)):
            put(root / "VLCS" / domain, *(f"{part}/{c}/{i}.jpg" for c in range(5) for i in range(count)))


def office_home_folders(root: Path) -> None:
    for domain in ("art", "clipart", "product", "real_world"):
        images = [
            f"{part}/{c}/{part}{i}.jpg" for part in ("train", "val") for c in ("Alarm_Clock", "Bed") for i in "12"
        ]
        put(root / "office_home_dg" / domain, *images)


def domainnet_lists(root: Path) -> None:
    for domain in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"):
        for part, numbers in (("train", "12"), ("test", "3")):
            # as in the authors' lists, the numbers do not follow the order of bytes
            images = [(f"{domain}/{c}/{i}.jpg", label) for label, c in enumerate(("axe", "The_Tower")) for i in numbers]
            put(root / "domainnet", *(image for image, _ in images))
            write(root / f"domainnet/splits/{domain}_{part}.txt", *(f"{image} {label}" for image, label in images))
