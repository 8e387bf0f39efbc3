"""Exact retrieval for a trained two-tower model: the best k of all items for each user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import shardembed as se
from shardembed.recipes.data.numbering import NOBODY, Numbers
from shardembed.recipes.models.two_tower import TwoTower

BLOCK_ROWS = 1 << 16
BATCH_USERS = 4096  # of all ranks together: each search reads the whole item table


class ItemIndex:
    """What users' queries are searched in. Collective to build and to search.

    Without MLPs and features the item table itself is searched, where it lies. Else every item's vector is computed once and kept
    in a second sharded table, cut by rows; it holds the vectors as they were when the index was built.

    numbers: of items by their ids, where the table takes any: then ids that live are found, or, where items have features, all.
    """

    most_users = BATCH_USERS

    def __init__(self, model: TwoTower, numbers: Numbers | None = None) -> None:
        self._model = model
        described = model.item_features.there
        living = None if numbers is None or described else model.tables.ids("item")
        computed = described or len(model.item_tower.layers) > 0
        self._found = Found.of(living, numbers, by_row=computed)
        self._tables = _computed(model, living) if computed and self._found.most != 0 else model.tables

    @torch.no_grad()
    def topk(self, users: torch.Tensor, k: int) -> torch.Tensor:
        """The k best items of each of this rank's `users` `[Q]`, best first: int64 `[Q, k]`. Collective; Q may differ and be 0."""
        return self.best(self._model.query_vectors_of(users), k)[1]

    def best(self, queries_QD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores float32 `[Q, k]`, items as `topk` gives them) for queries that the model made. Collective."""
        return self._found.best(self._tables, queries_QD, k)


@dataclass(frozen=True)
class Found:
    """How what a search finds becomes numbers of items.

    Attributes:
        most: how many there are to be found; None: as many as anybody asks for.
        numbers: of ids; None: they are numbers already.
        row_numbers: of the rows of a computed index, int64 `[most]`, where that is searched.
    """

    most: int | None = None
    numbers: Numbers | None = None
    row_numbers: torch.Tensor | None = None

    @staticmethod
    def of(living: torch.Tensor | None, numbers: Numbers | None, by_row: bool = False) -> Found:
        """Among the ids that live; None: among all rows."""
        if living is None or numbers is None:
            return Found()
        rows = torch.from_numpy(numbers(living.cpu().numpy())) if by_row else None
        return Found(living.numel(), numbers, rows)

    def topk(self, tables: se.EmbeddingCollection, queries: torch.Tensor, k: int) -> torch.Tensor:
        """The numbers of the best k, as `best` has them. Collective."""
        return self.best(tables, queries, k)[1]

    def best(self, tables: se.EmbeddingCollection, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores float32 `[Q, k]`, numbers int64 `[Q, k]`) of the best k; at the end -inf and `NOBODY` where fewer live, and
        `NOBODY` for ids that live and are not among `numbers`. Collective.

        Hazard: where tables take any id this waits for the device, and gives tensors on the CPU; else they lie where the model is.
        """
        if self.most is None:
            return tables.topk(queries, k, "item")
        scores, best = torch.full((len(queries), k), -torch.inf), torch.full((len(queries), k), NOBODY)
        if self.most:
            found_scores, found = (one.cpu() for one in tables.topk(queries, min(k, self.most), "item"))
            assert self.numbers is not None
            known = torch.from_numpy(self.numbers(found.numpy())) if self.row_numbers is None else self.row_numbers[found]
            best[:, : known.shape[1]], scores[:, : known.shape[1]] = known, found_scores
        return scores, best


@torch.no_grad()
def _computed(model: TwoTower, living: torch.Tensor | None) -> se.EmbeddingCollection:
    """A collection with the one table "item" that holds the item tower's outputs, of all rows or of the ids that live."""
    items = next(table for table in model.tables.tables if table.name == "item")
    count = len(model.log_expected) if living is None else living.numel()
    table = se.TableConfig("item", count, items.embedding_dim, pooling=None, init=se.Constant(0.0))
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
        numbers = torch.arange(block.start, block.stop, block.step, device=device)
        known = living is None
        blocks.append(model.item_vectors_of(numbers) if known else model.item_vectors(model.tables.rows("item", living[numbers])))
    index.load_rows("item", _Rows(torch.cat(blocks), mine, (count, items.embedding_dim)))
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
