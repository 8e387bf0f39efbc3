"""What benchmark pages share: the command, the machine and the date at the top, and tables in Markdown."""

from __future__ import annotations

import datetime
import math
import os
import platform
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path


def machine() -> str:
    """The machine that a page's figures are from."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor() or "?")
    return f"{os.cpu_count()} cores ({cpu}), {platform.system()}, Python {platform.python_version()}"


def heading(title: str, module: str, arguments: Sequence[str] | None = None) -> list[str]:
    """The title with its date, the command that makes the page again, and the machine."""
    command = " ".join(["python -m", module, *(sys.argv[1:] if arguments is None else arguments)])
    return [f"# {title}, {datetime.date.today()}", "", f"`{command}` on {machine()}.", ""]


def paragraph(*sentences: str) -> list[str]:
    """Running text in lines, and the empty line after it."""
    return [*textwrap.wrap(" ".join(sentences), 130, break_on_hyphens=False), ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table; all columns but the first hold figures."""
    marks = ["---" if i < 1 else "---:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, marks, *rows)]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
