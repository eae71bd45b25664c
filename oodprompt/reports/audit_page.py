"""``audit.html``: an audit as a page to look at, drawn from the content of ``audit.json``.

The page is one file. It holds its style and its images, and its policy forbids every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.reports.pages import inline, template
from oodprompt.reports.pictures import SIDES, Pictures, is_small
from oodprompt.reports.style import count, listing, number, signed, whole_percent

if TYPE_CHECKING:
    from jinja2 import Template

_LARGEST = 2_900_000  # page, in bytes
_SHOWN = 6  # proposals that are shown in full; the others in short


class _Picture(NamedTuple):
    """An image for the page; ``outline`` is the path of its region in hundredths of its sides, "" without a region."""

    address: str
    width: int
    height: int
    small: bool
    name: str
    outline: str


def audit_page(content: dict[str, Any], pictures: Pictures | None) -> str:
    """The page with the largest thumbnails that keep it small enough to send; without ``pictures``, none.

    ``content`` is that of audit.json. An image that cannot be read any more is left out.
    """
    for level in range(len(SIDES)):
        page = _render(content, pictures, level)
        if pictures is None or len(page.encode()) <= _LARGEST:
            break
    return page


def _render(content: dict[str, Any], pictures: Pictures | None, level: int) -> str:
    proposals = content["proposals"]
    page = _template().render(
        content=content,
        strong=[proposal for proposal in proposals if proposal["strong"]],
        shown=proposals[:_SHOWN],
        rest=proposals[_SHOWN:],
        vocabulary=content["vocabulary"],
        picture=lambda row: _picture(row, pictures, level),
        style=inline("discovery.css", "audit.css"),
    )
    return page.lstrip()  # the template's macros leave blank lines behind


@cache
def _template() -> Template:
    """The template. It escapes everything that it is given, except the style, which is marked as markup."""
    return template(
        "audit.html.j2",
        {
            "listing": listing,
            "number": number,
            "percent": whole_percent,
            "quantity": count,
            "quoted": "“{}”".format,
            "signed": signed,
            "small_p": _p,
            "thousands": "{:,}".format,
        },
    )


def _p(value: float) -> str:
    return "below 0.0001" if value < 0.0001 else f"{value:.4f}"


def _picture(row: dict[str, Any], pictures: Pictures | None, level: int) -> _Picture | None:
    """The image of a row; None where there are no pictures, or it cannot be read any more."""
    if pictures is None:
        return None
    try:
        image, address = pictures.image(row["index"]), pictures.data_uri(row["index"], level)
    except UserError as error:
        logger.warning(f"Note: {error}; the page is without it")
        return None
    return _Picture(
        address, image.width, image.height, is_small(image), PurePath(row["image"]).name, _outline(row.get("box"))
    )


def _outline(box: Sequence[float] | None) -> str:
    if not box:
        return ""
    left, top, right, bottom = (f"{100 * side:.4g}" for side in box)
    return f"M{left} {top}H{right}V{bottom}H{left}Z"
