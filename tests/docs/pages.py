"""What stands on a page of the documentation: blocks of Python with what they print, and lines of commands.

- A ```python block is run; the blocks of a page run in one session, one after the other. A block that begins with the
  comment `# name.py` is a file of that name: a quotation, where examples/ has it, else a script, which runs alone.
- A ```text block right after a ```python block is what that prints. `...` stands for anything.
- After `<!-- runs -->` the commands of a block are run too, in their place. Others are parsed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardembed.cli import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
FENCED = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?:    .*|[ \t]*)\n)+", re.MULTILINE)
COMMAND = re.compile(r"^(?:\S+/)?(?:torchrun .*-m |python -m )?shardembed (?=[a-z])")


@dataclass(frozen=True)
class Block:
    """Code of a page. prints: what is expected of Python, where the page says it. runs: a command is run and not just parsed."""

    language: str
    text: str
    line: int
    prints: str | None = None
    runs: bool = False

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, or is from."""
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found else None


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, in order. Indented ones have no language."""
    found: list[tuple[int, Block]] = []
    rest = list(text)
    for fence in FENCED.finditer(text):
        after = re.match(r"\n*```text\n(.*?)^```$", text[fence.end() :], re.MULTILINE | re.DOTALL)
        prints = after[1] if after and fence[1] == "python" else None
        found.append((fence.start(), Block(fence[1], fence[2], text.count("\n", 0, fence.start()) + 2, prints)))
        rest[fence.start() : fence.end()] = ["\n" if character == "\n" else "." for character in fence[0]]
    for block in INDENTED.finditer("".join(rest)):
        if not block[0].strip() or re.search(r"^[-*|] .*\n\Z", text[: block.start()], re.MULTILINE):
            continue  # nothing but empty lines, or the second line of an item of a list
        runs = text[: block.start()].rstrip().endswith("<!-- runs -->")
        plain = re.sub(r"^    ", "", block[0], flags=re.MULTILINE)
        found.append((block.start(), Block("", plain, text.count("\n", 0, block.start()) + 1, runs=runs)))
    return [block for _, block in sorted(found, key=lambda each: each[0])]


def commands_of(text: str) -> list[str]:
    """The lines that call shardembed, of a block or after `$ ` in what was seen on a terminal; continued lines as one."""
    lines = [line.removeprefix("$ ") for line in re.sub(r" *\\\n\s*", " ", text).splitlines()]
    # What follows three spaces, or a number sign, is said about the command; and a shell takes `> FILE`.
    return [re.split(r"(?<=\S) {3,}|\s+[#>] ", line)[0] for line in lines if COMMAND.match(line)]


def words_of(command: str) -> list[str]:
    import shlex

    return shlex.split(COMMAND.sub("", command))


def run_page(page: str) -> list[str]:
    """Run a page in the current folder; what each Python block printed, and the commands together with the block before."""
    said: list[str] = []
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(read(page)):
        where = f"{page}:{block.line}"
        if block.language == "python" and block.file and (EXAMPLES / block.file).exists():
            quoted = block.text.partition("\n")[2]
            assert quoted in (EXAMPLES / block.file).read_text(encoding="utf-8"), f"{where}: {block.file} does not have these lines"
        elif block.language == "python":
            printed = run_script(block.text, block.file) if block.file else run_code(block, where, scope)
            assert block.prints is None or matches(block.prints, printed), f"{where} should print\n{block.prints}\nnot\n{printed}"
            said.append(printed)
        elif block.runs:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                for command in commands_of(block.text):
                    assert main(words_of(command)) == 0, f"{where}: {command}\n{output.getvalue()}"
            said.append(output.getvalue())
    return said


def run_code(block: Block, where: str, scope: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile("\n" * (block.line - 1) + block.text, where, "exec"), scope)
    return output.getvalue()


def run_script(text: str, name: str) -> str:
    """What a file of that name prints, run by an interpreter of its own that is part of no job."""
    Path(name).write_text(text, encoding="utf-8")
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    environment = {key: value for key, value in os.environ.items() if key not in ours} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, name], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{name}:\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def matches(expected: str, printed: str) -> bool:
    pattern = ".*?".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None
