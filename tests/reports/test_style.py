"""Words, tables and figures that all reports share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from oodprompt.reports.attributes import write_pseudo_attributes
from oodprompt.reports.comparison import comparison_figure, grid_figure
from oodprompt.reports.curves import group_curves
from oodprompt.reports.style import count, listing, number, signed, whole_percent, write_figure


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.041, "4 %"), (0.996, "99.6 %"), (0.9999, "99.9 %"), (0.0001, "0.1 %")],
)
def test_only_all_is_100_per_cent_and_only_none_0(value: float, text: str) -> None:
    assert whole_percent(value) == text


def test_words_for_numbers() -> None:
    assert (number(-0.126), number(None), signed(-0.8), signed(0.004), signed(0.5)) == (
        *("−0.13", "none", "−0.80", "0.00", "+0.50"),
    )
    assert (count(1, "image"), count(2000, "image"), count(2, "class", "classes")) == (
        *("1 image", "2,000 images", "2 classes"),
    )


def test_words_in_a_list() -> None:
    assert listing(["a"]) == "a" and listing(["a", "b", "c"]) == "a, b and c"
    assert listing(["a", "b", "c", "d"], most=2) == "a, b and 2 more"


NAMES = (r"$\bad{$", "$100 for $5")


def figures(monkeypatch: pytest.MonkeyPatch, directory: Path) -> dict[str, Figure]:
    """Every figure that shows a user's names, by what it is of."""
    drawn: dict[str, Figure] = {}

    def keep(figure: Figure, path: Path) -> None:
        drawn[Path(path).name] = figure

    class Data:
        attribute_names, attribute_prompts = NAMES, (["a"], ["b"])

    monkeypatch.setattr("oodprompt.reports.style.write_figure", keep)
    rows = {"train": {"accuracy": 0.5, "groups": [], "counts": [[1, 1]], "confusion": [[0.5, 0.5], [0.5, 0.5]]}}
    write_pseudo_attributes(rows, ["train"], Data(), 0.0, directory)
    history: list[dict[str, Any]] = [{"epoch": 1, "by_group": {NAMES[0]: dict.fromkeys(NAMES, 1.0)}}]
    curves = group_curves(history)
    assert curves is not None
    return drawn | {
        "curves": curves,
        "comparison": comparison_figure([(name, 0.5, 0.25) for name in NAMES], NAMES[0]),
        "grid": grid_figure({name: [(NAMES[1], 50.0, 60.0)] for name in NAMES}),
    }


@pytest.mark.parametrize("which", ["pseudo_attributes.png", "curves", "comparison", "grid"])
def test_dollars_are_no_formula(which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two dollar signs enclose a formula, and what is none would end the run with an error."""
    write_figure(figures(monkeypatch, tmp_path)[which], tmp_path / "figure.png")
