"""Domain generalisation: the layouts of Dassl and DomainBed, which domains train and test, and their numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from oodprompt.errors import UserError
from tests.helpers.trees.domains import PACS, domainnet_lists, office_home_folders, pacs_lists, plain, vlcs_folders
from tests.helpers.trees.writing import MakeDataset, groups, paths, put, write


def test_lists_of_pacs(build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pacs_lists(tmp_path)
    data = build("PACS", SOURCE_DOMAINS=("photo", "art_painting"), TARGET_DOMAINS=("sketch",))
    assert groups(data.train_x) == {(label, domain): 2 for label in (0, 1) for domain in (0, 2)}
    assert groups(data.val) == {(label, domain): 1 for label in (0, 1) for domain in (0, 2)}
    assert groups(data.test) == {(0, 3): 3, (1, 3): 3}
    assert paths(data.val, tmp_path / "pacs/images") == [f"{d}/{c}/3.jpg" for d in (PACS[0], PACS[2]) for c in ("dog", "guitar")]  # fmt: skip
    assert {d.domain for d in data.train_x} == {0, 2} and {d.domain for d in data.test} == {3}
    assert data.classnames == ["dog", "guitar"] and data.has_attributes
    assert data.attribute_names == ("art painting", "cartoon", "photo", "sketch") and len(data.attribute_prompts) == 4
    assert capsys.readouterr().out == "PACS: training on art_painting, photo; testing on sketch\n"


def test_vlcs_in_split_folders(build: MakeDataset, tmp_path: Path) -> None:
    vlcs_folders(tmp_path)
    data = build("VLCS", TARGET_DOMAINS=("labelme",))
    assert groups(data.train_x) == {(label, domain): 3 for label in range(5) for domain in (0, 2, 3)}
    assert groups(data.val) == {(label, domain): 1 for label in range(5) for domain in (0, 2, 3)}
    assert groups(data.test) == {(label, 1): 2 for label in range(5)}
    assert data.classnames == ["bird", "car", "chair", "dog", "person"]
    assert all(f"/{d.label}/" in d.impath and "/full/" not in d.impath for d in data.train_x)


def test_vlcs_in_plain_folders(build: MakeDataset, tmp_path: Path) -> None:
    plain(tmp_path / "VLCS", ("Caltech101", "LabelMe", "VOC2007", "SUN09"), ("bird", "car"))
    data = build("VLCS", VAL_PERCENT=0.0, SOURCE_DOMAINS=("VOC2007", "caltech"))
    assert groups(data.train_x) == {(0, 0): 3, (1, 0): 3, (0, 2): 5, (1, 2): 5} and data.val == []
    assert groups(data.test) == {(0, 1): 4, (1, 1): 4, (0, 3): 6, (1, 3): 6}


def test_office_home_in_split_folders(build: MakeDataset, tmp_path: Path) -> None:
    office_home_folders(tmp_path)
    data = build("OfficeHome")
    assert groups(data.train_x) == {(label, domain): 2 for label in (0, 1) for domain in (0, 1, 2)} == groups(data.val)
    assert groups(data.test) == {(0, 3): 4, (1, 3): 4}
    assert all("/train/" in d.impath for d in data.train_x) and all("/val/" in d.impath for d in data.val)
    assert data.classnames == ["alarm clock", "bed"]


@pytest.mark.parametrize("place", ["office_home", "OfficeHomeDataset_10072016"])
def test_plain_folders_set_validation_aside(build: MakeDataset, tmp_path: Path, place: str) -> None:
    plain(tmp_path / place, ("Art", "Clipart", "Product", "Real World"), ("Bed", "TV"), count=9)
    data = build("OfficeHome", SOURCE_DOMAINS=("art", "clipart"), TARGET_DOMAINS=("Real World",))
    assert Counter(d.label for d in data.val) == {0: 2, 1: 2} and len(data.train_x) == 2 * 19 - 4
    assert groups(data.train_x + data.val) == {(0, 0): 9, (1, 0): 9, (0, 1): 10, (1, 1): 10}
    assert groups(data.test) == {(0, 3): 12, (1, 3): 12}


def test_split_folders_go_before_plain_ones(build: MakeDataset, tmp_path: Path) -> None:
    plain(tmp_path / "office_home", ("Art", "Clipart", "Product", "Real World"), ("Bed", "TV"))
    office_home_folders(tmp_path)
    assert "alarm clock" in build("OfficeHome").classnames


def test_lists_of_domainnet(build: MakeDataset, tmp_path: Path) -> None:
    domainnet_lists(tmp_path)
    data = build("DomainNet", TARGET_DOMAINS=("clipart", "paint"))
    assert groups(data.train_x) == {(label, domain): 2 for label in (0, 1) for domain in (1, 3, 4, 5)}
    assert groups(data.val) == {(label, domain): 1 for label in (0, 1) for domain in (1, 3, 4, 5)}
    assert groups(data.test) == {(label, domain): 1 for label in (0, 1) for domain in (0, 2)}
    assert data.classnames == ["axe", "the tower"] and all(d.impath.endswith("/3.jpg") for d in data.val + data.test)


def test_lists_with_backslashes_tabs_and_floats(build: MakeDataset, tmp_path: Path) -> None:
    domainnet_lists(tmp_path)
    expected = [(d.impath, d.label) for d in build("DomainNet").train_x]
    for path in (tmp_path / "domainnet/splits").iterdir():
        path.write_text(path.read_text().replace("/", "\\").replace(" ", "\t").replace("\n", ".0\n"))
    assert [(d.impath, d.label) for d in build("DomainNet").train_x] == expected


def test_classes_are_those_of_all_domains(build: MakeDataset, tmp_path: Path) -> None:
    """A class that the target lacks, and one that a domain out of use has alone."""
    plain(tmp_path / "terra_incognita", ("location_38", "location_100", "location_46"), ("bird", "cat", "empty"))
    plain(tmp_path / "terra_incognita", ("location_43",), ("cat",))
    data = build("TerraIncognita", TARGET_DOMAINS=("L43",))
    assert groups(data.test) == {(1, 2): 3} and data.classnames == ["bird", "cat", "empty"]
    assert {d.domain for d in data.train_x} == {0, 1, 3}
    put(tmp_path / "terra_incognita/location_38/ape", "1.jpg")
    data = build("TerraIncognita", TARGET_DOMAINS=("L43",), SOURCE_DOMAINS=("location_38", "location_46"))
    assert data.classnames == ["ape", "bird", "cat", "empty"] and groups(data.test) == {(2, 2): 3}
    with pytest.raises(UserError, match="^TerraIncognita: class 0 of 0..3 has no training image"):
        build("TerraIncognita", TARGET_DOMAINS=("L43",), SOURCE_DOMAINS=("location_46",))


def test_domains_out_of_use_may_lack(build: MakeDataset, tmp_path: Path) -> None:
    plain(tmp_path / "domain_net", ("real", "sketch"), ("axe",))
    assert len(build("DomainNet", SOURCE_DOMAINS=("real",), TARGET_DOMAINS=("sketch",)).test) == 4
    with pytest.raises(UserError, match="^DomainNet: no folder of clipart, infograph, painting, quickdraw in "):
        build("DomainNet")


@pytest.mark.parametrize(
    ("sources", "targets", "expected"),
    [
        ((), (), ("012", "3")),
        (("sketch",), (), ("3", "012")),
        ((), ("cartoon", "Art Painting"), ("23", "01")),
        (("sketch", "photo", "photo"), ("cartoon",), ("23", "1")),
    ],
)
def test_choice_of_domains(
    build: MakeDataset, tmp_path: Path, sources: tuple[str, ...], targets: tuple[str, ...], expected: tuple[str, str]
) -> None:
    plain(tmp_path / "PACS", PACS, ("dog",))
    data = build("PACS", SOURCE_DOMAINS=sources, TARGET_DOMAINS=targets)
    found = ["".join(map(str, dict.fromkeys(d.domain for d in split))) for split in (data.train_x, data.test)]
    assert tuple(found) == expected


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        (("skech",), (), "^DATASET.SOURCE_DOMAINS: PACS has no domain 'skech': did you mean 'sketch'. known: art_painting, "),
        ((), ("photos",), "^DATASET.TARGET_DOMAINS: PACS has no domain 'photos': did you mean 'photo'"),
        (PACS, (), "^DATASET.SOURCE_DOMAINS names every domain of PACS; leave out"),
        ((), PACS, "^DATASET.TARGET_DOMAINS names every domain of PACS; leave out"),
        (("photo", "cartoon"), ("cartoon",), "^PACS: cartoon is in DATASET.SOURCE_DOMAINS and in DATASET.TARGET_DOMAINS"),
    ],
)  # fmt: skip
def test_impossible_domains(
    build: MakeDataset, sources: tuple[str, ...], targets: tuple[str, ...], message: str
) -> None:  # the names are judged before files are looked for
    with pytest.raises(UserError, match=message):
        build("PACS", SOURCE_DOMAINS=sources, TARGET_DOMAINS=targets)


def test_two_folders_of_a_domain(build: MakeDataset, tmp_path: Path) -> None:
    plain(tmp_path / "VLCS", ("caltech", "labelme", "pascal", "sun", "VOC2007"), ("car",))
    with pytest.raises(UserError, match="VOC2007 and .*/pascal are both the domain pascal; keep one"):
        build("VLCS")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("photo/dog/1.jpg", "expected an image's path and its class's number from 1, not 'photo/dog/1.jpg'"),
        ("photo/dog/1.jpg 0", "expected an image's path"),
        ("photo/dog/1.jpg one", "expected an image's path"),
        ("1.jpg 1", "expected an image's path"),
        ("photo/dog/9.jpg 1", "names .*/pacs/images/photo/dog/9.jpg, which is missing; restore it"),
    ],
)
def test_wrong_lines(build: MakeDataset, tmp_path: Path, text: str, message: str) -> None:
    pacs_lists(tmp_path)
    path = write(tmp_path / "pacs/splits/photo_train_kfold.txt", "photo/dog/1.jpg 1", "", text)
    with pytest.raises(UserError, match=f"^{path}, line 3:? {message}"):
        build("PACS")


def test_a_number_with_two_names(build: MakeDataset, tmp_path: Path) -> None:
    pacs_lists(tmp_path)
    write(tmp_path / "pacs/splits/photo_train_kfold.txt", "photo/dog/1.jpg 1", "photo/guitar/1.jpg 1")
    with pytest.raises(UserError, match="^PACS: class 0 is named 'dog' and 'guitar' .image .*guitar/1.jpg"):
        build("PACS")


def test_missing_files(build: MakeDataset, tmp_path: Path) -> None:
    for name, what in (("PACS", "splits/<domain>_train_kfold.txt"), ("TerraIncognita", "location_38/<class>")):
        with pytest.raises(UserError, match=f"^{name}: no folders of the domains in ") as error:
            build(name)
        assert what in str(error.value) and "get it from https://" in str(error.value)
    pacs_lists(tmp_path)
    (tmp_path / "pacs/splits/photo_crossval_kfold.txt").unlink()
    with pytest.raises(UserError, match="^PACS: no file .*photo_crossval_kfold.txt; expected"):
        build("PACS")
    office_home_folders(tmp_path)
    (tmp_path / "office_home_dg/art/val").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="^OfficeHome: no image in .*/art/val/<class>; expected"):
        build("OfficeHome")


def test_shots_are_drawn_over_all_sources(build: MakeDataset, tmp_path: Path) -> None:
    plain(tmp_path / "PACS", PACS, ("dog", "guitar"), count=30)
    data = build("PACS", NUM_SHOTS=8, SEED=1)
    assert Counter(d.label for d in data.train_x) == {0: 8, 1: 8} and len({d.domain for d in data.train_x}) > 1
    data = build("PACS", SUBSAMPLE_CLASSES="new")
    assert data.classnames == ["guitar"] and {d.domain for d in data.test} == {3} == {d.attribute for d in data.test}


@pytest.mark.parametrize("domain", ["photo", "sketch"])
def test_two_spellings_of_a_class(build: MakeDataset, tmp_path: Path, domain: str) -> None:
    plain(tmp_path / "PACS", PACS, ("big_cat",))
    put(tmp_path / "PACS", f"{domain}/Big cat/1.jpg")
    with pytest.raises(UserError, match=f"{tmp_path}/PACS/{domain}/Big cat.* two spellings of one class"):
        build("PACS")


def test_files_that_are_no_images_are_counted_once(
    build: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain(tmp_path / "PACS", PACS, ("dog", "cat"))
    put(tmp_path / "PACS", "photo/dog/a.txt", "sketch/dog/b.txt", "sketch/cat/Thumbs.db", "cartoon/@eaDir/1.jpg")
    assert build("PACS").classnames == ["cat", "dog"]
    assert "Note: passed over 2 files that are no images: 2 .txt (in PACS)\n" in capsys.readouterr().out
