"""Upstream's data sets through the command line, by their yaml files, on miniature trees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from oodprompt import cli
from oodprompt.errors import UserError
from tests.helpers.runs import REPOSITORY
from tests.helpers.trees import coop_sets, domains, imagenet
from tests.helpers.trees.writing import arguments, put, write

pytestmark = pytest.mark.usefixtures("undrawn")

LOCATIONS = tuple(f"location_{number}" for number in (38, 43, 46, 100))
# yaml file: the data set's name, what makes its tree, and its groups of testing: (class, domain) -> images
DOMAINS: dict[str, tuple[str, Callable[[Path], Any], dict[tuple[str, str], int]]] = {
    "pacs": ("PACS", domains.pacs_lists, {("dog", "sketch"): 3, ("guitar", "sketch"): 3}),
    "vlcs": (
        "VLCS",
        domains.vlcs_folders,
        {(name, "sun"): 2 for name in ("bird", "car", "chair", "dog", "person")},
    ),
    "office_home": (
        "OfficeHome",
        domains.office_home_folders,
        {("alarm clock", "real world"): 4, ("bed", "real world"): 4},
    ),
    "terra_incognita": (
        "TerraIncognita",
        lambda root: domains.plain(root / "terra_incognita", LOCATIONS, ("bird", "cat")),
        {("bird", "location 46"): 5, ("cat", "location 46"): 5},
    ),
    "domainnet": ("DomainNet", domains.domainnet_lists, {("axe", "sketch"): 1, ("the tower", "sketch"): 1}),
}


def coop(name: str) -> tuple[str, Callable[[Path], Any], int]:
    return name, lambda root: coop_sets.tree(root, name), 2


def variant(name: str, count: int) -> tuple[str, Callable[[Path], Any], int]:
    def make(root: Path) -> None:
        imagenet.names(root / "imagenet")
        imagenet.VARIANTS[name][0](root)

    return name, make, count


# yaml file: the data set's name, what makes its tree, images of testing
WITHOUT_GROUPS = {
    "caltech101": coop("Caltech101"),
    "oxford_pets": coop("OxfordPets"),
    "stanford_cars": coop("StanfordCars"),
    "oxford_flowers": coop("OxfordFlowers"),
    "food101": coop("Food101"),
    "fgvc_aircraft": ("FGVCAircraft", coop_sets.aircraft, 6),
    "sun397": coop("SUN397"),
    "dtd": coop("DescribableTextures"),
    "eurosat": coop("EuroSAT"),
    "ucf101": coop("UCF101"),
    "imagenet": ("ImageNet", imagenet.imagenet, 24),
    "imagenetv2": variant("ImageNetV2", 24),
    "imagenet_sketch": variant("ImageNetSketch", 24),
    "imagenet_a": variant("ImageNetA", 6),
    "imagenet_r": variant("ImageNetR", 4),
}


def run(tmp_path: Path, file: str, make: Callable[[Path], Any], *more: str) -> dict[str, Any]:
    make(tmp_path / "data")
    cli.run([*arguments(tmp_path / "data", tmp_path / "out", file), *more])
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize("file", DOMAINS)
def test_groups_are_class_by_domain(tmp_path: Path, file: str) -> None:
    name, make, expected = DOMAINS[file]
    results = run(tmp_path, file, make)
    assert results["dataset"] == name and results["num_samples"] == sum(expected.values())
    found = {(g["class"], g["attribute"]): (g["num_samples"], g["num_train"]) for g in results["groups"]}
    assert found == {group: (count, 0) for group, count in expected.items()}
    assert results["worst_group_accuracy"] == min(g["accuracy"] for g in results["groups"])


@pytest.mark.parametrize("file", WITHOUT_GROUPS)
def test_runs_without_groups(tmp_path: Path, file: str) -> None:
    name, make, count = WITHOUT_GROUPS[file]
    results = run(tmp_path, file, make)
    assert (results["dataset"], results["num_samples"], results["groups"]) == (name, count, [])
    assert results["worst_group_accuracy"] is None


def test_the_file_of_imagenet_keeps_all_training_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    imagenet.imagenet(tmp_path / "data")
    cli.run(["--no-train", *arguments(tmp_path / "data", tmp_path / "out", "imagenet")])
    assert "ImageNet has no validation images: 0 of 120 training images are set aside" in capsys.readouterr().out


@pytest.mark.parametrize(("trainer", "by"), [("GroupDRO", "true"), ("DebiasedPT", "pseudo")])
def test_methods_take_the_domains(tmp_path: Path, trainer: str, by: str) -> None:
    """As groups by label, of which some have no training image, or by their prompts; batches balance the domains."""
    domains.plain(tmp_path / "data/PACS", domains.PACS, ("dog", "guitar"))
    keys = ["TRAINER.GROUPS", by, "OPTIM.MAX_EPOCH", "2", "DATALOADER.TRAIN_X.SAMPLER", "RandomDomainSampler"]
    flags = arguments(tmp_path / "data", tmp_path / "out", "pacs", *keys, "DATALOADER.TRAIN_X.BATCH_SIZE", "4")
    flags[flags.index("ZeroshotCLIP")] = trainer
    cli.run(["--source-domains", "sketch", "photo", "--target-domains", "Cartoon", *flags])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["trainer"] == trainer and results["groups_by"] == by
    assert {(g["attribute"], g["num_samples"], g["num_train"]) for g in results["groups"]} == {("cartoon", 4, 0)}


def test_errors_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = arguments(tmp_path, tmp_path / "out", "pacs")
    assert cli.main(["--target-domains", "clipart", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: DATASET.TARGET_DOMAINS: PACS has no domain 'clipart': ")
    assert cli.main(arguments(tmp_path, tmp_path / "out", "dtd")) == 2
    assert capsys.readouterr().err.startswith("error: DescribableTextures: no images in ")


def test_every_file_is_run() -> None:
    listed = {**DOMAINS, **WITHOUT_GROUPS}
    for file, (name, *_) in listed.items():
        content = yaml.safe_load((REPOSITORY / f"configs/datasets/{file}.yaml").read_text())
        assert content["DATASET"]["NAME"] == name
    assert len(listed) == 20


def test_helpers_of_files(tmp_path: Path) -> None:
    from oodprompt.data.folders import subfolders
    from oodprompt.data.tables import read_lines

    put(tmp_path / "b", ".hidden/1.jpg", "z/1.jpg", "a/1.jpg", "0.jpg")
    assert [path.name for path in subfolders(tmp_path / "b")] == ["a", "z"]
    assert list(read_lines(write(tmp_path / "c.txt", " a b ", "", "c", encoding="utf-8-sig"))) == [(1, "a b"), (3, "c")]


def test_training_on_test_images_is_refused(tmp_path: Path) -> None:
    imagenet.v2(tmp_path / "data")
    imagenet.names(tmp_path / "data" / "imagenet")
    flags = [
        "--root",
        str(tmp_path / "data"),
        "--trainer",
        "CoOp",
        "--backbone",
        "tiny",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    keys = ["DATASET.NAME", "ImageNetV2", "INPUT.SIZE", "(48, 48)", "INPUT.TRANSFORMS", "('normalize',)"]
    with pytest.raises(UserError, match="ImageNetV2 has no training images, and [A-Za-z]* trains"):
        cli.run([*flags, "--seed", "1", *keys, "DATALOADER.NUM_WORKERS", "0", "OPTIM.MAX_EPOCH", "1"])
