"""The Python blocks of README.md and of all pages in docs/ run as they stand, and print what the pages say.

On one rank they run in this process; where a page speaks of several ranks they run on two too. `pages.py` has the rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.amount import exhaustive
from tests.docs import pages
from tests.harness import run_ranks

WITH_PYTHON = [page for page in pages.PAGES if any(block.language == "python" for block in pages.blocks_of(pages.read(page)))]
ON_TWO_RANKS = ["README.md", "docs/checkpoints.md", "docs/from-nn-embedding.md", "docs/from-torchrec.md", "docs/speed.md"]
SEEN_ELSEWHERE = {"docs/using-embeddings.md"}  # test_serving.py goes on with what the page leaves behind


def some(found: Iterable[str]) -> list[Any]:
    """The pages, for `parametrize`: README.md, and the rest exhaustive."""
    return [page if page == "README.md" else exhaustive(page) for page in found]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def on_a_rank(rank: int, world_size: int, page: str, folder: str, blocks: int) -> list[str]:
    """The first blocks of a page, each a script of its own, as torchrun would start them in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        python = [block for block in pages.blocks_of(pages.read(page)) if block.language == "python"][:blocks]
        shared: dict[str, object] = {"__name__": "__main__"}
        return [pages.run_code(block, f"{page}:{block.line}", shared) for block in python]
    finally:
        os.chdir(before)


@pytest.mark.parametrize("page", some(page for page in WITH_PYTHON if page not in SEEN_ELSEWHERE))
def test_a_page_runs_and_prints_what_it_says(page: str) -> None:
    said = "".join(pages.run_page(page))
    for wanted in PRINTED.get(page, ()):
        assert re.search(wanted, said, re.MULTILINE), f"{wanted} is not in\n{said}"


PRINTED = {
    "README.md": [
        r"^step 0: loss 0\.[67]\d+\n(step \d+: loss .*\n)*step 80: loss 0\.[0-5]\d+$",
        r"^\{'user': \(2, 64\), 'item': \(2, 64\), 'history': \(5, 64\)\}$",
    ],
    "docs/checkpoints.md": [r"^\['step-0000000005', 'step-0000000010'\]$"],
    "docs/speed.md": [
        "20 step.s. on 1 rank.s.",
        r"send ids \(beside\)",
        "wait for ids",
        "optimizer state",
        "table items",
        r"20 steps\n\Z",
    ],
    "docs/planner.md": [r"^26 tables, at most \d+ % above the best plan$"],
    "docs/symptoms/out-of-memory.md": ["optimizer state +. +48.8 MiB", "process, at most"],
    "docs/symptoms/slow.md": ["5 step.s. on 1 rank.s.", "lookup"],
    "docs/training.md": [r"^\('shoes', 'gloves'\) \[0, 1, 0, 2\]$"],
}


@pytest.mark.parametrize("page", some(ON_TWO_RANKS))
def test_a_page_runs_on_two_ranks(page: str, folder: Path) -> None:
    # What follows the first script of checkpoints.md runs without a job, and what follows in the other reads its plain loss.
    blocks = {"docs/checkpoints.md": 1, "docs/from-nn-embedding.md": 3}.get(page, 2)
    first, second = run_ranks(2, on_a_rank, page, str(folder), blocks)
    if page == "README.md":
        losses = re.findall(r"^step (\d+): loss (\d+\.\d+)$", first[0], re.MULTILINE)
        assert [int(step) for step, _ in losses] == [0, 20, 40, 60, 80]
        assert float(losses[-1][1]) < 0.62 < float(losses[0][1]) < 0.79  # it begins at ln 2: a coin is tossed
        assert not second[0], "one rank prints"
        assert first[1] == second[1] == "{'user': (2, 64), 'item': (2, 64), 'history': (5, 64)}\n"
    elif page == "docs/checkpoints.md":
        assert (first[0], second[0]) == ("['step-0000000005', 'step-0000000010']\n", "")
        alone = pages.run_page(page)
        assert alone[0].startswith("rank 0 goes on at step 10, saved by 2 rank(s)\n")
        assert alone[0].endswith("['step-0000000010', 'step-0000000015', 'step-0000000020']\n")
    elif page == "docs/from-torchrec.md":
        assert first == second == ["torch.Size([3, 16])\n"]
    elif page == "docs/speed.md":
        assert "20 step(s) on 2 rank(s)" in first[0]
        assert not second[0]
    else:
        assert first[1] == second[1] == "the same loss: True\n"  # all ranks draw the same batches there


def test_what_should_be_printed_is_compared() -> None:
    assert pages.matches("a ... c\n", "a b\nb c\n")
    assert not pages.matches("a\n", "a\nb\n")
    text = (
        "```python\nprint(1)\n```\n\n```text\n2\n```\n\nso:\n\n<!-- runs -->\n\n    shardembed doctor   looks\n\n- item\n  more\n"
    )
    python, output, command = pages.blocks_of(text)
    assert (python.prints, python.line, output.language) == ("2\n", 2, "text")
    assert (command.runs, pages.commands_of(command.text)) == (True, ["shardembed doctor"])
