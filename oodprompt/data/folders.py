"""Which files of a folder are images, which are left behind by systems and programs, and which are neither."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from oodprompt.data.images import image_suffixes
from oodprompt.errors import UserError
from oodprompt.log import logger

# In lower case. Names that begin with a point (.DS_Store, ._1.jpg, .ipynb_checkpoints) are left over anyway.
_LEFTOVERS = frozenset(
    (
        *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
        *("__macosx", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot", "@recently-snapshot"),
        *("$recycle.bin", "system volume information", "lost+found"),
    )
)
IMAGE_ENDINGS = "images end in .jpg, .png, .webp, .tif, .gif or the suffix of another format that Pillow opens"
_CONVERTIBLE = frozenset(
    (
        ".heic",
        ".heif",
        ".psd",
        ".svg",
        ".eps",
        ".dcm",
        ".dicom",
        ".npy",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".raw",
        ".jxl",
        ".exr",
    )
)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of that name is hidden or left behind by a system: nobody means it as data."""
    return name.startswith(".") or name.lower() in _LEFTOVERS


def image_names(folder: Path, suffixes: Sequence[str] = (), passed_over: Counter[str] | None = None) -> list[str]:
    """Names of the images right in ``folder``, sorted: the order in which a disk lists them differs by machine.

    ``suffixes`` are theirs, by default all that can be read. The suffixes of other files are counted in ``passed_over``.
    """
    ends = tuple(suffixes) or image_suffixes()
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not is_leftover(entry.name) and not entry.is_dir()]
    images = [name for name in names if name.lower().endswith(ends)]
    if passed_over is not None and len(images) < len(names):
        passed_over.update(os.path.splitext(name)[1].lower() for name in names if not name.lower().endswith(ends))
    return sorted(images)


def subfolders(folder: Path) -> list[Path]:
    """The folders right in ``folder`` that are not left over, sorted by name."""
    return sorted(path for path in folder.iterdir() if not is_leftover(path.name) and path.is_dir())


def images_below(folder: Path, passed_over: Counter[str] | None = None) -> list[Path]:
    """The images in ``folder`` and in all folders below it that are not left over, sorted by path."""
    found: list[Path] = []
    for place, inside, _ in os.walk(folder):
        inside[:] = [name for name in inside if not is_leftover(name)]
        found += [Path(place, name) for name in image_names(Path(place), passed_over=passed_over)]
    return sorted(found)


def note_passed_over(passed_over: Counter[str], where: Path | str) -> None:
    """Say in one line how many files of ``where`` were passed over, by suffix; nothing where there were none."""
    number = sum(passed_over.values())
    if not number:
        return
    common = sorted(passed_over.items(), key=lambda kind: (-kind[1], kind[0] == "", kind[0]))[:5]
    kinds = [f"{n:,} {suffix or 'without a suffix'}" for suffix, n in common]
    if rest := number - sum(n for _, n in common):
        kinds.append(f"{rest:,} others")
    files = "1 file that is no image" if number == 1 else f"{number:,} files that are no images"
    convertible = sorted(_CONVERTIBLE & set(passed_over))
    remedy = f"; convert {', '.join(convertible)} to png or jpeg to use them" if convertible else ""
    logger.warning(f"Note: passed over {files}: {', '.join(kinds)} (in {where}){remedy}")


def check_spelling(folders: Iterable[Path], what: str) -> None:
    """``UserError`` for two folders whose names differ only in case, blanks and underscores, or by the form of accents.

    Folders of one name in different places are one. So are "red_fox" and "red fox" there; side by side, they are not.
    """
    first: dict[str, Path] = {}
    beside: dict[tuple[Path, str], Path] = {}
    for folder in folders:
        words = as_words(folder.name)
        key = " ".join(words.split()).casefold()
        one, other = first.setdefault(key, folder), beside.setdefault((folder.parent, key), folder)
        other = other if other != folder else one
        if other.name != folder.name and (other.parent == folder.parent or as_words(other.name) != words):
            raise UserError(f"{other} and {folder} are two spellings of one {what}; put their images into one folder")


def as_words(name: str) -> str:
    """A folder's name as words: "_" is a blank. Accents have one form, whichever the disk gives them."""
    return unicodedata.normalize("NFC", name).replace("_", " ")
