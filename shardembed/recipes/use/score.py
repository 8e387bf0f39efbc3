"""Scores of rows: of clicks how likely one is, of a user and an item how well they fit.

Legend: n rows, b of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from shardembed.comm.comm import Comm
from shardembed.errors import ConfigError, DataError
from shardembed.recipes.ctr_metrics import probabilities
from shardembed.recipes.data.bad import NONE, Dropped
from shardembed.recipes.data.clicks.reads import clicks_of
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.data.numbering import NOBODY
from shardembed.recipes.data.stream import rank_start
from shardembed.recipes.data.wanted import Read
from shardembed.recipes.models.two_tower import TwoTower
from shardembed.recipes.together import on_all
from shardembed.recipes.use.opened import Opened
from shardembed.recipes.use.ranking import ByHistory, to_first
from shardembed.recipes.use.recommend import known_by_history
from shardembed.recipes.use.rows import Columns, Rows, as_table, rows_of_files, rows_of_table
from shardembed.recipes.use.vectors import items_of, queries_of_users

PREDICTION, SCORE = "prediction", "score"
Found = TypeVar("Found")


@dataclass
class Scored:
    """What became of the rows, filled while they are scored.

    Attributes:
        rows: how many were scored.
        unknown: how many of them are of a user or an item that the model does not know, and have no score.
        dropped: bad ones, which were left out.
    """

    rows: int = 0
    unknown: int = 0
    dropped: Dropped = NONE


def scored(opened: Opened, rows: Any, along: tuple[str, ...], skip: bool, told: Scored) -> Iterator[pa.Table]:
    """Tables of the columns `along` and the score, row by row in their order, on rank 0; on other ranks tables without rows.
    Collective.

    Args:
        rows: a path of a file, several of them, or what `as_table` takes.

    Raises:
        ConfigError, DataError: on all ranks: a column is missing, or a row is bad and not to be skipped.
    """
    comm = Comm.of()
    columns = on_all(comm, "choose columns", lambda: Columns.of(opened, along))
    name = SCORE if opened.scorer is None else PREDICTION
    if name in along:
        raise ConfigError(f"columns: {name!r} is what the scores are called; rename that column first")
    paths = _paths(rows)
    table = None if paths else on_all(comm, "read rows", lambda: as_table(rows))

    def read() -> Iterator[Rows]:
        return rows_of_files(opened, paths, columns, skip) if table is None else rows_of_table(table, columns, skip)

    score = _scorer(opened, read, comm)
    size = opened.config.train.global_batch_size
    for chunk in _on_all(comm, read()):
        told.dropped += chunk.read.dropped
        pieces = [score(chunk.read, start, min(start + size, len(chunk))) for start in range(0, len(chunk), size)]
        found = np.concatenate([np.empty(0, np.float32), *pieces])
        told.rows += len(chunk)
        told.unknown += int(np.isnan(found).sum())  # as rank 0 knows, which tells it
        yield _answer(chunk.along if comm.rank == 0 else chunk.along.slice(0, 0), name, found)
    if not told.rows:
        raise DataError(
            f"there are no rows to score{f', but {len(told.dropped):,} bad ones ({told.dropped})' * bool(told.dropped)}"
        )


def _paths(rows: Any) -> list[str]:
    """Those of files, if rows are any; else none."""
    several = rows if isinstance(rows, list | tuple) else [rows]
    return [str(one) for one in several] if all(isinstance(one, str | Path) for one in several) else []


def _answer(along: pa.Table, name: str, found: np.ndarray) -> pa.Table:
    scores = pa.array(found, pa.float32(), mask=np.isnan(found))
    return along.append_column(name, scores) if along.num_columns else pa.table({name: scores})


def _on_all(comm: Comm, read: Iterator[Rows]) -> Iterator[Rows]:
    """What is read, on all ranks the same; an error of one goes to all."""
    while (found := on_all(comm, "read rows", lambda: next(read, None))) is not None:
        yield found


Score = Callable[[Read, int, int], np.ndarray]


def _scorer(opened: Opened, read: Callable[[], Iterator[Rows]], comm: Comm) -> Score:
    """What scores the rows from `start` up to `stop`: float32 `[stop - start]` on rank 0, elsewhere none; NaN of the unknown."""
    if opened.scorer is not None:
        of_mine: Callable[[Read], np.ndarray] = _Clicks(opened)
    elif isinstance(opened.model, TwoTower):
        of_mine = _Pairs(opened, opened.users.numbers_of, partial(queries_of_users, opened))
    else:
        users, asks = on_all(comm, "read what users have taken", lambda: _histories(opened, read()))
        of_mine = _Pairs(opened, users, asks)

    def score(rows: Read, start: int, stop: int) -> np.ndarray:
        first, last = (start + rank_start(stop - start, rank, comm.world_size) for rank in (comm.rank, comm.rank + 1))
        mine = of_mine(Read(tuple(column[first:last] for column in rows.columns)))
        told = to_first(comm, mine)
        return np.concatenate(told) if told else np.empty(0, np.float32)

    return score


class _Clicks:
    """Probabilities."""

    def __init__(self, opened: Opened) -> None:
        assert opened.scorer is not None
        self._scorer, self._columns = opened.scorer, Columns.of(opened, ()).wanted

    def __call__(self, rows: Read) -> np.ndarray:
        clicks: Clicks = clicks_of(rows, self._columns)
        return probabilities(self._scorer.logits(clicks)).astype(np.float32)


class _Pairs:
    """Dot products of queries and items.

    places: of users' ids, where they are known, else `NOBODY`. queries: of places.
    """

    def __init__(
        self, opened: Opened, places: Callable[[np.ndarray], np.ndarray], queries: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        self._opened, self._places, self._queries = opened, places, queries

    @torch.no_grad()
    def __call__(self, rows: Read) -> np.ndarray:
        user_ids, item_ids = rows.columns
        assert not isinstance(user_ids, Lists)
        assert not isinstance(item_ids, Lists)
        users, items = self._places(user_ids), self._opened.items.numbers_of(item_ids)
        known = (users != NOBODY) & (items != NOBODY)
        vectors_bD = items_of(self._opened, items[known])
        found = np.full(len(known), np.nan, np.float32)
        found[known] = (self._queries(users[known]) * vectors_bD).sum(1).cpu().numpy()
        return found


def _histories(opened: Opened, read: Iterator[Rows]) -> tuple[Callable[[np.ndarray], np.ndarray], ByHistory]:
    """Where users of the rows are among those with a history, and what asks for these. Reads rows and data."""
    ids = [np.unique(rows.read.columns[0]) for rows in read]  # type: ignore[arg-type]
    users = np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)
    known, asks = known_by_history(opened, users, ())
    there = users[known]

    def places(some: np.ndarray) -> np.ndarray:
        if not len(there):
            return np.full(len(some), NOBODY)
        found = np.minimum(np.searchsorted(there, some), len(there) - 1)
        return np.where(there[found] == some, found, NOBODY)

    return places, asks
