"""A miniature CelebA in its authors' form and in Kaggle's."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.trees.writing import put, write

NAMES = ["5_o_Clock_Shadow", "Blond_Hair", "Male", "Smiling"]
ATTRIBUTES = {  # in the order of NAMES
    "000001.jpg": (-1, 1, -1, 1),
    "000002.jpg": (-1, -1, -1, -1),
    "000003.jpg": (1, -1, 1, 1),
    "000004.jpg": (-1, 1, 1, -1),
    "000005.jpg": (-1, 1, -1, 1),
    "000006.jpg": (-1, -1, 1, -1),
    "000007.jpg": (-1, 1, 1, 1),
}
SPLITS = {name: (0, 0, 0, 0, 1, 2, 2)[i] for i, name in enumerate(ATTRIBUTES)}
TXT = [str(len(ATTRIBUTES)), " ".join(NAMES) + " "]
TXT += [f"{name} " + " ".join(f"{value:2d}" for value in values) for name, values in ATTRIBUTES.items()]
CSV = ["image_id," + ",".join(NAMES)] + [f"{n}," + ",".join(map(str, v)) for n, v in ATTRIBUTES.items()]
SPLIT_TXT = [f"{name} {split}" for name, split in SPLITS.items()]
SPLIT_CSV = ["image_id,partition"] + [f"{name},{split}" for name, split in SPLITS.items()]


def tree(folder: Path, form: str = "txt", images: str = "img_align_celeba", anno: str = "", part: str = "") -> Path:
    put(folder / images, *ATTRIBUTES)
    write(folder / part / f"list_eval_partition.{form}", *(SPLIT_TXT if form == "txt" else SPLIT_CSV))
    return write(folder / anno / f"list_attr_celeba.{form}", *(TXT if form == "txt" else CSV))
