"""The door to a terminal: consoles that print names as they are, and nothing that a terminal would obey but their own styles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from shardembed.config.shown import printable

WIDTH = 100


class CleanConsole(Console):
    """A console without markup, emoji codes and highlighting: what is printed may hold anybody's names."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)  # before widths are counted

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):  # whatever made it: also a Text, which is no str
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)


def console_for(file: IO[str]) -> CleanConsole:
    """A console that never exceeds `WIDTH` columns, and keeps to it where there is no terminal to ask."""
    asked = Console(file=file)
    return CleanConsole(file=file, width=min(WIDTH, asked.width) if asked.is_terminal else WIDTH)
