"""What is written at the end of a run."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from oodprompt.reports import comparison, curves, style
from oodprompt.reports.results import groups_figure, write_results


def results(groups: bool = True, **changes: Any) -> dict[str, Any]:
    """Results of a made-up run; without ``groups`` those of a data set without attributes."""
    names = [(y, a) for y in ("circle", "diamond") for a in ("water", "land")]
    return {
        "trainer": "CoOpOOD",
        "base": "CoOp",
        "stack": ["DebiasedPT"],
        "dataset": "ShapesOnScenes",
        "backbone": "tiny",
        "seed": 1,
        "split": "test",
        "num_samples": 2000,
        "accuracy": 0.8125,
        "macro_f1": 0.75,
        "worst_group_accuracy": 0.5 if groups else None,
        "adjusted_average_accuracy": 0.9 if groups else None,
        "gap": 0.3125 if groups else None,
        "groups": [
            {"class": y, "attribute": a, "num_samples": 500, "num_train": 1900, "accuracy": 0.5 + i / 10}
            for i, (y, a) in enumerate(names if groups else [])
        ],
        "classes": [{"class": y, "num_samples": 1000, "accuracy": 0.8} for y in ("circle", "diamond")],
        "checkpoint": "out/prompt_learner/model.pth.tar-50",
    } | changes


def picture(path: Path) -> Image.Image:
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.format == "PNG"
    image.load()
    return image.convert("RGB")


def cells(markdown: str) -> list[list[str]]:
    """The cells of all table rows."""
    return [re.split(r"\s*\|\s*", line.strip("| ")) for line in markdown.splitlines() if line.startswith("|")]


def test_results_are_written_as_json_tables_and_picture(tmp_path: Path) -> None:
    files = write_results(results(), tmp_path / "out")
    assert [file.name for file in files] == ["results.json", "results.md", "groups.png"]
    assert json.loads(files[0].read_text()) == results()
    text = files[1].read_text()
    assert text.startswith("# CoOpOOD + DebiasedPT over CoOp\n")
    for row in (
        ["data set", "ShapesOnScenes (test, 2,000 images)"],
        ["accuracy", "81.2 %"],
        ["worst-group accuracy", "50.0 %"],
        ["gap", "31.2 %"],
        ["adjusted average accuracy", "90.0 %"],
        ["macro F1", "75.0 %"],
        ["circle", "land", "1,900", "500", "60.0 %"],
        ["diamond", "1,000", "80.0 %"],
    ):
        assert row in cells(text)
    assert picture(files[2]).size[0] > 400


def test_without_attributes_there_are_classes(tmp_path: Path) -> None:
    files = write_results(results(groups=False, base="CoOp", trainer="CoOp", stack=[], checkpoint=""), tmp_path)
    text = files[1].read_text()
    assert json.loads(files[0].read_text())["worst_group_accuracy"] is None
    assert text.startswith("# CoOp\n")
    assert "## Groups" not in text
    assert ["worst-group accuracy", "-"] in cells(text)
    assert ["checkpoint", "none"] in cells(text)
    picture(files[2])


def test_images_without_an_attribute_are_counted(tmp_path: Path) -> None:
    words = "3 of 2,000 images are without an attribute"
    write_results(results(num_without_attribute=3), tmp_path)
    assert f"## Groups\n\n{words} and in no group.\n\n| class" in (tmp_path / "results.md").read_text()
    assert words in groups_figure(results(num_without_attribute=3)).axes[0].get_title()
    write_results(results(num_without_attribute=0), tmp_path)
    write_results(results(groups=False, num_without_attribute=2000), tmp_path / "none")
    for folder in (tmp_path, tmp_path / "none"):
        assert "without an attribute" not in (folder / "results.md").read_text()


def test_what_to_mind_stands_before_the_numbers(tmp_path: Path) -> None:
    write_results(results(notes=["1 image is bad.", "So is another."]), tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "\n\n## What to mind\n\n- 1 image is bad.\n- So is another.\n\n## Groups\n" in text
    write_results(results(notes=[]), tmp_path)
    assert "mind" not in (tmp_path / "results.md").read_text()


def test_other_predictions_are_a_table(tmp_path: Path) -> None:
    other = {"prompt alone": {"accuracy": 0.7, "worst_group_accuracy": None, "gap": None}}
    write_results(results(other_predictions=other), tmp_path)
    assert ["prompt alone", "70.0 %", "-"] in cells((tmp_path / "results.md").read_text())


def test_of_many_classes_the_worst_are_drawn() -> None:
    classes = [{"class": f"c{i}", "num_samples": 1, "accuracy": i / 200} for i in range(200)]
    axes = groups_figure(results(groups=False, classes=classes)).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"c{i}" for i in range(60)]
    assert "60 worst of 200" in axes.get_title()


def test_any_class_name_can_be_drawn(tmp_path: Path) -> None:
    classes = [{"class": name, "num_samples": 1, "accuracy": 0.0} for name in (r"$\bad{$", "$100 for $5", "a_b")]
    write_results(results(groups=False, classes=classes), tmp_path)
    picture(tmp_path / "groups.png")


def test_the_worst_group_is_red() -> None:
    figure = groups_figure(results())
    colours = [bar.get_facecolor()[:3] for bar in figure.axes[0].patches]
    assert colours[0] == pytest.approx((0.8, 0.2, 0.2))
    assert len(set(colours[1:])) == 1
    assert colours[1] != colours[0]


@pytest.mark.parametrize("epochs", [1, 3, 80])
@pytest.mark.parametrize("validation", [True, False])
def test_training_curves(tmp_path: Path, epochs: int, validation: bool) -> None:
    history = [{"epoch": e + 1, "loss": 1 / (e + 1), "lr": 0.1, "acc": 50.0} for e in range(epochs)]
    if validation:
        history[-1] |= {"val_accuracy": 0.5, "val_worst_group_accuracy": None}
    assert curves.write_training_curves(history, tmp_path) == [tmp_path / "training.png"]
    picture(tmp_path / "training.png")


def test_comparison(tmp_path: Path) -> None:
    figure = comparison.comparison_figure([("CoOp", 0.8, 0.4), ("CoOpOOD", 0.9, 0.7)], "ShapesOnScenes")
    style.write_figure(figure, tmp_path / "c.png")
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([80, 90, 40, 70])
    picture(tmp_path / "c.png")
