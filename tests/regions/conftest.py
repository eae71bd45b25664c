"""Grey images on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.boxes import MakeImages


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """Grey images of the given names and sizes (width, height) -> their paths."""

    def make(**sizes: tuple[int, int]) -> list[str]:
        paths = []
        for name, size in sizes.items():
            path = tmp_path / f"{name.replace('__', '/')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (90, 90, 90)).save(path)
            paths.append(str(path))
        return paths

    return make
