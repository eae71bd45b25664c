"""Miniature copies of the official file layouts."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oodprompt.config.keys import check_values, get_cfg_default, set_key
from oodprompt.data.dataset import DatasetBase, Datum, build_dataset

Build = Callable[..., DatasetBase]


def picture(suffix: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (120, 40, 200)).save(buffer, {".png": "PNG"}.get(suffix.lower(), "JPEG"))
    return buffer.getvalue()


_PICTURES = {suffix: picture(suffix) for suffix in (".jpg", ".png")}


def put(folder: Path, *names: str) -> None:
    """Write a small image under every name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_PICTURES.get(path.suffix.lower(), _PICTURES[".jpg"]))


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def groups(data: Iterable[Datum]) -> Counter[tuple[int, int]]:
    return Counter((datum.label, datum.attribute) for datum in data)


def paths(data: Iterable[Datum], root: Path) -> list[str]:
    return [Path(datum.impath).relative_to(root).as_posix() for datum in data]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """``build(name, **keys)``: a registered data set on the test's folder; ``CSV__FILE`` is DATASET.CSV.FILE."""

    def make(name: str, **keys: Any) -> DatasetBase:
        cfg = get_cfg_default()
        changes = {"ROOT": str(tmp_path), "NAME": name} | keys
        for key, value in changes.items():
            set_key(cfg, key if key == "SEED" else "DATASET." + key.replace("__", "."), value, "test")
        check_values(cfg)
        return build_dataset(cfg)

    return make
