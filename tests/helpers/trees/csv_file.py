"""A miniature csv file of a user's own."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.trees.writing import put, write

HEAD = "image,label,split,attribute"
ROWS = [
    "photos/1.jpg,cat,train,indoor",
    "photos/2.jpg,cat,Train,outdoor",
    "photos/3.jpg,ant,train,outdoor",
    '"photos/4, the last.jpg",ant,val,indoor',
    "photos/5.jpg,cat,test,outdoor",
    "photos/6.jpg,ant,test,indoor",
]
NAMES = [f"photos/{name}.jpg" for name in ("1", "2", "3", "4, the last", "5", "6")]


def tree(folder: Path, *lines: str, name: str = "metadata.csv", encoding: str = "utf-8") -> Path:
    put(folder, *NAMES)
    return write(folder / name, *(lines or (HEAD, *ROWS)), encoding=encoding)
