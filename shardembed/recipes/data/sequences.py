"""From a stream of interactions to sequences: what each user took, by time, and some of it held out, as a rule the last.

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
from functools import partial

import numpy as np
import torch

from shardembed.errors import DataError
from shardembed.recipes.data.bad import ENOUGH_DROPPED, NONE, Dropped, refuse_wrong_file
from shardembed.recipes.data.held import TEST, TRAINING, VALIDATION, Held, labels
from shardembed.recipes.data.holding import time_keys
from shardembed.recipes.data.interactions import INTERACTION
from shardembed.recipes.data.lists import stretches
from shardembed.recipes.data.numbering import Ids
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.plausible import Plausible
from shardembed.recipes.data.questions import Questions
from shardembed.recipes.data.source import Source, all_chunks, concatenate
from shardembed.recipes.data.stream import hash_rows, rank_start, shuffler
from shardembed.recipes.metrics import History
from shardembed.recipes.split_config import LAST, RankingSplitConfig


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
        taken: the items of all users, user after user: of each those for training by time, then those for validation, then those
            for the result, int64 `[n]`.
        starts: where in `taken` each user begins, int64 `[u + 1]`.
        held: what is held out for the result.
        validation: what is held out for evaluations during training, where that is something else.
        user_counts: training interactions by user, int64, held-out ones not counted.
        item_counts: training interactions by item, int64, held-out ones not counted.
        training_users: with something to predict in training: at least two interactions beside those held out.
        dropped: what the source left out.
        ids: behind the numbers of items, where they are others.
    """

    source: Source
    items: int
    taken: np.ndarray
    starts: np.ndarray
    held: Held
    validation: Held | None
    user_counts: np.ndarray
    item_counts: np.ndarray
    training_users: np.ndarray
    dropped: Dropped = NONE
    ids: Ids | None = None

    @staticmethod
    def of(
        source: Source,
        taken: np.ndarray,
        starts: np.ndarray,
        found: np.ndarray,
        validates: bool = False,
        dropped: Dropped = NONE,
        ids: Ids | None = None,
    ) -> Sequences:
        """found: what each of `taken` is for, int8 `[n]`, ascending for each user, as `labels` says."""
        items, users = int(taken.max()) + 1, np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        trained = np.bincount(users[found == TRAINING], minlength=len(starts) - 1)
        item_counts = np.bincount(taken[found == TRAINING], minlength=items)
        held, validation = (Held.of(users[found == label], taken[found == label]) for label in (TEST, VALIDATION))
        training_users = np.flatnonzero(trained > 1)
        apart = validation if validates else None
        return Sequences(source, items, taken, starts, held, apart, trained, item_counts, training_users, dropped, ids)

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

    def questions(self, validation: bool = False) -> Questions:
        """What is asked for the result, or for evaluations during training."""
        held = self.validation if validation else self.held
        assert held is not None
        before = None if validation else self.validation
        return Questions.of(self, held, partial(self.histories, met=self.met(validation)), before)

    def met(self, validation: bool) -> np.ndarray:
        """How many interactions each user had before the questions of `questions`, int64 `[u]`: the first of its sequence."""
        if self.validation is None or validation:
            return self.user_counts
        return self.user_counts + np.bincount(self.validation.owners, minlength=self.users)

    def histories(self, users: np.ndarray, met: np.ndarray | None = None) -> History:
        """The items that `users` met in training, by their place in `users`, or the first so many of each."""
        counts = (self.user_counts if met is None else met)[users]
        return History(np.repeat(np.arange(len(users)), counts), self.taken[stretches(self.starts[users], counts)])

    def last(self, users: np.ndarray, length: int, met: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The last `length` training items of each of `users`, one user after the other, and how many each has; or the last of the
        first so many of each.
        """
        ends = (self.user_counts if met is None else met)[users]
        counts = np.minimum(ends, length)
        return self.taken[stretches(self.starts[users] + ends - counts, counts)], counts

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


def scan(source: Source, ids: Ids | None = None, split: RankingSplitConfig = LAST, seed: int = 0) -> Sequences:
    """Read all interactions, sort them, hold out what `split` says; ids: behind the numbers of items. seed: of splits by hash.

    Raises:
        DataError: there are none, or none to train on, the source had to leave out more than it gave, or items are not numbered
            from 0.
    """
    chunks, dropped, rows = [], NONE, 0
    for chunk in all_chunks(source):
        dropped += chunk.dropped
        rows += len(chunk)
        if len(dropped) > ENOUGH_DROPPED:
            refuse_wrong_file(source.name, rows, dropped, INTERACTION)
        chunks.append(chunk)
    refuse_wrong_file(source.name, rows, dropped, INTERACTION)
    if not rows:
        raise DataError(f"{source.name}: there are no interactions in it")
    largest = max(int(chunk.items.max()) for chunk in chunks if len(chunk))
    Plausible(source, (1,)).check((largest,), rows, whole=True)
    whole = concatenate(chunks)
    # A second copy of all interactions is let go of before the sort takes its own memory.
    chunks.clear()
    users = np.unique(whole.users, return_inverse=True)[1].reshape(-1)
    times = time_keys(whole)
    found = labels(users, times if split.by_time else [hash_rows(seed, 0, rows)], split, source.name)
    order = np.lexsort((*reversed(times), found, users))  # stable
    starts = np.append(0, np.cumsum(np.bincount(users)))
    data = Sequences.of(source, whole.items[order], starts, found[order], split.validation, dropped, ids)
    if not len(data.training_users):
        raise DataError(
            f"{source.name}: no user has three interactions: one is held out, and of two others the first says the second. Is "
            "data.user the right column?"
            if split == LAST
            else f"{source.name}: no user has two interactions beside what data.split holds out: the first of two says the second"
        )
    return data
