"""Domain generalisation, train on some domains and test on others: PACS, VLCS, OfficeHome, TerraIncognita, DomainNet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from oodprompt.datasets.file_lists import (
    FilesDataset,
    check_names,
    listed,
    readable,
    sorted_values,
    split_off_validation,
)
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.columns import Images
from oodprompt.data.dataset import Datum
from oodprompt.data.folders import check_spelling, image_names, note_passed_over, subfolders
from oodprompt.data.tables import portable, read_lines, whole
from oodprompt.errors import UserError, nearest
from oodprompt.log import logger

_DOMAINBED = "https://github.com/facebookresearch/DomainBed"
_DASSL = "https://github.com/KaiyangZhou/Dassl.pytorch/blob/master/DATASETS.md"

Reader = Callable[[str, str], list[Datum]]  # (split, domain) -> images


class DomainsDataset(FilesDataset):
    """Images of the same classes in several domains; the domain is ``Datum.domain`` and the (spurious) attribute.

    Training and validation images are those of DATASET.SOURCE_DOMAINS, test images those of DATASET.TARGET_DOMAINS. Of
    the two, one that is empty is all other domains; both empty: the last domain is the target. Domains are numbered
    over all of ``domains``, so that one of the test images never has the number of one of the training images.

    Three layouts, by class attributes. *Lists* (``split_lists``): of each split, the lists
    ``splits/<domain>_<name>.txt`` with an image (under ``images``) and its class's number from ``first_label`` in each
    line, but for the images in ``broken``. *Split folders* (``split_folders``): ``<domain>/<split>/<class>/``. *Plain*:
    ``<domain>/<class>/``, where the validation images are DATASET.VAL_PERCENT of those of each class. Classes of folders
    are numbered in the sorted order of the names that any domain has; ``numbered`` names classes whose folders are
    numbers. ``aliases`` are other names of domains, of folders and from the user.

    Raises ``UserError`` for an unknown domain, one that is source and target, and missing files.
    """

    aliases: Mapping[str, str] = {}
    split_lists: Mapping[str, Sequence[str]] = {}
    split_folders: Mapping[str, Sequence[str]] = {}
    images = ""
    first_label = 0
    broken: Sequence[str] = ()
    numbered: Mapping[str, str] = {}

    def __init__(self, cfg: CfgNode) -> None:
        name = type(self).__name__
        sources, targets = self.choose(cfg)
        self.attribute_names = tuple(readable(domain) for domain in self.domains)
        self._passed_over: Counter[str] = Counter()
        read = self._reader(cfg, (*sources, *targets))
        train, val, test = (
            Images.of([datum for domain in domains for datum in read(split, domain)])
            for split, domains in (("train", sources), ("val", sources), ("test", targets))
        )
        check_names(name, train, val, test)
        note_passed_over(self._passed_over, name)
        logger.info(f"{name}: training on {', '.join(sources)}; testing on {', '.join(targets)}")
        if not val:
            train, val = split_off_validation(cfg, name, train)
        super().__init__(cfg, train, val, test)

    @classmethod
    def choose(cls, cfg: CfgNode) -> tuple[list[str], list[str]]:
        """(source domains, target domains), each in the order of ``domains``."""
        sources = cls._known("SOURCE_DOMAINS", cfg.DATASET.SOURCE_DOMAINS)
        targets = cls._known("TARGET_DOMAINS", cfg.DATASET.TARGET_DOMAINS)
        if not sources and not targets:
            targets = [cls.domains[-1]]
        sources = sources or [domain for domain in cls.domains if domain not in targets]
        targets = targets or [domain for domain in cls.domains if domain not in sources]
        if not sources or not targets:
            key = "TARGET_DOMAINS" if targets else "SOURCE_DOMAINS"
            raise UserError(f"DATASET.{key} names every domain of {cls.__name__}; leave out at least one")
        if both := [domain for domain in sources if domain in targets]:
            raise UserError(
                f"{cls.__name__}: {both[0]} is in DATASET.SOURCE_DOMAINS and in DATASET.TARGET_DOMAINS; test on domains "
                "that are not trained on"
            )
        return sources, targets

    @classmethod
    def _known(cls, key: str, names: Iterable[str]) -> list[str]:
        for name in names:
            if cls._domain(name) not in cls.domains:
                raise UserError(f"DATASET.{key}: {cls.__name__} has no domain {name!r}: {nearest(name, cls.domains)}")
        return [domain for domain in cls.domains if domain in {cls._domain(name) for name in names}]

    @classmethod
    def _domain(cls, name: str) -> str:
        """The domain that a folder or a user calls ``name``."""
        name = name.lower().replace(" ", "_")
        return cls.aliases.get(name, name)

    def _reader(self, cfg: CfgNode, used: Sequence[str]) -> Reader:
        """What reads the layout that is there."""
        root = self.root(cfg)
        error = self.not_in(root, "folders of the domains")
        for folder in (root / place for place in self.places if (root / place).is_dir()):
            if self.split_lists and (folder / "splits").is_dir():
                return partial(self._read_lists, folder)
            found = self._folders(folder)
            lacking = [domain for domain in used if domain not in found]
            if not lacking:
                return self._folders_reader(found)
            if len(lacking) < len(used):
                error = self.missing(f"no folder of {', '.join(lacking)} in {folder.absolute()}")
        raise error

    def _folders(self, folder: Path) -> dict[str, Path]:
        """The folder of each domain that has one in ``folder``."""
        found: dict[str, Path] = {}
        for path in subfolders(folder):
            domain = self._domain(path.name)
            if domain in found:
                raise UserError(f"{found[domain]} and {path} are both the domain {domain}; keep one of them")
            if domain in self.domains:
                found[domain] = path
        return found

    def _read_lists(self, folder: Path, split: str, domain: str) -> list[Datum]:
        data = []
        for name in self.split_lists[split]:
            path = folder / "splits" / f"{domain}_{name}.txt"
            if not path.is_file():
                raise self.missing(f"no file {path}")
            for line, text in read_lines(path):
                image, *number = text.rsplit(maxsplit=1)
                image = portable(image, folder / self.images)
                try:
                    label = whole("".join(number)) - self.first_label
                except ValueError:
                    label = -1
                if label < 0 or "/" not in image:
                    raise UserError(
                        f"{path}, line {line}: expected an image's path and its class's number from {self.first_label}, "
                        f"not {text[:80]!r}"
                    )
                if image not in self.broken:
                    classname = readable(Path(image).parent.name)
                    attribute = self.domains.index(domain)
                    data.append(listed(path, line, folder / self.images / image, label, classname, attribute))
        return data

    def _folders_reader(self, folders: Mapping[str, Path]) -> Reader:
        split_folders = self.split_folders
        parts = {part for names in split_folders.values() for part in names}
        if not any((folder / part).is_dir() for folder in folders.values() for part in parts):
            split_folders, parts = {"train": ("",), "val": (), "test": ("",)}, {""}
        places = [folder / part for folder in folders.values() for part in parts]
        class_folders = [path for place in places if place.is_dir() for path in subfolders(place)]
        check_spelling(class_folders, "class")
        classes = {path.name for path in class_folders}
        label_of = {name: label for label, name in enumerate(sorted_values(classes))}
        return lambda split, domain: [
            datum
            for part in split_folders[split]
            for datum in self._read_folder(folders[domain] / part, domain, label_of)
        ]

    def _read_folder(self, folder: Path, domain: str, label_of: Mapping[str, int]) -> list[Datum]:
        """The images of ``folder``/<class>."""
        attribute = self.domains.index(domain)
        data = []
        for path in subfolders(folder) if folder.is_dir() else []:
            classname = self.numbered.get(path.name, readable(path.name))
            for name in image_names(path, passed_over=self._passed_over):
                data.append(Datum(str(path / name), label_of[path.name], attribute, classname, attribute))
        if not data:
            raise self.missing(f"no image in {folder}/<class>")
        return data


@DATASET_REGISTRY.register()
class PACS(DomainsDataset):
    """Seven things in art paintings, cartoons, photos and sketches, which are the domains.

    Source: Li, Yang, Song, Hospedales, "Deeper, Broader and Artier Domain Generalization", ICCV 2017. Dassl's lists or
    DomainBed's folders. We know of no published prompts for the domains; these are ours.
    """

    dataset_dir = "pacs"
    places = ("pacs", "pacs/images", "PACS", "PACS/kfold")
    domains = ("art_painting", "cartoon", "photo", "sketch")
    split_lists = {
        "train": ("train_kfold",),
        "val": ("crossval_kfold",),
        "test": ("train_kfold", "crossval_kfold"),
    }
    images = "images"
    first_label = 1
    broken = ("sketch/dog/n02103406_4068-1.png",)  # Dassl leaves it out, too
    attribute_prompts = (
        ("an art painting.", "a painting."),
        ("a cartoon.", "a cartoon drawing."),
        ("a photo.", "a photograph."),
        ("a sketch.", "a pencil sketch."),
    )
    tree = """
        ROOT/pacs/                                       Dassl's
          images/<domain>/<class>/*.jpg
          splits/<domain>_train_kfold.txt                and <domain>_crossval_kfold.txt
        or ROOT/PACS/<domain>/<class>/*.jpg              DomainBed's
        domains: art_painting, cartoon, photo, sketch
    """
    address = f"{_DASSL}#pacs (or {_DOMAINBED})"


@DATASET_REGISTRY.register()
class VLCS(DomainsDataset):
    """Bird, car, chair, dog, person in four older data sets, which are the domains.

    Source: Torralba and Efros, "Unbiased Look at Dataset Bias", CVPR 2011; Fang, Xu, Rockmore, ICCV 2013. Dassl's
    folders, whose classes are numbers, or DomainBed's. The domains have no names that CLIP could see in an image: the
    prompts, which are ours, describe what such images mostly show.
    """

    dataset_dir = "VLCS"
    places = ("VLCS", "vlcs")
    domains = ("caltech", "labelme", "pascal", "sun")
    aliases = {"caltech101": "caltech", "voc2007": "pascal", "sun09": "sun"}
    split_folders = {"train": ("train",), "val": ("crossval",), "test": ("test",)}
    numbered = dict(zip("01234", ("bird", "car", "chair", "dog", "person"), strict=True))
    attribute_prompts = (
        ("a photo of one object in the middle.", "a close-up photo of one object."),
        ("a photo of a street.", "a photo of an urban scene."),
        ("a snapshot from an album.", "a photo of everyday life."),
        ("a photo of a wide scene.", "a photo of a place."),
    )
    tree = """
        ROOT/VLCS/CALTECH/train/<class's number>/*.jpg   Dassl's; likewise crossval, test and LABELME, PASCAL, SUN
        or ROOT/VLCS/Caltech101/<class>/*.jpg            DomainBed's; likewise LabelMe, VOC2007, SUN09
    """
    address = f"{_DASSL}#vlcs (or {_DOMAINBED})"


@DATASET_REGISTRY.register()
class OfficeHome(DomainsDataset):
    """65 things of office and home as art, clipart, product pictures and photos, which are the domains.

    Source: Venkateswara, Eusebio, Chakraborty, Panchanathan, "Deep Hashing Network for Unsupervised Domain Adaptation",
    CVPR 2017. The folders of Dassl (its OfficeHomeDG, with its split, or its OfficeHome), of DomainBed, or of the
    authors. We know of no published prompts for the domains; these are ours.
    """

    dataset_dir = "office_home_dg"
    places = ("office_home_dg", "office_home", "OfficeHomeDataset_10072016", "OfficeHome")
    domains = ("art", "clipart", "product", "real_world")
    split_folders = {"train": ("train",), "val": ("val",), "test": ("train", "val")}
    attribute_prompts = (
        ("a work of art.", "a painting or a sketch."),
        ("a clipart picture.", "a clip art image."),
        ("a product photo on a white background.", "a picture from a shop."),
        ("a photo of a real scene.", "a photo taken with a camera."),
    )
    tree = """
        ROOT/office_home_dg/<domain>/train/<class>/*.jpg Dassl's; likewise val
        or ROOT/office_home/<domain>/<class>/*.jpg       DomainBed's
        domains: art, clipart, product, real_world       or Art, Clipart, Product, Real World
    """
    address = f"{_DASSL}#office-home-dg (or {_DOMAINBED})"


@DATASET_REGISTRY.register()
class OfficeHomeDG(OfficeHome):
    """OfficeHome under the name that it has in Dassl's configs."""


@DATASET_REGISTRY.register()
class TerraIncognita(DomainsDataset):
    """Ten kinds of animals (or none) before camera traps at four locations, which are the domains.

    DomainBed's selection of Beery, Van Horn, Perona, "Recognition in Terra Incognita", ECCV 2018. The locations have no
    names that CLIP could see in an image; the prompts only number them.
    """

    dataset_dir = "terra_incognita"
    places = ("terra_incognita", "TerraIncognita")
    domains = ("location_100", "location_38", "location_43", "location_46")  # DomainBed's order
    aliases = {f"l{number}": f"location_{number}" for number in (100, 38, 43, 46)}
    attribute_prompts = tuple((f"a camera trap photo at location {number}.",) for number in (100, 38, 43, 46))
    tree = """
        ROOT/terra_incognita/location_38/<class>/*.jpg   likewise location_43, location_46, location_100
    """
    address = f"{_DOMAINBED} (domainbed/scripts/download.py)"


@DATASET_REGISTRY.register()
class DomainNet(DomainsDataset):
    """345 things as clipart, infographics, paintings, quick drawings, photos and sketches, which are the domains.

    Source: Peng et al., "Moment Matching for Multi-Source Domain Adaptation", ICCV 2019. Dassl's lists, the authors'
    cleaned ones, with the sources' test images for validation as there; or DomainBed's folders. We know of no published
    prompts for the domains; these are ours.
    """

    dataset_dir = "domainnet"
    places = ("domainnet", "domain_net", "DomainNet")
    domains = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    aliases = {"clip": "clipart", "info": "infograph", "paint": "painting", "quick": "quickdraw"}
    split_lists = {"train": ("train",), "val": ("test",), "test": ("test",)}
    attribute_prompts = (
        ("a clipart picture.", "a clip art image."),
        ("an infographic.", "an infographic with text and icons."),
        ("a painting.", "an art painting."),
        ("a quick drawing of a few lines.", "a doodle."),
        ("a photo.", "a photograph."),
        ("a sketch.", "a pencil sketch."),
    )
    tree = """
        ROOT/domainnet/                                  Dassl's
          <domain>/<class>/*.jpg
          splits/<domain>_train.txt                      and <domain>_test.txt
        or ROOT/domain_net/<domain>/<class>/*.jpg        DomainBed's
        domains: clipart, infograph, painting, quickdraw, real, sketch
    """
    address = "https://ai.bu.edu/M3SDA/ (the cleaned version)"
