"""CelebA: hair colour of celebrities, confounded with gender (Liu et al., ICCV 2015; Sagawa et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from oodprompt.datasets.file_lists import FilesDataset, Splits, listed
from yacs.config import CfgNode

from oodprompt.config.keys import declare
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.tables import missing, read_header, read_lines, read_rows, whole
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
                label = _PRESENT[whole(values[0])]
                attribute = -1 if missing(values[1]) else _PRESENT[whole(values[1])]
            except (KeyError, ValueError):
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


_PRESENT = {1: 1, -1: 0, 0: 0}


def _read_splits(path: Path) -> Iterator[tuple[str, int]]:
    """(image name, split) of list_eval_partition; only the csv form has a header."""
    if path.suffix == ".csv":
        rows = read_rows(path, ("image_id", "partition"))
    else:
        rows = ((line, text.split()) for line, text in read_lines(path))
    for line, row in rows:
        try:
            name, number = row
            split = whole(number)
        except ValueError:
            split = -1
        if split not in (0, 1, 2):
            raise UserError(
                f"{path}, line {line}: expected an image and its split (0 train, 1 val, 2 test), "
                f"not {' '.join(row)[:80]!r}"
            )
        yield name, split


def _read_attributes(path: Path, wanted: dict[str, str]) -> Iterator[tuple[int, str, str, str]]:
    """(line, image name, values of the two ``wanted`` attributes) of list_attr_celeba."""
    if path.suffix == ".csv":
        image, *names = read_header(path) or [""]
        _check_attributes(path, wanted, names)
        for line, (name, one, other) in read_rows(path, (image, *wanted.values())):
            yield line, name, one, other
        return
    rows = read_lines(path)  # the number of images, then the names of the attributes without one for the image
    _, first = next(rows, (1, ""))
    if not first.isdecimal():
        raise UserError(f"{path}, line 1: expected the number of images, not {first[:80]!r}")
    names = next(rows, (1, ""))[1].split()
    _check_attributes(path, wanted, names)
    places = [0, *(1 + names.index(attribute) for attribute in wanted.values())]
    found = 0
    for line, text in rows:
        row = text.split()
        if len(row) != 1 + len(names):
            raise UserError(f"{path}, line {line} has {len(row)} fields, not {1 + len(names)}; fetch it again")
        found += 1
        name, one, other = (row[i] for i in places)
        yield line, name, one, other
    if found != int(first):
        raise UserError(f"{path} lists {found} images, but line 1 says {first}; fetch it again")


def _check_attributes(path: Path, wanted: dict[str, str], names: Sequence[str]) -> None:
    for key, attribute in wanted.items():
        if attribute not in names:
            raise UserError(f"DATASET.CELEBA.{key}: {path} has no {attribute!r}: {nearest(attribute, names)}")
