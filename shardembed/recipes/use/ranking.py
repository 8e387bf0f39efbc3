"""The best items for many users, exact, on all ranks of a job: each rank asks for its share of the users, and rank 0 gets all.

Legend: U users, q of this rank in a batch, k items of each, L items that are searched for, of which some are left out.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.errors import UnsupportedError
from shardembed.recipes.data.numbering import NOBODY, Numbers
from shardembed.recipes.evaluate import batches
from shardembed.recipes.models.index import BATCH_USERS, Found, ItemIndex
from shardembed.recipes.models.next_items import BATCH_POSITIONS
from shardembed.recipes.models.sasrec import Sasrec
from shardembed.recipes.models.two_tower import TwoTower
from shardembed.recipes.use.opened import Opened
from shardembed.recipes.use.taken import Taken

NO_RANKING = "its model predicts clicks and ranks no items; score rows of users and items"


class Asks(Protocol):
    """What makes queries, float32 `[q, D]`, of users by their places. Collective; q may be 0."""

    most_users: int

    def __call__(self, places: np.ndarray) -> torch.Tensor: ...


class ByTower:
    """Queries of two towers, for users by the numbers `[U]` of their rows."""

    most_users = BATCH_USERS

    def __init__(self, opened: Opened, numbers: np.ndarray) -> None:
        self._model, self._numbers = opened.model, numbers

    @torch.no_grad()
    def __call__(self, places: np.ndarray) -> torch.Tensor:
        model: TwoTower = self._model
        return model.query_vectors_of(torch.from_numpy(self._numbers[places]))


class ByHistory:
    """Queries of a model of sequences, for users by what they took, of which the last few items count; each at least one."""

    def __init__(self, opened: Opened, taken: Taken) -> None:
        self._model, self._taken = opened.model, taken
        self._any_ids = opened.config.data.any_ids is not None
        self._longest: int = opened.config.model.max_length
        self.most_users = max(1, BATCH_POSITIONS // self._longest)

    @torch.no_grad()
    def __call__(self, places: np.ndarray) -> torch.Tensor:
        model: Sasrec = self._model
        mine = self._taken.of(places, self._longest)
        items = torch.from_numpy(mine.items).to(model.log_expected.device)
        # By id, which an item without a row has too: it is read as evaluation reads it.
        rows = (
            model.tables({"sequence": items, "negatives": items[:0]})["sequence"]
            if self._any_ids
            else model.tables.rows("item", items)
        )
        lengths = torch.from_numpy(mine.counts)
        queries_nD = model.queries(rows.float(), lengths)
        return queries_nD[(lengths.cumsum(0) - 1).to(queries_nD.device)]


def queries_at_first(asks: Asks, users: int) -> np.ndarray:
    """On rank 0 the queries of all users, float32 `[U, D]`, on other ranks none; no more at once than memory is meant for.
    Collective.
    """
    first = Comm.of().rank == 0
    starts = range(0, max(1, users), asks.most_users)
    batches = (np.arange(start, min(start + asks.most_users, users) if first else start) for start in starts)
    return torch.cat([asks(batch).cpu() for batch in batches]).numpy()


class Ranking:
    """All items of a run, to be ranked by queries. Collective to make and to ask.

    Raises:
        UnsupportedError: the model predicts clicks.
    """

    def __init__(self, opened: Opened) -> None:
        model, items = opened.model, opened.items
        if not isinstance(model, TwoTower | Sasrec):
            raise UnsupportedError(f"{opened.path}: {NO_RANKING}")
        numbers = Numbers(items.ids) if opened.config.data.any_ids is not None else None
        self._tables: Any = model.tables
        if isinstance(model, TwoTower):
            self._index: ItemIndex | None = ItemIndex(model, numbers)
            return
        self._index = None
        self._found = Found.of(None if numbers is None else model.tables.ids("item"), numbers)

    def best(self, queries_QD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._index is not None:
            return self._index.best(queries_QD, k)
        return self._found.best(self._tables, queries_QD, k)


def best_items(ranking: Ranking, asks: Asks, users: int, items: int, k: int, seen: Taken | None) -> tuple[np.ndarray, np.ndarray]:
    """On rank 0 the scores float32 and the numbers int64 of the best items for each user, both `[U, k]`, with -inf and `NOBODY` at
    the end where there are no more; on other ranks the same shapes without values. Collective.

    Args:
        items: how many there are. seen: numbers of items that are left out, by user; None: none is.
    """
    comm = Comm.of()
    k_found = min(k, items)
    scores, numbers = np.full((users, k), -np.inf, np.float32), np.full((users, k), NOBODY)
    lengths = np.full(users, k_found) if seen is None else np.minimum(k_found + seen.counts, items)
    order = np.argsort(lengths, kind="stable")
    for searched in batches(lengths[order], asks.most_users, comm.world_size) if k_found else ():
        batch = order[searched.start : searched.stop]
        mine = batch[comm.rank :: comm.world_size]
        found_scores, found = (one.cpu().numpy() for one in ranking.best(asks(mine), searched.length))
        kept = found != NOBODY
        if seen is not None:
            left_out = seen.of(mine)
            kept &= ~np.isin(found + np.arange(len(mine))[:, None] * items, left_out.items + left_out.owners * items)
        first = np.argsort(~kept, axis=1, kind="stable")[:, :k_found]
        there = np.take_along_axis(kept, first, 1)
        found = np.where(there, np.take_along_axis(found, first, 1), NOBODY)
        found_scores = np.where(there, np.take_along_axis(found_scores, first, 1), -np.inf).astype(np.float32)
        for rank, (some_scores, some) in enumerate(zip(to_first(comm, found_scores), to_first(comm, found), strict=True)):
            places = batch[rank :: comm.world_size]
            scores[places, :k_found], numbers[places, :k_found] = some_scores.reshape(-1, k_found), some.reshape(-1, k_found)
    return scores, numbers


def to_first(comm: Comm, mine: np.ndarray) -> list[np.ndarray]:
    """On rank 0 what all ranks have, flat, by rank; elsewhere nothing. Collective; sizes may differ."""
    flat = torch.from_numpy(np.ascontiguousarray(mine).reshape(-1))
    sizes = [flat.numel()]
    if comm.world_size > 1:
        sizes = comm.tell("control", "bring answers together: sizes", np.full((comm.world_size, 1), flat.numel())).ravel().tolist()
    receive = sizes if comm.rank == 0 else [0] * comm.world_size
    send = [flat.numel(), *[0] * (comm.world_size - 1)]
    told = comm.all_to_all("control", "bring answers together", flat, send, receive)
    return [part.numpy() for part in told.split(receive)] if comm.rank == 0 else []
