"""The name that was probably meant. Apart from `explain`, because every import of the package comes here, and none but of a program
that reads configurations should wait for pydantic and PyYAML.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

COMPARED = 4_000_000  # pairs of characters that are compared for a hint: names may come from a stranger's file


def nearest(name: str, names: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest of `names`, or nothing when none is near. Of very many names the first are tried."""
    compared, looked_at = [], 0
    for other in names:
        looked_at += len(name) * len(other)
        if looked_at > COMPARED:
            break
        compared.append(other)
    close = difflib.get_close_matches(name, compared, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
