"""From what a user has in hand to the config keys of a data set: a folder, a csv, a table, features, or a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodprompt.config.keys import get_cfg_default
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.feature_files import FEATURES, is_feature_file, write_features
from oodprompt.errors import UserError, nearest
from oodprompt.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

IN_RUN = ("data.csv", "data.safetensors")  # what tables and arrays are called in a run's folder
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
    """Keys of the data set; ``write_data`` gives those of data that are in memory."""
    name = name_of(data)
    keys: dict[str, Any] = {"DATASET.NAME": name} if name else {}
    if root is not None:
        keys["DATASET.ROOT"] = str(root)
    if isinstance(data, (str, Path)) and str(data) != name:
        path = Path(data).expanduser().absolute()
        if name == "Features":
            keys["DATASET.FEATURES.FILE"] = str(path)
        elif name == "CSV":
            keys["DATASET.CSV.FILE"] = str(path / "metadata.csv" if path.is_dir() else path)
        else:
            keys["DATASET.ROOT"] = str(path)
    return keys


def write_data(data: Any, folder: Path) -> dict[str, Any]:
    """Write data that are in memory to the run's ``folder``; returns the key of the file, nothing for data in files.

    A run can only be loaded again where its data are kept, so that tables and arrays become files.
    """
    if isinstance(data, Mapping):
        return {"DATASET.FEATURES.FILE": str(_write_arrays(data, folder))}
    return {"DATASET.CSV.FILE": str(_write_frame(data, folder))} if _is_frame(data) else {}


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


def _write_frame(frame: pd.DataFrame, folder: Path) -> Path:
    missing = [column for column in ("image", "label", "split") if column not in frame.columns]
    if missing:
        raise UserError(
            f"data=: the DataFrame has no column {missing[0]!r}: {nearest(missing[0], map(str, frame.columns))}; it needs "
            "image, label and split (train, val or test), and may have attribute and caption"
        )
    if frame.empty:
        raise UserError("data=: the DataFrame has no rows")
    table = frame.copy()
    table["image"] = [str(Path(str(path)).expanduser().absolute()) for path in frame["image"]]
    path = folder.absolute() / IN_RUN[0]
    write_atomically(path, table.to_csv(index=False))
    return path


def _write_arrays(data: Mapping[str, Any], folder: Path) -> Path:
    if FEATURES not in data:
        raise UserError(f"data=: the dict has no {FEATURES!r} [N, d]; it has {', '.join(map(str, data)) or 'nothing'}")
    folder.mkdir(parents=True, exist_ok=True)
    return write_features(folder.absolute() / IN_RUN[1], **data)
