"""Regions of images as boxes, and reading them from COCO json and csv files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from oodprompt.data.images import image_size
from oodprompt.data.tables import portable, read_rows
from oodprompt.data.transforms import CentreView
from oodprompt.errors import UserError

_VISIBLE = 0.25  # the share of a box's area that must lie in what the model sees
_SMALLEST = 1e-4  # of the image's side: narrower boxes are empty


@dataclass(frozen=True)
class Regions:
    """Regions of the images of a split, ordered by image.

    ``boxes`` [r, 4] float32 as (left, top, right, bottom) in fractions of the image *as the model sees it* (after the
    test transform); ``owner`` [r] the index of each region's image in the split, not decreasing; ``names`` what an
    annotation calls each region ("" where it says nothing; empty when there is no annotation); ``source`` says in
    words where they come from.
    """

    boxes: Tensor
    owner: Tensor
    names: Sequence[str] = ()
    source: str = ""


def counts(regions: Regions, n_images: int) -> Tensor:
    """How many regions each image has, [n_images] int64."""
    return torch.bincount(regions.owner, minlength=n_images)


def per_image(regions: Regions, n_images: int) -> list[Tensor]:
    """The boxes of each image: ``n_images`` tensors [n_i, 4]."""
    return list(regions.boxes.split(counts(regions, n_images).tolist()))


def rows_of_images(regions: Regions, images: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
    """(the regions of ``images``, one image after the other [m]; which of ``images`` each belongs to [m])."""
    images = torch.as_tensor(images, dtype=torch.long)
    first = torch.searchsorted(regions.owner, images)
    number = torch.searchsorted(regions.owner, images, right=True) - first
    place = torch.repeat_interleave(torch.arange(len(images)), number)
    return torch.arange(len(place)) + (first - number.cumsum(0) + number)[place], place


def digest(regions: Regions, how: str = "") -> str:
    """SHA256 of boxes, owners and ``how`` features are made of them (not of names and source)."""
    sha256 = hashlib.sha256(f"{how}\n{len(regions.owner)}\n".encode())
    sha256.update(regions.boxes.cpu().numpy().astype("<f4").tobytes())
    sha256.update(regions.owner.cpu().numpy().astype("<i8").tobytes())
    return sha256.hexdigest()


class Box(NamedTuple):
    """A box in pixels of an image of size (``width``, ``height``), or of the image file where that is None."""

    left: float
    top: float
    right: float
    bottom: float
    name: str
    size: tuple[float, ...] | None = None


def coco_regions(file: str, paths: Sequence[str], input_size: tuple[int, int], resize: str = "shortest") -> Regions:
    """The boxes of a COCO file: images (id, file_name), annotations (image_id, bbox, category_id), categories.

    An annotation's bbox is [x, y, width, height] in pixels, of the width and height that the file gives the image,
    where it does. An image has the boxes of the longest ``file_name`` that its path ends in; where there is none, of
    the one with the same last part, if only one image on either side has that. Crowds (iscrowd 1) are left out. Names
    are those of the categories. Raises ``UserError`` as ``build_regions``.
    """
    content = _read_json(given_file(file))
    names = {entry["id"]: str(entry["name"]) for entry in _entries(file, content, "categories", ("id", "name"), False)}
    images = _entries(file, content, "images", ("id", "file_name"))
    by_image: dict[Any, list[Box]] = {entry["id"]: [] for entry in images}
    sizes = {
        entry["id"]: tuple(_number(entry[edge], f"{file}: image {entry['id']}") for edge in ("width", "height"))
        for entry in images
        if entry.get("width") and entry.get("height")
    }
    for i, entry in enumerate(_entries(file, content, "annotations", ("image_id", "bbox"))):
        if entry.get("iscrowd"):
            continue
        where, owner = f"{file}: annotation {i}", entry["image_id"]
        if owner not in by_image:
            raise UserError(f"{where} is of image {owner!r}, which the file's images lack")
        bbox = entry["bbox"]
        if not (isinstance(bbox, list) and len(bbox) == 4):
            raise UserError(f"{where}: bbox is [x, y, width, height], not {str(bbox)[:80]}")
        x, y, width, height = (_number(value, where) for value in bbox)
        if min(width, height) < 0:
            raise UserError(f"{where}: bbox {bbox} has a negative width or height; correct it or take it out")
        name = names.get(entry.get("category_id"), "")
        by_image[owner].append(Box(x, y, x + width, y + height, name, sizes.get(owner)))
    matches = _match(file, [(str(entry["file_name"]), by_image[entry["id"]]) for entry in images], paths)
    return in_view(file, matches, paths, input_size, resize)


def csv_regions(file: str, paths: Sequence[str], input_size: tuple[int, int], resize: str = "shortest") -> Regions:
    """The boxes of a csv file with the columns image, left, top, right, bottom and, if names are known, label.

    Boxes are in pixels of the image file; ``image`` is its path, absolute or relative to the csv's folder. Rows of
    other images are passed over. Raises ``UserError`` as ``build_regions``.
    """
    path, columns = given_file(file), ("image", "left", "top", "right", "bottom")
    by_image: dict[str, list[Box]] = defaultdict(list)
    for line, (image, *corners, label) in read_rows(path, columns, ("label",)):
        where = f"{path}, line {line}"
        left, top, right, bottom = (_number(corner, where) for corner in corners)
        if right <= left or bottom <= top:
            raise UserError(f"{where}: the box must have left < right and top < bottom, not {', '.join(corners)}")
        image = portable(image.strip(), path.parent)
        by_image[_absolute(path.parent / image)].append(Box(left, top, right, bottom, label.strip()))
    matches = {i: by_image[_absolute(name)] for i, name in enumerate(paths) if _absolute(name) in by_image}
    if not matches:
        raise _no_match(file, list(by_image), paths)
    return in_view(file, matches, paths, input_size, resize)


def in_view(
    source: str,
    by_image: Mapping[int, Sequence[Box]],
    paths: Sequence[str],
    input_size: tuple[int, int],
    resize: str = "shortest",
) -> Regions:
    """Boxes of images (in rising order) as the model sees them; ``UserError`` if none is left."""
    view = CentreView(input_size, resize=resize)
    boxes, owner, names = [], [], []
    for i, of_image in by_image.items():
        size = image_size(paths[i])
        window = view.window(*size)
        for box in of_image:
            seen = _clip(_in_pixels(box, size, source, paths[i]), window)
            if seen is not None:
                boxes.append(seen)
                owner.append(i)
                names.append(box.name)
    if not boxes:
        raise UserError(
            f"{source}: no region lies in what the model sees of the {len(paths):,} images; "
            "give boxes in pixels of the image files (left, top, right, bottom)"
        )
    dropped = sum(map(len, by_image.values())) - len(boxes)
    words = f"{source}: {len(boxes):,} regions on {len(set(owner)):,} of {len(paths):,} images"
    if dropped:
        words += f"; {dropped:,} boxes that lie mostly outside what the model sees, or are empty, are left out"
    return Regions(torch.tensor(boxes), torch.tensor(owner), tuple(names) if any(names) else (), words)


def _in_pixels(box: Box, size: tuple[int, int], source: str, path: str) -> tuple[float, float, float, float]:
    """The corners of a box in pixels of the image file."""
    if box.size is None:
        return box[:4]
    across, down = size[0] / box.size[0], size[1] / box.size[1]
    if abs(across / down - 1) > 0.05:
        raise UserError(
            f"{source}: it gives {path} the size {box.size[0]:g} x {box.size[1]:g}, but the file has {size[0]} x "
            f"{size[1]}: the image was cropped or turned since, and its boxes do not fit"
        )
    return box.left * across, box.top * down, box.right * across, box.bottom * down


def _clip(corners: Sequence[float], window: Sequence[float]) -> tuple[float, float, float, float] | None:
    """A box in fractions of the window, clipped to it; None where too little of it is left."""
    left, top, right, bottom = (
        (corner - window[i % 2]) / (window[i % 2 + 2] - window[i % 2]) for i, corner in enumerate(corners)
    )
    seen = (max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0))
    width, height = seen[2] - seen[0], seen[3] - seen[1]
    if min(width, height) < _SMALLEST or width * height < _VISIBLE * (right - left) * (bottom - top):
        return None
    return seen


def given_file(file: str) -> Path:
    if not file:
        raise UserError("regions from boxes need a file: a COCO json or a csv (image, left, top, right, bottom, label)")
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(
            f"no file of regions at {path}; give a COCO json or a csv (image, left, top, right, bottom, label)"
        )
    return path


def is_json(path: Path) -> bool:
    """By its content: csv files begin with the name of a column."""
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") or path.suffix.lower() == ".json"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not json: {error}") from error


def _entries(file: str, content: Any, key: str, needed: Sequence[str], required: bool = True) -> list[dict[str, Any]]:
    """The entries of a list of the COCO file, each of which must have the fields ``needed``."""
    if not isinstance(content, dict) or not isinstance(content.get(key, None if required else []), list):
        raise UserError(f"{file}: no list {key!r}; a COCO file has the lists images, annotations and categories")
    entries = content.get(key, [])
    for i, entry in enumerate(entries):
        missing = [field for field in needed if not isinstance(entry, dict) or field not in entry]
        if missing:
            raise UserError(f"{file}: entry {i} of {key} has no {', '.join(missing)}")
    return entries


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {str(value)[:80]!r} is not a number")
    return number


def _absolute(path: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _match(file: str, images: Sequence[tuple[str, Sequence[Box]]], paths: Sequence[str]) -> dict[int, Sequence[Box]]:
    """The boxes of each of ``paths`` that ``images`` (name, boxes) holds, see ``coco_regions``."""
    named: dict[str, list[tuple[str, Sequence[Box]]]] = defaultdict(list)
    for name, boxes in images:
        name = name.replace("\\", "/").removeprefix("./")
        named[name.rpartition("/")[2]].append((name, boxes))
    ours = [_absolute(path).replace("\\", "/") for path in paths]
    with_name: dict[str, set[str]] = defaultdict(set)
    for path in ours:
        with_name[path.rpartition("/")[2]].add(path)
    matches: dict[int, Sequence[Box]] = {}
    taken: dict[int, str] = {}  # by the identity of the matched boxes
    for i, path in enumerate(ours):
        last = path.rpartition("/")[2]
        candidates = named.get(last, [])
        fitting = [image for image in candidates if f"/{path}".endswith(f"/{image[0].lstrip('/')}")]
        longest = max((len(name) for name, _ in fitting), default=0)
        fitting = [image for image in fitting if len(image[0]) == longest]
        if not fitting and len(candidates) == len(with_name[last]) == 1:
            fitting = candidates
        if not fitting:
            continue
        if len(fitting) > 1:
            raise UserError(f"{file}: {len(fitting)} of its images have the file_name {fitting[0][0]!r}; keep one")
        name, boxes = fitting[0]
        if taken.setdefault(id(boxes), path) != path:
            raise UserError(f"{file}: {name!r} fits {taken[id(boxes)]} and {path}; give file_name with its folders")
        matches[i] = boxes
    if not matches:
        raise _no_match(file, [name for name, _ in images], paths)
    return matches


def _no_match(file: str, theirs: Iterable[str], paths: Sequence[str]) -> UserError:
    theirs = list(dict.fromkeys(theirs))
    return UserError(
        f"{file}: none of its {len(theirs):,} images is among the {len(paths):,} asked for; "
        f"it names {_examples(theirs)}, asked for are {_examples(paths)}"
    )


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) or "none"
