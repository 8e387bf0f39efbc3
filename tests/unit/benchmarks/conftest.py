"""What all tests of benchmarks need."""

from __future__ import annotations

import pytest

from tests.harness import forks


@pytest.fixture(scope="session", autouse=True)
def forks_of_what() -> None:
    """The ranks of a contender are forks too, and Python has one process to make them: whoever comes first says of what."""
    forks()
