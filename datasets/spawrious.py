"""Spawrious: generated photos of dogs, breeds confounded with places (Lynch et al., 2023)."""

from __future__ import annotations

from pathlib import Path

from oodprompt.datasets.file_lists import FilesDataset, split_off_validation
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import image_names

_BREEDS = ("bulldog", "corgi", "dachshund", "labrador")
_PLACES = ("desert", "jungle", "dirt", "mountain", "snow", "beach")
# Places of the bulldog, dachshund, labrador and corgi in training and in testing; one more place that all share.
_ORDER = ("bulldog", "dachshund", "labrador", "corgi")
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "o2o_easy": (("desert", "jungle", "dirt", "snow"), ("dirt", "snow", "desert", "jungle"), "beach"),
    "o2o_medium": (("mountain", "beach", "dirt", "jungle"), ("jungle", "dirt", "beach", "snow"), "desert"),
    "o2o_hard": (("jungle", "mountain", "snow", "desert"), ("mountain", "snow", "desert", "jungle"), "beach"),
    "m2m_easy": (("desert", "mountain", "dirt", "jungle"), ("dirt", "jungle", "mountain", "desert"), ""),
    "m2m_medium": (("beach", "snow", "mountain", "desert"), ("desert", "mountain", "beach", "snow"), ""),
    "m2m_hard": (("dirt", "jungle", "snow", "beach"), ("snow", "beach", "dirt", "jungle"), ""),
}
_IN_FOLDER = 3168  # images of a breed at a place in each of the folders 0 and 1
_OWN_SHARE = (0.97, 0.87)  # one-to-one: share of the breed's own place in folder 0 and in folder 1

declare(
    "DATASET.SPAWRIOUS",
    {
        "SETTING": Key(
            "o2o_hard",
            "One of the authors' settings: one-to-one or many-to-many.",
            choices=tuple(_SETTINGS),
            error="{key}: unknown setting {value!r}: {known}",
        )
    },
)


@DATASET_REGISTRY.register()
class Spawrious(FilesDataset):
    """Four dog breeds (class) at six places (spurious attribute); six settings by key.

    One-to-one (o2o): in training each breed is nearly always at a place of its own, in testing at that of another.
    Many-to-many (m2m): two breeds share two places in training, and two others in testing. Where the authors take the
    first so many images in the order in which the disk lists them, here they are the first by name. There is no
    official validation set: DATASET.VAL_PERCENT of the training images are set aside. Source: Lynch, Dovonon, Kaddour,
    Silva, "Spawrious", 2023, arXiv 2303.05470. We know of no published prompts for the attribute; these are ours.
    """

    dataset_dir = "spawrious224"
    places = ("spawrious224", "spawrious/spawrious224")
    tree = """
        ROOT/spawrious224/
          0/<place>/<breed>/*.png        places: desert, jungle, dirt, mountain, snow, beach
          1/<place>/<breed>/*.png        breeds: bulldog, corgi, dachshund, labrador; 1/ for o2o only
    """
    address = "https://github.com/aengusl/spawrious"
    attribute_names = _PLACES
    attribute_prompts = (
        ("a photo of a desert.", "a desert background."),
        ("a photo of a jungle.", "a jungle background."),
        ("a photo of dirt.", "a dirt road."),
        ("a photo of a mountain.", "a mountain background."),
        ("a photo of snow.", "a snowy background."),
        ("a photo of a beach.", "a beach background."),
    )

    def __init__(self, cfg: CfgNode) -> None:
        setting = cfg.DATASET.SPAWRIOUS.SETTING
        folder = self.folder(cfg, "0")
        listed, test = ([d for part in parts for d in self._read(folder, *part)] for parts in parts_of(setting))
        train, val = split_off_validation(cfg, "Spawrious", listed)
        super().__init__(cfg, train, val, test)

    def _read(self, root: Path, number: int, place: str, breed: str, limit: int | None) -> list[Datum]:
        folder = root / str(number) / place / breed
        names = image_names(folder, (".png", ".jpg", ".jpeg")) if folder.is_dir() else []
        if not names:
            raise self.missing(f"no image in {folder}")
        label, attribute = _BREEDS.index(breed), _PLACES.index(place)
        return [Datum(str(folder / name), label, attribute, breed, attribute) for name in names[:limit]]


Part = tuple[int, str, str, int | None]


def parts_of(setting: str) -> tuple[list[Part], list[Part]]:
    """(folder, place, breed, number of images or None for all) of training and of testing."""
    train_places, test_places, shared = _SETTINGS[setting]
    train: list[Part] = []
    test: list[Part] = []
    for i, breed in enumerate(_ORDER):
        if shared:
            for folder, share in enumerate(_OWN_SHARE):
                own = int(share * _IN_FOLDER)
                train += [(folder, train_places[i], breed, own), (folder, shared, breed, _IN_FOLDER - own)]
                test.append((folder, test_places[i], breed, None))
        else:
            for j in (i, i ^ 1):  # bulldog and dachshund share their two places, labrador and corgi theirs
                train.append((0, train_places[j], breed, _IN_FOLDER))
                test.append((0, test_places[j], breed, None))
    return train, test
