"""Streams of rows, whatever a row holds: cut anew, shuffled through a buffer, dealt to ranks, picked by a hash of their number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import numpy as np

from shardembed.inputs.hashing import hash_integers


class Rows(Protocol):
    """Consecutive rows, which are cut and picked like a numpy array."""

    def __len__(self) -> int: ...

    def __getitem__(self: RowsT, rows: slice | np.ndarray) -> RowsT: ...


RowsT = TypeVar("RowsT", bound=Rows)
Join = Callable[[list[RowsT]], RowsT]  # of at least one


def rechunked(chunks: Iterable[RowsT], size: int, join: Join[RowsT]) -> Iterator[RowsT]:
    """The same rows in chunks of `size`; the last one may be shorter."""
    waiting: list[RowsT] = []
    count = 0
    for chunk in chunks:
        waiting.append(chunk)
        count += len(chunk)
        if count >= size:
            merged = join(waiting)
            whole = count // size * size
            for start in range(0, whole, size):
                yield merged[start : start + size]
            waiting, count = [merged[whole:]], count - whole
    if count:
        yield join(waiting)


def shuffled(chunks: Iterable[RowsT], buffer_rows: int, rng: np.random.Generator, join: Join[RowsT]) -> Iterator[RowsT]:
    """Shuffle through a buffer: each round tops it up by a quarter, permutes it, and lets that quarter go.

    A row can move back without bound, and forward by about the buffer's size. 0 keeps the order of the source.
    """
    if buffer_rows == 0:
        yield from chunks
        return
    quarter = shuffled_at_once(buffer_rows)
    held: RowsT | None = None
    for chunk in rechunked(chunks, quarter, join):
        held = chunk if held is None else join([held, chunk])
        if len(held) > buffer_rows:
            held = held[rng.permutation(len(held))]
            yield held[buffer_rows:]
            held = held[:buffer_rows]
    if held is not None:
        yield held[rng.permutation(len(held))]


def shuffled_at_once(buffer_rows: int) -> int:
    """Rows that a buffer lets go in one round."""
    return max(1, buffer_rows // 4)


def shuffler(seed: int, epoch: int) -> np.random.Generator:
    """What shuffles an epoch: the same on every rank."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))


def rank_slice(batch: RowsT, rank: int, world_size: int) -> RowsT:
    """The part of a global batch that `rank` gets: contiguous, sizes differ by one at most, possibly empty."""
    return batch[rank_start(len(batch), rank, world_size) : rank_start(len(batch), rank + 1, world_size)]


def rank_start(size: int, rank: int, world_size: int) -> int:
    """Where in a global batch of `size` the part of `rank` begins."""
    share, rest = divmod(size, world_size)
    return rank * share + min(rank, rest)


def hash_rows(seed: int, first: int, count: int) -> np.ndarray:
    """A hash of (seed, row) for rows first, first + 1, ...: uint64 `[count]`, never 0. The hash of `se.Hashing`."""
    return hash_integers(np.arange(first, first + count, dtype=np.uint64), seed) | np.uint64(1)
