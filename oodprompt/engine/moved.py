"""Data that a run keeps in its own folder, which may have been moved since."""

from __future__ import annotations

from pathlib import Path

from yacs.config import CfgNode

from oodprompt.config.keys import leaves, set_key

# What ``oodprompt.train`` calls tables and arrays that it is given, in the run's folder.
IN_RUN = ("data.csv", "data.safetensors")
_KEYS = ("DATASET.CSV.FILE", "DATASET.FEATURES.FILE")


def find_moved_data(cfg: CfgNode, folder: Path) -> None:
    """Have ``cfg`` name the data in the run's ``folder`` where those that it names are gone."""
    for key in _KEYS:
        file = Path(leaves(cfg)[key])
        here = folder.absolute() / file.name
        if file.is_absolute() and file.name in IN_RUN and not file.is_file() and here.is_file():
            set_key(cfg, key, str(here), str(folder))
