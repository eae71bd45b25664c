"""``comparison.html``: several runs on one page that loads nothing, drawn from what ``comparison`` gives."""

from __future__ import annotations

import base64
import hashlib
import math
from functools import cache
from typing import TYPE_CHECKING, Any

from oodprompt.reports.comparison_runs import MEASURES
from oodprompt.reports.pages import inline, template
from oodprompt.reports.style import count, listing

if TYPE_CHECKING:
    from jinja2 import Template

COLOURS = 8  # of runs; further ones take them again, with dashed lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 352.0, 10.0, 168.0  # of a chart in its box of 360 by 200 units


def comparison_page(content: dict[str, Any]) -> str:
    """The page of ``comparison``'s content. Its policy allows its own script alone, which sorts the table."""
    script = inline("comparison.js")
    page = _template().render(
        content=content,
        measures=MEASURES,
        charts=[chart(curve) for curve in content["curves"]],
        style=inline("discovery.css", "comparison.css"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return page.lstrip()


def chart(curve: dict[str, Any]) -> dict[str, Any]:
    """A curve in units of its box: ``lines`` with ``points`` for a polyline, marks along both axes.

    Positive values of which the largest is more than 30 times the smallest have a logarithmic axis, unless they are per cent.
    """
    finite = {line["number"]: [point for point in line["points"] if math.isfinite(point[1])] for line in curve["lines"]}
    points = [point for line in finite.values() for point in line]
    epochs, values = [point[0] for point in points] or [0], [point[1] for point in points] or [0.0]
    first, last, low, high = min(epochs), max(epochs), min(values), max(values)
    is_log = not curve["percent"] and low > 0 and high > 30 * low
    if curve["percent"]:
        low, high = math.floor(low / 10) * 10, math.ceil(high / 10) * 10
    high = high if high > low else low + 1
    scale = math.log if is_log else float

    def across(epoch: float) -> float:
        return (_LEFT + _RIGHT) / 2 if last == first else _LEFT + (_RIGHT - _LEFT) * (epoch - first) / (last - first)

    def down(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    lines = [
        {"number": number, "points": " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in some), "last": some[-1][1]}
        for number, some in finite.items()
        if some
    ]
    parts = [i / 4 for i in range(5)]
    marks = [low * (high / low) ** part if is_log else low + (high - low) * part for part in parts]
    return {
        "title": curve["title"] + (", logarithmic" if is_log else ""),
        "lines": lines,
        "single": last == first,
        "levels": [(f"{value:.3g}", f"{down(value):.1f}") for value in marks],
        "epochs": [(epoch, f"{across(epoch):.1f}") for epoch in dict.fromkeys((first, (first + last) // 2, last))],
    }


def _tenths(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


@cache
def _template() -> Template:
    """The template. It escapes everything that it is given, except style and script, which are marked as markup."""
    return template(
        "comparison.html.j2",
        {
            "hue": lambda number: f"r{(number - 1) % COLOURS}" + (" again" if number > COLOURS else ""),
            "listing": listing,
            "minutes": _minutes,
            "quantity": count,
            "tenths": _tenths,
        },
    )
