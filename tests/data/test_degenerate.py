"""Problems whose numbers mean less than they seem to are refused, or said in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from oodprompt.data.dataset import told_apart
from oodprompt.data.datum import Datum
from oodprompt.data.degenerate import notes_on
from oodprompt.errors import UserError

# What is in a split: (class, attribute) of its images; cows and horses on a beach or a meadow.
SOUND = [(0, 0), (0, 1), (1, 0), (1, 1)]
FREE = [(0, -1), (1, -1)]


class Cattle(SimpleNamespace):
    """A data set of ``train``, ``val`` and ``test``, each image with its own path unless it is given."""

    classnames, attribute_names, test_only = ("cow", "horse"), ("beach", "meadow"), False

    def __init__(self, train: list[tuple], test: list[tuple], val: list[tuple] = (), **more: object) -> None:
        super().__init__(**more)
        self.num_classes = len(self.classnames)
        self.train_x, self.val, self.test = (
            [Datum.unchecked((*path, f"/data/{part}{i}.png")[0], y, 0, "", a, "") for i, (y, a, *path) in enumerate(split)]
            for part, split in (("train", train), ("val", val), ("test", test))
        )  # fmt: skip


def test_a_sound_problem_has_no_notes() -> None:
    assert notes_on(Cattle(SOUND, SOUND, SOUND)) == []
    assert notes_on(Cattle(FREE, FREE)) == []


def test_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="^Cattle has one class only .'cow'., so that every answer is right; give two"):
        notes_on(Cattle([(0, 0)], [(0, 1)], classnames=("cow",)))


@pytest.mark.parametrize(
    "path", ["/data/train0.png", "/data/more/../train0.png", "/data/./train0.png", "/data//train0.png"]
)
def test_test_images_that_are_training_images(path: str) -> None:
    [note] = notes_on(Cattle(FREE, [(0, -1, path), (1, -1), (0, -1), (1, -1)]))
    assert (
        note == "1 of the 4 test images (25.0%) are training images too: accuracy on them says nothing of new images."
    )
    with pytest.raises(
        UserError, match="^every test image is a training image too .all 2., so that the test says nothing"
    ):
        notes_on(Cattle(FREE, [(0, -1, path), (1, -1, "/data/train1.png")]))


def test_validation_images_that_are_training_or_test_images() -> None:
    [note] = notes_on(Cattle(FREE, FREE, [(0, -1, "/data/train0.png"), (1, -1, "/data/train1.png")]))
    assert note.startswith("2 of the 2 validation images (100.0%) are training images too: ")
    [note] = notes_on(Cattle(FREE, FREE, [(0, -1, "/data/test0.png"), (1, -1)]))
    assert note.startswith("1 of the 2 test images (50.0%) are validation images too: an epoch that is chosen")


def test_images_that_stand_in_for_training_images_are_no_news() -> None:
    assert notes_on(Cattle(same := [(0, -1, "/data/0.png"), (1, -1, "/data/1.png")], same, test_only=True)) == []


def test_images_that_are_listed_twice() -> None:
    train = [(0, -1, "/a.png"), (0, -1, "/a.png"), (0, -1, "/b.png"), (1, -1, "/b.png"), (1, -1)]
    [note] = notes_on(Cattle(train, FREE))
    assert note == (
        "2 of the 5 training images are in the list more than once, and count as often. "
        "1 of them have more than one class."
    )
    [note] = notes_on(Cattle(FREE, [*FREE, (0, -1, "/data/test0.png")]))
    assert note == "1 of the 3 test images are in the list more than once, and count as often."


def test_classes_without_test_images() -> None:
    three = {"classnames": ("cow", "horse", "goat")}
    train = [(0, -1), (1, -1), (2, -1)]
    [note] = notes_on(Cattle(train, FREE, **three))
    assert note == "1 of the 3 classes (goat) has no test image: the results say nothing of it."
    [note] = notes_on(Cattle(train, [(1, -1), (1, -1)], **three))
    assert note == "Every test image is of the class horse: who always answers horse is right on all of them."


ALIGNED, CROSSED = [(0, 0), (1, 1)], [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (ALIGNED, ALIGNED, ["The attribute is the class in training and testing: every class has one value (cow / beach, horse / meadow). The worst group is the worst class"]),
        (SOUND, ALIGNED, ["The attribute is the class in the test split: every class has one value (cow / beach, horse / meadow). The worst group"]),
        (ALIGNED, CROSSED, ["The attribute is the class in the test split", "The attribute is the class in training: every class has one value (cow / beach, horse / meadow). No training image is against", "No test group has a training image"]),
        (ALIGNED, SOUND, ["The attribute is the class in training", "2 of the 4 test groups (cow / meadow, horse / beach) have no training image: the adjusted average leaves"]),
        (SOUND[:3], SOUND, ["1 of the 4 test groups (horse / meadow) has no training image: the adjusted average leaves it out."]),
        (SOUND, SOUND[1:], ["1 of the 4 training groups (cow / beach) has no test image: the worst group is that of the others."]),
        (SOUND, [(0, 1), (1, 1)], ["Every test image has the attribute meadow. The worst group is the worst class"]),
        ([(0, 0), (1, 0)], SOUND, ["2 of the 4 test groups"]),
        (FREE, SOUND, ["The attribute is not known of 2 of the 2 training images", "No test group has a training image: the adjusted average accuracy is the plain one."]),
        (SOUND, [*SOUND, (0, -1)], ["The attribute is not known of 1 of the 5 test images: they are in no group."]),
        (SOUND, FREE, ["The attribute is not known of 2 of the 2 test images: they are in no group."]),
        ([], SOUND, []),
    ],
)  # fmt: skip
def test_attributes_that_tell_nothing_apart(train: list[tuple], test: list[tuple], words: list[str]) -> None:
    notes = notes_on(Cattle(train, test))
    assert len(notes) == len(words)
    assert all(note.startswith(start) for note, start in zip(notes, words, strict=True))


def test_unknown_attributes_are_counted_in_every_split() -> None:
    [note] = notes_on(Cattle([*SOUND, (0, -1)], SOUND, FREE))
    assert note.startswith(
        "The attribute is not known of 1 of the 5 training images and of 2 of the 2 validation images:"
    )


def test_classes_of_one_name() -> None:
    train = [(0, -1), (1, -1), (2, -1)]
    missing, note = notes_on(Cattle(train, FREE, classnames=("cow", "horse", "cow")))
    assert missing.startswith("1 of the 3 classes (cow (class 2)) has no test image")
    assert note.startswith("Several classes have the name cow: prompts that differ by the name alone cannot tell")
    note = notes_on(Cattle(FREE, FREE, classnames=("red fox", "Red_fox")))[-1]
    assert note.startswith("Several classes have the name red fox, Red_fox: ")


def test_long_lists_are_cut() -> None:
    names = [f"c{i}" for i in range(9)]
    [note] = notes_on(Cattle([(i, -1) for i in range(9)], [(7, -1), (8, -1)], classnames=names))
    assert note.startswith("7 of the 9 classes (c0, c1, c2, c3 and 3 more) have no test image")


def test_classes_of_one_name_are_told_apart_by_their_numbers() -> None:
    assert told_apart(["crane", "heron", "crane"]) == ["crane (class 0)", "heron", "crane (class 2)"]
    assert told_apart(["cow", "horse"]) == ["cow", "horse"]
