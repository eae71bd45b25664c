"""A small folder in COCO's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from oodprompt.studies.coco import CocoPair

IDS = {"person": 1, "cat": 17, "dog": 18, "traffic light": 10, "bench": 15, "kite": 38}  # not in order, with gaps
PAIR = CocoPair("person", "cat", ("cat", "dog", "traffic light"))
# (objects shown, crowds, how many in train, how many in val)
KINDS: list[tuple[Sequence[str], Sequence[str], int, int]] = [
    (("cat",), (), 60, 16),
    (("cat", "person"), (), 70, 12),
    (("dog",), (), 60, 9),
    (("dog", "person", "person"), (), 50, 30),
    (("traffic light", "bench"), (), 55, 20),
    (("traffic light", "person"), (), 60, 20),
    (("cat", "dog"), (), 5, 5),  # two labels
    (("cat", "dog", "person"), (), 5, 5),
    (("cat",), ("person",), 5, 5),  # whether the feature is there cannot be told
    (("cat", "person"), ("dog",), 5, 5),
    (("bench", "person"), (), 5, 5),  # no label
    (("kite",), (), 3, 3),
    ((), (), 2, 2),
]


def coco(folder: Path, split: str, seed: int = 0) -> None:
    """The instances, captions and (empty) image files of a split."""
    rng = np.random.default_rng(seed)
    images, notes, captions = [], [], []
    kinds = [kind for kind in KINDS for _ in range(kind[2] if split == "train" else kind[3])]
    for i, which in enumerate(rng.permutation(len(kinds))):
        shown, crowds, *_ = kinds[which]
        images.append({"id": 1000 - i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480})
        for k, name in enumerate((*shown, *crowds)):
            box = [10.5 * k, 20, 100.25, 50]
            crowd = int(k >= len(shown))
            notes.append(
                {"image_id": 1000 - i, "category_id": IDS[name], "bbox": box, "iscrowd": crowd, "id": len(notes)}
            )
        label = next((name for name in shown if name in PAIR.labels), "thing")
        texts = (
            [f"Two {label.title()}s\n there", "something", f"the {label} again"] if i % 5 else ["something else"] * 3
        )
        captions += [{"image_id": 1000 - i, "caption": text} for text in texts]
        (folder / f"{split}2017").mkdir(parents=True, exist_ok=True)
        (folder / f"{split}2017" / f"{i:012d}.jpg").touch()
    categories = [{"id": number, "name": name, "supercategory": "x"} for name, number in IDS.items()]
    categories = categories if split == "train" else categories[::-1]
    place = folder / "annotations"
    place.mkdir(exist_ok=True)
    instances = {"images": images, "annotations": notes, "categories": categories}
    (place / f"instances_{split}2017.json").write_text(json.dumps(instances))
    (place / f"captions_{split}2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
