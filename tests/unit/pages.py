"""Pages that must be well-formed and stand alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Strict(HTMLParser):
    """Fails where tags do not nest; collects ids, what refers to them, and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.wanted: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> in line {self.getpos()[0]} closes something else"

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                assert (value or "").startswith("#"), f"{tag} fetches {value}"
                self.wanted.add((value or "")[1:])
            self.wanted.update(re.findall(r"url\(#([^)]*)\)", value or ""))
            assert name not in ("src", "srcset", "onclick", "onload"), f"{tag} has {name}"


def stands_alone(text: str) -> None:
    """Fails where a page is malformed, fetches anything, or needs a script."""
    parser = Strict()
    parser.feed(text)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids)), "two pictures share ids"
    assert parser.wanted <= set(parser.ids)
    assert not {"script", "link", "img", "iframe", "object"} & parser.tags
    assert "http" not in re.sub(r"<!doctype[^>]*>", "", text)
    assert "@import" not in text
