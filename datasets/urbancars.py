"""UrbanCars: cars with two shortcuts at once, background and co-occurring object (Li et al., CVPR 2023)."""

from __future__ import annotations

from itertools import product

from oodprompt.datasets.file_lists import FilesDataset
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import image_names

_KINDS = ("urban", "country")
_FOLDERS = {
    "train": "bg-0.95_co_occur_obj-0.95/train",
    "val": "bg-0.5_co_occur_obj-0.5/val",
    "test": "bg-0.5_co_occur_obj-0.5/test",
}
# Some of the scenes and things that the authors put in (their meta_data.json).
_SCENES = {
    "urban": ("an alley", "a street", "a gas station"),
    "country": ("a field road", "a forest road", "a desert road"),
}
_THINGS = {"urban": ("a stop sign", "a traffic light", "a fire hydrant"), "country": ("a cow", "a horse", "a sheep")}

declare(
    "DATASET.URBANCARS",
    {
        "ATTRIBUTE": Key(
            "both",
            "The spurious attribute: background, object (the co-occurring one), or both combined.",
            choices=("both", "background", "object"),
            error="{key}: unknown {value!r}: {known}",
        )
    },
)


@DATASET_REGISTRY.register()
class UrbanCars(FilesDataset):
    """Urban or country car (class) on urban or country background, beside an urban or country object (attribute).

    In training 95 % of the cars are on a background of their kind and 95 % beside an object of their kind; in
    validation and testing all eight combinations are equally many. Source: Li et al., "A Whac-A-Mole Dilemma", CVPR
    2023, whose scripts generate the images. We know of no published prompts for the attribute; these are ours.
    """

    dataset_dir = "urbancars"
    places = ("urbancars", "UrbanCars")
    tree = """
        ROOT/urbancars/
          bg-0.95_co_occur_obj-0.95/train/obj-urban_bg-urban_co_occur_obj-urban/*.jpg
                                          obj-urban_bg-urban_co_occur_obj-country/*.jpg
                                          ...
          bg-0.5_co_occur_obj-0.5/val/...
          bg-0.5_co_occur_obj-0.5/test/...
    """
    address = "https://github.com/facebookresearch/Whac-A-Mole (scripts/prepare_dataset_models/create_urbancars.sh)"

    def __init__(self, cfg: CfgNode) -> None:
        which = cfg.DATASET.URBANCARS.ATTRIBUTE
        self.attribute_names, self.attribute_prompts = _words(which)
        root = self.folder(cfg, *_FOLDERS.values())
        splits: dict[str, list[Datum]] = {split: [] for split in _FOLDERS}
        for split, folder in _FOLDERS.items():
            for label, background, thing in product(range(2), repeat=3):
                car, scene, beside = (_KINDS[i] for i in (label, background, thing))
                group = root / folder / f"obj-{car}_bg-{scene}_co_occur_obj-{beside}"
                images = image_names(group, (".jpg",)) if group.is_dir() else []  # .png are masks
                if not images:
                    raise self.missing(f"no .jpg in {group}")
                number = {"both": 2 * background + thing, "background": background, "object": thing}[which]
                splits[split] += [Datum(str(group / name), label, number, f"{car} car", number) for name in images]
        super().__init__(cfg, splits["train"], splits["val"], splits["test"])


def _words(which: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Names and prompts of the attribute's values."""
    if which != "both":
        words = _SCENES if which == "background" else _THINGS
        return tuple(f"{kind} {which}" for kind in _KINDS), [
            tuple(f"a photo of {w}." for w in words[k]) for k in _KINDS
        ]
    pairs = list(product(_KINDS, repeat=2))
    names = tuple(f"{scene} background, {thing} object" for scene, thing in pairs)
    prompts = [
        tuple(f"a photo of {a} with {b}." for a, b in zip(_SCENES[s], _THINGS[t], strict=True)) for s, t in pairs
    ]
    return names, prompts
