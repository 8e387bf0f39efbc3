"""From a stream of interactions to sequences: what each user took, by time, and the last of it held out.

    scan      one pass, then a sort: each user's items by time, those of one moment in the order of the file
    batches   users in an order that seed and epoch decide; each gives the last items of its training sequence

Every rank holds all sequences, about 8 bytes an interaction (while scanning 60), so what a global batch holds depends on the data
and the seed alone. Users are numbered anew: nothing is kept for ids that do not occur.

Legend: u users, n interactions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from shardembed.errors import DataError
from shardembed.recipes.data.bad import NONE, Dropped
from shardembed.recipes.data.interactions import ENOUGH_DROPPED, refuse_wrong_file
from shardembed.recipes.data.lists import stretches
from shardembed.recipes.data.numbering import Ids
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.plausible import Plausible
from shardembed.recipes.data.source import Source, all_chunks, concatenate
from shardembed.recipes.data.stream import rank_start, shuffler
from shardembed.recipes.metrics import History


@dataclass(frozen=True)
class SequencePart(Part):
    """A rank's part of a global batch.

    Attributes:
        items: int64 `[n]`, sequence after sequence.
        lengths: of the sequences, int64 `[b]`, on the CPU.
        targets: how many the whole batch has.
        first: the place of the first sequence in the global batch.
    """

    items: torch.Tensor
    lengths: np.ndarray
    targets: int
    first: int


@dataclass(frozen=True)
class Sequences:
    """A scanned source.

    Attributes:
        source: what was scanned.
        items: largest id + 1.
        taken: the items of all users, user after user, each one's by time, int64 `[n]`.
        starts: where in `taken` each user begins, int64 `[u + 1]`.
        held_users: users with at least two interactions, whose last is held out; ascending.
        held_item: the last item of each user, int64 `[u]`, which is held out of those in `held_users`.
        user_counts: training interactions by user, int64, held-out ones not counted.
        item_counts: training interactions by item, int64, held-out ones not counted.
        training_users: with something to predict in training: at least two interactions beside the one held out.
        dropped: what the source left out.
        ids: behind the numbers of items, where they are others.
    """

    source: Source
    items: int
    taken: np.ndarray
    starts: np.ndarray
    held_users: np.ndarray
    held_item: np.ndarray
    user_counts: np.ndarray
    item_counts: np.ndarray
    training_users: np.ndarray
    dropped: Dropped = NONE
    ids: Ids | None = None

    @staticmethod
    def of(source: Source, taken: np.ndarray, starts: np.ndarray, dropped: Dropped = NONE, ids: Ids | None = None) -> Sequences:
        counts, held_item = np.diff(starts), taken[starts[1:] - 1]
        held_users = np.flatnonzero(counts > 1)
        trained, items = counts - (counts > 1), int(taken.max()) + 1
        item_counts = np.bincount(taken, minlength=items) - np.bincount(held_item[held_users], minlength=items)
        training_users = np.flatnonzero(trained > 1)
        return Sequences(source, items, taken, starts, held_users, held_item, trained, item_counts, training_users, dropped, ids)

    def with_room(self, items: int) -> Sequences:
        """With at least so many items, of which the additional ones have no interactions."""
        more = max(0, items - self.items)
        return replace(self, items=self.items + more, item_counts=np.pad(self.item_counts, (0, more)))

    @property
    def users(self) -> int:
        return len(self.starts) - 1

    @property
    def rows(self) -> int:
        return len(self.taken)

    def histories(self, users: np.ndarray) -> History:
        """All training items of `users`, by their place in `users`."""
        counts = self.user_counts[users]
        return History(np.repeat(np.arange(len(users)), counts), self.taken[stretches(self.starts[users], counts)])

    def last(self, users: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The last `length` training items of each of `users`, one user after the other, and how many each has."""
        counts = np.minimum(self.user_counts[users], length)
        return self.taken[stretches(self.starts[users] + self.user_counts[users] - counts, counts)], counts

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """The global batches of one epoch: users int64 `[B]`, the last one shorter."""
        order = self.training_users[shuffler(seed, epoch).permutation(len(self.training_users))]
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def part(self, users: np.ndarray, rank: int, world_size: int, longest: int) -> SequencePart:
        """Of a global batch, what `rank` takes: the last `longest` items, the last of which is only a target."""
        first, end = (rank_start(len(users), one, world_size) for one in (rank, rank + 1))
        items, lengths = self.last(users[first:end], longest)
        targets = int(np.minimum(self.user_counts[users], longest).sum()) - len(users)
        return SequencePart(torch.from_numpy(items), lengths, targets, first, global_size=len(users))

    def describe(self) -> str:
        """What the data are known by: hardly any other data have the same."""
        checksum = zlib.crc32(self.taken.tobytes(), zlib.crc32(self.starts.tobytes()))
        ids = "" if self.ids is None else f", ids {self.ids}"
        return f"{self.rows} interactions of {self.users} users with {self.items} items{ids}, in the order {checksum:08x}"


def scan(source: Source, ids: Ids | None = None) -> Sequences:
    """Read all interactions and sort them; ids: behind the numbers of items.

    Raises:
        DataError: there are none, or none to train on, the source had to leave out more than it gave, or items are not numbered
            from 0.
    """
    chunks, dropped, rows = [], NONE, 0
    for chunk in all_chunks(source):
        dropped += chunk.dropped
        rows += len(chunk)
        if len(dropped) > ENOUGH_DROPPED:
            refuse_wrong_file(source, rows, dropped)
        chunks.append(chunk)
    refuse_wrong_file(source, rows, dropped)
    if not rows:
        raise DataError(f"{source.name}: there are no interactions in it")
    largest = max(int(chunk.items.max()) for chunk in chunks if len(chunk))
    Plausible(source, (1,)).check((largest,), rows, whole=True)
    whole = concatenate(chunks)
    # A second copy of all interactions is let go of before the sort takes its own memory.
    chunks.clear()
    users = np.unique(whole.users, return_inverse=True)[1].reshape(-1)
    keys = [one for one in (whole.nanoseconds, whole.times) if one is not None]
    order = np.lexsort((*keys, users))  # stable
    starts = np.append(0, np.cumsum(np.bincount(users)))
    data = Sequences.of(source, whole.items[order], starts, dropped, ids)
    if not len(data.training_users):
        raise DataError(
            f"{source.name}: no user has three interactions: one is held out, and of two others the first says the second. Is "
            "data.user the right column?"
        )
    return data
