"""Tutorials: Python files in percent format (`# %%`), which are run, and shown as pages with what they printed and drew."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURES = (".png", ".svg")


@dataclass(frozen=True)
class Cell:
    """A piece of a file: text, or code. line: of its first line in the file."""

    code: bool
    text: str
    line: int


@dataclass(frozen=True)
class Output:
    """What a cell printed, and the pictures that it wrote."""

    printed: str
    pictures: tuple[str, ...]


def cells(text: str) -> list[Cell]:
    """What stands between the markers, `# %%` for code and `# %% [markdown]` for text in comments."""
    found: list[Cell] = []
    parts = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    line = parts[0].count("\n") + 1
    for kind, body in zip(parts[1::2], parts[2::2], strict=True):
        code = "[markdown]" not in kind
        said = body.strip("\n") if code else re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()
        if said:
            found.append(Cell(code, said, line + 1))
        line += 1 + body.count("\n")
    return found


def run(path: Path) -> list[Output]:
    """Run the code cells, one after the other, in the current folder; what each printed and drew."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for cell in cells(path.read_text(encoding="utf-8")):
        if not cell.code:
            continue
        before, said = set(os.listdir()), io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("\n" * (cell.line - 1) + cell.text, str(path), "exec"), scope)
        new = sorted(name for name in set(os.listdir()) - before if name.endswith(PICTURES))
        outputs.append(Output(said.getvalue(), tuple(new)))
    return outputs


def page(path: Path, outputs: list[Output], pictures: str) -> str:
    """The file as Markdown. pictures: the folder of what was drawn, as links name it."""
    left = iter(outputs)
    parts = []
    for cell in cells(path.read_text(encoding="utf-8")):
        if not cell.code:
            parts.append(cell.text)
            continue
        output = next(left)
        parts.append(f"```python\n{cell.text}\n```")
        if output.printed.strip():
            parts.append(f"```{{code-block}} text\n:class: output-of-cell\n\n{output.printed.rstrip()}\n```")
        parts += [f"![what the code above drew]({pictures}/{name})" for name in output.pictures]
    parts.append(f"*This page is `docs/tutorials/{path.name}`, run by the build of the site.*")
    return "\n\n".join(parts) + "\n"


def built(path: Path, site: Path) -> str:
    """The page of a tutorial, which is run in a process and a folder of its own."""
    root = site.parent
    kept = site / "_build" / "tutorials" / path.stem
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(root), "MPLBACKEND": "agg", "COLUMNS": "100"}
        command = [sys.executable, "-m", "docs.extension.percent", str(path)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{path} does not run:\n{done.stderr}")
        outputs = [Output(printed, tuple(pictures)) for printed, pictures in json.loads(done.stdout)]
        for name in (name for output in outputs for name in output.pictures):
            (kept / name).write_bytes((Path(folder) / name).read_bytes())
    return page(path, outputs, f"/_build/tutorials/{path.stem}")


if __name__ == "__main__":
    print(json.dumps([[output.printed, output.pictures] for output in run(Path(sys.argv[1]))]))
