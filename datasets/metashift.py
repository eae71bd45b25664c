"""MetaShift, cats and dogs indoors and outdoors (Liang and Zou, ICLR 2022), in SubpopBench's build."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from oodprompt.datasets.file_lists import FilesDataset, Splits
from oodprompt.datasets.metadata import SUBPOPBENCH, read_metadata
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import image_names

BUILD = "MetaShift-Cat-Dog-indoor-outdoor"
_CLASSES = ("dog", "cat")
_ATTRIBUTES = ("outdoor", "indoor")
# In the order in which SubpopBench numbers the images; what the folders call train and test does not count.
_FOLDERS = (
    ("train", "cat", "indoor"),
    ("train", "dog", "outdoor"),
    ("test", "cat", "outdoor"),
    ("test", "dog", "indoor"),
)
_SEED, _TEST_SHARE, _VAL_SHARE = 42, 0.25, 0.1


@DATASET_REGISTRY.register()
class MetaShift(FilesDataset):
    """Dog or cat (class), outdoors or indoors (spurious attribute).

    SubpopBench pools all images and splits them 65 : 10 : 25 at random, so cats are mostly indoors and dogs outdoors
    in every split. Where its ``metadata_metashift.csv`` exists, that is the split. Without it the same rule is applied
    to the file names in sorted order: SubpopBench takes them in the order in which the disk lists them, so its split
    of the same images differs from machine to machine, and from this one.

    Sources: Liang and Zou, ICLR 2022 (data); Yang et al., "Change is Hard", ICML 2023 (SubpopBench, its
    scripts/download.py). We know of no published prompts for the attribute; these are ours.
    """

    dataset_dir = "metashift"
    places = ("metashift", ".")
    tree = f"""
        ROOT/metashift/
          metadata_metashift.csv         filename,y,a,split; optional, SubpopBench's split
          {BUILD}/
            train/cat/cat(indoor)/*.jpg
            train/dog/dog(outdoor)/*.jpg
            test/cat/cat(outdoor)/*.jpg
            test/dog/dog(indoor)/*.jpg
    """
    address = "https://www.dropbox.com/s/a7k65rlj4ownyr2/metashift.tar.gz?dl=1 (SubpopBench's archive)"
    attribute_names = _ATTRIBUTES
    attribute_prompts = (
        ("a photo taken outdoors.", "a photo of grass.", "a photo of a street.", "an outdoor background."),
        ("a photo taken indoors.", "a photo of a room.", "a photo of a sofa.", "an indoor background."),
    )

    def __init__(self, cfg: CfgNode) -> None:
        folder = self.folder(cfg, BUILD)
        metadata = folder / "metadata_metashift.csv"
        if metadata.is_file():
            splits = read_metadata(metadata, folder / BUILD, _CLASSES, len(_ATTRIBUTES), SUBPOPBENCH, after=BUILD)
        else:
            splits = self._split(folder / BUILD)
        super().__init__(cfg, *splits)

    def _split(self, build: Path) -> Splits:
        pool = []
        for split, name, place in _FOLDERS:
            folder = build / split / name / f"{name}({place})"
            images = image_names(folder, (".jpg",)) if folder.is_dir() else []
            if not images:
                raise self.missing(f"no .jpg in {folder}")
            label, attribute = _CLASSES.index(name), _ATTRIBUTES.index(place)
            pool += [Datum(str(folder / image), label, attribute, name, attribute) for image in images]
        test, val = random_split(len(pool))
        train = set(range(len(pool))) - set(test) - set(val)
        kept, held_out, tested = ([pool[i] for i in sorted(indices)] for indices in (train, val, test))
        return kept, held_out, tested


def random_split(count: int) -> tuple[list[int], list[int]]:
    """Test and validation indices below ``count``, as SubpopBench draws them."""
    rng = np.random.RandomState(_SEED)
    test = rng.choice(count, int(count * _TEST_SHARE), replace=False)
    val = rng.choice(np.setdiff1d(np.arange(count), test), int(count * _VAL_SHARE), replace=False)
    return test.tolist(), val.tolist()
