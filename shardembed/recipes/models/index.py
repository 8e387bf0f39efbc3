"""Exact retrieval for a trained two-tower model: the best k of all items for each user."""

from __future__ import annotations

from typing import Any

import torch

import shardembed as se
from shardembed.recipes.models.two_tower import TwoTower

BLOCK_ROWS = 1 << 16
BATCH_USERS = 4096  # of all ranks together: each search reads the whole item table


class ItemIndex:
    """What users' queries are searched in. Collective to build and to search.

    Without MLPs the item table itself is searched, where it lies. Else every item's vector is computed once and kept in a second
    sharded table, cut by rows; it holds the vectors as they were when the index was built.
    """

    most_users = BATCH_USERS

    def __init__(self, model: TwoTower) -> None:
        self._model = model
        self._tables = model.tables if not len(model.item_tower.layers) else _computed(model)

    @torch.no_grad()
    def topk(self, users: torch.Tensor, k: int) -> torch.Tensor:
        """The k best items of each of this rank's `users` `[Q]`, best first: int64 `[Q, k]`. Collective; Q may differ and be 0."""
        queries = self._model.queries(self._model.tables.rows("user", users.to(self._model.log_expected.device)))
        return self._tables.topk(queries, k, "item")[1]


@torch.no_grad()
def _computed(model: TwoTower) -> se.EmbeddingCollection:
    """A collection with the one table "item" that holds the item tower's outputs."""
    items = next(table for table in model.tables.tables if table.name == "item")
    table = se.TableConfig("item", items.num_embeddings, items.embedding_dim, pooling=None, init=se.Constant(0.0))
    index = se.EmbeddingCollection([table], optimizer=se.optim.SGD(), plan=se.row_wise())
    mine, longest = range(0), 0
    for shard in index.plan.tables[0].layout.shards:
        longest = max(longest, len(shard.rows))
        if se.rank() in shard.ranks:
            mine = shard.rows
    device = model.log_expected.device
    blocks = []
    for start in range(0, longest, BLOCK_ROWS):  # as many calls on every rank: reading rows is collective
        block = mine[start : start + BLOCK_ROWS]
        rows = model.tables.rows("item", torch.arange(block.start, block.stop, block.step, device=device))
        blocks.append(model.item_vectors(rows))
    index.load_rows("item", _Rows(torch.cat(blocks), mine, (items.num_embeddings, items.embedding_dim)))
    return index


class _Rows:
    """Stands for a whole table of `shape`, of which it holds the rows `mine`: all that this rank will ask for."""

    def __init__(self, values: torch.Tensor, mine: range, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._values, self._mine = values, mine

    def __getitem__(self, key: tuple[slice, Any]) -> torch.Tensor:
        rows, columns = key
        asked = range(self.shape[0])[rows]  # of the step of `mine`
        first = self._mine.index(asked[0])
        return self._values[first : first + len(asked), columns]
