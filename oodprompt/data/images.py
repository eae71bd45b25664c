"""Reading image files, with one clear error for a file that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from tqdm import tqdm

from oodprompt.data.dataset import Datum
from oodprompt.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def read_image(path: str) -> Image.Image:
    """The image at ``path`` in RGB; ``UserError`` names a missing, truncated or foreign file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"cannot read the image {path}: {error}; replace the file or take it out of the list"
        ) from error


def check_images(*splits: Sequence[Datum]) -> int:
    """Read every image once; returns how many. ``UserError`` names those that cannot be read."""
    paths = list(dict.fromkeys(d.impath for split in splits for d in split))

    def problem(path: str) -> str | None:
        try:
            read_image(path)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [p for p in tqdm(pool.map(problem, paths), "images", len(paths), unit="image", disable=None) if p]
    if found:
        more = f"\nand {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError("\n".join(found[:5]) + more)
    return len(paths)
