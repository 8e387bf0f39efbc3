"""Sequences made up from a Markov chain, so that what a trained model reaches can be compared with what can be reached.

From each item a user goes on to one of a few successors, of which the first is the likeliest; sometimes to any item, by
popularity. Every item is a successor of as many others, so what is popular overall says little of what comes next. The
interactions of all users come mixed, and not in the order of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np

from shardembed.recipes.data.likely import ranked_by
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.metrics import History
from shardembed.recipes.sequence_config import ChainConfig

SHORTEST = 3  # one item to begin with, one to learn from, one held out


class PlantedSequences:
    """The interactions of a `ChainConfig`, made in memory on first use and the same for the same settings."""

    def __init__(self, config: ChainConfig) -> None:
        self._config = config
        self.successors = min(config.successors, config.items - 1)
        rng = np.random.default_rng(config.seed)
        # The items stand in a ring, and the j-th successor comes `steps[j]` places later: none is one's own, none is twice.
        self._ring = rng.permutation(config.items)
        self._place = np.argsort(self._ring)
        self._steps = rng.permutation(config.items - 1)[: self.successors] + 1
        weights = 1.0 / np.arange(1, self.successors + 1)
        self._weights = (1 - config.noise) * weights / weights.sum()
        popularity = np.arange(1, config.items + 1, dtype=np.float64) ** -config.zipf
        rng.shuffle(popularity)
        self._popularity = popularity / popularity.sum()
        self._rng = rng

    @property
    def name(self) -> str:
        c = self._config
        return f"generator ({c.users:,} users, {c.items:,} items, {self.successors} successors, {c.noise:.0%} noise, seed {c.seed})"

    @property
    def parts(self) -> tuple[str]:
        return (self.name,)

    def chunks(self, part: int = 0) -> Iterator[Chunk]:
        yield self._all

    def place(self, column: int, value: int) -> str:
        return self.name

    @cached_property
    def _all(self) -> Chunk:
        config, rng = self._config, self._rng
        lengths = rng.integers(SHORTEST, max(SHORTEST, 2 * config.length - SHORTEST), size=config.users, endpoint=True)
        first, users, items, times = rng.random(config.users), [], [], []
        walking = np.arange(config.users)
        current = self._popular(rng, config.users)
        for step in range(int(lengths.max())):
            users.append(walking)
            items.append(current)
            times.append(((first[walking] + step) * 1_000_000).astype(np.int64))
            going = lengths[walking] > step + 1
            walking, current = walking[going], self._after(current[going], rng)
        mixed = rng.permutation(sum(map(len, users)))
        return Chunk(np.concatenate(users)[mixed], np.concatenate(items)[mixed], times=np.concatenate(times)[mixed])

    def _popular(self, rng: np.random.Generator, count: int) -> np.ndarray:
        drawn = np.searchsorted(np.cumsum(self._popularity), rng.random(count), side="right")
        return np.minimum(drawn, self._config.items - 1)

    def _after(self, items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        chosen = np.searchsorted(np.cumsum(self._weights), rng.random(len(items)), side="right")
        followed = self._successors(items, np.minimum(chosen, self.successors - 1))
        return np.where(chosen < self.successors, followed, self._popular(rng, len(items)))

    def _successors(self, items: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return self._ring[(self._place[items] + self._steps[numbers]) % self._config.items]

    def positions(self, last: np.ndarray, wanted: History, history: History) -> np.ndarray:
        """Where relevant items stand when all items are ranked by how likely they come after `last`: no model can rank better.

        Args:
            last: of each user what came before, int64 `[Q]`. wanted: relevant items of theirs. history: items left out.
        """

        def likely(block: slice) -> np.ndarray:
            rows = np.arange(len(last[block]))
            found = np.tile(self._config.noise * self._popularity, (len(rows), 1))
            for number, weight in enumerate(self._weights):
                found[rows, self._successors(last[block], np.full(len(rows), number))] += weight
            return found

        return ranked_by(likely, len(last), self._config.items, wanted, history)
