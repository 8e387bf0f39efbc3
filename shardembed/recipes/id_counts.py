"""What becomes of the ids of dynamic tables while a job trains: lines for metrics.jsonl, of all ranks together."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import shardembed as se
from shardembed.recipes.series import THERE


class IdCounts:
    """Of one start of a run.

    begun: steps that were taken before.
    """

    def __init__(self, tables: se.EmbeddingCollection, begun: int) -> None:
        self._tables, self._step = tables, begun
        self._names = [table.name for table in tables.tables if table.dynamic is not None]
        self._before: dict[str, dict[str, int]] = {}

    def lines(self, step: int) -> list[dict[str, Any]]:
        """One line of what has happened since the last one, `steps` of the optimizer ago; none without such tables. Collective."""
        if not self._names:
            return []
        told = {name: asdict(self._tables.tally(name)) for name in self._names}
        since = {name: _since(self._before.get(name, {}), counts) for name, counts in told.items()}
        line = {"step": step, "steps": step - self._step, "ids": since}
        self._step, self._before = step, told
        return [line]


def _since(before: dict[str, int], now: dict[str, int]) -> dict[str, int]:
    return {key: count if key in THERE else count - before.get(key, 0) for key, count in now.items()}
