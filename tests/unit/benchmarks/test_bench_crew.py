"""Contenders as processes of their own, their turns, and what ours is by default."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

import shardembed as se
from benchmarks import rounds, tasks
from benchmarks.contenders import AUTO, KINDS, OURS, placement
from benchmarks.crew import Contender, Crew, CrewError
from benchmarks.roster import ONE_RANK, roster_of

TINY = tasks.alike("tiny", 3, 50, 8, 4, 3)


def learning(batches: Sequence[Any]) -> Contender:
    """A contender whose batches are its rank's, and whose step is none."""
    return Contender(lambda batch: None, batches)


def alone(batches: Sequence[Any]) -> str:
    return "it sums no bags"


def failing(batches: Sequence[Any]) -> Contender:
    raise ValueError(f"rank {os.environ['RANK']} has no such kernel\nand a long story")


def seen(contender: Contender, table: str) -> tuple[int, str, list[int]]:
    return os.getpid(), os.environ["RANK"], contender.batches[0][table][0].tolist()


@pytest.mark.exhaustive  # it starts four processes that import all
def test_ranks_are_processes_that_do_what_they_are_told_and_end() -> None:
    with closing(Crew.start(learning, TINY, 2)) as crew:
        found = crew.do(seen, "t1")
        with pytest.raises(CrewError, match="KeyError: 'nothing'") as told:
            crew.do(seen, "nothing")
        assert "in seen" in told.value.args[1]
    assert [rank for _, rank, _ in found] == ["0", "1"]
    assert len({os.getpid(), *(process for process, _, _ in found)}) == 3
    # Each rank draws its own ids.
    assert [ids for _, _, ids in found] == [TINY.batches(rank, 1)[0]["t1"][0].tolist() for rank in (0, 1)]
    assert not any(process.is_alive() for process in crew.processes)


@pytest.mark.parametrize(("make", "said"), [(alone, "it sums no bags"), (failing, "ValueError: rank . has no such kernel")])
def test_who_cannot_take_part_says_why_in_a_line(make: Any, said: str) -> None:
    with pytest.raises(CrewError) as told:
        Crew.start(make, TINY, 2)
    assert re.fullmatch(said, told.value.args[0])


class Here:
    """A crew of this process, whose turns go to a log."""

    def __init__(self, name: str, log: list[str], ahead: Any = None) -> None:
        self.contender = Contender(lambda batch: log.append(f"{name}{batch}"), range(4), ahead)

    def do(self, action: Any, *given: Any) -> list[Any]:
        return [action(self.contender, *given)]


def test_turns_are_of_all_on_the_same_batches_and_none_always_follows_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "FIRST", 1)
    monkeypatch.setattr(rounds, "UNCOUNTED", 1)
    log: list[str] = []
    crews: Any = {name: Here(name, log) for name in "ABC"}
    times = rounds.take_turns(crews, 3, 2, {"C": 2})
    turns = ["A0 A1 A2 B0 B1 B2 C0 C1 C2", "B3 B0 B1 A3 A0 A1", "B2 B3 B0 C2 C3 C0 A2 A3 A0"]
    assert log == ["A0", "B0", "C0", *" ".join(turns).split()]
    assert [len(times[name]) for name in "ABC"] == [6, 6, 6]
    assert [number for number, time in enumerate(times["C"]) if time is None] == [2, 3]


def test_a_turn_with_ids_sent_ahead_sends_as_many_as_it_trains_and_trains_all() -> None:
    log: list[str] = []

    def ahead(batches: Sequence[Any]) -> Iterator[Any]:
        log.append(f"sends {len(batches)}")
        return iter(batches)

    (times,) = Here("A", log, ahead).do(rounds.turn, 0, 1, 2)
    assert len(times) == 2
    assert log == ["sends 4", "A0", "A1", "A2", "A3"]


def test_what_a_user_gets_by_default_is_what_is_measured() -> None:
    assert [placement(kind, 3, 2) for kind in KINDS[:3]] == [se.row_wise(), se.table_wise(1), se.column_wise()]
    assert [placement("mixed", i, 2) for i in range(4)] == [se.row_wise(), se.table_wise(0), se.column_wise(), se.row_wise()]
    for kind in KINDS:
        names = [entry.name for entry in roster_of(TINY, kind, 2, full=False).entries]
        assert names == [OURS, "TorchRec", *["TorchRec, row-wise"] * (kind == AUTO)]
    names = [entry.name for entry in roster_of(TINY, ONE_RANK, 1, full=False).entries]
    assert names == [OURS, "FBGEMM TBE", "nn.EmbeddingBag(sparse), torch Adagrad"]


@pytest.mark.parametrize(
    ("kind", "packings"), [("row_wise", {"bag"}), ("table_wise", {"unique"}), ("mixed", {"bag", "unique"}), (AUTO, set())]
)
def test_further_settings_are_further_contenders(kind: str, packings: set[str]) -> None:
    names = {entry.name for entry in roster_of(TINY, kind, 2, full=True).entries}
    assert {f'{OURS}, packing="{packing}"' for packing in packings} <= names
    assert {f"{OURS}, bfloat16 wire", f"{OURS}, prefetched", f"{OURS}, from an IdBatch"} <= names
    assert not any(f'packing="{packing}"' in name for name in names for packing in {"bag", "unique"} - packings)
