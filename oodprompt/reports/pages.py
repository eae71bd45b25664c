"""What the pages that people read share: the template engine and the styles, which become part of the page."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Template


def template(name: str, filters: dict[str, Callable[..., Any]], **functions: Callable[..., Any]) -> Template:
    """The template ``name`` of this room, with ``filters`` and ``functions``.

    It escapes everything that it is given, unless that is marked as markup.
    """
    import jinja2  # here: few runs write a page

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("oodprompt.reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    environment.globals |= functions
    return environment.get_template(name)


def inline(*names: str) -> Markup:
    """Files of this room, one after the other, marked as markup: styles and scripts."""
    return Markup("".join(files("oodprompt.reports").joinpath(name).read_text(encoding="utf-8") for name in names))
