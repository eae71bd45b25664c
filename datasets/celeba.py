"""CelebA: hair colour of celebrities, confounded with gender (Liu et al., ICCV 2015; Sagawa et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from oodprompt.datasets.file_lists import FilesDataset, Splits, listed
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.errors import UserError, nearest

declare(
    "DATASET.CELEBA",
    {
        "TARGET": ("Blond_Hair", "The one of CelebA's 40 attributes that is the class."),
        "ATTRIBUTE": ("Male", "The one that is the spurious attribute."),
    },
)


class _Words(NamedTuple):
    """How to speak of one of CelebA's attributes: names and prompts for absent and present, and a class prompt."""

    names: tuple[str, str]
    template: str
    prompts: tuple[tuple[str, ...], tuple[str, ...]]


# Who is not blond counts as dark-haired, as in debias_vl, RoboShot and others. Prompts start from debias_vl's.
_WORDS = {
    "Blond_Hair": _Words(
        ("dark hair", "blond hair"),
        "a photo of a celebrity with {}.",
        (
            ("a photo of a celebrity with dark hair.", "a photo of a person with dark hair."),
            ("a photo of a celebrity with blond hair.", "a photo of a person with blond hair."),
        ),
    ),
    "Male": _Words(
        ("female", "male"),
        "a photo of a {} celebrity.",
        (
            ("a photo of a female.", "a photo of a female celebrity.", "a photo of a woman."),
            ("a photo of a male.", "a photo of a male celebrity.", "a photo of a man."),
        ),
    ),
}


def words_of(attribute: str) -> _Words:
    """Names and prompts of an attribute: those chosen by hand, else made of its name ("Wearing_Hat": "wearing hat")."""
    if attribute in _WORDS:
        return _WORDS[attribute]
    name = attribute.replace("_", " ").lower()
    names = (f"not {name}", name)
    absent, present = ((f"a photo of a celebrity, {n}.",) for n in names)
    return _Words(names, "a photo of a celebrity, {}.", (absent, present))


_CANDIDATES = {
    "list_attr_celeba": [f"{d}list_attr_celeba.{form}" for d in ("", "Anno/") for form in ("txt", "csv")],
    "list_eval_partition": [f"{d}list_eval_partition.{form}" for d in ("", "Eval/") for form in ("txt", "csv")],
    # Kaggle's archive holds the folder within a folder of the same name.
    "img_align_celeba": [
        f"{d}{folder}" for folder in ("img_align_celeba/img_align_celeba", "img_align_celeba") for d in ("", "Img/")
    ],
}


@DATASET_REGISTRY.register()
class CelebA(FilesDataset):
    """Dark or blond hair (class) of female or male celebrities (spurious attribute); other attributes by key.

    Official splits. Both forms of the lists are read, the authors' txt and Kaggle's and WILDS' csv. Source: Liu, Luo,
    Wang, Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015; as a benchmark of spurious correlation: Sagawa
    et al., ICLR 2020. Prompts start from debias_vl (Chuang et al. 2023, discriminative/main.py).
    """

    dataset_dir = "celeba"
    # torchvision and SubpopBench; GroupDRO; WILDS; others
    places = ("celeba", "celebA/data", "celebA", "celebA_v1.0", "CelebA", "CelebA/data")
    tree = """
        ROOT/celeba/
          list_attr_celeba.txt           or .csv; also in Anno/
          list_eval_partition.txt        or .csv; also in Eval/
          img_align_celeba/000001.jpg    also in Img/ or img_align_celeba/img_align_celeba/
          ...
    """
    address = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (aligned and cropped images)"

    def __init__(self, cfg: CfgNode) -> None:
        keys = cfg.DATASET.CELEBA
        if keys.TARGET == keys.ATTRIBUTE:
            raise UserError(f"DATASET.CELEBA: TARGET and ATTRIBUTE are both {keys.TARGET!r}; choose two attributes")
        target, attribute = words_of(keys.TARGET), words_of(keys.ATTRIBUTE)
        self.template = target.template
        self.attribute_names, self.attribute_prompts = attribute.names, attribute.prompts
        super().__init__(cfg, *self._read(*self._files(cfg), keys, target.names))

    def _files(self, cfg: CfgNode) -> tuple[Path, Path, Path]:
        """(attribute list, split list, image folder) in the first place that holds all three."""
        root = self.root(cfg)
        error = self.not_in(root, "list_attr_celeba")
        for folder in (root / place for place in self.places):
            found = {
                name: next((folder / path for path in paths if (folder / path).exists()), None)
                for name, paths in _CANDIDATES.items()
            }
            paths = [path for path in found.values() if path is not None]
            if len(paths) == len(found):
                list_attr, list_split, images = paths
                return list_attr, list_split, images
            if paths:
                lacking = " and no ".join(name for name in found if not found[name])
                error = self.missing(f"no {lacking} in {folder.absolute()}")
        raise error

    def _read(self, list_attr: Path, list_split: Path, images: Path, keys: CfgNode, names: tuple[str, str]) -> Splits:
        split_of = dict(_read_splits(list_split))
        splits: Splits = ([], [], [])
        prefix = f"{images}/"
        for line, name, *values in _read_attributes(list_attr, {"TARGET": keys.TARGET, "ATTRIBUTE": keys.ATTRIBUTE}):
            try:
                label, attribute = (_PRESENT[value] for value in values)
            except KeyError:
                both = f"{keys.TARGET} {values[0]!r} and {keys.ATTRIBUTE} {values[1]!r}"
                raise UserError(f"{list_attr}, line {line}: {both} must be 1 or -1") from None
            if name not in split_of:
                raise UserError(f"{list_attr}, line {line}: {name!r} comes twice or has no split in {list_split}")
            splits[split_of.pop(name)].append(listed(list_attr, line, prefix + name, label, names[label], attribute))
        if split_of:
            raise UserError(
                f"{list_attr} lacks {len(split_of)} images of {list_split}, {next(iter(split_of))!r} is one"
            )
        return splits


_PRESENT = {"1": 1, "-1": 0, "0": 0}
_SPLIT = {"0": 0, "1": 1, "2": 2}


def _read_splits(path: Path) -> Iterator[tuple[str, int]]:
    """(image name, split) of list_eval_partition; only the csv form has a header."""
    for line, row in _table(path):
        if path.suffix == ".csv" and row == ["image_id", "partition"]:
            continue
        if len(row) != 2 or row[1] not in _SPLIT:
            raise UserError(
                f"{path}, line {line}: expected an image and its split (0 train, 1 val, 2 test), "
                f"not {' '.join(row)[:80]!r}"
            )
        yield row[0], _SPLIT[row[1]]


def _read_attributes(path: Path, wanted: dict[str, str]) -> Iterator[tuple[int, str, str, str]]:
    """(line, image name, values of the two ``wanted`` attributes) of list_attr_celeba."""
    rows = _table(path)
    count = None
    if path.suffix == ".txt":  # the number of images, then the names of the attributes without one for the image
        _, first = next(rows, (1, []))
        if len(first) != 1 or not first[0].isdecimal():
            raise UserError(f"{path}, line 1: expected the number of images, not {' '.join(first)[:80]!r}")
        count = int(first[0])
    header = next(rows, (1, []))[1]
    header = header if path.suffix == ".csv" else ["image_id", *header]
    for key, attribute in wanted.items():
        if attribute not in header[1:]:
            raise UserError(f"DATASET.CELEBA.{key}: {path} has no {attribute!r}: {nearest(attribute, header[1:])}")
    one, other = (header.index(attribute) for attribute in wanted.values())
    found = 0
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line} has {len(row)} fields, not {len(header)}; fetch it again")
        found += 1
        yield line, row[0], row[one], row[other]
    if count not in (None, found):
        raise UserError(f"{path} lists {found} images, but line 1 says {count}; fetch it again")


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every line that is not empty; fields are split at commas or, in txt, at blanks."""
    separator = "," if path.suffix == ".csv" else None
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, text.split() if separator is None else text.strip().split(separator)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch it again") from error
