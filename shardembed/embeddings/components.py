"""Principal components of a table by streaming: mean and covariance of all rows, then a sample of rows on the first two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardembed.embeddings.stored import BLOCK_BYTES, StoredTable
from shardembed.errors import ConfigError

MOST_COLUMNS = 8192  # a covariance of 512 MiB


@dataclass(frozen=True)
class Flat:
    """Rows of a table on its first two principal components.

    Attributes:
        ids: rows that were drawn, int64, ascending.
        points: where each of them lies, float64 `[rows, 2]`.
        shares: of the variance of all rows, along each of the two.
        left_out: rows with inf or nan, which count nowhere.
    """

    ids: torch.Tensor
    points: torch.Tensor
    shares: tuple[float, float]
    left_out: int


def flatten(table: StoredTable, sample: int, always: torch.Tensor, seed: int = 0, block_bytes: int = BLOCK_BYTES) -> Flat:
    """The first two principal components over all rows, and on them `sample` rows drawn at random and the rows `always`.

    Two passes over the table, in float64, of which the second reads the sample only.

    Raises:
        ConfigError: the table is too wide, or has no finite row.
        CheckpointError: the checkpoint is damaged.
    """
    if table.columns > MOST_COLUMNS:
        raise ConfigError(f"table {table.name!r} has {table.columns} columns; a map is made of at most {MOST_COLUMNS}")
    count, mean, scatter = _moments(table, block_bytes)
    if not count:
        raise ConfigError(f"table {table.name!r} has no row without inf or nan to draw")
    values, vectors = torch.linalg.eigh(scatter)
    axes = torch.zeros(table.columns, 2, dtype=torch.float64)
    found = vectors.flip(1)[:, :2]  # ascending in `eigh`; one column has only one
    axes[:, : found.shape[1]] = found * _signs(found)
    total = float(values.clamp(min=0).sum())
    shares = [float(value) / total if total > 0 else 0.0 for value in values.flip(0)[:2].clamp(min=0)]
    ids, points = [], []
    for block in table.blocks(_sample(table, sample, always, seed), block_bytes):
        finite = block.values.isfinite().all(1)
        ids.append(block.ids[finite])
        points.append((block.values[finite].double() - mean) @ axes)
    return Flat(torch.cat(ids), torch.cat(points), (shares[0], shares[1] if len(shares) > 1 else 0.0), table.rows - count)


def _moments(table: StoredTable, block_bytes: int) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many finite rows there are, their mean, and the sum of outer products of their distances from it.

    Blocks are put together by Chan's formula: sums of squares minus squares of sums would cancel where the mean is large.
    """
    count, mean = 0, torch.zeros(table.columns, dtype=torch.float64)
    scatter = torch.zeros(table.columns, table.columns, dtype=torch.float64)
    for block in table.blocks(block_bytes=block_bytes):
        rows = block.values[block.values.isfinite().all(1)].double()
        if not len(rows):
            continue
        own = rows.mean(0)
        apart = own - mean
        rows -= own
        scatter += rows.T @ rows + torch.outer(apart, apart) * (count * len(rows) / (count + len(rows)))
        mean += apart * (len(rows) / (count + len(rows)))
        count += len(rows)
    return count, mean, scatter


def _signs(vectors: torch.Tensor) -> torch.Tensor:
    """A direction has two signs: take the one whose largest number is positive, so that a map stays as it was."""
    largest = vectors.abs().argmax(0, keepdim=True)
    return torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)


def _sample(table: StoredTable, sample: int, always: torch.Tensor, seed: int) -> torch.Tensor:
    """Ids, ascending."""
    rows = table.rows
    if table.ids is not None:
        return torch.cat([table.ids[_drawn(rows, sample, seed)], always]).unique()
    return torch.cat([_drawn(rows, sample, seed), always]).unique()


def _drawn(rows: int, sample: int, seed: int) -> torch.Tensor:
    """Numbers below `rows`."""
    if sample >= rows:
        return torch.arange(rows)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < sample:  # distinct ones, without a permutation of all rows
        drawn = torch.cat([drawn, torch.randint(rows, (2 * sample,), generator=generator)])
        unique, first = drawn.unique(return_inverse=True)
        order = torch.full((len(unique),), len(drawn)).scatter_reduce_(0, first, torch.arange(len(drawn)), "amin")
        drawn = drawn[order.sort().values]
    return drawn[:sample]
