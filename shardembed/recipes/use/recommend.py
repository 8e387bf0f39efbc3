"""Recommendations of an opened run: users by name, items by name, exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from shardembed.comm.comm import Comm
from shardembed.config.hints import nearest
from shardembed.config.scalars import within
from shardembed.errors import ConfigError, DataError
from shardembed.recipes.data.numbering import NOBODY
from shardembed.recipes.sequence_config import SequenceConfig
from shardembed.recipes.together import on_all
from shardembed.recipes.use.catalog import array_of
from shardembed.recipes.use.opened import Opened
from shardembed.recipes.use.ranking import Asks, ByHistory, ByTower, Ranking, best_items, queries_at_first
from shardembed.recipes.use.taken import Taken, counts_of_items, of_data, taken_by, users_of

ALL = "all"
PIECE, PIECE_ENTRIES = 1 << 20, 1 << 24  # users, and items of theirs, that are answered before the next ones
MOST_K = 1 << 20
Unknown = Literal["leave_out", "popular"]
UNKNOWN: tuple[Unknown, ...] = get_args(Unknown)
NAMED = 5  # unknown users that are told by name


@dataclass(frozen=True)
class Wish:
    """What is asked for.

    Attributes:
        k: items a user.
        exclude_seen: what a user has in the data is not recommended to that user.
        data: files of interactions in the place of the run's, for what users have seen and for popularity.
        history: files of interactions in the place of the run's, from which a model of sequences goes on.
        unknown: what users get whom the model does not know: nothing, or what is popular.
    """

    k: int = 10
    exclude_seen: bool = False
    data: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
    unknown: Unknown = "leave_out"

    def check(self, opened: Opened) -> None:
        """
        Raises:
            ConfigError: it cannot be had of this run.
        """
        if within(self.k, 1, MOST_K) is None:
            raise ConfigError(f"k={self.k!r}: it must be a whole number from 1 to {MOST_K:,}")
        if self.unknown not in UNKNOWN:
            raise ConfigError(f"unknown={self.unknown!r} is not one of {', '.join(UNKNOWN)}{nearest(str(self.unknown), UNKNOWN)}")
        if self.history and not isinstance(opened.config, SequenceConfig):
            raise ConfigError("history: two towers know users by their rows, and not by what they took; leave it out")
        if self.data and not (self.exclude_seen or self.unknown == "popular"):
            raise ConfigError(
                "data: it says what users have seen, and what is popular: ask for exclude_seen or unknown='popular' too"
            )


@dataclass
class Answered:
    """What became of the users, filled while they are answered.

    Attributes:
        users: how many were asked for.
        unknown: how many of them the model does not know.
        some: names of the first few of these.
    """

    users: int = 0
    unknown: int = 0
    some: list[str] = field(default_factory=list)


def recommended(opened: Opened, users: Any, wish: Wish, told: Answered) -> Iterator[pa.Table]:
    """Tables of user, rank (from 1), item and score (null where popularity decides), in the order of the users, on rank 0; on other
    ranks tables without rows. Collective: all ranks pass the same.

    Args:
        users: names, as `Catalog.ids_of` takes them; or "all": whom the model knows.

    Raises:
        ConfigError, DataError: on all ranks.
    """
    wish.check(opened)
    comm = Comm.of()
    ranking = Ranking(opened)
    asked = on_all(comm, "find the users", lambda: Users.of(opened, users, wish))
    popular = on_all(comm, "count items", lambda: _popular(opened, wish)) if wish.unknown == "popular" else None
    piece = min(PIECE, max(1, PIECE_ENTRIES // wish.k))  # for each of which the data are read once
    for start in range(0, max(1, len(asked.ids)), piece):
        yield _piece(opened, ranking, asked.between(start, start + piece), wish, popular, told)


def queries_of(opened: Opened, users: Any, history: tuple[str, ...] = ()) -> np.ndarray:
    """The queries of users, float32 `[q, D]` on rank 0; elsewhere none. Collective.

    Raises:
        DataError: on all ranks: the model does not know one of them. And as `recommended`.
    """
    comm = Comm.of()
    wish = Wish(history=history)
    wish.check(opened)
    asked = on_all(comm, "find the users", lambda: Users.given(opened, users))
    distinct, places = np.unique(asked.ids, return_inverse=True)
    known, asks, _ = on_all(comm, "read what users have taken", lambda: _known(opened, distinct, wish))
    if not known.all():
        stranger = int(np.flatnonzero(~known[places])[0])
        raise DataError(f"user {stranger} (from 0) of those given, {asked.name(stranger)!r}, is unknown to the model")
    found = queries_at_first(asks, len(distinct))
    return found[places] if comm.rank == 0 else found


@dataclass(frozen=True)
class Users:
    """Who is asked for.

    Attributes:
        ids: int64 `[m]`, of which some may be the same.
        names: as they were given, an Arrow array `[m]`; None where all are asked for.
    """

    ids: np.ndarray
    names: pa.Array | None

    @staticmethod
    def given(opened: Opened, users: Any) -> Users:
        """
        Raises:
            DataError: as `Catalog.ids_of`.
        """
        names = array_of(users, "user")
        return Users(opened.users.ids_of(names), names)

    @staticmethod
    def of(opened: Opened, users: Any, wish: Wish) -> Users:
        """As `given`, or all. Of sequences it reads the data for that."""
        if not isinstance(users, str) or users != ALL:
            return Users.given(opened, users)
        sequences = isinstance(opened.config, SequenceConfig)
        return Users(users_of(of_data(opened, wish.history)) if sequences else opened.users.ids, None)

    def between(self, start: int, stop: int) -> Users:
        return Users(self.ids[start:stop], None if self.names is None else self.names[start:stop])

    def name(self, place: int) -> Any:
        return None if self.names is None else self.names[place].as_py()


def _piece(opened: Opened, ranking: Ranking, users: Users, wish: Wish, popular: np.ndarray | None, told: Answered) -> pa.Table:
    comm = Comm.of()
    distinct, places = np.unique(users.ids, return_inverse=True)
    known, asks, seen = on_all(comm, "read what users have taken", lambda: _known(opened, distinct, wish))
    found_scores, found = best_items(
        ranking, asks, int(known.sum()), len(opened.items), wish.k, seen and seen.of(np.flatnonzero(known))
    )
    scores, items = np.full((len(distinct), wish.k), -np.inf, np.float32), np.full((len(distinct), wish.k), NOBODY)
    scores[known], items[known] = found_scores, found
    strangers = np.flatnonzero(~known)
    if popular is not None and len(strangers) and comm.rank == 0:
        items[strangers] = _most_popular(popular, strangers, seen, len(opened.items), wish.k)
    unknown = np.flatnonzero(~known[places])
    told.users += len(users.ids)
    told.unknown += len(unknown)
    if users.names is not None:
        told.some += [str(users.name(place)) for place in unknown[: NAMED - len(told.some)].tolist()]
    return _table(opened, users, scores[places], items[places], comm.rank == 0)


def _known(opened: Opened, ids: np.ndarray, wish: Wish) -> tuple[np.ndarray, Asks, Taken | None]:
    """Of distinct users: whom the model knows, bool `[U]`; what asks for these; the numbers of what each of all has seen."""
    seen = _numbered(opened, taken_by(of_data(opened, wish.data), ids)) if wish.exclude_seen else None
    if not isinstance(opened.config, SequenceConfig):
        numbers = opened.users.numbers_of(ids)
        known = numbers != NOBODY
        return known, ByTower(opened, numbers[known]), seen
    known, asks = known_by_history(opened, ids, wish.history)
    return known, asks, seen


def known_by_history(opened: Opened, users: np.ndarray, history: tuple[str, ...]) -> tuple[np.ndarray, ByHistory]:
    """Of distinct users, ids `[U]`: who has taken an item that has a row, bool `[U]`; and what asks for these. Reads the run's
    data, or the files of `history`.

    Raises:
        DataError: they cannot be read.
    """
    taken = taken_by(of_data(opened, history), users)
    there = opened.items.numbers_of(taken.items) != NOBODY
    known = taken.only(there).counts > 0
    # Any id can be looked up, and is read as evaluation reads it where it has no row.
    taken = taken if opened.config.data.any_ids is not None else taken.only(there)
    return known, ByHistory(opened, taken.of(np.flatnonzero(known)))


def _numbered(opened: Opened, taken: Taken) -> Taken:
    """With numbers of items in the place of ids, each once for a user."""
    numbers = Taken(opened.items.numbers_of(taken.items), taken.starts)
    numbers = numbers.only(numbers.items != NOBODY)
    pairs = np.unique(numbers.owners * len(opened.items) + numbers.items)
    owners = pairs // max(1, len(opened.items))
    return Taken(pairs % max(1, len(opened.items)), np.searchsorted(owners, np.arange(len(numbers.starts))))


def _popular(opened: Opened, wish: Wish) -> np.ndarray:
    """The numbers of items in the data, the most frequent first."""
    ids, counts = counts_of_items(of_data(opened, wish.data))
    numbers = opened.items.numbers_of(ids)
    order = np.argsort(-counts, kind="stable")
    return numbers[order][numbers[order] != NOBODY]


def _most_popular(popular: np.ndarray, users: np.ndarray, seen: Taken | None, items: int, k: int) -> np.ndarray:
    found = np.full((len(users), k), NOBODY)
    for row, user in enumerate(users.tolist()):
        left = popular[: k + (0 if seen is None else int(seen.counts[user]))]
        left = left if seen is None else left[~np.isin(left, seen.items[seen.starts[user] : seen.starts[user + 1]])]
        found[row, : len(left[:k])] = left[:k]
    return found


def _table(opened: Opened, users: Users, scores: np.ndarray, items: np.ndarray, answers: bool) -> pa.Table:
    there = (items != NOBODY) & answers
    rows, columns = np.nonzero(there)
    names = opened.users.names_of(users.ids) if users.names is None else users.names
    found = scores[there]
    return pa.table(
        {
            "user": names.take(pa.array(rows)),
            "rank": pa.array((columns + 1).astype(np.int32)),
            "item": opened.items.named(items[there]),
            "score": pa.array(found, mask=np.isneginf(found)),
        }
    )
