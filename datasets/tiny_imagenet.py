"""Tiny ImageNet: 200 of ImageNet's classes in photographs of 64 pixels (Le and Yang, 2015)."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oodprompt.datasets.coop_sets import note_few_shot
from oodprompt.datasets.file_lists import FilesDataset, split_off_validation
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.columns import Images
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import image_names, note_passed_over
from oodprompt.data.tables import read_lines
from oodprompt.downloads import download, sha256_of
from oodprompt.errors import UserError
from oodprompt.files import sweep, temporary_folder
from oodprompt.log import logger, progress

# The embedded CLIP of photographs is trained on the photographs below this number of every training folder. Those from
# this number on, and the validation photographs, are seen by no training: other data sets are made from them.
HELD_OUT_FROM = 400

FOLDER = "tiny-imagenet-200"
ARCHIVE = f"{FOLDER}.zip"
ADDRESS = f"http://cs231n.stanford.edu/{ARCHIVE}"
SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
TREE = f"""
    ROOT/{FOLDER}/
      wnids.txt                      the ids of the classes: n01443537, ...
      words.txt                      an id, a tab, its names: goldfish, Carassius auratus
      train/<id>/images/*.JPEG       and <id>_boxes.txt: file, left, top, right, bottom
      val/images/*.JPEG
      val/val_annotations.txt        file, id, left, top, right, bottom
"""

# Names in place of words.txt's first, which mean something else, or nothing, to a model of everyday captions. Most are
# OpenAI's names of ImageNet's classes (openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb).
NAMES: dict[str, str] = {
    "n01629819": "fire salamander",
    "n01641577": "American bullfrog",
    "n01774384": "black widow spider",
    "n02106662": "German shepherd dog",
    "n02123045": "tabby cat",
    "n02231487": "stick insect",
    "n02236044": "praying mantis",
    "n02279972": "monarch butterfly",
    "n02395406": "pig",
    "n02509815": "red panda",
    "n02814533": "station wagon",
    "n02814860": "lighthouse",
    "n02892201": "memorial plaque",
    "n02917067": "high-speed train",
    "n02977058": "automated teller machine",
    "n03014705": "storage chest",
    "n03089624": "candy store",
    "n03126707": "construction crane",
    "n03424325": "gas mask",
    "n03599486": "rickshaw",
    "n03804744": "metal nail",
    "n03854065": "pipe organ",
    "n03902125": "payphone",
    "n03983396": "soda bottle",
    "n04067472": "fishing reel",
    "n04399382": "teddy bear",
    "n04417672": "thatched roof",
    "n07615774": "popsicle",
    "n07875152": "pot pie",
    "n09193705": "mountain",
    "n09332890": "lakeshore",
    "n09428293": "beach",
}

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Photograph:
    """A photograph and the box of its object: left, top, right and bottom pixel, the last two within the object."""

    path: Path
    box: Box


@DATASET_REGISTRY.register()
class TinyImageNet(FilesDataset):
    """200 classes of photographs of 64 pixels, 500 of each for training (Le and Yang, CS231n, 2015).

    The published validation photographs are the test images. DATASET.VAL_PERCENT of the training photographs of each
    class are the validation images. The published test photographs have no published classes and are not read. If ROOT
    has neither the archive nor its folder, the archive is downloaded and unpacked there. Source: Le, Yang, "Tiny
    ImageNet Visual Recognition Challenge", CS231N, Stanford 2015.
    """

    dataset_dir = FOLDER
    places = (FOLDER,)
    tree = TREE
    address = ADDRESS

    def __init__(self, cfg: CfgNode) -> None:
        folder = found_or_downloaded(self.root(cfg))
        note_few_shot(cfg, folder)
        wnids = read_wnids(folder)
        names = class_names(folder, wnids)
        labels = {wnid: label for label, wnid in enumerate(sorted(wnids))}
        listed = Images.of(self._training(folder, labels, names))
        test = Images.of(self._test(folder, labels, names))
        train, val = split_off_validation(cfg, type(self).__name__, listed)
        super().__init__(cfg, train, val, test)

    def _training(self, folder: Path, labels: Mapping[str, int], names: Mapping[str, str]) -> list[Datum]:
        data, passed_over = [], Counter[str]()
        for wnid, label in labels.items():
            images = folder / "train" / wnid / "images"
            found = image_names(images, passed_over=passed_over) if images.is_dir() else []
            if not found:
                raise self.missing(f"no image in {images}, the folder of the class {names[wnid]!r}")
            data += [Datum(str(images / name), label, 0, names[wnid]) for name in found]
        note_passed_over(passed_over, folder / "train")
        return data

    def _test(self, folder: Path, labels: Mapping[str, int], names: Mapping[str, str]) -> list[Datum]:
        found = validation_photographs(folder, labels)
        if lacking := [wnid for wnid in labels if not found[wnid]]:
            raise self.missing(f"val/val_annotations.txt names no image of the class {names[lacking[0]]!r}")
        return [
            Datum(str(photograph.path), label, 0, names[wnid])
            for wnid, label in labels.items()
            for photograph in found[wnid].values()
        ]


# --- the folder ------------------------------------------------------------------------------------------------------


def found_or_downloaded(root: Path) -> Path:
    """The folder of the unpacked archive in ``root``. If missing, the archive is unpacked, and fetched if need be.

    Raises ``UserError`` with the tree for a folder that lacks one of its parts, and for a download that fails.
    """
    folder, archive = root / FOLDER, root / ARCHIVE
    if not folder.exists():
        by_hand = f"download {ADDRESS} elsewhere and unpack it into {root.absolute()}"
        if not archive.is_file():
            logger.info(f"There is no {FOLDER} in {root.absolute()}; {ADDRESS} is downloaded (237 MiB)")
            download(ADDRESS, archive, SHA256, "Tiny ImageNet", by_hand)
        elif sha256_of(archive) != SHA256:
            raise UserError(f"{archive} has not the SHA256 {SHA256}; delete it and run again, or {by_hand}")
        _unpack(archive, folder)
    for part in ("wnids.txt", "words.txt", "train", "val/images", "val/val_annotations.txt"):
        if not (folder / part).exists():
            raise TinyImageNet.missing(f"no {part} in {folder.absolute()}")
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack ``archive`` whole or not at all; runs that start at the same time may unpack twice, and one result stays."""
    sweep(folder.parent)
    try:
        with temporary_folder(folder.parent) as temporary, zipfile.ZipFile(archive) as packed:
            for member in progress.over(packed.infolist(), f"Unpacking {ARCHIVE}", "file"):
                packed.extract(member, temporary)
            try:
                os.rename(temporary / FOLDER, folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot unpack {archive}: {reason}; free some space or choose another --root") from error


# --- its lists -------------------------------------------------------------------------------------------------------


def read_wnids(folder: Path) -> list[str]:
    """The WordNet ids of the classes, in the order of wnids.txt; ``UserError`` where one comes twice, or none."""
    path, wnids = folder / "wnids.txt", list[str]()
    for line, wnid in read_lines(path):
        if wnid in wnids:
            raise UserError(f"{path}, line {line}: {wnid!r} comes twice; take one out")
        wnids.append(wnid)
    if not wnids:
        raise UserError(f"{path} is empty; expected a WordNet id on each line, such as n01443537")
    return wnids


def class_names(folder: Path, wnids: Sequence[str]) -> dict[str, str]:
    """A name of each class, no two the same: that of ``NAMES``, or its first in words.txt that no other class has.

    If other classes have all names of a class, too, its id follows its first name: "crane (n03126707)".
    """
    path, synonyms = folder / "words.txt", dict[str, list[str]]()
    wanted = set(wnids)
    for line, text in read_lines(path):
        wnid, _, words = text.partition("\t")
        if wnid in wanted:
            synonyms[wnid] = [word for part in words.split(",") if (word := part.strip())]
            if not synonyms[wnid]:
                raise UserError(f"{path}, line {line}: {wnid!r} has no name; expected an id, a tab and names")
    if lacking := [wnid for wnid in wnids if wnid not in synonyms]:
        raise UserError(f"{path} has no line of {lacking[0]}, a class of wnids.txt; fetch the archive again")
    first = {wnid: NAMES.get(wnid, synonyms[wnid][0]) for wnid in wnids}
    how_many = Counter(first.values())
    names: dict[str, str] = {}
    for wnid in wnids:
        if how_many[first[wnid]] == 1:
            names[wnid] = first[wnid]
        else:
            free = (word for word in synonyms[wnid] if not how_many[word])
            names[wnid] = next(free, f"{first[wnid]} ({wnid})")
            how_many[names[wnid]] += 1
    return names


def validation_photographs(folder: Path, wnids: Iterable[str]) -> dict[str, dict[int, Photograph]]:
    """The photographs of val/ of each class by their numbers, ``val_<number>.JPEG``, in order.

    Raises ``UserError`` that names file and line where val_annotations.txt cannot be read or names a missing photograph.
    """
    path, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    found: dict[str, dict[int, Photograph]] = {wnid: {} for wnid in wnids}
    for line, name, (wnid, *box) in _rows(path, 5):
        if wnid in found:
            number = _number(path, line, name, "val")
            found[wnid][number] = _photograph(path, line, images / name, box)
    return {wnid: dict(sorted(mine.items())) for wnid, mine in found.items()}


def training_photographs(folder: Path, wnid: str) -> dict[int, Photograph]:
    """The photographs of a class's training folder by their numbers, ``<id>_<number>.JPEG``, in order.

    Raises ``UserError`` that names file and line for a list of boxes that cannot be read or names a missing photograph.
    """
    path, found = folder / "train" / wnid / f"{wnid}_boxes.txt", dict[int, Photograph]()
    if not path.is_file():
        raise UserError(f"there is no {path}, the boxes of a class; fetch the archive again")
    for line, name, box in _rows(path, 4):
        number = _number(path, line, name, wnid)
        found[number] = _photograph(path, line, path.parent / "images" / name, box)
    return dict(sorted(found.items()))


def _rows(path: Path, columns: int) -> Iterable[tuple[int, str, list[str]]]:
    """(line, file name, the other columns) of a list with tabs between its columns."""
    for line, text in read_lines(path):
        name, *rest = text.split("\t")
        if len(rest) != columns or "/" in name:
            raise UserError(
                f"{path}, line {line}: expected a file name and {columns} columns behind it, with tabs between"
            )
        yield line, name, rest


def _number(path: Path, line: int, name: str, prefix: str) -> int:
    before, _, number = Path(name).stem.rpartition("_")
    if before != prefix or not number.isdecimal():
        raise UserError(f"{path}, line {line}: {name[:200]!r} is no name of the form {prefix}_<number>.JPEG")
    return int(number)


def _photograph(path: Path, line: int, image: Path, box: Sequence[str]) -> Photograph:
    if not all(value.isdecimal() for value in box):
        raise UserError(f"{path}, line {line}: a box has four whole numbers: left, top, right, bottom")
    left, top, right, bottom = map(int, box)
    if left > right or top > bottom:
        raise UserError(f"{path}, line {line}: the box {' '.join(box)} ends before it begins")
    if not image.is_file():
        raise UserError(f"{path}, line {line} names {image}, which is missing; fetch the archive again")
    return Photograph(image, (left, top, right, bottom))
