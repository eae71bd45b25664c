"""The images that a report shows."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from PIL import Image

from oodprompt.errors import UserError

LARGEST_PAGE = 2_900_000  # in bytes, so that it can be sent
SIDES = (176, 136, 104)  # of thumbnails in pixels, by level: a smaller one where a page would be too large
_STRIP = 96  # of thumbnails in a strip, in pixels
_SMALL = 64  # images up to this side in pixels are not shrunk, and are enlarged pixel by pixel


def is_small(image: Image.Image) -> bool:
    """Whether single pixels of the image can be seen: it is then shown without smoothing."""
    return max(image.size) <= _SMALL


class Pictures:
    """The images that are shown. Each is read once, and each thumbnail is made once.

    ``load(i)`` gives image i; ``paths`` [n] name the images in errors.
    """

    def __init__(self, load: Callable[[int], Image.Image], paths: Sequence[str]) -> None:
        self._load, self._paths = load, paths
        self._images: dict[int, Image.Image] = {}
        self._addresses: dict[tuple[int, int, bool], str] = {}

    def image(self, index: int) -> Image.Image:
        """Image ``index`` in RGB; ``UserError`` when it cannot be read."""
        if index not in self._images:
            try:
                self._images[index] = self._load(index).convert("RGB")
            except OSError as error:
                raise UserError(
                    f"cannot read {self._paths[index]} for the gallery: {error}; restore the image"
                ) from error
        return self._images[index]

    def data_uri(self, index: int, level: int = 0, strip: bool = False) -> str:
        """The thumbnail of image ``index`` as a ``data:`` address, which a page needs no network for.

        ``level`` 0 looks best, 2 takes the fewest bytes. Small images keep their size: as PNG at level 0, else as JPEG.
        Large ones are shrunk to ``SIDES[level]``, or further in a ``strip`` of them.
        """
        key = (index, level, strip)
        if key not in self._addresses:
            image = self.image(index)
            kind, content = (
                _small(image, level) if is_small(image) else _shrunk(image, _STRIP if strip else SIDES[level])
            )
            self._addresses[key] = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        return self._addresses[key]


class PagePicture(NamedTuple):
    """An image for a page; ``outline`` is the path of its region in hundredths of its sides, "" without a region."""

    address: str
    width: int
    height: int
    small: bool
    name: str
    outline: str


def page_picture(row: Mapping[str, Any], pictures: Pictures, level: int, strip: bool = False) -> PagePicture:
    """The image of a row, which has ``index`` and ``image`` (its path), and ``box`` where a region is shown.

    ``level`` and ``strip`` are those of ``Pictures.data_uri``. ``UserError`` where the image cannot be read.
    """
    image, address = pictures.image(row["index"]), pictures.data_uri(row["index"], level, strip)
    outline = ""
    if row.get("box"):
        left, top, right, bottom = (f"{100 * side:.4g}" for side in row["box"])
        outline = f"M{left} {top}H{right}V{bottom}H{left}Z"
    return PagePicture(address, image.width, image.height, is_small(image), PurePath(row["image"]).name, outline)


def _small(image: Image.Image, level: int) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    if level == 0:
        image.save(buffer, "PNG", optimize=True)
        return "png", buffer.getvalue()
    quality, subsampling = (90, 0) if level == 1 else (75, 2)
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling, optimize=True)
    return "jpeg", buffer.getvalue()


def _shrunk(image: Image.Image, side: int) -> tuple[str, bytes]:
    buffer, image = io.BytesIO(), image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return "jpeg", buffer.getvalue()
