"""Recall and NDCG of a trained model, of the popularity baseline and, where that is known, of what made the data.

Every rank evaluates its share of the users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from rich.console import Console

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.recipes import metrics, report
from shardembed.recipes.common import RankingConfig
from shardembed.recipes.data.stream import hash_rows
from shardembed.recipes.metrics import History, Score
from shardembed.recipes.together import on_all

BATCH_ENTRIES = 1 << 22  # list entries of all ranks together, which bounds memory where histories are long
NO_HISTORY = History(np.empty(0, np.int64), np.empty(0, np.int64))


class HeldOut(Protocol):
    """Interactions of which one of each user is held out; arrays as in `Interactions`."""

    @property
    def items(self) -> int: ...

    @property
    def held_users(self) -> np.ndarray: ...

    @property
    def held_item(self) -> np.ndarray: ...

    @property
    def user_counts(self) -> np.ndarray: ...

    @property
    def item_counts(self) -> np.ndarray: ...

    def histories(self, users: np.ndarray) -> History: ...


class Ranker(Protocol):
    """What ranks all items for users; searches at most `most_users` of all ranks at once."""

    most_users: int

    def topk(self, users: torch.Tensor, k: int) -> torch.Tensor: ...


# (users, their held-out items, what is left out) -> the places of these in the ranking of what made the data.
Oracle = Callable[[np.ndarray, np.ndarray, History], np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """How well held-out items are found: sums over all ranks' users.

    Attributes:
        k: how many items are asked for.
        repeats: users that were not asked: they had met their held-out item in training.
        model: what the model reaches.
        popularity: what the baseline of popular items reaches.
        generator: what the tastes that made the data reach, where they are known.
    """

    k: int
    repeats: int
    model: Score
    popularity: Score
    generator: Score | None = None

    @property
    def score(self) -> float:
        return self.model.recall

    def show(self, console: Console) -> None:
        report.show_retrieval(console, self.k, self.repeats, self.model, self.popularity, self.generator)

    def to_json(self) -> dict[str, float | int]:
        k = self.k
        generator = self.generator
        known = {} if generator is None else {f"generator_recall@{k}": generator.recall, f"generator_ndcg@{k}": generator.ndcg}
        return {
            f"recall@{k}": self.model.recall,
            f"popularity_recall@{k}": self.popularity.recall,
            f"ndcg@{k}": self.model.ndcg,
            f"popularity_ndcg@{k}": self.popularity.ndcg,
            **known,
            "evaluated_users": int(self.model.users),
            "repeats_left_out": self.repeats,
        }


def evaluate(ranker: Ranker, data: HeldOut, config: RankingConfig, seed: int, oracle: Oracle | None = None) -> Evaluation:
    """Rank all items for every held-out user. Collective.

    Without `config.repeats`, what a user met in training is no candidate for that user, and no question either: users who had met
    their held-out item are not asked.

    Args:
        seed: which users are taken when `config.users` asks for only some.

    Raises:
        DataError: on all ranks: the data are not what they were when they were scanned.
    """
    comm, device = Comm.of(), default_device()
    everyone = chosen_users(data, config.users, seed)
    places = np.arange(comm.rank, len(everyone), comm.world_size)
    history = NO_HISTORY
    if not config.repeats:
        history = on_all(comm, "read the histories", lambda: data.histories(everyone[places]))
    asked = metrics.unmet(data.held_item[everyone[places]], history, data.items)
    repeats, places, history = float((~asked).sum()), places[asked], history.only(asked)
    mine, held = everyone[places], data.held_item[everyone[places]]
    lengths = np.minimum(data.user_counts[everyone] * (not config.repeats) + config.k, data.items)
    total = Score()
    for batch in _batches(lengths, ranker.most_users, comm.world_size):  # as many on every rank, whoever is asked
        low, high = np.searchsorted(places, [batch.start, batch.stop])
        ranked = ranker.topk(torch.from_numpy(mine[low:high]), batch.length).cpu().numpy()
        # With room for one more: a list may end with a number below all items.
        positions = metrics.positions_in_lists(ranked, held[low:high], history.of(low, high), data.items + 1)
        total += metrics.score(positions, config.k)
    by_popularity = metrics.positions_by_popularity(metrics.popularity_ranks(data.item_counts), held, history)
    scores = [total, metrics.score(by_popularity, config.k)]
    if oracle is not None:
        scores.append(metrics.score(oracle(mine, held, history), config.k))
    sums = [repeats, *(each for one in scores for each in (one.users, one.hits, one.gain))]
    left_out, *found = comm.all_reduce("sum recall and NDCG", torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
    return Evaluation(config.k, int(left_out), *(Score(*found[place : place + 3]) for place in range(0, len(found), 3)))


def chosen_users(data: HeldOut, limit: int | None, seed: int) -> np.ndarray:
    """The users to evaluate, those with the fewest training interactions first: the same on every rank."""
    users = data.held_users
    if limit is not None and limit < len(users):
        users = users[np.sort(np.argsort(hash_rows(seed, 0, len(users)), kind="stable")[:limit])]
    return users[np.argsort(data.user_counts[users], kind="stable")]


@dataclass(frozen=True)
class _Batch:
    """Users from `start` up to `stop`, whose lists must have `length` entries."""

    start: int
    stop: int
    length: int


def _batches(lengths: np.ndarray, most_users: int, world_size: int) -> Iterator[_Batch]:
    """Cut the users, whose lists must have these lengths, shortest first, so that none is much longer than it must be. The same on
    every rank.
    """
    start = 0
    while start < len(lengths):
        stop = min(start + most_users, len(lengths))
        while stop - start > world_size and (stop - start) * lengths[stop - 1] > BATCH_ENTRIES:
            stop = start + (stop - start + 1) // 2
        yield _Batch(start, stop, int(lengths[stop - 1]))
        start = stop
