"""docs/compatibility.md: every line names tests that exist, and no argument of torch's is left out."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from torch import nn

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "compatibility.md").read_text()


def lines() -> list[list[str]]:
    """The cells of every line of the tables."""
    rows = [line.strip().strip("|").split("|") for line in PAGE.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows if not set(row[0]) <= {"-"}]


def functions() -> set[str]:
    found = set()
    for path in TESTS.rglob("test_*.py"):
        found |= {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return found


def test_every_named_test_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 30
    assert named - functions() == set()


def test_every_line_is_held_by_a_test() -> None:
    assert len(lines()) > 50
    for row in lines():
        assert len(row) == 3, row
        if row[0] != "torch says":
            assert re.fullmatch(r"(trained|`test_\w+`)(, `test_\w+`)*", row[2]), f"{row[0]} is held by {row[2]!r}"


def test_every_argument_of_torchs_has_a_line() -> None:
    said = " ".join(row[0] for row in lines())
    for kind in (nn.Embedding, nn.EmbeddingBag):
        for method in (kind.__init__, kind.from_pretrained, kind.forward):
            for name in set(inspect.signature(method).parameters) - {"self"}:
                aliases = {"embeddings": "embeddings", "freeze": "freeze=True", "input": "input"}
                assert aliases.get(name, name) in said, f"{kind.__name__}.{method.__name__} has {name}"
