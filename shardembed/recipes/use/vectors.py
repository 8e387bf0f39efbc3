"""What the model of an opened run compares: a query a user, a vector an item, so that score = query @ vector.

Of two towers a user's query is what the user tower makes of its row. Of sequences it is what the layers make of what the user had
met when the job was evaluated.

Legend: n users or items, D columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from shardembed.comm.comm import Comm
from shardembed.config.hints import nearest
from shardembed.embeddings.compared import Metric, in_words
from shardembed.embeddings.stored import Block
from shardembed.errors import ConfigError, IdRangeError, UnsupportedError
from shardembed.recipes.models.sasrec import Sasrec
from shardembed.recipes.models.two_tower import TwoTower
from shardembed.recipes.sequence_config import SequenceConfig
from shardembed.recipes.tasks import prepare
from shardembed.recipes.together import on_all
from shardembed.recipes.use.catalog import Catalog
from shardembed.recipes.use.opened import Opened
from shardembed.recipes.use.ranking import ByHistory
from shardembed.recipes.use.taken import Taken, users_of

SIDES = ("user", "item")
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class NamedVectors:
    """Vectors of users or of items.

    Attributes:
        ids: of each, int64 `[n]`, ascending.
        names: an Arrow array `[n]` of texts, or of integers where ids are names.
        values: float32 `[n, D]`.
        metric: by which the model compares users with items.
        told: what they are, in words.
    """

    ids: np.ndarray
    names: pa.Array
    values: np.ndarray
    metric: Metric
    told: str


class MadeRows:
    """The vectors of a side in the place of a stored table's rows, for `embeddings.nearest`; in one process.

    Attributes:
        name: of the side.
        rows: how many.
        ids: int64 `[n]`, ascending.
        metric: by which the model compares them.
        told: what they are, in words.
    """

    vectors = "model"

    def __init__(self, side: str, made: NamedVectors) -> None:
        self.name, self.rows, self.metric = side, len(made.ids), made.metric
        self.told = f"{in_words(made.metric)}: {made.told}"
        self.ids = torch.from_numpy(made.ids)
        self._values = torch.from_numpy(made.values)

    def chosen(self, ids: Any) -> torch.Tensor:
        """As `StoredTable.chosen`."""
        found = torch.as_tensor(ids, dtype=torch.int64)
        strange = (~torch.isin(found, self.ids)).nonzero()
        if len(strange):
            raise IdRangeError(f"{self.name} {int(found[strange[0]])}: none of the {self.rows:,} ids that have a vector")
        return found.unique()

    def some(self, ids: torch.Tensor) -> torch.Tensor:
        return self._values[torch.searchsorted(self.ids, ids)]

    def blocks(self, *, block_bytes: int) -> Iterator[Block]:
        yield Block(0, self.ids, self._values)


@dataclass(frozen=True)
class Maker:
    """What makes the vectors of one side, a block at a time.

    Attributes:
        catalog: whose.
        columns: D.
        metric: by which they are compared.
        told: what they are, in words.
        of: the vectors float32 `[m, D]` of places in `catalog`, on rank 0; other ranks call it with none. Collective.
        most: places that it can be asked for at once; None: as many as there is memory for their vectors.
    """

    catalog: Catalog
    columns: int
    metric: Metric
    told: str
    of: Callable[[np.ndarray], torch.Tensor]
    most: int | None = None

    @property
    def compared(self) -> str:
        """What they are and how they are compared, in words."""
        return f"{in_words(self.metric)}: {self.told}"

    def blocks(self, places: np.ndarray, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """(places, vectors) on rank 0, on other ranks nothing in them, as many times. Collective."""
        rows = max(1, block_bytes // (4 * self.columns))
        rows = rows if self.most is None else min(rows, self.most)
        first = Comm.of().rank == 0
        for start in range(0, max(1, len(places)), rows):
            mine = places[start : start + rows] if first else places[:0]
            yield mine, self.of(mine).cpu()


def maker(opened: Opened, side: str) -> Maker:
    """Collective. For users of sequences it reads the run's data.

    Raises:
        ConfigError: there is no such side. UnsupportedError: the model compares none. DataError: on all ranks: the data that are
            needed are not what they were.
    """
    model = opened.model
    if side not in SIDES:
        raise ConfigError(f"vectors({side!r}): it is one of {', '.join(SIDES)}{nearest(str(side), SIDES)}")
    if not isinstance(model, TwoTower | Sasrec):
        raise UnsupportedError(f"{opened.path}: its model predicts clicks from rows of all tables, and compares no vectors")
    if side == "item":
        noted = model.vectors["tables.item"]
        return Maker(opened.items, _columns(opened), noted.metric, f"items, {noted.made}", lambda places: items_of(opened, places))
    if isinstance(model, TwoTower):
        noted = model.vectors["tables.user"]
        return Maker(
            opened.users, _columns(opened), noted.metric, f"users, {noted.made}", lambda places: queries_of_users(opened, places)
        )
    catalog, taken = _trained_on(opened)
    told = "queries that the layers make of what each user had met when the job was evaluated"
    asks = ByHistory(opened, taken)
    return Maker(catalog, _columns(opened), model.vectors["tables.item"].metric, told, asks, asks.most_users)


def vectors_of(opened: Opened, side: str) -> NamedVectors:
    """All of a side, in memory on rank 0; other ranks get none. Collective; raises as `maker`."""
    made = maker(opened, side)
    blocks = [block for _, block in made.blocks(np.arange(len(made.catalog)))]
    values = torch.cat(blocks).numpy()
    numbers = np.arange(len(values))
    return NamedVectors(made.catalog.ids[numbers], made.catalog.named(numbers), values, made.metric, made.told)


def _columns(opened: Opened) -> int:
    return opened.config.model.embedding_dim


def items_of(opened: Opened, places: np.ndarray) -> torch.Tensor:
    """The vectors of items, by their numbers; float32 `[m, D]`. Collective."""
    return opened.model.item_vectors_of(torch.from_numpy(places))


def queries_of_users(opened: Opened, places: np.ndarray) -> torch.Tensor:
    """The queries of users of two towers, by their numbers; float32 `[m, D]`. Collective."""
    return opened.model.query_vectors_of(torch.from_numpy(places))


def _trained_on(opened: Opened) -> tuple[Catalog, Taken]:
    """The users of sequences who had met something when the job was evaluated, and what that is."""
    config = opened.config
    assert isinstance(config, SequenceConfig)
    data = prepare(config, Comm.of()).data
    users = data.ids.users if data.ids is not None else on_all(Comm.of(), "find the users", lambda: users_of(config.data))
    met = data.met(validation=False)
    trained = np.flatnonzero(met > 0)
    items, counts = data.last(trained, config.model.max_length, met)
    items = items if data.ids is None else data.ids.items[items]
    return Catalog("user", users[trained], opened.users.names), Taken(items, np.append(0, np.cumsum(counts)))
