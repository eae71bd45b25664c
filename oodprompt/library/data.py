"""From what a user has in hand to the config keys of a data set: a folder, a csv, a table, features, or a name."""

from __future__ import annotations

import contextlib
import filecmp
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodprompt.config.keys import get_cfg_default
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.feature_files import ENTRIES, FEATURES, is_feature_file, read_feature_file, write_features
from oodprompt.engine.moved import IN_RUN
from oodprompt.errors import UserError, nearest
from oodprompt.files import temporary_folder
from oodprompt.reports.results import RESULTS

if TYPE_CHECKING:
    import pandas as pd

_OUTCOMES = (RESULTS, "audit.json", "*/model*.pth.tar*")  # what was made of the data in a folder
_TAKES = (
    "give a folder of train/CLASS/*.jpg and test/CLASS/*.jpg, a csv file, a pandas DataFrame with columns image, label and "
    "split, a file of image features (.npz, .safetensors), a dict of arrays with image_features, or a data set's name"
)


def name_of(data: Any) -> str:
    """The registered name of the data set that ``keys_of_data`` would take; "" for None."""
    if data is None:
        return ""
    if isinstance(data, Mapping):
        return "Features"
    if _is_frame(data):
        return "CSV"
    if not isinstance(data, (str, Path)):
        raise UserError(f"data=: a {type(data).__name__} is no data set; {_TAKES}")
    text, path = str(data), Path(data).expanduser()
    get_cfg_default()  # which registers the data sets
    if isinstance(data, str) and text in DATASET_REGISTRY.registered_names():
        return text
    if path.is_dir():
        return _kind_of_folder(path)
    if path.is_file():
        if is_feature_file(path):
            return "Features"
        if path.suffix.lower() in (".csv", ".tsv", ".txt"):
            return "CSV"
        raise UserError(f"data=: {path} is neither a csv file nor one of image features; {_TAKES}")
    if "/" not in text and "." not in text:
        hint = nearest(text, DATASET_REGISTRY.registered_names()).split("known:")[0]
        raise UserError(f"data=: there is no folder, file or data set {text!r}; {hint or _TAKES}")
    raise UserError(f"data=: there is no folder or file {path.absolute()}; {_TAKES}")


def keys_of_data(data: Any, root: str | Path | None) -> dict[str, Any]:
    """Keys of the data set; ``written_data`` gives those of data that are in memory."""
    name = name_of(data)
    keys: dict[str, Any] = {"DATASET.NAME": name} if name else {}
    if root is not None:
        keys["DATASET.ROOT"] = str(Path(root).expanduser())
    if isinstance(data, (str, Path)) and str(data) != name:
        path = Path(data).expanduser().absolute()
        if name == "Features":
            keys["DATASET.FEATURES.FILE"] = str(path)
        elif name == "CSV":
            keys["DATASET.CSV.FILE"] = str(path / "metadata.csv" if path.is_dir() else path)
        else:
            if root is not None:
                raise UserError(
                    f"root=: the folder of data= is the root, {path}; leave root= out, or give the data set's name"
                )
            keys["DATASET.ROOT"] = str(path)
    return keys


@contextlib.contextmanager
def written_data(data: Any, folder: Path) -> Iterator[dict[str, Any]]:
    """Write data in memory to a file in the run's ``folder``; yields the file's key, or nothing for data in files.

    A run can only be loaded again if its data are kept, so tables and arrays become files. ``UserError`` if the folder
    has other data, from which another run was trained. If a run is refused before it begins, the file is removed.
    """
    kind = next((i for i, fits in enumerate((_is_frame(data), isinstance(data, Mapping))) if fits), None)
    if kind is None:
        yield {}
        return
    folder = folder.absolute()
    key, name = list(IN_RUN.items())[kind]
    path = folder / name
    is_new = not path.is_file()
    try:
        with temporary_folder(folder) as temporary:
            new = temporary / path.name
            (_write_frame, _write_arrays)[kind](data, new)
            has_outcome = any(True for pattern in _OUTCOMES for _ in folder.glob(pattern))
            if not is_new and has_outcome and not _hold_the_same(new, path):
                raise UserError(
                    f"output=: {folder} has the data of another run, which are others; choose another folder"
                )
            new.replace(path)
        yield {key: str(path)}
    except OSError as error:
        raise UserError(f"output=: cannot write {path}: {error.strerror or error}") from error
    except UserError:
        if is_new and not (folder / "config.yaml").is_file():
            path.unlink(missing_ok=True)
        raise


def _hold_the_same(one: Path, other: Path) -> bool:
    """Whether two files have the same data; files of features with the same data differ in the order of their entries."""
    if filecmp.cmp(one, other, shallow=False):
        return True
    return is_feature_file(one) and read_feature_file(one).holds_what(read_feature_file(other))


def _kind_of_folder(path: Path) -> str:
    if (path / "metadata.csv").is_file():
        return "CSV"
    if (path / "train").is_dir() or (path / "test").is_dir():
        return "Folders"
    if any(is_feature_file(file) for file in path.iterdir()):
        return "Features"
    inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise UserError(
        f"data=: the folder {path} has neither folders train and test, nor a metadata.csv, nor files of image features "
        f"(there is {inside}); for one of the package's data sets give its name and root={str(path)!r}"
    )


def _is_frame(data: Any) -> bool:
    return type(data).__module__.split(".")[0] == "pandas" and type(data).__name__ == "DataFrame"


def _write_frame(frame: pd.DataFrame, path: Path) -> None:
    missing = [column for column in ("image", "label", "split") if column not in frame.columns]
    if missing:
        raise UserError(
            f"data=: the DataFrame has no column {missing[0]!r}: {nearest(missing[0], map(str, frame.columns))}; it needs "
            "image, label and split (train, val or test), and may have attribute and caption"
        )
    if frame.empty:
        raise UserError("data=: the DataFrame has no rows")
    for row, (image, is_missing) in enumerate(zip(frame["image"], frame["image"].isna(), strict=True)):
        if is_missing or not str(image).strip():
            raise UserError(f"data=: row {row:,} of the DataFrame has no image; give its path, or take the row out")
    table = frame.copy()
    table["image"] = [str(Path(str(path)).expanduser().absolute()) for path in frame["image"]]
    table.to_csv(path, index=False, encoding="utf-8", errors="backslashreplace")


def _write_arrays(data: Mapping[str, Any], path: Path) -> None:
    if FEATURES not in data:
        raise UserError(f"data=: the dict has no {FEATURES!r} [N, d]; it has {', '.join(map(str, data)) or 'nothing'}")
    if unknown := [name for name in data if name not in ENTRIES]:
        raise UserError(f"data=: unknown entry {unknown[0]!r} of the dict: {nearest(str(unknown[0]), ENTRIES)}")
    try:
        write_features(path, **data)
    except UserError as error:  # the file is a temporary one, of which nobody knows
        raise UserError(str(error).replace(f"{path}: ", "data=: ")) from error
