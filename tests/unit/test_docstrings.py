"""Dataclasses say what their fields are, one a line: names and types leave shapes, units and what None means to be guessed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "shardembed"
FIELD = re.compile(r"^ {4}(\w+): \S", re.MULTILINE)
SECTION = re.compile(r"^(?:Attributes|Args):\n((?: {4}.*\n|\n(?= ))*)", re.MULTILINE)  # Args: of what users make themselves


def is_record(node: ast.ClassDef) -> bool:
    """A dataclass or a NamedTuple."""
    decorators = [ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list]
    return "dataclass" in decorators or "NamedTuple" in [ast.unparse(base) for base in node.bases]


def fields_of(node: ast.ClassDef) -> list[str]:
    """The fields that a class adds and shows, but those that say what they are in their annotation (`Annotated`)."""
    lines = [(ast.unparse(line.target), ast.unparse(line.annotation)) for line in node.body if isinstance(line, ast.AnnAssign)]
    names = [name for name, kind in lines if "ClassVar" not in kind and not kind.startswith("Annotated[")]
    return [name for name in names if not name.startswith("_")]


def constants_of(node: ast.ClassDef) -> set[str]:
    """What holds for the class as a whole, which may be said too."""
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and "ClassVar" in ast.unparse(line.annotation)]
    return {ast.unparse(line.target) for line in lines}


def said_in(docstring: str) -> list[str]:
    return [name for section in SECTION.findall(docstring + "\n") for name in FIELD.findall(section)]


def complaints(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_") or not is_record(node):
            continue
        constants, fields = constants_of(node), fields_of(node)
        said = [name for name in said_in(ast.get_docstring(node) or "") if name not in constants]
        if missing := [name for name in fields if name not in said]:
            yield f"{node.name} does not say, each on a line under `Attributes:`, what {missing} are"
        elif gone := [name for name in said if name not in fields]:
            yield f"{node.name} tells of {gone}, which are no fields of it"
        elif said != fields:
            yield f"{node.name} tells of its fields in another order than it has them: {said}"


@pytest.mark.parametrize("room", sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}))
def test_every_field_of_a_dataclass_is_said_on_a_line_of_its_own(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / room]
    found = [f"{path.relative_to(REPOSITORY)}: {each}" for path in files for each in complaints(path.read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


RECORD = """
@dataclass(frozen=True)
class Part:
    '''{}'''

    ids: torch.Tensor
    lengths: torch.Tensor
    _cache: dict
"""
GOOD = "A part.\n\n    Attributes:\n        ids: `[n]`.\n        lengths: `[B]`,\n            int64.\n    "


@pytest.mark.parametrize(
    ("docstring", "complaint"),
    [
        ("A part. ids: `[n]`. lengths: `[B]`.", "what ['ids', 'lengths'] are"),
        (GOOD.replace("\n        lengths:", " lengths:"), "what ['lengths'] are"),
        (GOOD + "    sizes: `[n]`.\n    ", "tells of ['sizes']"),
        ("A part.\n\n    Args:\n        lengths: `[B]`.\n        ids: `[n]`.\n    ", "another order"),
    ],
)
def test_what_is_not_said_so_is_found(docstring: str, complaint: str) -> None:
    assert not list(complaints(RECORD.format(GOOD)))
    (found,) = complaints(RECORD.format(docstring))
    assert complaint in found
