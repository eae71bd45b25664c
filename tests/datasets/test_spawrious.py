"""Spawrious, all six settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from oodprompt.datasets import spawrious
from oodprompt.datasets.spawrious import parts_of

from oodprompt.errors import UserError
from tests.helpers.trees.writing import MakeDataset, put

BREEDS = ("bulldog", "corgi", "dachshund", "labrador")
PLACES = ("desert", "jungle", "dirt", "mountain", "snow", "beach")
# As in the paper's tables: breed -> places in training, in testing
O2O = {
    "o2o_easy": ({"bulldog": "desert", "dachshund": "jungle", "labrador": "dirt", "corgi": "snow"},
                 {"bulldog": "dirt", "dachshund": "snow", "labrador": "desert", "corgi": "jungle"}, "beach"),
    "o2o_medium": ({"bulldog": "mountain", "dachshund": "beach", "labrador": "dirt", "corgi": "jungle"},
                   {"bulldog": "jungle", "dachshund": "dirt", "labrador": "beach", "corgi": "snow"}, "desert"),
    "o2o_hard": ({"bulldog": "jungle", "dachshund": "mountain", "labrador": "snow", "corgi": "desert"},
                 {"bulldog": "mountain", "dachshund": "snow", "labrador": "desert", "corgi": "jungle"}, "beach"),
}  # fmt: skip
M2M = {  # (places of bulldog and dachshund, of labrador and corgi) in training, in testing
    "m2m_easy": (({"desert", "mountain"}, {"dirt", "jungle"}), ({"dirt", "jungle"}, {"mountain", "desert"})),
    "m2m_medium": (({"beach", "snow"}, {"mountain", "desert"}), ({"desert", "mountain"}, {"beach", "snow"})),
    "m2m_hard": (({"dirt", "jungle"}, {"snow", "beach"}), ({"snow", "beach"}, {"dirt", "jungle"})),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spawrious")
    for number in (0, 1):
        for place in PLACES:
            for breed in BREEDS:
                put(root / "spawrious224" / str(number) / place / breed, *(f"{i:02d}.png" for i in range(12)))
    return root


@pytest.mark.parametrize("setting", [*O2O, *M2M])
def test_settings(build: MakeDataset, root: Path, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawrious, "_IN_FOLDER", 10)
    data = build("Spawrious", ROOT=str(root), SPAWRIOUS__SETTING=setting, VAL_PERCENT=0.0)
    expected_train, expected_test = set(), set()

    def add(where: set, folder: int, place: str, breed: str, count: int) -> None:
        where.update(str(root / "spawrious224" / str(folder) / place / breed / f"{i:02d}.png") for i in range(count))

    if setting in O2O:
        own, other, shared = O2O[setting]
        for breed in BREEDS:
            for folder, count in ((0, 9), (1, 8)):  # 97 % and 87 % of 10
                add(expected_train, folder, own[breed], breed, count)
                add(expected_train, folder, shared, breed, 10 - count)
                add(expected_test, folder, other[breed], breed, 12)
    else:
        for pairs, where, count in zip(M2M[setting], (expected_train, expected_test), (10, 12), strict=True):
            for places, breeds in zip(pairs, (("bulldog", "dachshund"), ("labrador", "corgi")), strict=True):
                for place in places:
                    for breed in breeds:
                        add(where, 0, place, breed, count)
    assert {d.impath for d in data.train_x} == expected_train and len(data.train_x) == len(expected_train)
    assert {d.impath for d in data.test} == expected_test and len(data.test) == len(expected_test)
    for datum in (*data.train_x, *data.test):
        place, breed = Path(datum.impath).parts[-3:-1]
        assert (data.classnames[datum.label], data.attribute_names[datum.attribute]) == (breed, place)
    assert data.classnames == list(BREEDS) and data.attribute_names == PLACES
    for name, prompts in zip(data.attribute_names, data.attribute_prompts, strict=True):
        assert name in prompts[0]


@pytest.mark.parametrize("setting", [*O2O, *M2M])
def test_official_sizes(setting: str) -> None:
    train, _ = parts_of(setting)
    assert sum(count for *_, count in train) == 25344
    if setting in O2O:
        assert sorted({count for *_, count in train}) == [96, 412, 2756, 3072]


def test_validation_and_second_place(build: MakeDataset, root: Path, tmp_path: Path) -> None:
    (tmp_path / "spawrious").symlink_to(root)
    data = build("Spawrious", SPAWRIOUS__SETTING="m2m_hard")
    assert len(data.val) == 8 and len(data.train_x) == 8 * 12 - 8


def test_errors(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SPAWRIOUS.SETTING: unknown setting 'o2o': .*known: m2m_easy"):
        build("Spawrious", SPAWRIOUS__SETTING="o2o")
    with pytest.raises(
        UserError, match="^Spawrious: no 0 in .*github.com/aengusl/spawrious$".replace(".*", r"(.|\n)*")
    ):
        build("Spawrious")
    (tmp_path / "spawrious224/0").mkdir(parents=True)
    with pytest.raises(UserError, match=f"^Spawrious: no image in {tmp_path}/spawrious224/0/jungle/bulldog; expected"):
        build("Spawrious")
