"""What the reports share: whose tables they are about, and how they look on a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from torch import nn

from shardembed.comm.comm import Comm
from shardembed.errors import ConfigError
from shardembed.journey.journey import Journey
from shardembed.journey.waiting import journeys

WIDTH = 120


def journeys_of(model: nn.Module) -> tuple[list[Journey], Comm, torch.device]:
    """The collections of a model, the ranks they share and the device they lie on.

    Raises:
        ConfigError: there is none, or there are several process groups or devices.
    """
    found = journeys(model)
    if not found:
        raise ConfigError("the model has no sharded tables to look at; se.shard(model) or an EmbeddingCollection makes some")
    if len({(id(journey.comm), journey.device) for journey in found}) > 1:
        raise ConfigError("the model's tables lie on several process groups or devices; look at the parts of each by themselves")
    return found, found[0].comm, found[0].device


def rendered(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text; the first column to the left, numbers to the right."""
    from rich.table import Table  # here, so that `import shardembed` does not wait for it

    from shardembed.config.console import CleanConsole

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = io.StringIO()
    CleanConsole(file=out, width=WIDTH).print(table)
    return out.getvalue().rstrip()


def bytes_text(count: float | None) -> str:
    """A number of bytes for people; a dash where nobody knows."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
