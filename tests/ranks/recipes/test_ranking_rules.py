"""What an evaluation asks and ranks, from raw rows by brute force: for every split, with repeats and without, for both kinds of
models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shardembed.inputs.hashing import hash_integers
from shardembed.recipes.common import RankingConfig
from shardembed.recipes.data.interactions import scan
from shardembed.recipes.data.sequences import scan as scan_sequences
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.evaluate import Evaluation, evaluate
from shardembed.recipes.split_config import RankingSplitConfig
from tests.harness import run_ranks

ROWS, USERS, ITEMS, K, SEED = 500, 60, 25, 4, 3
SPLITS: list[dict[str, Any]] = [
    {"kind": "leave_one_out"},
    {"kind": "leave_one_out", "validation": True},
    {"kind": "last"},
    {"kind": "last", "validation": True},
    {"kind": "ratio", "share": 0.3},
    {"kind": "ratio", "share": 0.3, "validation": True},
    {"kind": "time", "share": 0.3},
    {"kind": "time", "share": 0.3, "validation": True},
    {"kind": "time", "start": 30},
]
KINDS = ("two_tower", "sasrec")


def rows() -> np.ndarray:
    """User, item, time; most users meet some item twice, many rows have the same time, and some users are new at the end."""
    rng = np.random.default_rng(4)
    found = np.stack([rng.integers(USERS, size=ROWS), rng.integers(ITEMS, size=ROWS), rng.integers(40, size=ROWS)], 1)
    found[:5] = [[USERS - 1, item, 39] for item in range(5)]
    return found[(found[:, 0] != USERS - 1) | (found[:, 2] == 39)]


class Listed:
    """A source of the rows, in two chunks."""

    name = "listed"
    parts = ("listed",)

    def chunks(self, part: int) -> Any:
        for some in np.split(rows(), [200]):
            yield Chunk(some[:, 0], some[:, 1], times=some[:, 2])

    def place(self, column: int, value: int) -> str:
        raise NotImplementedError


class Scores:
    """Ranks by numbers drawn for each user and item; few users at a time, so that there are several batches."""

    most_users = 7

    def __init__(self) -> None:
        self.of = np.random.default_rng(5).random((USERS, ITEMS))

    def topk(self, users: torch.Tensor, k: int) -> torch.Tensor:
        return torch.from_numpy(np.argsort(-self.of[users.numpy()], axis=1)[:, :k].copy())


def evaluated(rank: int, world_size: int, users: int | None) -> dict[tuple[str, int, bool, bool], Evaluation]:
    """By kind, split, whether repeats are asked, and whether it is for validation."""
    found = {}
    for kind in KINDS:
        for number, settings in enumerate(SPLITS):
            split = RankingSplitConfig(**settings)
            if kind == "sasrec" and split.validation and not split.by_time:
                continue
            data = scan(Listed(), SEED, split=split) if kind == "two_tower" else scan_sequences(Listed(), None, split, SEED)
            for repeats in (False, True):
                config = RankingConfig(k=K, repeats=repeats, users=users)
                for validation in (False, True)[: 1 + split.validation]:
                    asked = data.questions(validation)
                    found[kind, number, repeats, validation] = evaluate(Scores(), asked, config, SEED)
    return found


def held_out(split: dict[str, Any]) -> tuple[set[int], set[int]]:
    """The rows for the result, and those for validation, by the words of the documentation."""
    given, test, validation = rows(), set(), set()
    hashes = hash_integers(np.arange(len(given), dtype=np.uint64), SEED) | np.uint64(1)
    times = given[:, 2]
    if split["kind"] == "time":
        if "start" in split:
            return {row for row in range(len(given)) if times[row] >= split["start"]}, set()
        each = int(split["share"] * len(given))
        # The most that whole moments, the newest first, make without being more.
        for part in (test, validation)[: 1 + split.get("validation", False)]:
            for moment in sorted(set(times) - {times[row] for row in test | validation}, reverse=True):
                more = {row for row in range(len(given)) if times[row] == moment}
                if len(part) + len(more) > each:
                    break
                part |= more
        return test, validation
    for user in range(USERS):
        mine = [row for row in range(len(given)) if given[row, 0] == user]
        mine.sort(key=lambda row: (times[row], row) if split["kind"] == "last" else (hashes[row], row))
        if split["kind"] == "ratio":
            parts = [split["share"]] * (1 + split.get("validation", False))
            sizes = recbole(len(mine), [1 - sum(parts), *parts])
            ends = np.cumsum(sizes)
            test |= set(mine[ends[-2] :])
            validation |= set(mine[ends[0] : ends[-2]])
            continue
        if len(mine) > 1:
            test.add(mine[-1])
        if len(mine) > 2 and split.get("validation"):
            validation.add(mine[-2])
    return test, validation


def recbole(total: int, ratios: list[float]) -> list[int]:
    """How many of a user's interactions RecBole 1.2.1 puts into each part (`Dataset._calcu_split_ids`, in other words)."""
    counts = [int(ratio * total) for ratio in ratios]
    counts[0] = total - sum(counts[1:])
    for part in range(len(ratios) - 1, 0, -1):
        if counts[0] > 1 and 0 < ratios[part] * total < 1:
            counts[part] += 1
            counts[0] -= 1
    return counts


def by_hand(split: dict[str, Any], repeats: bool, for_validation: bool) -> dict[str, float]:
    """Recall, NDCG of the scores and of popularity, users asked and left out."""
    given = rows()
    test, validation = held_out(split)
    training = set(range(len(given))) - test - validation
    asked, met = (validation, training) if for_validation else (test, training | validation)
    popular = np.bincount(given[sorted(training), 1], minlength=ITEMS)
    orders = {"model": np.argsort(-Scores().of, axis=1), "popularity": np.tile(np.argsort(-popular, kind="stable"), (USERS, 1))}
    sums = {f"{who}_{what}": 0.0 for who in ("model", "popularity") for what in ("recall", "ndcg")}
    users = left_out = strangers = 0
    for user in range(USERS):
        wanted = {int(given[row, 1]) for row in asked if given[row, 0] == user}
        known = {int(given[row, 1]) for row in met if given[row, 0] == user}
        if wanted and not any(given[row, 0] == user for row in training):
            strangers += 1
            continue
        if not repeats:
            left_out += len(wanted & known)
            wanted -= known
        if not wanted:
            continue
        users += 1
        for who, order in orders.items():
            best = [item for item in order[user].tolist() if repeats or item not in known][:K]
            sums[f"{who}_recall"] += len(wanted & set(best)) / len(wanted)
            gain = sum(1 / np.log2(place + 2) for place, item in enumerate(best) if item in wanted)
            sums[f"{who}_ndcg"] += gain / sum(1 / np.log2(place + 2) for place in range(min(K, len(wanted))))
    return {name: value / users for name, value in sums.items()} | {"users": users, "repeats": left_out, "strangers": strangers}


def as_numbers(found: Evaluation) -> dict[str, float]:
    scores = {"model": found.model, "popularity": found.popularity}
    reached = {f"{who}_{what}": getattr(one, what) for who, one in scores.items() for what in ("recall", "ndcg")}
    return reached | {"users": found.model.users, "repeats": found.repeats, "strangers": found.strangers}


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, int, bool, bool], Evaluation]:
    return run_ranks(1, evaluated, None)[0]


@pytest.mark.parametrize("number", range(len(SPLITS)), ids=lambda number: "-".join(map(str, SPLITS[number].values())))
def test_recall_and_ndcg_are_those_of_the_raw_rows(alone: Any, number: int) -> None:
    for (kind, split, repeats, validation), found in alone.items():
        if split == number:
            expected = by_hand(SPLITS[number], repeats, validation)
            assert as_numbers(found) == pytest.approx(expected), (kind, repeats, validation)
            assert repeats or expected["repeats"], "some held-out items were met before"
            assert expected["users"] > 10


def test_another_number_of_ranks_or_users_changes_nothing_else(alone: Any) -> None:
    for dealt in run_ranks(2, evaluated, None):
        for case, found in dealt.items():
            assert as_numbers(found) == pytest.approx(as_numbers(alone[case])), case
    some = run_ranks(1, evaluated, 20)[0]
    for case, found in some.items():
        assert 10 < found.model.users <= 20, case
    for case, found in run_ranks(2, evaluated, 20)[1].items():
        assert as_numbers(found) == pytest.approx(as_numbers(some[case])), case


def test_users_who_are_new_are_not_asked(alone: Any) -> None:
    assert alone["two_tower", 8, False, False].strangers == alone["sasrec", 8, True, False].strangers > 0
