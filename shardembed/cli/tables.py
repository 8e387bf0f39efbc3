"""What the commands' tables of text look like: no lines, columns apart by two spaces, names cut so that 80 columns are enough."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

VECTORS = "rows as they lie in the table, or what the model compares (default: the latter, where the checkpoint says what it is)"


def plain_table(title: str, columns: Sequence[str], numbers: Collection[str]) -> Table:
    """An empty table; the columns in `numbers` are aligned right."""
    from rich.table import Table

    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "header_style": "dim", "box": None, "pad_edge": False}
    table = Table(title=title or None, padding=(0, 2, 0, 0), **look)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def short(name: str, most: int) -> str:
    """The end of a name, which tells keys apart better than the beginning."""
    name = printable(name)
    return name if len(name) <= most else f"...{name[3 - most :]}"


def shortened(text: str, most: int) -> str:
    """The beginning of a text, which says most where it is no key."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."


def folded(text: str) -> str:
    """In lines of at most 80 columns."""
    return textwrap.fill(printable(text), 80)


def printable(text: str) -> str:
    """Names of files and of tables are anybody's, and a terminal obeys some characters."""
    return "".join(each if each.isprintable() else "?" for each in text)
