"""ImageNet, and four sets that test a classifier of its classes: ImageNetV2, ImageNetSketch, ImageNetA, ImageNetR."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from oodprompt.datasets.coop_sets import GUIDE, note_few_shot
from oodprompt.datasets.file_lists import FilesDataset, sorted_values, split_off_validation
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.columns import Images
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import image_names, note_passed_over, subfolders
from oodprompt.data.tables import read_lines
from oodprompt.errors import UserError
from oodprompt.log import logger


class ClassFolders(FilesDataset):
    """Base of data sets of ImageNet's classes: a folder of images per class, and ``classnames.txt``.

    Each line of that file is a class's WordNet id and its name, in the order of the ids. It may lie in the data set's
    folder or in ImageNet's.
    """

    @classmethod
    def names(cls, cfg: CfgNode) -> dict[str, str]:
        """The class name of each WordNet id, in the order of the file."""
        root = cls.root(cfg)
        found = [path for d in (cls.dataset_dir, "imagenet") if (path := root / d / "classnames.txt").is_file()]
        if not found:
            raise cls.missing(f"no classnames.txt in {root.absolute() / cls.dataset_dir}")
        names: dict[str, str] = {}
        for line, text in read_lines(found[0]):
            wnid, *rest = text.split(maxsplit=1)
            name = "".join(rest)
            if not name or wnid in names:
                problem = "comes twice" if wnid in names else "has no name"
                raise UserError(f"{found[0]}, line {line}: {wnid!r} {problem}; expected a WordNet id and a class name")
            names[wnid] = name
        return names

    @classmethod
    def read(cls, folder: Path, names: Mapping[str, str], labels: Mapping[str, int]) -> list[Datum]:
        """The images of ``folder``/<class>, for the classes of ``labels``."""
        data, passed_over = [], Counter[str]()
        for key, label in labels.items():
            images = image_names(folder / key, passed_over=passed_over) if (folder / key).is_dir() else []
            if not images:
                raise cls.missing(f"no image in {folder / key}, the folder of the class {names[key]!r}")
            data += [Datum(str(folder / key / image), label, 0, names[key]) for image in images]
        note_passed_over(passed_over, folder)
        return data

    @classmethod
    def labels(cls, folder: Path, names: Mapping[str, str]) -> dict[str, int]:
        """The label of each class's folder, in sorted order; ``UserError`` for none, or one without a name."""
        found = sorted_values(path.name for path in subfolders(folder))
        if not found:
            raise cls.missing(f"no class's folder in {folder}")
        if unknown := [name for name in found if name not in names]:
            raise UserError(f"{cls.__name__}: {folder / unknown[0]} is no class of classnames.txt; take it out")
        return {name: label for label, name in enumerate(found)}


@DATASET_REGISTRY.register()
class ImageNet(ClassFolders):
    """1000 classes of photos; the official validation images are for testing (Deng et al., CVPR 2009).

    Upstream takes the same images for validation, too, so that choosing an epoch by validation would choose by testing.
    Here the validation images are DATASET.VAL_PERCENT of the training images of each class; ``configs/datasets/
    imagenet.yaml`` sets 0: all training images are for training, as upstream, and nothing for validation.
    """

    dataset_dir = "imagenet"
    places = ("imagenet/images", "imagenet")
    tree = """
        ROOT/imagenet/
          classnames.txt                 n01440764 tench
          images/train/<id>/*.JPEG       ids: n01440764, ...; also imagenet/train, imagenet/val
          images/val/<id>/*.JPEG
    """
    address = f"{GUIDE}#imagenet (classnames.txt; images from image-net.org)"

    def __init__(self, cfg: CfgNode) -> None:
        images, names = self.folder(cfg, "train", "val"), self.names(cfg)
        note_few_shot(cfg, self.root(cfg) / self.dataset_dir)
        labels = self.labels(images / "train", names)
        if other := set(labels) ^ set(self.labels(images / "val", names)):
            raise UserError(f"ImageNet: {images} has a folder {min(other)} in one of train and val only; complete it")
        listed, test = (Images.of(self.read(images / split, names, labels)) for split in ("train", "val"))
        train, val = split_off_validation(cfg, "ImageNet", listed)
        super().__init__(cfg, train, val, test)


class ImageNetTest(ClassFolders):
    """Base of sets that only test: as upstream, the training images are the test images, and no method should train.

    Labels count the folders in sorted order, so they are ImageNet's where all classes are there (``all_classes``).
    """

    image_dir = ""
    all_classes = False
    test_only = True

    def __init__(self, cfg: CfgNode) -> None:
        names = self.keyed(self.names(cfg))
        folder = self.folder(cfg, self.image_dir) / self.image_dir
        labels = self.labels(folder, names)
        if self.all_classes and len(labels) < len(names):
            lacking = next(key for key in names if key not in labels)
            raise self.missing(f"no folder {lacking} in {folder}, one of {len(names) - len(labels)} classes that lack")
        data = self.read(folder, names, labels)
        logger.warning(
            f"{type(self).__name__} is for testing only: its test images stand in for training images; train on ImageNet "
            "and give --eval-only --model-dir"
        )
        super().__init__(cfg, data, (), data)

    @classmethod
    def keyed(cls, names: dict[str, str]) -> dict[str, str]:
        """The class name of each folder."""
        return names


@DATASET_REGISTRY.register()
class ImageNetV2(ImageNetTest):
    """10,000 new photos of ImageNet's classes, the matched-frequency set; testing only (Recht et al., ICML 2019)."""

    dataset_dir, image_dir, all_classes = "imagenetv2", "imagenetv2-matched-frequency-format-val", True
    places = ("imagenetv2", ".")
    tree = """
        ROOT/imagenetv2/
          classnames.txt                 ImageNet's, or in ROOT/imagenet/
          imagenetv2-matched-frequency-format-val/<class's number, 0 to 999>/*.jpeg
    """
    address = f"{GUIDE}#imagenetv2"

    @classmethod
    def keyed(cls, names: dict[str, str]) -> dict[str, str]:
        return {str(label): name for label, name in enumerate(names.values())}


@DATASET_REGISTRY.register()
class ImageNetSketch(ImageNetTest):
    """Sketches of ImageNet's classes; testing only (Wang et al., NeurIPS 2019)."""

    dataset_dir, image_dir, all_classes = "imagenet-sketch", "images", True
    places = ("imagenet-sketch",)
    tree = """
        ROOT/imagenet-sketch/
          classnames.txt                 ImageNet's, or in ROOT/imagenet/
          images/<id>/*.JPEG             ids: n01440764, ...
    """
    address = f"{GUIDE}#imagenet-sketch"


@DATASET_REGISTRY.register()
class ImageNetA(ImageNetTest):
    """Photos of 200 of ImageNet's classes that a ResNet gets wrong; testing only (Hendrycks et al., CVPR 2021)."""

    dataset_dir, image_dir = "imagenet-adversarial", "imagenet-a"
    places = ("imagenet-adversarial", ".")
    tree = """
        ROOT/imagenet-adversarial/
          classnames.txt                 ImageNet's, or in ROOT/imagenet/
          imagenet-a/<id>/*.jpg          ids: n01498041, ...
    """
    address = f"{GUIDE}#imagenet-a"


@DATASET_REGISTRY.register()
class ImageNetR(ImageNetTest):
    """Art, cartoons, toys and more of 200 of ImageNet's classes; testing only (Hendrycks et al., ICCV 2021)."""

    dataset_dir, image_dir = "imagenet-rendition", "imagenet-r"
    places = ("imagenet-rendition", ".")
    tree = """
        ROOT/imagenet-rendition/
          classnames.txt                 ImageNet's, or in ROOT/imagenet/
          imagenet-r/<id>/*.jpg          ids: n01443537, ...
    """
    address = f"{GUIDE}#imagenet-r"
