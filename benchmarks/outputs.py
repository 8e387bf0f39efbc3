"""Writes what commands print into a page of the docs: `python -m benchmarks.outputs docs/planner.md`.

A line `<!-- output: plan X -->` runs `shardembed plan X` in the page's folder and has its output in the block below; one with
`run` only runs. Pictures that come out stay beside the page, all other new files go.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

MARK = re.compile(r"(<!-- (output|run): (.*?) -->\n)(\n```text\n.*?```\n)?", re.DOTALL)
KEPT = (".png", ".svg")


def fill(page: Path) -> None:
    """Run every command of the page, in order, and write it anew."""
    before = set(page.parent.iterdir())
    text = MARK.sub(lambda match: _block(match, page.parent), page.read_text())
    page.write_text(text)
    for path in set(page.parent.iterdir()) - before:
        if path.suffix not in KEPT:
            path.unlink()


def _block(match: re.Match[str], folder: Path) -> str:
    mark, kind, command, _ = match.groups()
    done = subprocess.run(
        [sys.executable, "-m", "shardembed", *shlex.split(command)], cwd=folder, capture_output=True, text=True, check=False
    )
    if kind == "run":
        if done.returncode:
            raise SystemExit(f"shardembed {command}: {done.stderr}")
        return mark
    lines = [line.rstrip() for line in (done.stdout + done.stderr).strip().splitlines()]
    return f"{mark}\n```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fill(Path(name).resolve())
