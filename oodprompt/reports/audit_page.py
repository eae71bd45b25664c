"""``audit.html``: an audit as a page to look at, drawn from the content of ``audit.json``.

The page is one file. It holds its style and its images, and its policy forbids every request.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.reports.pages import inline, template
from oodprompt.reports.pictures import LARGEST_PAGE, SIDES, PagePicture, Pictures, page_picture
from oodprompt.reports.style import count, listing, number, whole_percent

if TYPE_CHECKING:
    from jinja2 import Template

_SHOWN = 6  # proposals that are shown in full; the others in short


def audit_page(content: dict[str, Any], pictures: Pictures | None, of_regions: Pictures | None = None) -> str:
    """The page with the largest thumbnails that keep it small enough to send; without ``pictures``, none.

    ``content`` is that of audit.json. ``pictures`` are of the split that accuracy is measured on, and ``of_regions`` of
    the split whose regions were looked at. An image that cannot be read any more is left out.
    """
    for level in range(len(SIDES)):
        page = _render(content, pictures, of_regions, level)
        if pictures is None or len(page.encode()) <= LARGEST_PAGE:
            break
    return page


def _render(content: dict[str, Any], pictures: Pictures | None, of_regions: Pictures | None, level: int) -> str:
    proposals = content["proposals"]
    page = _template().render(
        content=content,
        strong=[proposal for proposal in proposals if proposal["strong"]],
        shown=proposals[:_SHOWN],
        rest=proposals[_SHOWN:],
        vocabulary=content["vocabulary"],
        picture=lambda row: _picture(row, of_regions if "box" in row else pictures, level),
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
            "thousands": "{:,}".format,
        },
    )


def _picture(row: dict[str, Any], pictures: Pictures | None, level: int) -> PagePicture | None:
    """The image of a row; None where there are no pictures, or it cannot be read any more."""
    if pictures is None:
        return None
    try:
        return page_picture(row, pictures, level)
    except UserError as error:
        logger.warning(f"Note: {error}; the page is without it")
        return None
