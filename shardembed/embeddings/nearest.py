"""Nearest rows of a table, exact: every row of the checkpoint is looked at, a block at a time.

Scores are float64, and each is summed in an order that depends on the number of columns alone: rows of equal values have equal
scores, wherever they lie and however large a block is, so that ties go to the lower id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from shardembed.config.hints import nearest
from shardembed.embeddings.compared import METRICS, Metric, Which
from shardembed.embeddings.stored import BLOCK_BYTES, Block, StoredTables
from shardembed.errors import ConfigError

AT_A_TIME = 1 << 19  # numbers in float64 that are worked on: as much as a cache holds


@dataclass(frozen=True)
class Neighbors:
    """The rows nearest to one row.

    Attributes:
        id: of the row that was asked for.
        ids: of its neighbours, the nearest first.
        scores: of these, in the same order.
    """

    id: int
    ids: tuple[int, ...]
    scores: tuple[float, ...]


def neighbors(
    folder: str | Path,
    table: str,
    ids: Any,
    k: int = 10,
    *,
    metric: Metric | None = None,
    step: int | None = None,
    vectors: Which | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> list[Neighbors]:
    """For each of `ids`, the `k` other rows of a table with the highest cosine or dot product; equal scores: lower ids first.

    Straight from a checkpoint, without a process group, and with a block of the table in memory at a time. A row of zeros has no
    direction: its cosine with any other is 0. Rows with inf or nan are nobody's neighbours.

    Args:
        folder: of checkpoints (the newest counts), of one checkpoint, or of a run (its best weights count).
        table: its name, in full or the end of it.
        ids: rows to find neighbours of, each once.
        metric: None takes that of the model, or the cosine where the checkpoint does not say how the model compares rows.
        step: the checkpoint of this step, rather than the newest.
        vectors: what is compared: "rows" as they lie in the table, or what the "model" makes of them; None takes the latter where
            the checkpoint says what that is.
        block_bytes: how much of the table is in memory at a time.

    Raises:
        ConfigError, IdRangeError: the table, an id or the metric does not exist, or an id's own row is zeros (cosine), inf or nan.
        CheckpointError: the checkpoint is missing or damaged.
    """
    if metric is not None and metric not in METRICS:
        raise ConfigError(f"metric={metric!r} is not one of {', '.join(METRICS)}{nearest(str(metric), METRICS)}")
    if k < 1:
        raise ConfigError(f"k={k}: at least one neighbour must be asked for")
    with StoredTables(folder, step, vectors) as stored:
        found = stored.find(table)
        return nearest_of(found, ids, k, metric_of(found, metric), block_bytes)


class Rows(Protocol):
    """Rows of a table, or vectors made of them, as `StoredTable` gives them."""

    name: str
    rows: int

    def chosen(self, ids: Any) -> torch.Tensor: ...

    def some(self, ids: torch.Tensor) -> torch.Tensor: ...

    def blocks(self, *, block_bytes: int) -> Iterator[Block]: ...


def nearest_of(table: Rows, ids: Any, k: int, metric: Metric, block_bytes: int = BLOCK_BYTES) -> list[Neighbors]:
    """As `neighbors`, in rows that are open."""
    distinct = table.chosen(ids)
    asked = torch.as_tensor(ids, dtype=torch.int64)
    queries = table.some(distinct)[torch.searchsorted(distinct, asked)].double()
    _check(table.name, asked, queries, metric)
    best = _Best(asked, min(k, max(0, table.rows - 1)))
    for block in table.blocks(block_bytes=block_bytes):
        _score_block(block, queries, metric, best)
    return best.found()


def metric_of(table: Any, asked: Metric | None = None) -> Metric:
    """By which rows are compared: as asked for, or as the model does, or by the cosine."""
    return asked or table.metric or "cosine"


def _check(name: str, ids: torch.Tensor, queries: torch.Tensor, metric: Metric) -> None:
    for row, query in zip(ids.tolist(), queries, strict=True):
        if not bool(query.isfinite().all()):
            raise ConfigError(f"table {name!r}: row {row} holds inf or nan, which is near to nothing")
        if metric == "cosine" and not bool(query.any()):
            raise ConfigError(f"table {name!r}: row {row} is all zeros and has no direction; compare it with the metric 'dot'")


def _score_block(block: Block, queries: torch.Tensor, metric: Metric, best: _Best) -> None:
    rows = max(1, AT_A_TIME // queries.shape[1])
    norms = _sums(queries * queries).sqrt()
    for first in range(0, len(block.ids), rows):
        part = block.values[first : first + rows].double()
        lengths = _sums(part * part).sqrt() if metric == "cosine" else None
        ids = block.ids[first : first + rows]
        for number, query in enumerate(queries):
            scores = _sums(part * query)
            if lengths is not None:
                scores = torch.where(lengths == 0, 0.0, scores / (lengths * norms[number]))  # nan stays nan
            best.offer(number, ids, scores)


def _sums(products: torch.Tensor) -> torch.Tensor:
    """The sum of each row, by halves: only additions of whole columns, which have one result anywhere. Overwrites its input."""
    width = products.shape[1]
    while width > 1:
        half = (width + 1) // 2
        products[:, : width - half] += products[:, half:width]
        width = half
    return products[:, 0].clone()


class _Best:
    """The best `k` so far of each query, best first."""

    def __init__(self, asked: torch.Tensor, k: int) -> None:
        self._asked, self._k = asked.tolist(), k
        self._ids = [torch.empty(0, dtype=torch.int64) for _ in self._asked]
        self._scores = [torch.empty(0, dtype=torch.float64) for _ in self._asked]

    def offer(self, number: int, ids: torch.Tensor, scores: torch.Tensor) -> None:
        """Rows that follow all that were offered before."""
        wanted = scores.isfinite() & (ids != self._asked[number])
        if len(self._scores[number]) == self._k and self._k:
            wanted &= scores > self._scores[number][-1]  # an equal one has the higher id
        ids, scores = ids[wanted], scores[wanted]
        if len(ids) > self._k:
            threshold = scores.topk(self._k).values[-1] if self._k else torch.inf
            high = scores >= threshold  # topk itself may take any of equal ones
            ids, scores = ids[high], scores[high]
        if len(ids):
            scores = torch.cat([self._scores[number], scores])
            order = scores.sort(descending=True, stable=True).indices[: self._k]
            self._ids[number], self._scores[number] = torch.cat([self._ids[number], ids])[order], scores[order]

    def found(self) -> list[Neighbors]:
        each: Sequence[tuple[int, torch.Tensor, torch.Tensor]] = list(zip(self._asked, self._ids, self._scores, strict=True))
        return [Neighbors(row, tuple(ids.tolist()), tuple(scores.tolist())) for row, ids, scores in each]
