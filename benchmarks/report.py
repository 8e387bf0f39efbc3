"""The page of a benchmark: what its module says, below the date, the command, the machine and the versions."""

from __future__ import annotations

import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import pages
from benchmarks.jobs import Result
from benchmarks.options import Options
from shardembed._version import __version__

WHERE = "Gloo on loopback, one thread a rank"
PACKAGES = ("torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numba", "numpy")
KEPT = (
    "Ours keeps the memory that it frees, which is the default of `se.init`: glibc hands large buffers back, and each step pays "
    "for getting them again. Peers run as they come."
)
PLAIN = "Ours runs with `se.init(keep_memory=False)`, and glibc's way of freeing memory."


def versions() -> dict[str, str]:
    found = {"shardembed": __version__, "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def circumstances(words: list[str]) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    return {"date": str(datetime.date.today()), "command": command(words), "machine": pages.machine(), "versions": versions()}


def command(words: list[str]) -> str:
    return " ".join(["shardembed", *words])


def write(bench: Any, results: list[Result], words: list[str], options: Options, page: Path | None) -> str:
    """The text of the page; written to `page`, if any, with its plots beside it."""
    ranks = " ".join(map(str, options.ranks))
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [f"# {bench.TITLE}, {datetime.date.today()}", ""]
    lines += [f"`{command(words)} --ranks {ranks}`", ""]
    lines += pages.paragraph(
        f"{pages.machine()}; {known}; {getattr(bench, 'WHERE', WHERE)}.", bench.ABOUT, KEPT if options.keep_memory else PLAIN
    )
    lines += bench.page(results, page)
    text = "\n".join(lines).rstrip() + "\n"
    if page:
        page.write_text(text)
    return text
