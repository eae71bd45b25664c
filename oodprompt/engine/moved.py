"""Data that a run keeps in its own folder, which may have been moved since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from oodprompt.config.keys import leaves, set_key

# The key of tables and of arrays that ``oodprompt.train`` is given, and what they are called in the run's folder.
IN_RUN = {"DATASET.CSV.FILE": "data.csv", "DATASET.FEATURES.FILE": "data.safetensors"}


def find_moved_data(cfg: CfgNode, folder: Path) -> None:
    """Have ``cfg`` name the data in the run's ``folder`` where those that it names are gone."""
    for key, name in IN_RUN.items():
        file, here = Path(leaves(cfg)[key]), folder.absolute() / name
        if file.is_absolute() and file.name == name and not file.is_file() and here.is_file():
            set_key(cfg, key, str(here), str(folder))


def are_in_run(key: str, old: Any, new: Any, folder: str) -> bool:
    """Whether ``new`` names the data in the run's ``folder``, and ``old`` did so where the folder was before."""
    if key not in IN_RUN or not Path(old).is_absolute():
        return False
    return Path(old).name == IN_RUN[key] and Path(new) == Path(folder).absolute() / IN_RUN[key]
