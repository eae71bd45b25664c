"""A miniature NICO++ in SubpopBench's layout."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.trees.writing import put, write

CONTEXTS = ("autumn", "dim", "grass", "outdoor", "rock", "water")
CLASSES = {"hot_air_balloon": 1, "airplane": 0}  # the order of the file is not that of the numbers
COUNTS = {("autumn", "airplane"): 90, ("dim", "airplane"): 7, ("dim", "hot_air_balloon"): 80, ("water", "airplane"): 75}


def tree(folder: Path) -> None:
    for (context, name), count in COUNTS.items():
        put(folder / "public_dg_0416/train" / context / name, *(f"{i * 7 % 100:03d}.jpg" for i in range(count)))
    put(folder / "public_dg_0416/train/dim/airplane", "x.png")
    write(folder / "dg_label_id_mapping.json", json.dumps(CLASSES))
