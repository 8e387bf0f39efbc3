"""From a stream of interactions to what training needs: a hold-out, counts, and global batches dealt to ranks.

    scan      one pass: users, items, what is held out of each user, counts of the rest
    batches   one pass an epoch, held to the first: held-out rows dropped, shuffled through a buffer, cut into global batches

Every rank reads the whole stream and keeps its part of each batch, so what a global batch holds depends on the data and the seed
alone, never on the number of ranks. Memory is O(users + items + shuffle buffer), and while scanning some 40 bytes an interaction
where more or others are held out than one of each user by hash.

Legend: n interactions of a chunk, B a global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import numpy as np
import torch

from shardembed.errors import DataError
from shardembed.recipes.data.bad import ENOUGH_DROPPED, NONE, Dropped, refuse_wrong_file
from shardembed.recipes.data.fingerprint import FirstPass, Seen, fingerprint_of, held_to
from shardembed.recipes.data.held import TEST, VALIDATION, Held
from shardembed.recipes.data.holding import Labelled, OneEach, grown
from shardembed.recipes.data.numbering import Ids
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.plausible import Plausible
from shardembed.recipes.data.questions import Questions
from shardembed.recipes.data.sides import NOTHING_KNOWN, Known
from shardembed.recipes.data.source import Chunk, Source, concatenate
from shardembed.recipes.data.stream import rank_slice, rank_start, rechunked, shuffled, shuffler
from shardembed.recipes.metrics import History
from shardembed.recipes.split_config import LEAVE_ONE_OUT, RankingSplitConfig

INTERACTION = "interaction"  # what a row holds, in messages
NARROW = 16  # places for each id that are cheaper to go through than sorting is


@dataclass(frozen=True)
class Interactions:
    """A scanned source.

    Attributes:
        source: what was scanned.
        users: largest id + 1.
        items: largest id + 1.
        seen: of each part of the source, what later passes are held to.
        held_rows: the numbers of the rows that are held out, int64, ascending.
        held: what is held out for the result.
        validation: what is held out for evaluations during training, where that is something else.
        user_counts: training interactions by user, int64, held-out ones not counted.
        item_counts: training interactions by item, int64, held-out ones not counted.
        dropped: what the source left out.
        ids: behind the numbers of users and items, where they are others.
        known: features of users and items.
    """

    source: Source
    users: int
    items: int
    seen: tuple[Seen, ...]
    held_rows: np.ndarray
    held: Held
    validation: Held | None
    user_counts: np.ndarray
    item_counts: np.ndarray
    dropped: Dropped = NONE
    ids: Ids | None = None
    known: Known = NOTHING_KNOWN

    @property
    def rows(self) -> int:
        """All interactions, held-out ones included, dropped ones not."""
        return sum(one.rows for one in self.seen)

    def describe(self) -> str:
        """What the data are known by: hardly any other data have the same."""
        ids = "" if self.ids is None else f", ids {self.ids}"
        order = fingerprint_of(self.seen)
        known = f", features {self.known}" if str(self.known) else ""
        return f"{self.rows} interactions of {self.users} users and {self.items} items{ids}{known}, in the order {order}"

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
                kept = self.kept(row, len(chunk))
                row += len(chunk)
                yield chunk[kept]

    def kept(self, first: int, count: int) -> np.ndarray:
        """Which of `count` rows from `first` on are for training: bool `[count]`."""
        low, high = np.searchsorted(self.held_rows, [first, first + count])
        found = np.ones(count, bool)
        found[self.held_rows[low:high] - first] = False
        return found

    def with_room(self, users: int, items: int) -> Interactions:
        """With at least so many of both, of which the additional ones have no interactions."""
        more_users, more_items = max(0, users - self.users), max(0, items - self.items)
        return replace(
            self,
            users=self.users + more_users,
            items=self.items + more_items,
            user_counts=np.pad(self.user_counts, (0, more_users)),
            item_counts=np.pad(self.item_counts, (0, more_items)),
            known=self.known.with_room(more_users, more_items),
        )

    def to_read(self) -> Interactions:
        """What reading needs of this, for worker processes, each of which gets a copy."""
        none = np.empty(0, np.int64)
        return replace(
            self, held=Held(none, none, none), validation=None, user_counts=none, item_counts=none, ids=None, known=NOTHING_KNOWN
        )

    def questions(self, validation: bool = False) -> Questions:
        """What is asked for the result, or for evaluations during training."""
        held = self.validation if validation else self.held
        assert held is not None
        before = None if validation else self.validation  # met by then, beside training
        return Questions.of(self, held, partial(self.histories, before=before), before)

    def histories(self, users: np.ndarray, before: Held | None = None) -> History:
        """The training items of `users`, by their place in `users`, and those of `before`: one pass over the data."""
        place = np.full(self.users, -1, np.int64)
        place[users] = np.arange(len(users))
        trained = ((place[chunk.users], chunk.items) for chunk in self.training())
        met = trained if before is None else chain(trained, [(place[before.owners], before.items)])
        mine = [(owners[owners >= 0], items[owners >= 0]) for owners, items in met]
        owners, items = (np.concatenate(column) for column in zip(*mine, strict=True))
        order = np.argsort(owners, kind="stable")
        return History(owners[order], items[order])


def scan(source: Source, seed: int, ids: Ids | None = None, split: RankingSplitConfig = LEAVE_ONE_OUT) -> Interactions:
    """Count users and items, and hold out what `split` says; ids: behind their numbers.

    Each row gets a hash of (seed, row number), by which splits that are random choose. One pass.

    Raises:
        DataError: there are no interactions, the source had to leave out more than it gave, or ids are not numbered from 0; or
            nothing is left to train on.
    """
    # Arrays by id, which grow as larger ids come: who has which is not known before the end.
    user_counts, item_counts = np.empty(0, np.int64), np.empty(0, np.int64)
    holding = OneEach(seed) if split == LEAVE_ONE_OUT else Labelled(seed, split)
    row = 0
    dropped = NONE
    passes = [FirstPass() for _ in source.parts]
    plausible = Plausible(source)
    for part, chunk in _chunks(source):
        passes[part].see(chunk)
        dropped += chunk.dropped
        if len(dropped) > ENOUGH_DROPPED:
            refuse_wrong_file(source.name, row + len(chunk), dropped, INTERACTION)
        if not len(chunk):
            continue
        users, items = int(chunk.users.max()) + 1, int(chunk.items.max()) + 1
        plausible.check((users - 1, items - 1), row + len(chunk))
        user_counts, item_counts = grown(user_counts, users), grown(item_counts, items)
        holding.see(chunk, row)
        _count(user_counts, chunk.users)
        _count(item_counts, chunk.items)
        row += len(chunk)
    refuse_wrong_file(source.name, row, dropped, INTERACTION)
    if row == 0:
        raise DataError(f"{source.name}: there are no interactions in it")
    users, items = int(np.flatnonzero(user_counts)[-1]) + 1, int(np.flatnonzero(item_counts)[-1]) + 1
    taken = holding.held(user_counts[:users], source.name)
    user_counts = user_counts[:users] - np.bincount(taken.users, minlength=users)
    item_counts = item_counts[:items] - np.bincount(taken.items, minlength=items)
    held, validation = (taken.of(label) for label in (TEST, VALIDATION))
    seen = tuple(one.seen for one in passes)
    return Interactions(
        source,
        users,
        items,
        seen,
        np.sort(taken.rows),
        held,
        validation if split.validation else None,
        user_counts,
        item_counts,
        dropped,
        ids,
    )


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
        first: the number of the first in the global batch.
    """

    users: torch.Tensor
    items: torch.Tensor
    first: int


def pairs_of(batch: Chunk, rank: int, world_size: int) -> Pairs:
    """What `rank` takes of a global batch."""
    mine = rank_slice(batch, rank, world_size)
    users, items = (torch.from_numpy(np.ascontiguousarray(ids)) for ids in (mine.users, mine.items))
    return Pairs(users, items, rank_start(len(batch), rank, world_size), global_size=len(batch))


def _count(counts: np.ndarray, ids: np.ndarray) -> None:
    """Add how often each of `ids` occurs. What that takes goes by their number, not by how large they are."""
    if ids.max() < NARROW * len(ids):  # many times faster
        found = np.bincount(ids)
        counts[: len(found)] += found
        return
    found, times = np.unique(ids, return_counts=True)
    counts[found] += times
