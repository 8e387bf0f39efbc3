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
from shardembed.recipes.data.lists import stretches
from shardembed.recipes.data.questions import Questions
from shardembed.recipes.data.stream import hash_rows
from shardembed.recipes.metrics import History, Score
from shardembed.recipes.together import on_all

BATCH_ENTRIES = 1 << 22  # list entries of all ranks together, which bounds memory where histories are long
NO_HISTORY = History(np.empty(0, np.int64), np.empty(0, np.int64))


class Ranker(Protocol):
    """What ranks all items for users; searches at most `most_users` of all ranks at once."""

    most_users: int

    def topk(self, users: torch.Tensor, k: int) -> torch.Tensor: ...


# (users, what is relevant for them, what is left out) -> the places of these in the ranking of what made the data.
Oracle = Callable[[np.ndarray, History, History], np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """How well held-out items are found: sums over all ranks' users.

    Attributes:
        k: how many items are asked for.
        repeats: held-out items that were not asked for: their users had met them.
        strangers: users that were not asked: they have nothing in training.
        model: what the model reaches.
        popularity: what the baseline of popular items reaches.
        generator: what the tastes that made the data reach, where they are known.
    """

    k: int
    repeats: int
    strangers: int
    model: Score
    popularity: Score
    generator: Score | None = None

    @property
    def score(self) -> float:
        return self.model.recall

    def show(self, console: Console) -> None:
        left_out = report.LeftOut(self.repeats, self.strangers)
        report.show_retrieval(console, self.k, left_out, self.model, self.popularity, self.generator)

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
            "strangers_left_out": self.strangers,
        }


def evaluate(ranker: Ranker, asked: Questions, config: RankingConfig, seed: int, oracle: Oracle | None = None) -> Evaluation:
    """Rank all items for every user with something held out. Collective.

    Without `config.repeats`, what a user had met is no candidate for that user, and no question either: users who had met all that
    is held out of them are not asked.

    Args:
        seed: which users are taken when `config.users` asks for only some.

    Raises:
        DataError: on all ranks: the data are not what they were when they were scanned.
    """
    comm, device = Comm.of(), default_device()
    everyone = chosen_users(asked, config.users, seed)
    places = np.arange(comm.rank, len(everyone), comm.world_size)
    history = NO_HISTORY
    if not config.repeats:
        history = on_all(comm, "read the histories", lambda: asked.histories(everyone[places]))
    held = _held_of(asked, everyone[places])
    wanted = metrics.relevant(held, history, asked.items)
    distinct = metrics.relevant(held, NO_HISTORY, asked.items)
    kept = np.zeros(len(places), bool)
    kept[wanted.owners] = True
    repeats = float(len(distinct.items) - len(wanted.items))
    places, history, wanted = places[kept], history.only(kept), wanted.only(kept)
    mine = everyone[places]
    lengths = np.minimum(asked.met_counts[everyone] * (not config.repeats) + config.k, asked.items)
    positions = np.empty(len(wanted.items), np.int64)
    for batch in batches(lengths, ranker.most_users, comm.world_size):  # as many on every rank, whoever is asked
        low, high = np.searchsorted(places, [batch.start, batch.stop])
        ranked = ranker.topk(torch.from_numpy(mine[low:high]), batch.length).cpu().numpy()
        first, last = np.searchsorted(wanted.owners, [low, high])
        # With room for one more: a list may end with a number below all items.
        found = metrics.positions_in_lists(ranked, wanted.of(low, high), history.of(low, high), asked.items + 1)
        positions[first:last] = np.where(found < batch.length, found, asked.items)
    by_popularity = metrics.positions_by_popularity(metrics.popularity_ranks(asked.item_counts), wanted, history)
    scores = [metrics.score(one, wanted.owners, config.k) for one in (positions, by_popularity)]
    if oracle is not None:
        scores.append(metrics.score(oracle(mine, wanted, history), wanted.owners, config.k))
    sums = [repeats, *(each for one in scores for each in (one.users, one.found, one.gain))]
    left_out, *found = comm.all_reduce("sum recall and NDCG", torch.tensor(sums, dtype=torch.float64, device=device)).tolist()
    reached = (Score(*found[place : place + 3]) for place in range(0, len(found), 3))
    return Evaluation(config.k, int(left_out), asked.strangers, *reached)


def _held_of(asked: Questions, users: np.ndarray) -> History:
    """What is held out of `users`, by their place among them."""
    held = asked.held
    number = np.searchsorted(held.users, users)
    counts = held.starts[number + 1] - held.starts[number]
    return History(np.repeat(np.arange(len(users)), counts), held.items[stretches(held.starts[number], counts)])


def chosen_users(asked: Questions, limit: int | None, seed: int) -> np.ndarray:
    """The users to evaluate, those who had met the least first: the same on every rank."""
    users = asked.held.users
    if limit is not None and limit < len(users):
        users = users[np.sort(np.argsort(hash_rows(seed, 0, len(users)), kind="stable")[:limit])]
    return users[np.argsort(asked.met_counts[users], kind="stable")]


@dataclass(frozen=True)
class Batch:
    """Users who are searched for at once.

    Attributes:
        start: the first of them.
        stop: behind the last.
        length: that their lists must have.
    """

    start: int
    stop: int
    length: int


def batches(lengths: np.ndarray, most_users: int, world_size: int) -> Iterator[Batch]:
    """Cut the users, whose lists must have these lengths, shortest first, so that none is much longer than it must be. The same on
    every rank.
    """
    start = 0
    while start < len(lengths):
        stop = min(start + most_users, len(lengths))
        while stop - start > world_size and (stop - start) * lengths[stop - 1] > BATCH_ENTRIES:
            stop = start + (stop - start + 1) // 2
        yield Batch(start, stop, int(lengths[stop - 1]))
        start = stop
