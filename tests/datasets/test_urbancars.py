"""UrbanCars as its scripts write it."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.urbancars import KINDS, SPLITS, tree
from tests.helpers.trees.writing import MakeDataset, groups


@pytest.mark.parametrize("place", ["urbancars", "UrbanCars"])
def test_both_attributes(build: MakeDataset, tmp_path: Path, place: str) -> None:
    tree(tmp_path / place)
    data = build("UrbanCars")
    assert data.classnames == ["urban car", "country car"]
    assert data.attribute_names[1:3] == ("urban background, country object", "country background, urban object")
    assert data.attribute_prompts[1][0] == "a photo of an alley with a cow."
    assert data.attribute_prompts[2][0] == "a photo of a field road with a stop sign."
    assert groups(data.train_x) == {(y, 2 * b + o): 1 + 4 * y + 2 * b + o for y, b, o in product(range(2), repeat=3)}
    assert groups(data.val) == groups(data.test) == dict.fromkeys(product(range(2), range(4)), 2)
    assert all(f"/{split}/" in d.impath for split in ("val", "test") for d in getattr(data, split))
    for d in data.train_x:
        scene, thing = data.attribute_names[d.attribute].replace(" background", "").replace(" object", "").split(", ")
        assert f"obj-{d.classname[:-4]}_bg-{scene}_co_occur_obj-{thing}/" in d.impath and d.impath.endswith(".jpg")


@pytest.mark.parametrize(
    ("which", "prompt"), [("background", "a photo of a street."), ("object", "a photo of a traffic light.")]
)
def test_one_attribute(build: MakeDataset, tmp_path: Path, which: str, prompt: str) -> None:
    tree(tmp_path / "urbancars")
    data = build("UrbanCars", URBANCARS__ATTRIBUTE=which)
    assert data.attribute_names == (f"urban {which}", f"country {which}") and prompt in data.attribute_prompts[0]
    mark = {"background": "_bg-{}_", "object": "_co_occur_obj-{}/"}[which]
    assert all(mark.format(KINDS[d.attribute]) in d.impath for d in data.train_x)


def test_errors(build: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="URBANCARS.ATTRIBUTE: unknown 'bg': "):
        build("UrbanCars", URBANCARS__ATTRIBUTE="bg")
    with pytest.raises(UserError, match="^UrbanCars: no bg-0.95.*create_urbancars.sh.$".replace(".*", r"(.|\n)*")):
        build("UrbanCars")
    tree(tmp_path / "urbancars")
    group = tmp_path / "urbancars" / SPLITS["val"] / "obj-country_bg-urban_co_occur_obj-country"
    shutil.rmtree(group)
    with pytest.raises(UserError, match=f"^UrbanCars: no .jpg in {group}; expected"):
        build("UrbanCars")
