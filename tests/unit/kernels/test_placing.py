"""What a step makes of ids: plain torch and the compiled kernels against a model of dicts, one rule after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels import grouping
from shardembed.kernels.placing import DEAD, EVICTED, MOST, STAYS, Placed, Rules, meet, place, ranked, redirect
from tests.amount import examples
from tests.dynamic_cases import FEW
from tests.dynamic_oracle import mixed

NOW, NEVER, FREE = 9, 1 << 62, -1
compiled = pytest.mark.skipif(grouping.missing() is not None, reason="needs numba")


@dataclass(frozen=True)
class Slot:
    """Of one bucket. last: below 0 where it is free."""

    id: int
    count: int
    last: int


@dataclass(frozen=True)
class Case:
    """held: slots, bucket by bucket. newcomers: (id, count, bucket)."""

    rules: Rules
    held: tuple[Slot, ...]
    newcomers: tuple[tuple[int, int, int], ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    room, buckets = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    lives, halves = draw(st.just(NEVER) | st.integers(1, 4)), draw(st.just(NEVER) | st.integers(1, 4))
    rules = Rules(room, lives, halves, draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))
    ids = draw(st.permutations(FEW * 3))
    ids = [id_ ^ (place << 20) for place, id_ in enumerate(ids)]  # distinct
    few = st.integers(0, 3) | st.just(2**31 - 1)
    slots = [Slot(ids.pop(), draw(few), draw(st.integers(NOW - 6, NOW) | st.just(FREE))) for _ in range(room * buckets)]
    newcomers = [(ids.pop(), draw(few), draw(st.integers(0, buckets - 1))) for _ in range(draw(st.integers(0, 2 * room)))]
    return Case(rules, tuple(slots), tuple(newcomers))


def found(case: Case) -> Placed:
    """By the code, the newcomers as they are given."""
    held = tuple(torch.tensor([getattr(slot, name) for slot in case.held]) for name in ("id", "count", "last"))
    ids, counts, groups = torch.tensor(case.newcomers, dtype=torch.int64).view(-1, 3).unbind(1)
    by_count = case.rules.by_count
    order = ranked(ids, counts if by_count else None, groups)
    kept = held[0], held[1].to(torch.int32) if by_count else held[1][:0].to(torch.int32), held[2].to(torch.int32)
    before = [part.clone() for part in kept]
    placed = place(ids[order], counts[order] if by_count else None, groups[order], NOW, kept, case.rules)
    assert all(torch.equal(part, was) for part, was in zip(kept, before, strict=True)), "nothing is changed"
    slots, fates = torch.empty_like(order), torch.empty_like(order)
    slots[order], fates[order] = placed.slots_O, placed.fates_O
    return Placed(slots, fates)


def expected(case: Case) -> tuple[list[int], list[int]]:
    """By the model: (slots, fates)."""
    slots, fates = [-1] * len(case.newcomers), [STAYS] * len(case.newcomers)
    rules = case.rules
    for bucket in {bucket for _, _, bucket in case.newcomers}:
        here = range(bucket * rules.room, (bucket + 1) * rules.room)
        open_to: list[tuple[int, tuple[int, ...], int]] = []  # standing, rank, slot
        for number in here:
            slot = case.held[number]
            count = slot.count >> min(NOW // rules.halves - max(slot.last, 0) // rules.halves, 62) if rules.by_count else 0
            if slot.last < 0:
                open_to.append((STAYS, (number,), number))
            elif slot.last + rules.lives < NOW:
                open_to.append((DEAD, (number,), number))
            elif rules.evicts and (rules.compete or slot.last != NOW):
                open_to.append((EVICTED, (count, slot.last, mixed(slot.id)), number))
        open_to.sort()
        wishing = [number for number, newcomer in enumerate(case.newcomers) if newcomer[2] == bucket]
        wishing.sort(key=lambda number: _rank(case, number), reverse=True)
        for number in wishing:
            if not open_to:
                break
            standing, rank, slot_number = open_to[0]
            if standing == EVICTED and rules.compete and not _rank(case, number) > rank:
                continue
            del open_to[0]
            slots[number], fates[number] = slot_number, standing
    return slots, fates


def _rank(case: Case, number: int) -> tuple[int, ...]:
    id_, count, _ = case.newcomers[number]
    return count if case.rules.by_count else 0, NOW, mixed(id_)


def agree(case: Case) -> None:
    placed, (slots, fates) = found(case), expected(case)
    assert placed.slots_O.tolist() == slots
    assert placed.fates_O.tolist() == fates


@compiled
@examples(600)
@given(cases())
def test_compiled_places_are_those_of_the_model(case: Case) -> None:
    agree(case)


@examples(400)
@given(cases())
def test_plain_places_are_those_of_the_model(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        agree(case)


@pytest.mark.parametrize("plain", [pytest.param(False, marks=compiled), True])
def test_many_newcomers_of_many_buckets(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(grouping, "missing", lambda: "numba is not installed")
    seed = torch.Generator().manual_seed(0)

    def draw(high: int, size: int) -> Sequence[int]:
        return torch.randint(high, (size,), generator=seed).tolist()

    room, buckets = 128, 5
    held = tuple(
        Slot(id_ - 500, count, last - 1) for id_, (count, last) in enumerate(zip(draw(4, 640), draw(11, 640), strict=True))
    )
    newcomers = tuple(zip(range(10**6, 10**6 + 900), draw(5, 900), draw(buckets, 900), strict=True))
    for by_count in (False, True):
        for compete in (False, True):
            agree(Case(Rules(room, 5, 3, by_count, True, compete), held, newcomers))


@dataclass(frozen=True)
class Met:
    """Of `slots` slots and `others` ids without one. counted: counts are kept. times: None for once."""

    slots: int
    others: int
    counted: bool
    halves: int
    numbers: tuple[int, ...]
    times: tuple[int, ...] | None
    seed: int


@st.composite
def meetings(draw: st.DrawFn) -> Met:
    slots, others = draw(st.integers(1, 5)), draw(st.integers(0, 4))
    numbers = tuple(draw(st.lists(st.integers(-1, slots + others - 1), max_size=12)))
    several = st.lists(st.integers(0, 5) | st.just(MOST), min_size=len(numbers), max_size=len(numbers)).map(tuple)
    halves = draw(st.just(NEVER) | st.integers(1, 4))
    return Met(slots, others, draw(st.booleans()), halves, numbers, draw(st.none() | several), draw(st.integers(0, 99)))


@pytest.mark.parametrize("plain", [pytest.param(False, marks=compiled), True])
def test_whoever_is_met_is_counted_and_dated(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(grouping, "missing", lambda: "numba is not installed")

    @examples(200)
    @given(meetings())
    def of(met: Met) -> None:
        draw = torch.Generator().manual_seed(met.seed)
        lasts = torch.randint(0, NOW, (met.slots,), generator=draw, dtype=torch.int32)
        counts = torch.randint(0, 9, (met.slots if met.counted else 0,), generator=draw, dtype=torch.int32)
        others = torch.randint(0, 9, (met.others,), generator=draw)
        expected = lasts.tolist(), counts.tolist(), others.tolist()
        for number, times in zip(met.numbers, met.times or [1] * len(met.numbers), strict=True):
            if number >= met.slots:
                expected[2][number - met.slots] += times
            elif number >= 0:
                if met.counted:
                    halved = expected[1][number] >> (NOW // met.halves - expected[0][number] // met.halves)
                    expected[1][number] = min(halved + times, MOST)
                expected[0][number] = NOW
        times_E = None if met.times is None else torch.tensor(met.times, dtype=torch.int32)
        meet(torch.tensor(met.numbers, dtype=torch.int64), times_E, NOW, met.halves, (lasts, counts), others)
        assert (lasts.tolist(), counts.tolist(), others.tolist()) == expected

    of()


@pytest.mark.parametrize("plain", [pytest.param(False, marks=compiled), True])
def test_numbers_behind_all_rows_become_rows(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if plain:
        monkeypatch.setattr(grouping, "missing", lambda: "numba is not installed")
    given = torch.tensor([3, 10, -1, 12, 10, 9])
    assert redirect(given, 10, torch.tensor([7, 8, -1])).tolist() == [3, 7, -1, -1, 7, 9]
    assert redirect(given[:1], 10, given[:0]).tolist() == [3]
    assert given.tolist() == [3, 10, -1, 12, 10, 9]
