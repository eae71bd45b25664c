"""The figure of a discovery."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oodprompt.reports.discovery_figure import discovery_figure
from oodprompt.reports.pictures import Pictures
from tests.helpers.made_up_discovery import load, written


def figure_texts(content: dict[str, Any]) -> tuple[Any, str]:
    figure = discovery_figure(content, Pictures(load, [""] * 30).image)
    texts = [t.get_text() for t in figure.texts]
    for axes in figure.axes:
        texts += [t.get_text() for t in [*axes.texts, *axes.get_yticklabels()]]
    return figure, "\n".join(texts)


def test_figure_shows_regions_and_bars(tmp_path: Path) -> None:
    content, _ = written(tmp_path)
    figure, text = figure_texts(content)
    pictures, bars = [a for a in figure.axes if a.images], [a for a in figure.axes if not a.images]
    assert len(pictures) == 8 and len(bars) == 1
    assert "cluster 1 · G 1.47 · H 0.75 · helps “nine” · hurts “one”" in text
    assert [bar.get_width() for bar in bars[0].patches] == pytest.approx([100, 80, 0, 100 / 6, 80, 100])
    assert [t.get_text() for t in bars[0].texts] == [
        *("100 % of 4", "80 % of 5", "0 % of 6"),
        *("17 % of 6", "80 % of 5", "100 % of 4"),
    ]
    places = [axes.get_position() for axes in figure.axes]
    assert all(0 < p.x0 < p.x1 < 1 and 0 < p.y0 < p.y1 < 1 for p in places)
    assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
    assert "nine  +0.67" in text and "1 of 3 clusters survives" in text
    row = content["clusters"][0]["regions"][0]
    shown, pixels = pictures[0].images[0].get_array(), np.asarray(load(row["index"])) / 255
    assert np.allclose(shown[:12, 8:], pixels[:12, 8:]) and np.allclose(shown[:, :8], pixels[:, :8] / 2)
    assert np.allclose(shown[12:], pixels[12:] / 2)
    assert pictures[0].patches[0].get_bbox().extents.tolist() == [0.5, 0, 1, 0.75]
    assert f"{row['true']}\nsaid {row['predicted']} ✗" in text or f"{row['true']} ✓" in text


def test_figure_when_nothing_survives(tmp_path: Path) -> None:
    content, _ = written(tmp_path, survive=False)
    _, text = figure_texts(content)
    assert "None of the 3 clusters survives the filters" in text and "dropped: too few" in text


def test_dollars_are_no_formula_in_the_figure(tmp_path: Path) -> None:
    content, _ = written(tmp_path, classnames=["$a$", "$b_c$", "$d"], title="$e^$")
    assert r"\$d" in figure_texts(content)[1]
