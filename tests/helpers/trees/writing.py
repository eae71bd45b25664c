"""Small images and lists written to disk, and what a data set holds."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from oodprompt.data.dataset import DatasetBase, Datum
from tests.helpers.runs import REPOSITORY

MakeDataset = Callable[..., DatasetBase]


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


def arguments(root: Path, output: Path, yaml: str, *keys: str) -> list[str]:
    flags = ["--trainer", "ZeroshotCLIP", "--backbone", "tiny", "--seed", "1", "--root", str(root)]
    flags += ["--dataset-config-file", str(REPOSITORY / "configs" / "datasets" / f"{yaml}.yaml")]
    small = ["INPUT.SIZE", "(48, 48)", "INPUT.TRANSFORMS", "('normalize',)", "DATALOADER.NUM_WORKERS", "0"]
    return [*flags, "--output-dir", str(output), *small, *keys]
