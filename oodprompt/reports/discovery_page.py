"""``discovery.html``: a discovery as a page to look at, drawn from the content of ``discovery.json``.

The page is one file. It holds its style and its images, and its policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from oodprompt.reports.discovery_text import (
    NEAREST,
    dropped,
    how_it_was_made,
    largest_gaps,
    row_of_class,
    survivors,
    verdict,
)
from oodprompt.reports.pages import inline, template
from oodprompt.reports.pictures import LARGEST_PAGE, SIDES, Pictures, page_picture
from oodprompt.reports.style import count, listing, number, signed, whole_percent

if TYPE_CHECKING:
    from jinja2 import Template

_CARDS = 12  # clusters shown in full
_LISTED = 20  # clusters with pictures among those that did not survive
_CLASSES = 14  # classes in one chart


def discovery_page(content: dict[str, Any], pictures: Pictures) -> str:
    """The page with the largest thumbnails that keep it small enough to send.

    ``content`` is what ``read_discovery`` gives. Raises ``UserError`` when an image cannot be read.
    """
    for level in range(len(SIDES)):
        page = _render(content, pictures, level)
        if len(page.encode()) <= LARGEST_PAGE:
            break
    return page


def _render(content: dict[str, Any], pictures: Pictures, level: int) -> str:
    surviving, others = survivors(content), dropped(content)
    cards, rest = (surviving, others) if surviving else (others[:NEAREST], others[NEAREST:])
    page = _template().render(
        content=content,
        verdict=verdict(content),
        survivors=surviving,
        cards=cards[:_CARDS],
        further_cards=len(cards[_CARDS:]),
        rest=rest,
        listed=_LISTED,
        classes=_CLASSES,
        silhouettes=_silhouettes(content["clustering"]),
        facts=how_it_was_made(content),
        picture=lambda row, strip: page_picture(row, pictures, level, strip),
        style=inline("discovery.css"),
    )
    return page.lstrip()  # the template's macros leave blank lines behind


@cache
def _template() -> Template:
    """The template. It escapes everything that it is given, except the style, which is marked as markup."""
    return template(
        "discovery.html.j2",
        {
            "frequencies": lambda names: listing([f"“{name}” ({times:,})" for name, times in names.items()]),
            "listing": listing,
            "number": number,
            "percent": whole_percent,
            "quantity": count,
            "quoted": "“{}”".format,
            "short": "{:.4g}".format,
            "signed": signed,
            "tenths": "{:.1f}".format,
            "thousands": "{:,}".format,
        },
        largest_gaps=largest_gaps,
        row_of_class=row_of_class,
    )


@dataclass(frozen=True)
class _Silhouettes:
    """The mean silhouette by K as a curve, in a box of 360 by 160 units.

    ``tried`` says which K were tried. ``low`` and ``high`` are the extreme values; ``points`` is the line, "" for a
    single K. ``marks_of_values`` are (value, y) and ``marks_of_k`` (K, x) along the axes. ``chosen`` is (x, y) of the
    chosen K, None where that has no value.
    """

    tried: str
    low: float
    high: float
    points: str = ""
    marks_of_values: Sequence[tuple[float, float]] = ()
    marks_of_k: Sequence[tuple[int, float]] = ()
    chosen: tuple[float, float] | None = None


def _silhouettes(clustering: dict[str, Any]) -> _Silhouettes | None:
    """The curve of a clustering; None where no K has a silhouette."""
    values = {k: value for k, value in clustering["silhouettes"] if value is not None}
    if not values:
        return None
    ks = list(values)
    first, last, low, high = ks[0], ks[-1], min(values.values()), max(values.values())
    tried = f"{len(ks)} values of K from {first} to {last}" if len(ks) >= 5 else listing([str(k) for k in ks])
    if len(ks) == 1:
        return _Silhouettes(tried, low, high)

    def across(k: int) -> float:
        return 46 + 300 * (k - first) / (last - first)

    def down(value: float) -> float:
        return 130 - 105 * (value - low) / ((high - low) or 1.0)

    chosen = clustering["k"]
    return _Silhouettes(
        tried,
        low,
        high,
        " ".join(f"{across(k):.1f},{down(value):.1f}" for k, value in values.items()),
        [(value, down(value) + 4) for value in dict.fromkeys((low, high))],
        [(k, across(k)) for k in (first, last)],
        (across(chosen), down(values[chosen])) if chosen in values else None,
    )
