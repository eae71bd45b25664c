"""Taking a page apart."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Tree(HTMLParser):
    """Checks that tags are balanced; keeps elements with their attributes, and texts with the tags they are in."""

    void = {"img", "meta", "link"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """What a reader sees, one space where the markup has any white space."""
        shown = "".join(text for tags, text in self.texts if "style" not in tags and "title" not in tags)
        return re.sub(r"\s+", " ", shown)
