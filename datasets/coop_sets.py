"""CoOp's ten data sets beside ImageNet, in its folders and with its splits (Zhou et al., IJCV 2022)."""

from __future__ import annotations

import json
from pathlib import Path

from oodprompt.datasets.file_lists import FilesDataset, Splits, check_names, named
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.tables import portable, read_lines
from oodprompt.errors import UserError, nearest
from oodprompt.log import logger

GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"


def note_few_shot(cfg: CfgNode, folder: Path) -> None:
    """Say so where upstream has kept a few-shot sample, which is not read: a pickle with another machine's paths."""
    name = f"split_fewshot/shot_{cfg.DATASET.NUM_SHOTS}-seed_{cfg.SEED}.pkl"
    if (folder / name).is_file():
        logger.warning(
            f"Note: {folder / name} is not read; the {cfg.DATASET.NUM_SHOTS} images per class are drawn here"
        )


class CoOpDataset(FilesDataset):
    """Base of CoOp's data sets: ``split_zhou_<Name>.json`` says which images are for training, validation, testing.

    The file holds for each of "train", "val", "test" a list of (image, label, class name), images relative to the folder
    ``image_dir``. It is never made here: upstream makes a missing one from the order in which a disk lists the images,
    so it would differ between machines. Validation images stay whole in few-shot runs (upstream: at most four a class).
    """

    image_dir = ""

    def __init_subclass__(cls, anchor: str, folders: str = "") -> None:
        super().__init_subclass__()
        cls.places = (cls.dataset_dir,)
        cls.address = f"{GUIDE}#{anchor} (images and split file)"
        cls.tree = f"""
            ROOT/{cls.dataset_dir}/
              {cls.split_file()}
              {folders or cls.image_dir + "/..."}
        """

    @classmethod
    def split_file(cls) -> str:
        return f"split_zhou_{cls.__name__}.json"

    def __init__(self, cfg: CfgNode) -> None:
        folder = self.folder(cfg, *([self.image_dir] if self.image_dir else []))
        path = folder / self.split_file()
        if not path.is_file():
            raise self.missing(f"no {path.name} in {folder.absolute()}; it is not made here, fetch it")
        note_few_shot(cfg, folder)
        super().__init__(cfg, *read_split(path, folder / self.image_dir))


def read_split(path: Path, images: Path) -> Splits:
    """Training, validation and test images of a ``split_zhou_*.json``; ``UserError`` names the entry that is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from error
    splits: Splits = ([], [], [])
    for name, data in zip(("train", "val", "test"), splits, strict=True):
        entries = content.get(name) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"{path} has no list {name!r}; expected lists train, val and test; fetch it again")
        for number, entry in enumerate(entries, 1):
            where = f"{path}, {name!r} entry {number}"
            match entry:
                case [str(image), int() | float() as label, str(classname)] if label >= 0 and float(label).is_integer():
                    file = images / portable(image, images)
                    data.append(named(where, "restore it", file, int(label), 0, classname))
                case _:
                    raise UserError(f"{where}: expected [image, label, class name], not {str(entry)[:80]}")
    check_names(path, *splits)
    return splits


@DATASET_REGISTRY.register()
class Caltech101(CoOpDataset, anchor="caltech101"):
    """100 kinds of objects, without the background class (Fei-Fei, Fergus, Perona, 2004)."""

    dataset_dir, image_dir = "caltech-101", "101_ObjectCategories"


@DATASET_REGISTRY.register()
class OxfordPets(CoOpDataset, anchor="oxfordpets"):
    """37 breeds of cats and dogs (Parkhi et al., CVPR 2012)."""

    dataset_dir, image_dir = "oxford_pets", "images"
    template = "a photo of a {}, a type of pet."


@DATASET_REGISTRY.register()
class StanfordCars(CoOpDataset, anchor="stanfordcars", folders="cars_train/*.jpg, cars_test/*.jpg"):
    """196 car models (Krause et al., 2013)."""

    dataset_dir = "stanford_cars"  # image paths start with cars_train/ or cars_test/


@DATASET_REGISTRY.register()
class OxfordFlowers(CoOpDataset, anchor="flowers102"):
    """102 kinds of flowers, also called Flowers102 (Nilsback and Zisserman, 2008)."""

    dataset_dir, image_dir = "oxford_flowers", "jpg"
    template = "a photo of a {}, a type of flower."


@DATASET_REGISTRY.register()
class Food101(CoOpDataset, anchor="food101"):
    """101 dishes (Bossard, Guillaumin, Van Gool, ECCV 2014)."""

    dataset_dir, image_dir = "food-101", "images"
    template = "a photo of {}, a type of food."


@DATASET_REGISTRY.register()
class SUN397(CoOpDataset, anchor="sun397"):
    """397 scenes (Xiao et al., CVPR 2010)."""

    dataset_dir, image_dir = "sun397", "SUN397"


@DATASET_REGISTRY.register()
class DescribableTextures(CoOpDataset, anchor="dtd"):
    """47 textures, also called DTD (Cimpoi et al., CVPR 2014)."""

    dataset_dir, image_dir = "dtd", "images"
    template = "{} texture."


@DATASET_REGISTRY.register()
class EuroSAT(CoOpDataset, anchor="eurosat"):
    """Ten kinds of land use in satellite images (Helber et al., 2019)."""

    dataset_dir, image_dir = "eurosat", "2750"
    template = "a centered satellite photo of {}."


@DATASET_REGISTRY.register()
class UCF101(CoOpDataset, anchor="ucf101"):
    """101 actions, the middle frames of videos (Soomro, Zamir, Shah, 2012)."""

    dataset_dir, image_dir = "ucf101", "UCF-101-midframes"
    template = "a photo of a person doing {}."


@DATASET_REGISTRY.register()
class FGVCAircraft(FilesDataset):
    """100 aircraft variants, in the authors' split (Maji et al., 2013)."""

    dataset_dir = "fgvc_aircraft"
    places = ("fgvc_aircraft", "fgvc-aircraft-2013b/data")
    template = "a photo of a {}, a type of aircraft."
    tree = """
        ROOT/fgvc_aircraft/
          variants.txt
          images_variant_train.txt       likewise images_variant_val.txt, images_variant_test.txt
          images/*.jpg
    """
    address = f"{GUIDE}#fgvcaircraft"

    def __init__(self, cfg: CfgNode) -> None:
        files = [f"images_variant_{split}.txt" for split in ("train", "val", "test")]
        folder = self.folder(cfg, "images", "variants.txt", *files)
        note_few_shot(cfg, folder)
        label_of = {name: label for label, (_, name) in enumerate(read_lines(folder / "variants.txt"))}
        splits: Splits = ([], [], [])
        for file, data in zip(files, splits, strict=True):
            for line, text in read_lines(folder / file):
                image, *rest = text.split(maxsplit=1)
                variant = "".join(rest)
                where = f"{folder / file}, line {line}"
                if variant not in label_of:
                    raise UserError(f"{where}: no variant {variant!r} in variants.txt: {nearest(variant, label_of)}")
                path = folder / "images" / f"{image}.jpg"
                data.append(named(where, "restore it", path, label_of[variant], 0, variant))
        super().__init__(cfg, *splits)
