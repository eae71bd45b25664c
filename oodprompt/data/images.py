"""Reading image files as RGB with 8 bits, by one rule for every depth, with one clear error for a file that cannot be read.

Files with 8 bits a channel or fewer become what Pillow's ``convert("RGB")`` makes of them. Grey files with more bits
(16-bit, 32-bit and float) are mapped to 0..255 by ``PixelRules``. Of colour files with 16 bits a channel Pillow keeps the
upper 8. Of several frames the first counts. The EXIF orientation is not applied.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile
from yacs.config import CfgNode

from oodprompt.errors import UserError

# Formats whose files count as images in a folder: photographs, scans, drawings. Icons and the working files of programs
# are left out; Pillow opens them where a list names them. HEIF is there where another package has added it to Pillow.
_FORMATS = frozenset(
    (
        "AVIF",
        "BMP",
        "DIB",
        "GIF",
        "HEIF",
        "JPEG",
        "JPEG2000",
        "MPO",
        "PCX",
        "PNG",
        "PPM",
        "QOI",
        "SGI",
        "TGA",
        "TIFF",
        "WEBP",
    )
)
_RUN_PROGRAMS = ("EPS", "WMF")  # their readers start another program or draw with the system's; never opened here
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")
_AT_ONCE = 2**20  # pixels of a grey file with more than 8 bits that are in memory as float64
_TWELVE_BITS, _SIXTEEN_BITS = 4095.0, 65535.0
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


@dataclass(frozen=True)
class PixelRules:
    """How files become pixels.

    ``max_pixels``: largest width times height of an image that is decoded; 0: no limit. ``value_range``: the values
    (low, high) of grey files with more than 8 bits that become 0 and 255, with those outside clipped; (): by the file.
    """

    max_pixels: int = 250_000_000
    value_range: tuple[float, ...] = ()

    @classmethod
    def of(cls, cfg: CfgNode) -> PixelRules:
        """The rules of INPUT.MAX_PIXELS and INPUT.IMAGE_RANGE."""
        return cls(cfg.INPUT.MAX_PIXELS, tuple(cfg.INPUT.IMAGE_RANGE))


class Decoded(NamedTuple):
    """An RGB image, whether its file is grey with more than 8 bits, and whether it has several frames."""

    image: Image.Image
    is_deep: bool
    has_frames: bool


def image_suffixes() -> tuple[str, ...]:
    """The suffixes of the image files that the installed Pillow opens, in lower case, sorted."""
    suffixes = Image.registered_extensions()
    return tuple(sorted(suffix for suffix, name in suffixes.items() if name in _FORMATS and name in Image.OPEN))


def read_image(path: str, rules: PixelRules = PixelRules()) -> Image.Image:
    """The image at ``path`` in RGB with 8 bits.

    Raises ``UserError`` for a missing, truncated or foreign file, for one with more pixels than ``rules`` allow, and for
    values that no rule maps to grey levels.
    """
    return decode(path, rules).image


def decode(path: str, rules: PixelRules = PixelRules(), count_frames: bool = False) -> Decoded:
    """``read_image`` and what is known of the file; ``has_frames`` is False unless they are counted."""
    try:
        with open(path, "rb") as file, _limit_of(path, rules):
            try:
                return _decode(file, path, rules, count_frames)
            except ValueError:  # of metadata that is larger than Pillow reads, among others
                file.seek(0)
                if file.read(len(_PNG)) != _PNG:
                    raise
                return _decode(io.BytesIO(_without_metadata(file.read())), path, rules, count_frames)
    except UserError:
        raise
    except Exception as error:  # decoders of damaged files raise whatever they come upon
        raise _unreadable(path, error) from error


def image_size(path: str) -> tuple[int, int]:
    """Width and height by the header of the image file; ``UserError`` where it cannot be read."""
    try:
        with open(path, "rb") as file, _limit_of(path, PixelRules(0)), _identified(file, path) as image:
            return image.size
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return UserError(f"cannot read the image {path}: {reason}; replace the file or take it out of the list")


def _decode(file: IO[bytes], path: str, rules: PixelRules, count_frames: bool) -> Decoded:
    with _identified(file, path) as image:
        _check_size(image.size, path, rules)
        is_deep = image.mode == "F" or image.mode.startswith("I")
        if is_deep:
            rgb = _from_deep(image, path, rules)
        elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            rgb = image.convert("RGBA").convert("RGB")  # the same colours, without Pillow's warning
        else:
            rgb = image.convert("RGB")
        return Decoded(rgb, is_deep, count_frames and bool(getattr(image, "is_animated", False)))


def _check_size(size: tuple[int, int], path: str, rules: PixelRules) -> None:
    width, height = size
    if 0 < rules.max_pixels < width * height:
        raise UserError(
            f"the image {path} has {width:,} x {height:,} pixels, more than INPUT.MAX_PIXELS {rules.max_pixels:,}; "
            "raise the key (0: no limit) or make the image smaller"
        )


# (path, rules) of the image that a thread is reading here. Pillow checks sizes against a global variable, also of tiles
# and frames on the way; while a thread is reading here, these checks are by the rules of its image. All else that uses
# Pillow in this process keeps Pillow's limit.
_being_read: ContextVar[tuple[str, PixelRules] | None] = ContextVar("_being_read", default=None)


@contextlib.contextmanager
def _limit_of(path: str, rules: PixelRules) -> Iterator[None]:
    token = _being_read.set((path, rules))
    try:
        yield
    finally:
        _being_read.reset(token)


def _check_by_rules(pillows: Callable[..., None]) -> Callable[..., None]:
    """Pillow's check of a size, but for images that are being read here."""

    @functools.wraps(pillows)
    def check(size: tuple[int, int], *args: Any, **options: Any) -> None:
        reading = _being_read.get()
        if reading is None:
            pillows(size, *args, **options)
        else:
            _check_size(size, *reading)

    return check


if hasattr(Image, "_decompression_bomb_check"):
    Image._decompression_bomb_check = _check_by_rules(Image._decompression_bomb_check)


def _identified(file: IO[bytes], path: str) -> ImageFile.ImageFile:
    """``Image.open`` for formats whose readers start no program. Raises ``OSError`` for a file of no known format."""
    prefix, why = file.read(16), ""
    for load_formats in (Image.preinit, Image.init):
        load_formats()
        for name in tuple(Image.ID):
            factory, accept = Image.OPEN[name]
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # as Image.open: the next one
                accepted = name not in _RUN_PROGRAMS and (accept is None or accept(prefix))
                if isinstance(accepted, str):  # the format is known, but this Pillow was built without it
                    why = f" ({accepted})"
                elif accepted:
                    file.seek(0)
                    return factory(file, path)
    raise OSError(f"it is no image file of a known format{why}")


def _without_metadata(chunks: bytes) -> bytes:
    """A png of the ``chunks`` behind its signature, without texts and colour profiles: pixels do not depend on them."""
    kept, start = [_PNG], 0
    while start + 12 <= len(chunks):
        end = start + 12 + int.from_bytes(chunks[start : start + 4], "big")
        if chunks[start + 4 : start + 8] not in _PNG_METADATA:
            kept.append(chunks[start:end])
        start = end
    return b"".join(kept)


def _from_deep(image: ImageFile.ImageFile, path: str, rules: PixelRules) -> Image.Image:
    """The RGB image of a grey one with more than 8 bits: (value - low) / (high - low) * 255, rounded down.

    Rounding down is what most programs do that make 8-bit files, so that files of one drawing in 8, 16 and 32 bits agree.
    """
    known = _known_range(image)
    inverted = _tag(image, _TIFF_PHOTOMETRIC) == 0  # "white is zero", which Pillow heeds in 8-bit files alone
    is_signed = _tag(image, _TIFF_BITS) == 16 and _tag(image, _TIFF_SAMPLE_FORMAT) == 2
    values = np.asarray(image)
    if not values.size:
        raise UserError(f"the image {path} has no pixels; replace the file or take it out of the list")
    least, largest = float(values.min()), float(values.max())
    if not (np.isfinite(least) and np.isfinite(largest)):
        raise UserError(f"the image {path} holds NaN or infinity, which is no grey level; write a number in its place")
    span = rules.value_range or known or _range_of(values.dtype, least, largest, is_signed, path)
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, _AT_ONCE // values.shape[1])
    for start in range(0, len(values), rows):
        grey[start : start + rows] = _levels(values[start : start + rows], *span)
    return Image.fromarray(255 - grey if inverted else grey).convert("RGB")


def _levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey levels in uint8 of ``values``, of which ``low`` is black and ``high`` white."""
    levels = values.astype(np.float64)
    if (low, high) != (0.0, 255.0):  # those are levels already
        # The small number undoes rounding: levels that were mapped to the range in float32 come back as they were.
        levels = (levels - low) * (255 / (high - low)) + 1e-4
    return np.clip(levels, 0, 255).astype(np.uint8)


def _tag(image: ImageFile.ImageFile, number: int) -> int | None:
    """A whole number (the first, of several) among the tags of a tiff; None where there is none."""
    tags: Any = getattr(image, "tag_v2", None)
    value = tags.get(number) if tags is not None else None
    if isinstance(value, tuple):
        value = value[0] if value else None
    return value if isinstance(value, int) else None


def _known_range(image: ImageFile.ImageFile) -> tuple[float, float] | None:
    """The range of values that the file itself gives; None where it does not."""
    if _tag(image, _TIFF_BITS) == 12:
        return 0.0, _TWELVE_BITS
    if image.format == "PPM" and image.tile and image.mode == "I":
        arguments = image.tile[0][3]  # (mode, largest value of the file), which Pillow scales to 16 bits
        if isinstance(arguments, tuple) and arguments[-1] != _SIXTEEN_BITS and image.tile[0][0].startswith("ppm"):
            return 0.0, _SIXTEEN_BITS
    return None


def _range_of(dtype: np.dtype, least: float, largest: float, is_signed: bool, path: str) -> tuple[float, float]:
    """The range that values stand for where neither the user nor the file says it; ``UserError`` where it is unknown.

    Floats from 0 to 1 span that; other values from 0 to 255 are grey levels; whole numbers whose largest lies above 12
    bits and within 16 span 16 bits. Fewer bits in such a file, and all other values, need INPUT.IMAGE_RANGE: shown in 16
    bits, a picture of 12 would be black.
    """
    is_float = np.issubdtype(dtype, np.floating)
    if is_float and least >= 0 and largest <= 1:
        return 0.0, 1.0
    if least >= 0 and largest <= 255:
        return 0.0, 255.0
    if not is_float and not is_signed and least >= 0 and _TWELVE_BITS < largest <= _SIXTEEN_BITS:
        return 0.0, _SIXTEEN_BITS
    bits = next((bits for bits in (10, 12) if not is_float and least >= 0 and largest < 2**bits), 0)
    example = f"(0, {2**bits - 1})" if bits else "(LOW, HIGH)"
    raise UserError(
        f"the image {path} holds values from {least:g} to {largest:g}, and what they stand for is not known: give the range of "
        f'all images, INPUT.IMAGE_RANGE "{example}", whose ends become black and white'
    )
