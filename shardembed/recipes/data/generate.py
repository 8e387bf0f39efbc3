"""Interactions with planted tastes, so that learning can be seen without any file.

Items are dealt to tastes at random, and each has a Zipf popularity. A user has one main taste and one side taste; an interaction
picks one of the two, then an item of that taste by popularity. What a user likes therefore shows in what others of the same taste
took, which a model can learn, while recommending what is popular overall misses most of it. No user meets an item twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from shardembed.recipes.config import GeneratorConfig
from shardembed.recipes.data.likely import ranked_by
from shardembed.recipes.data.made_features import check_made, made_values
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.metrics import History

MAIN_TASTE = 0.8  # share of a user's interactions that follow the main taste
OVERDRAW = 1.5  # repeated items are dropped, so more are drawn at first


class GeneratedInteractions:
    """The interactions of a `GeneratorConfig`, made in memory on first use and the same for the same settings.

    Repeats are dropped rather than drawn again for ever, so there can be fewer than `interactions` where items are few.

    features: those of `made_features` that rows have too.
    """

    def __init__(self, config: GeneratorConfig, features: Sequence[FeatureConfig] = ()) -> None:
        check_made(features)
        self._config, self._features = config, tuple(features)

    @property
    def name(self) -> str:
        c = self._config
        return f"generator ({c.users:,} users, {c.items:,} items, {c.tastes} tastes, Zipf {c.zipf:g}, seed {c.seed})"

    @property
    def parts(self) -> tuple[str]:
        return (self.name,)

    def chunks(self, part: int = 0) -> Iterator[Chunk]:
        yield self._all

    def place(self, column: int, value: int) -> str:
        return self.name

    def positions(self, users: np.ndarray, wanted: History, history: History) -> np.ndarray:
        """Where relevant items of `users` `[Q]` stand when all are ranked by how likely the user's tastes make them: no model can
        rank better. history: items left out of the ranking.
        """
        _, tastes, taste_of_item, popularity = self._made
        within = popularity / np.bincount(taste_of_item, popularity, self._config.tastes)[taste_of_item]

        def likely(block: slice) -> np.ndarray:
            main, side = (tastes[users[block], which][:, None] == taste_of_item for which in (0, 1))
            return (MAIN_TASTE * main + (1 - MAIN_TASTE) * side) * within

        return ranked_by(likely, len(users), self._config.items, wanted, history)

    @property
    def _all(self) -> Chunk:
        return self._made[0]

    @cached_property
    def _made(self) -> tuple[Chunk, np.ndarray, np.ndarray, np.ndarray]:
        """The interactions; of each user the main and the side taste, of each item its taste and its popularity."""
        config = self._config
        rng = np.random.default_rng(config.seed)
        wanted = int(config.interactions * OVERDRAW)
        users = rng.integers(config.users, size=wanted)
        tastes, followed = _tastes_of(users, config, rng)
        items, taste_of_item, popularity = _items_of_tastes(followed, config, rng)
        # The first of each pair, so that what is dropped does not depend on the order of ids.
        first = np.unique(users * config.items + items, return_index=True)[1]
        kept = np.sort(first)[: config.interactions]
        found = Chunk(users[kept], items[kept])
        columns = []
        for feature in self._features:
            numbers, own = (found.users, tastes[:, 0]) if feature.of == "user" else (found.items, taste_of_item)
            columns.append(made_values(feature, own, config.tastes, config.seed)[numbers])
        return replace(found, features=tuple(columns)), tastes, taste_of_item, popularity


def _tastes_of(users: np.ndarray, config: GeneratorConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The main and the side taste of each user `[users, 2]`, and the one that each interaction follows, `[n]`."""
    tastes = rng.integers(config.tastes, size=(config.users, 2))
    side = (rng.random(len(users)) >= MAIN_TASTE).astype(np.int64)
    return tastes, tastes[users, side]


def _items_of_tastes(
    tastes: np.ndarray, config: GeneratorConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An item of each taste in `tastes` `[n]`, drawn by popularity; and of each item its taste and its popularity, `[items]`."""
    popularity = np.arange(1, config.items + 1, dtype=np.float64) ** -config.zipf
    rng.shuffle(popularity)
    taste_of_item = rng.permutation(config.items) % config.tastes
    order = np.argsort(taste_of_item, kind="stable")  # the items, taste by taste
    edges = np.searchsorted(taste_of_item[order], np.arange(config.tastes + 1))
    sums = np.concatenate([[0.0], np.cumsum(popularity[order])])
    low, high = sums[edges[tastes]], sums[edges[tastes + 1]]
    # One draw on the cumulated popularity of the taste's own stretch. A taste without items (more tastes than items) draws its
    # neighbour's; rounding may touch the edge of a stretch, which is harmless.
    drawn = np.searchsorted(sums, low + rng.random(len(tastes)) * (high - low), side="right") - 1
    return order[np.minimum(drawn, config.items - 1)], taste_of_item, popularity
