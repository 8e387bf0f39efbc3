"""What users have taken, read from interactions: all of it, whatever training held out.

Legend: U users that are asked for, n interactions of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shardembed.inputs.vocab import Counts
from shardembed.recipes.config import DataConfig
from shardembed.recipes.data.choose import open_numbered, open_source
from shardembed.recipes.data.lists import stretches
from shardembed.recipes.data.source import Chunk, all_chunks
from shardembed.recipes.sequence_config import SequenceDataConfig
from shardembed.recipes.use.opened import Opened

InteractionsConfig = DataConfig | SequenceDataConfig


@dataclass(frozen=True)
class Taken:
    """Of each user the items, oldest first where the data have times, else in the order of the data.

    Attributes:
        items: ids, user after user, int64 `[n]`.
        starts: where each user's begin, int64 `[U + 1]`.
    """

    items: np.ndarray
    starts: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """How many each user has, int64 `[U]`."""
        return np.diff(self.starts)

    def of(self, users: np.ndarray, last: int | None = None) -> Taken:
        """Those of some users, by their places `[u]`, or the `last` few of each."""
        counts = self.counts[users]
        kept = counts if last is None else np.minimum(counts, last)
        items = self.items[stretches(self.starts[users] + counts - kept, kept)]
        return Taken(items, np.append(0, np.cumsum(kept)))

    def only(self, kept: np.ndarray) -> Taken:
        """Without some of the interactions: `kept` says which stay, bool `[n]`."""
        sums = np.append(0, np.cumsum(kept))
        return Taken(self.items[kept], sums[self.starts])

    @property
    def owners(self) -> np.ndarray:
        """Of each interaction the place of its user, int64 `[n]`."""
        return np.repeat(np.arange(len(self.starts) - 1), self.counts)


def of_data(opened: Opened, paths: Sequence[str]) -> InteractionsConfig:
    """The settings for reading the run's data, or other files, whose ids are texts where those of the run are: a short file would
    often say otherwise.
    """
    config = opened.config.data
    texts = {name for name, side in ((config.user, opened.users), (config.item, opened.items)) if side.names is not None}
    return config.model_copy(update={"path": tuple(paths) or config.path, "texts": tuple(texts | set(config.texts))})


def taken_by(config: InteractionsConfig, users: np.ndarray) -> Taken:
    """What these users, ids `[U]`, each once, have taken. One pass over the data.

    Raises:
        DataError: the data are not there, or cannot be read.
    """
    order = np.argsort(users, kind="stable")
    ascending = users[order]
    owners, items, keys = [], [], []
    for chunk in raw_chunks(config):
        if not len(chunk) or not len(ascending):
            continue
        places = np.minimum(np.searchsorted(ascending, chunk.users), len(ascending) - 1)
        mine = ascending[places] == chunk.users
        owners.append(order[places[mine]])
        items.append(chunk.items[mine])
        fine = np.zeros(len(chunk), np.int64) if chunk.nanoseconds is None else chunk.nanoseconds
        times = np.zeros(len(chunk), np.int64) if chunk.times is None else chunk.times
        keys.append(np.stack([fine[mine], times[mine]]))
    if not owners:
        return Taken(np.empty(0, np.int64), np.zeros(len(users) + 1, np.int64))
    owner = np.concatenate(owners)
    # Stable: those of one moment stay in the order of the data, as in training.
    by = np.lexsort((*np.concatenate(keys, axis=1), owner))
    return Taken(np.concatenate(items)[by], np.append(0, np.cumsum(np.bincount(owner, minlength=len(users)))))


def counts_of_items(config: InteractionsConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids of items, ascending; how often each occurs). One pass over the data; raises as `taken_by`."""
    found = _counted(chunk.items for chunk in raw_chunks(config))
    counts = found.of_integers()
    return found.integers[0], counts


def users_of(config: InteractionsConfig) -> np.ndarray:
    """The ids of all users, ascending. One pass over the data; raises as `taken_by`."""
    found = _counted(chunk.users for chunk in raw_chunks(config))
    found.of_integers()  # which merges them
    return found.integers[0]


def raw_chunks(config: InteractionsConfig) -> Iterator[Chunk]:
    """All interactions, with ids and not numbers."""
    if config.path is not None or config.any_ids is None:
        yield from all_chunks(open_source(config))
        return
    source, ids = open_numbered(config)  # what is made up has numbers
    assert ids is not None
    for chunk in all_chunks(source):
        yield Chunk(ids.users[chunk.users], ids.items[chunk.items], times=chunk.times, nanoseconds=chunk.nanoseconds)


def _counted(columns: Iterator[np.ndarray]) -> Counts:
    found = Counts()
    for column in columns:
        found.add(column)
    return found
