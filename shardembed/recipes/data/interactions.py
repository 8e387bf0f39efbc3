"""From a stream of interactions to what training needs: a hold-out, counts, and global batches dealt to ranks.

    scan      one pass: users, items, the interaction held out of each user, counts of the rest
    batches   one pass an epoch, held to the first: held-out rows dropped, shuffled through a buffer, cut into global batches

Every rank reads the whole stream and keeps its part of each batch, so what a global batch holds depends on the data and the seed
alone, never on the number of ranks. Memory is O(users + items + shuffle buffer).

Legend: n interactions of a chunk, B a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from shardembed.errors import DataError
from shardembed.recipes.data.bad import NONE, Dropped
from shardembed.recipes.data.fingerprint import FirstPass, Seen, fingerprint_of, held_to
from shardembed.recipes.data.numbering import Ids
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.plausible import Plausible
from shardembed.recipes.data.source import Chunk, Source, concatenate
from shardembed.recipes.data.stream import hash_rows, rank_slice, rechunked, shuffled, shuffler
from shardembed.recipes.metrics import History

NO_ROW = -1
NARROW = 16  # places for each id that are cheaper to go through than sorting is
ENOUGH_DROPPED = 100_000  # to tell that a file is the wrong one before its end


@dataclass(frozen=True)
class Interactions:
    """A scanned source.

    Attributes:
        source: what was scanned.
        users: largest id + 1.
        items: largest id + 1.
        seen: of each part of the source, what later passes are held to.
        held_row: the row number held out of each user, int64 `[users]`, NO_ROW where nothing is.
        held_item: the item held out of each user, int64 `[users]`.
        user_counts: training interactions by user, int64, held-out ones not counted.
        item_counts: training interactions by item, int64, held-out ones not counted.
        dropped: what the source left out.
        ids: behind the numbers of users and items, where they are others.
    """

    source: Source
    users: int
    items: int
    seen: tuple[Seen, ...]
    held_row: np.ndarray
    held_item: np.ndarray
    user_counts: np.ndarray
    item_counts: np.ndarray
    dropped: Dropped = NONE
    ids: Ids | None = None

    @property
    def rows(self) -> int:
        """All interactions, held-out ones included, dropped ones not."""
        return sum(one.rows for one in self.seen)

    def describe(self) -> str:
        """What the data are known by: hardly any other data have the same."""
        ids = "" if self.ids is None else f", ids {self.ids}"
        order = fingerprint_of(self.seen)
        return f"{self.rows} interactions of {self.users} users and {self.items} items{ids}, in the order {order}"

    @property
    def held_users(self) -> np.ndarray:
        """The users with a held-out interaction, ascending."""
        return np.flatnonzero(self.held_row != NO_ROW)

    @property
    def training_rows(self) -> int:
        return int(self.user_counts.sum())

    def training(self) -> Iterator[Chunk]:
        """The interactions that are not held out, in the order of the source.

        Raises:
            DataError: the data are not what they were when they were scanned.
        """
        row = 0
        for part, (seen, name) in enumerate(zip(self.seen, self.source.parts, strict=True)):
            for chunk in held_to(seen, partial(self.source.chunks, part), name, concatenate):
                kept = self.held_row[chunk.users] != np.arange(row, row + len(chunk))
                row += len(chunk)
                yield chunk[kept]

    def with_room(self, users: int, items: int) -> Interactions:
        """With at least so many of both, of which the additional ones have no interactions."""
        more_users, more_items = max(0, users - self.users), max(0, items - self.items)
        return replace(
            self,
            users=self.users + more_users,
            items=self.items + more_items,
            held_row=np.pad(self.held_row, (0, more_users), constant_values=NO_ROW),
            held_item=np.pad(self.held_item, (0, more_users), constant_values=NO_ROW),
            user_counts=np.pad(self.user_counts, (0, more_users)),
            item_counts=np.pad(self.item_counts, (0, more_items)),
        )

    def to_read(self) -> Interactions:
        """What reading needs of this, for worker processes, each of which gets a copy."""
        none = np.empty(0, np.int64)
        return replace(self, held_item=none, user_counts=none, item_counts=none, ids=None)

    def histories(self, users: np.ndarray) -> History:
        """The training items of `users`, by their place in `users`: one pass over the data."""
        number = np.full(self.users, -1, np.int64)
        number[users] = np.arange(len(users))
        kept = concatenate([chunk[number[chunk.users] >= 0] for chunk in self.training()])
        owners = number[kept.users]
        order = np.argsort(owners, kind="stable")
        return History(owners[order], kept.items[order])


def scan(source: Source, seed: int, ids: Ids | None = None) -> Interactions:
    """Count users and items, and hold one interaction out of every user that has at least two; ids: behind their numbers.

    Each row gets a hash of (seed, row number); a user's row with the largest hash is held out. One pass, O(users + items) memory.

    Raises:
        DataError: there are no interactions, the source had to leave out more than it gave, or ids are not numbered from 0.
    """
    # Arrays by id, which grow as larger ids come: who has which is not known before the end.
    best = np.empty(0, np.uint64)
    held_row, held_item, user_counts, item_counts = (np.empty(0, np.int64) for _ in range(4))
    row = 0
    dropped = NONE
    passes = [FirstPass() for _ in source.parts]
    plausible = Plausible(source)
    for part, chunk in _chunks(source):
        passes[part].see(chunk)
        dropped += chunk.dropped
        if len(dropped) > ENOUGH_DROPPED:
            refuse_wrong_file(source, row + len(chunk), dropped)
        if not len(chunk):
            continue
        users, items = int(chunk.users.max()) + 1, int(chunk.items.max()) + 1
        plausible.check((users - 1, items - 1), row + len(chunk))
        best, user_counts = _grown(best, users, 0), _grown(user_counts, users, 0)
        held_row, held_item = _grown(held_row, users, NO_ROW), _grown(held_item, users, NO_ROW)
        item_counts = _grown(item_counts, items, 0)
        _hold_out(chunk, row, hash_rows(seed, row, len(chunk)), best, held_row, held_item)
        _count(user_counts, chunk.users)
        _count(item_counts, chunk.items)
        row += len(chunk)
    refuse_wrong_file(source, row, dropped)
    if row == 0:
        raise DataError(f"{source.name}: there are no interactions in it")
    users, items = int(np.flatnonzero(user_counts)[-1]) + 1, int(np.flatnonzero(item_counts)[-1]) + 1
    single = user_counts[:users] < 2  # a user's only interaction stays in training
    held_row, held_item = np.where(single, NO_ROW, held_row[:users]), np.where(single, NO_ROW, held_item[:users])
    taken = held_item[~single]
    user_counts = user_counts[:users] - ~single
    item_counts = item_counts[:items] - np.bincount(taken, minlength=items)
    seen = tuple(one.seen for one in passes)
    return Interactions(source, users, items, seen, held_row, held_item, user_counts, item_counts, dropped, ids)


def _chunks(source: Source) -> Iterator[tuple[int, Chunk]]:
    return ((part, chunk) for part in range(len(source.parts)) for chunk in source.chunks(part))


def global_batches(data: Interactions, batch_size: int, buffer_rows: int, seed: int, epoch: int) -> Iterator[Chunk]:
    """The global batches of one epoch: `[B]` each, the last one shorter. The same for the same seed and epoch."""
    mixed = shuffled(data.training(), buffer_rows, shuffler(seed, epoch), concatenate)
    return rechunked(mixed, batch_size, concatenate)


@dataclass(frozen=True)
class Pairs(Part):
    """A rank's part of a global batch.

    Attributes:
        users: int64 `[b]`.
        items: int64 `[b]`, the one that each of the users took.
    """

    users: torch.Tensor
    items: torch.Tensor


def pairs_of(batch: Chunk, rank: int, world_size: int) -> Pairs:
    mine = rank_slice(batch, rank, world_size)
    users, items = (torch.from_numpy(np.ascontiguousarray(ids)) for ids in (mine.users, mine.items))
    return Pairs(users, items, global_size=len(batch))


def refuse_wrong_file(source: Source, kept: int, dropped: Dropped) -> None:
    """
    Raises:
        DataError: more rows were dropped than kept.
    """
    if len(dropped) > kept:
        raise DataError(
            f"{source.name}: {len(dropped):,} of the first {kept + len(dropped):,} rows hold no interaction ({dropped}); "
            f"is this the right file, with the right columns? The first: {dropped.places[0]}"
        )


def _hold_out(chunk: Chunk, first: int, hashes: np.ndarray, best: np.ndarray, held_row: np.ndarray, held_item: np.ndarray) -> None:
    """Let the chunk's rows compete with the rows held so far; the arrays by user are changed in place."""
    # By user, and within one by hash: the last row of each user is its largest.
    order = np.lexsort((hashes, chunk.users))
    users = chunk.users[order]
    winners = order[np.append(users[1:] != users[:-1], True)]  # of each user in the chunk, the largest hash
    winners = winners[hashes[winners] > best[chunk.users[winners]]]
    users = chunk.users[winners]
    best[users], held_row[users], held_item[users] = hashes[winners], first + winners, chunk.items[winners]


def _count(counts: np.ndarray, ids: np.ndarray) -> None:
    """Add how often each of `ids` occurs. What that takes goes by their number, not by how large they are."""
    if ids.max() < NARROW * len(ids):  # many times faster
        found = np.bincount(ids)
        counts[: len(found)] += found
        return
    found, times = np.unique(ids, return_counts=True)
    counts[found] += times


def _grown(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    """`array` with room for `size` elements, and for as many again when it has to move."""
    if size <= len(array):
        return array
    grown = np.full(max(size, 2 * len(array)), fill, dtype=array.dtype)
    grown[: len(array)] = array
    return grown
