"""The tables in datasets/README.md, the example in docs/your_data.md, and the yaml files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from oodprompt.config.keys import get_cfg_default, merge_file
from oodprompt.config.registry import DATASET_REGISTRY
from tests.helpers.runs import REPOSITORY
from tests.helpers.trees.writing import MakeDataset, groups, put

FILES = sorted((REPOSITORY / "configs" / "datasets").glob("*.yaml"))
README = (REPOSITORY / "datasets" / "README.md").read_text()


def ours() -> list[str]:
    return [name for name, cls in DATASET_REGISTRY.items() if cls.__module__.startswith("oodprompt.datasets")]


def test_every_data_set_has_a_file_and_a_row() -> None:
    names = {yaml.safe_load(file.read_text())["DATASET"]["NAME"] for file in FILES}
    assert names >= set(ours())
    assert [name for name in ours() if f"`{name}`" not in README] == []
    assert [cls.__name__ for _, cls in DATASET_REGISTRY.items() if not (cls.__doc__ or "").strip()] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_hold_the_data_set_alone(file: Path) -> None:
    merge_file(get_cfg_default(), file)
    assert list(yaml.safe_load(file.read_text())) == ["DATASET"]


def test_addresses_and_keys_of_the_readme() -> None:
    for _, cls in DATASET_REGISTRY.items():
        address = getattr(cls, "address", "").split(" ")[0]
        assert address in README, cls
    assert [
        name
        for name in re.findall(r"configs/datasets/\w+\.yaml|docs/[\w.]+", README)
        if not (REPOSITORY / name).exists()
    ] == []


def test_the_example_of_your_data(build: MakeDataset, tmp_path: Path) -> None:
    """The csv file shown there is read as the text beside it says."""
    page = (REPOSITORY / "docs" / "your_data.md").read_text()
    text = re.search(r"```csv\n(.*?)```", page, re.S)[1]
    put(tmp_path, *re.findall(r"photos/\S+?\.jpg", text))
    (tmp_path / "metadata.csv").write_text(text)
    data = build("CSV")
    assert data.classnames == ["cow", "horse"] and data.attribute_names == ("beach", "meadow")
    assert groups(data.test) == {(0, 0): 1, (1, 1): 1} and data.has_attributes
    assert any(d.attribute == -1 for d in data.train_x)
