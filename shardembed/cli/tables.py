"""What the commands' tables of text look like: no lines, columns apart by two spaces, names cut so that 80 columns are enough."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from shardembed.config.shown import one_line

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


def folded(text: str) -> str:
    """In lines of at most 80 columns."""
    return textwrap.fill(one_line(text), 80)
