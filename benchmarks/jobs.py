"""What a benchmark gives back, how it ends when it cannot, and what it says meanwhile."""

from __future__ import annotations

import sys
from typing import Any

Result = dict[str, Any]


class BenchFailedError(Exception):
    """Ranks of a benchmark failed, and have said why. code: what this process is to exit with."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a benchmark's ranks ended with exit code {code}")
        self.code = code


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)
