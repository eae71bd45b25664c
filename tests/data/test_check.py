"""The check of the data: what it finds in images, splits, groups and texts, and what it leaves alone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from oodprompt.backbones import is_too_long
from oodprompt.backbones.tokenizer import OpenAITokenizer
from oodprompt.data.check import Report, check_data
from oodprompt.data.dataset import DatasetBase, Datum
from oodprompt.data.images import PixelRules
from oodprompt.data.transforms import CentreView
from oodprompt.engine.check import check_images, check_run, check_texts
from oodprompt.errors import UserError
from tests.helpers.small_data import MakeCfg

Splits = Sequence[Sequence[Datum]]
Check = Callable[..., Report]


class Given(DatasetBase):
    """Of splits that a test gives."""

    def __init__(self, cfg: object, splits: Splits, names: Sequence[str] = (), **attributes: object) -> None:
        super().__init__(cfg, *splits)
        self.classnames = list(names) or self.classnames
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.fixture
def photo(tmp_path: Path) -> Callable[..., str]:
    """Writes an image of random pixels that depends on its number alone; returns its path."""

    def write(number: int, name: str = "") -> str:
        path = tmp_path / (name or f"{number}.png")
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)).save(path)
        return str(path)

    return write


@pytest.fixture
def check(make_cfg: MakeCfg, photo: Callable[..., str]) -> Check:
    """The report of a data set with two good images of two classes for training and testing, and of those given."""

    def run(
        train: Sequence[Datum] = (),
        test: Sequence[Datum] = (),
        until: float = math.inf,
        size: int = 8,
        **attributes: object,
    ) -> Report:
        def good(first: int) -> list[Datum]:
            return [Datum(photo(first + i), i, classname="ab"[i]) for i in range(2)]

        dataset = Given(make_cfg(), ([*good(9000), *train], [], [*good(9002), *test]), **attributes)
        return check_data(dataset, PixelRules(), CentreView((size, size)), until)

    return run


def texts(report: Report) -> list[str]:
    return [finding.text for finding in report.findings]


def test_data_in_order(check: Check) -> None:
    report = check()
    assert report == Report(4, 4, (), ()) and report.error() is None


def test_constant_pictures(check: Check, tmp_path: Path) -> None:
    for i in range(5):
        Image.new("RGB", (20, 20), (90, i, 0)).save(tmp_path / f"{i}.png")
    report = check(test=[Datum(str(tmp_path / f"{i}.png"), 0, classname="a") for i in range(5)])
    assert texts(report) == ["5 of 9 images (55.6%) show one constant colour"]
    assert report.findings[0].examples == tuple(str(tmp_path / f"{i}.png") for i in range(3))
    assert str(report.findings[0]).endswith(f"colour: {', '.join(report.findings[0].examples)}")


def test_pictures_that_are_nearly_all_black_or_white_but_no_drawings(check: Check, tmp_path: Path) -> None:
    pixels = np.full((224, 224), 255, np.uint8)
    pixels[0, 0] = 0
    Image.fromarray(pixels).save(tmp_path / "white.png")
    Image.fromarray(255 - pixels).save(tmp_path / "black.png")
    drawing = Image.new("1", (224, 224), 1)
    ImageDraw.Draw(drawing).line((20, 20, 200, 120), width=4)
    drawing.save(tmp_path / "drawing.png")
    Image.fromarray(np.where(np.arange(224) < 150, pixels, 255 - pixels)).save(tmp_path / "halves.png")
    names = ("white", "black", "drawing", "halves")
    report = check(test=[Datum(str(tmp_path / f"{name}.png"), 0, classname="a") for name in names], size=224)
    assert texts(report) == ["2 of 8 images (25.0%) are black or white in more than 99% of their pixels"]
    assert report.findings[0].examples == (str(tmp_path / "white.png"), str(tmp_path / "black.png"))


@pytest.mark.parametrize(("scale", "words"), [(0.2, "use less than a quarter of the grey levels"), (0.3, "")])
def test_dark_files_of_more_than_8_bits(check: Check, tmp_path: Path, scale: float, words: str) -> None:
    values = np.random.default_rng(0).random((9, 9)) * scale * 65535
    values[4, 4] = scale * 65535
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "x.png")
    Image.fromarray((values / 257).astype(np.uint8)).save(tmp_path / "night.png")
    report = check(test=[Datum(str(tmp_path / name), 0, classname="a") for name in ("x.png", "night.png")])
    assert [words in text and "1 of 6" in text for text in texts(report)] == [True] * bool(words)


def test_clipped_files_of_more_than_8_bits(make_cfg: MakeCfg, check: Check, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(300, 60000, (9, 9)).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    path = str(tmp_path / "x.png")
    dataset = Given(make_cfg(), ([Datum(path)], [], [Datum(path)]), test_only=True)
    report = check_data(dataset, PixelRules(value_range=(0, 255)), CentreView((8, 8)))
    assert [text.split(" more")[0] for text in texts(report)] == ["1 of 1 images (100.0%) show one constant colour"]
    values[::2] = 0
    Image.fromarray(values).save(tmp_path / "x.png")
    report = check_data(dataset, PixelRules(value_range=(0, 255)), CentreView((9, 9)))
    assert "have more than 8 bits and become black or white in more than 95%" in texts(report)[0]


def test_what_is_black_around_an_image_does_not_count(make_cfg: MakeCfg, tmp_path: Path) -> None:
    path = str(tmp_path / "long.png")
    Image.fromarray(np.random.default_rng(0).integers(1, 255, (2, 400, 3), dtype=np.uint8)).save(path)
    cfg = make_cfg(INPUT__RESIZE="longest")
    assert texts(check_images(cfg, Given(cfg, ([Datum(path)], [], [Datum(path)]), test_only=True), show=False)) == []


def test_only_the_first_frame_is_read(check: Check, tmp_path: Path) -> None:
    frames = [Image.effect_noise((9, 9), 80).convert("RGB") for _ in range(2)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    report = check(test=[Datum(str(tmp_path / "x.gif"), 0, classname="a")])
    assert texts(report) == ["1 of 5 images (20.0%) have several frames, of which the first is read"]


@pytest.mark.parametrize(("same", "found"), [(1, False), (2, True)])
def test_duplicates_across_splits(check: Check, photo: Callable[..., str], same: int, found: bool) -> None:
    """More than 1 % of 101 or 102 test images, by their pixels: the files have other names."""
    train = [Datum(photo(i), 0, classname="a") for i in range(4)]
    test = [Datum(photo(i, f"copy{i}.bmp"), 0, classname="a") for i in range(same)]
    report = check(train, [*test, *(Datum(photo(100 + i), 0, classname="a") for i in range(98))])
    assert texts(report) == [f"{same} of 102 test images (2.0%) are training images too, by their pixels"] * found


def test_a_set_that_only_tests_has_no_training_images(check: Check, photo: Callable[..., str]) -> None:
    images = [Datum(photo(i), 0, classname="a") for i in range(4)]
    assert texts(check(images, images)) and not texts(check(images, images, test_only=True))


def test_one_picture_with_two_labels(check: Check, photo: Callable[..., str]) -> None:
    report = check(
        [
            Datum(photo(1), 0, classname="a"),
            Datum(photo(1, "x.png"), 1, classname="b"),
            Datum(photo(2), 0, classname="a"),
        ]
    )
    assert texts(report) == ["2 of 5 training images (40.0%) have the pixels of another image with another label"]
    same_label = [Datum(photo(1), 0, classname="a"), Datum(photo(1, "x.png"), 0, classname="a")]
    assert not texts(check(same_label))


def test_pictures_that_differ_outside_the_view_are_no_duplicates(check: Check, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 80, 3), np.uint8)
    for i in range(2):
        pixels[0, 0] = i
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    assert not texts(check([Datum(str(tmp_path / f"{i}.png"), i, classname="ab"[i]) for i in range(2)]))


def test_pictures_of_equal_bytes_in_another_shape_are_no_duplicates(check: Check, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), np.uint8)
    for i, shape in enumerate(((12, 9, 3), (9, 12, 3))):
        Image.fromarray(pixels.reshape(shape)).save(tmp_path / f"{i}.png")
    assert not texts(check([Datum(str(tmp_path / f"{i}.png"), i, classname="ab"[i]) for i in range(2)]))


def test_constant_pictures_are_no_duplicates_too(check: Check, tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    black = [Datum(str(tmp_path / f"{i}.png"), i % 2, classname="ab"[i % 2]) for i in range(4)]
    assert texts(check(black[:2], black[2:])) == ["4 of 8 images (50.0%) show one constant colour"]


def test_groups_without_images(check: Check, photo: Callable[..., str]) -> None:
    train = [
        Datum(photo(i), label, classname="ab"[label], attribute=a) for i, (label, a) in enumerate([(0, 0), (1, 0)])
    ]
    test = [Datum(photo(50 + i), i % 2, classname="ab"[i % 2], attribute=i // 2) for i in range(4)]
    report = check(train, test, attribute_names=("land", "water"))
    assert list(map(str, report.findings)) == [
        "2 of 4 groups (class / attribute) have no training images: a / water, b / water"
    ]
    assert not texts(check(train, test, attribute_names=("land", "water"), domains=("land", "water")))
    report = check((), test[:3])  # no training image has a known attribute: that is not the same as no image
    assert list(map(str, report.findings)) == ["1 of 4 groups (class / attribute) have no test images: b / 1"]


def test_unreadable_files_are_named_and_counted(check: Check, tmp_path: Path) -> None:
    for i in range(7):
        (tmp_path / f"bad{i}.png").write_bytes(b"no image")
    error = check([Datum(str(tmp_path / f"bad{i}.png"), 0, classname="a") for i in range(7)]).error()
    assert error is not None
    lines = str(error).splitlines()
    assert [str(tmp_path / f"bad{i}.png") in line for i, line in enumerate(lines[:5])] == [True] * 5
    assert lines[5:] == ["and 2 more, 7 of 11 images"]


def test_where_time_is_up_some_images_are_looked_at(check: Check, photo: Callable[..., str]) -> None:
    images = [Datum(photo(i), 0, classname="a") for i in range(60)]
    report = check(images, until=time.monotonic())
    assert report == Report(64, 0, (), ()) or 0 < report.looked < 64
    assert check(images, until=time.monotonic() + 60).looked == 64


def test_every_image_is_decoded_once_and_in_threads(
    check: Check, photo: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from oodprompt.data import check as module

    read: list[tuple[str, bool]] = []

    def counted(path: str, *args: object) -> object:
        read.append((path, threading.current_thread() is threading.main_thread()))
        return look(path, *args)

    look = module.look
    monkeypatch.setattr(module, "look", counted)
    images = [Datum(photo(1), 0, classname="a")] * 3
    assert check(images, images).images == 5
    assert len(read) == len(set(read)) == 5 and not any(main for _, main in read)


def test_texts_of_too_many_tokens(make_cfg: MakeCfg, photo: Callable[..., str]) -> None:
    captions = ["a dog " * 50, "a dog", "", "two " * 75, "two " * 76]
    train = [Datum(photo(i), i % 2, classname="ab"[i % 2], caption=text) for i, text in enumerate(captions)]
    names = ("dog", "long " * 80)
    dataset = Given(make_cfg(), (train, [], train), names=names, attribute_prompts=[("a photo of water.",)])
    prompts, found = check_texts(dataset, OpenAITokenizer())
    assert prompts.text.startswith("1 of 3 prompts of classes and attribute values have more than 77 tokens")
    assert (
        found.text.startswith("2 of 4 captions of training images have more than 77 tokens")
        and len(found.examples) == 2
    )


def test_a_text_is_over_by_its_tokens() -> None:
    assert not is_too_long("a photo of a dog. " * 12, 77) and is_too_long("a photo of a dog. " * 13, 77)
    assert [is_too_long("two " * n, 77) for n in (75, 76)] == [False, True]
    assert is_too_long("狗" * 70, 77)


def test_the_verdict(make_cfg: MakeCfg, photo: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    cfg, good = make_cfg(INPUT__SIZE=(8, 8)), [Datum(photo(i), 0, classname="a") for i in range(2)]
    assert check_run(cfg, Given(cfg, (good[:1], [], good[1:])), OpenAITokenizer()) == (
        "Config, weights and all 2 images are in order; nothing is trained (--no-train)"
    )
    assert capsys.readouterr().out == ""
    verdict = check_run(cfg, Given(cfg, (good, [], good)), OpenAITokenizer())
    assert verdict.startswith("Config and weights are in order, and all 2 images can be read; the note above tells")
    assert capsys.readouterr().out.startswith(
        "Note: 2 of 2 test images (100.0%) are training images too, by their pixels: "
    )
    check_run(cfg, Given(cfg, (good[:1], [], good[1:])), OpenAITokenizer(), ["Every test image is a cow."])
    assert capsys.readouterr().out == "Note: Every test image is a cow.\n"
    Path(good[0].impath).write_bytes(b"")
    with pytest.raises(UserError, match=f"^cannot read the image {good[0].impath}"):
        check_run(cfg, Given(cfg, (good, [], good)), OpenAITokenizer())
