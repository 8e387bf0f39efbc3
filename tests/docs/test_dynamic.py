"""The rules of dynamic tables on their page each have a test."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_rule_names_a_test_that_there_is() -> None:
    page = (ROOT / "docs" / "dynamic.md").read_text()
    rules = page[page.index("| when | what |") :].split("\n\n")[0].splitlines()[2:]
    assert len(rules) > 10
    source = (ROOT / "tests" / "unit" / "test_dynamic_oracle.py").read_text()
    for rule in rules:
        named = re.fullmatch(r".*\| `(\w+)` \|", rule)
        assert named, f"a rule without a test: {rule}"
        assert f"def test_{named[1]}(" in source, f"no such test: {named[1]}"
