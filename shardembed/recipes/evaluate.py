"""Recall and NDCG of a trained model and of the popularity baseline; every rank evaluates its share of the users."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console

from shardembed.comm import Comm
from shardembed.recipes import metrics, report
from shardembed.recipes.config import EvalConfig
from shardembed.recipes.data.interactions import Interactions
from shardembed.recipes.data.source import concatenate
from shardembed.recipes.data.stream import hash_rows
from shardembed.recipes.metrics import History, Score
from shardembed.recipes.models.index import ItemIndex
from shardembed.recipes.models.two_tower import TwoTower

BATCH_USERS = 4096  # of all ranks together: each search reads the whole item table
BATCH_ENTRIES = 1 << 22  # list entries of all ranks together, which bounds memory where histories are long


@dataclass(frozen=True)
class Evaluation:
    """`model` and `popularity` hold the sums over all ranks' users."""

    k: int
    model: Score
    popularity: Score

    @property
    def score(self) -> float:
        return self.model.recall

    def show(self, console: Console) -> None:
        report.show_retrieval(console, self.k, self.model, self.popularity)

    def to_json(self) -> dict[str, float | int]:
        k = self.k
        return {
            f"recall@{k}": self.model.recall,
            f"popularity_recall@{k}": self.popularity.recall,
            f"ndcg@{k}": self.model.ndcg,
            f"popularity_ndcg@{k}": self.popularity.ndcg,
            "evaluated_users": int(self.model.users),
        }


def evaluate(model: TwoTower, data: Interactions, config: EvalConfig, seed: int) -> Evaluation:
    """Rank all items for every held-out user, training items left out. Collective.

    Args:
        seed: which users are taken when `config.users` asks for only some.
    """
    comm = Comm.of()
    everyone = chosen_users(data, config.users, seed)
    mine = everyone[comm.rank :: comm.world_size]
    held, history = data.held_item[mine], _history(data, mine)
    index = ItemIndex(model)
    by_popularity = metrics.popularity_ranks(data.item_counts)
    total = Score()
    for batch in _batches(everyone, data, config.k, comm.world_size):
        # Users are dealt in turn, so rank r's part of everyone[a:b] is a stretch of its own list.
        low, high = (max(0, -(-(edge - comm.rank) // comm.world_size)) for edge in (batch.start, batch.stop))
        users = torch.from_numpy(mine[low:high]).to(model.log_expected.device)
        ranked = index.topk(users, batch.length).cpu().numpy()
        positions = metrics.positions_in_lists(ranked, held[low:high], history.of(low, high), data.items)
        total += metrics.score(positions, config.k)
    baseline = metrics.score(metrics.positions_by_popularity(by_popularity, held, history), config.k)
    parts = [total.users, total.hits, total.gain, baseline.users, baseline.hits, baseline.gain]
    sums = comm.all_reduce("sum recall and NDCG", torch.tensor(parts, dtype=torch.float64, device=model.log_expected.device))
    numbers = sums.tolist()
    return Evaluation(config.k, Score(*numbers[:3]), Score(*numbers[3:]))


def chosen_users(data: Interactions, limit: int | None, seed: int) -> np.ndarray:
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


def _batches(users: np.ndarray, data: Interactions, k: int, world_size: int) -> Iterator[_Batch]:
    """Cut the users, shortest histories first, so that lists are no longer than their batch needs. The same on every rank."""
    lengths = np.minimum(data.user_counts[users] + k, data.items)
    start = 0
    while start < len(users):
        stop = min(start + BATCH_USERS, len(users))
        while stop - start > world_size and (stop - start) * lengths[stop - 1] > BATCH_ENTRIES:
            stop = start + (stop - start + 1) // 2
        yield _Batch(start, stop, int(lengths[stop - 1]))
        start = stop


def _history(data: Interactions, users: np.ndarray) -> History:
    """The training items of `users`, by their place in `users`: one pass over the data."""
    number = np.full(data.users, -1, np.int64)
    number[users] = np.arange(len(users))
    kept = concatenate([chunk[number[chunk.users] >= 0] for chunk in data.training()])
    owners = number[kept.users]
    order = np.argsort(owners, kind="stable")
    return History(owners[order], kept.items[order])
