"""Who has a place on a rank, and ids to rows of one slab: what no lookup from outside shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.kernels import grouping
from shardembed.kernels.gradients import Gradients
from shardembed.store.dynamic.census import FIRST, Census
from shardembed.store.dynamic.keys import DynamicKeys
from shardembed.store.dynamic.outcomes import Tally
from shardembed.store.dynamic.policy import Policy
from shardembed.store.slab import Slab
from tests.ranks.dynamic import without_numba

CPU = torch.device("cpu")
LOW, HIGH = -(2**63), 2**63 - 1


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def both(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "compiled" and grouping.missing() is not None:
        pytest.skip("needs numba")
    with without_numba() if request.param == "plain" else nullcontext():
        yield


def census(dynamic: se.Dynamic, room: int | None = None, buckets: int = 1) -> Census:
    return Census(Policy.of(dynamic), room, buckets, CPU)


def ids(*given: int) -> torch.Tensor:
    return torch.tensor(given, dtype=torch.int64)


def come(made: Census, now: int, *given: int) -> list[int]:
    """Newcomers of bucket 0, each met once; their places."""
    ones = torch.ones(len(given), dtype=torch.int64)
    return made.settle(ids(*given), ones, torch.zeros_like(ones), now, compete=False).slots_O.tolist()


def test_places_without_a_limit_go_to_ids_in_order_the_lowest_free_first() -> None:
    made = census(se.Dynamic())
    assert come(made, 1, HIGH, 5, LOW) == [2, 1, 0]
    assert come(made, 2, 7) == [3]
    made.leave(torch.tensor([2, 0]))
    assert made.find(ids(LOW, 5, HIGH, 7), 2).tolist() == [-1, 1, -1, 3]
    assert come(made, 3, 9, 8, -8) == [4, 2, 0]
    assert made.living(3).tolist() == [0, 1, 2, 3, 4]
    made.clear()
    assert made.living(3).tolist() == []
    assert come(made, 4, 1) == [0]


def test_a_census_without_a_limit_grows_and_keeps_what_it_knows() -> None:
    made = census(se.Dynamic(admission=se.MinCount(2)))
    first = come(made, 1, *range(FIRST))
    assert made.places == FIRST
    assert come(made, 2, *range(-2 * FIRST, 0)) == list(range(FIRST, 3 * FIRST))
    assert made.places >= 3 * FIRST
    assert made.find(torch.arange(FIRST), 2).tolist() == first
    assert made.lasts_S[: 3 * FIRST].tolist() == [1] * FIRST + [2] * 2 * FIRST
    assert made.counts_S[: 3 * FIRST].tolist() == [1] * 3 * FIRST
    assert (made.lasts_S[3 * FIRST :] < 0).all()


def test_the_dead_give_up_their_places_before_a_table_without_a_limit_grows() -> None:
    made = census(se.Dynamic(se.TTL(3)))
    for now in range(1, 200):
        come(made, now, *range(now * 100, now * 100 + 100))
        assert made.living(now).numel() == 100 * min(now, 3)
        assert made.find(ids(now * 100, (now - 2) * 100, (now - 3) * 100), now).tolist()[2] == -1
    assert made.places == FIRST, "at most 400 of 1,024 lived"


def test_what_a_sweep_finds_dead_is_counted_and_leaves() -> None:
    made = census(se.Dynamic(se.TTL(2)))
    come(made, 1, *range(FIRST - 1))
    come(made, 3, -1)  # in the last place; the others could still be touched
    found = made.settle(ids(-2, -3), None, ids(0, 0), 4, compete=False)
    left = FIRST + 2 - len(made._map)  # of all that ever came
    assert (found.expired, found.evicted, left, made.places) == (FIRST - 1, 0, FIRST - 1, FIRST)
    assert made.find(ids(-1, -2, -3, 0), 4).tolist() == [FIRST - 1, 1, 0, -1]


def test_whoever_died_and_comes_again_has_one_place() -> None:
    for room in (None, 2):
        made = census(se.Dynamic(se.TTL(1)), room)
        come(made, 1, 4, 5)
        found = made.settle(ids(5), None, ids(0), 3, compete=False)
        assert found.expired == 1
        assert made.find(ids(4, 5), 3).tolist() == [-1, found.slots_O.item()]
        assert made.living(3).numel() == 1


def test_buckets_lie_side_by_side() -> None:
    made = census(se.Dynamic(se.LRU()), room=2, buckets=3)
    found = made.settle(ids(1, 2, 3, 4), None, ids(2, 0, 2, 2), 1, compete=False)
    assert sorted(found.slots_O.tolist()) == [-1, 0, 4, 5]
    assert made.places == 6


def slab(dynamic: se.Dynamic, rows: int | None = 4, padding_idx: int | None = None) -> tuple[Slab, DynamicKeys]:
    table = se.TableConfig("item", rows, 2, dynamic=dynamic, padding_idx=padding_idx, init=se.Normal(1.0, 0.1))
    emb = se.EmbeddingCollection([table], optimizer=se.optim.Adagrad(lr=0.5))
    (made,) = emb.journey.slabs
    assert made.dynamic is not None
    return made, made.dynamic


def test_a_lookup_changes_nothing_but_the_number_of_unknown_ids() -> None:
    made, keys = slab(se.Dynamic(se.LRU()), padding_idx=-1)
    for learning in (True, False):
        rows = keys.find(ids(-1, 7, LOW, 7), learning)
        assert rows.tolist()[1] == rows.tolist()[3]
        assert (rows >= keys.census.places).all()
        assert not made.weights[rows[0]].any(), "padding is zero"
    assert keys.unknown == 2  # 7 and LOW, asked for by the evaluation
    assert (keys.census.living(0).numel(), keys.tally) == (0, Tally())


def test_what_is_brought_and_forgotten_gets_no_row() -> None:
    _, keys = slab(se.Dynamic(se.LRU()))
    keys.bring(ids(3, 4))  # whose gradients nobody kept
    moved = keys.commit(1)
    assert moved.rows_P.tolist() == [-1, -1]
    assert (keys.census.living(1).numel(), keys.last, keys.steps) == (0, Tally(), 1)


def test_an_id_waits_under_one_number_however_often_it_is_brought() -> None:
    _, keys = slab(se.Dynamic(se.LRU()), padding_idx=9)
    first = keys.bring(ids(3, 4, 3, 9))
    again = keys.bring(ids(5, 3))
    assert first.tolist() == [first[0], first[1], first[0], -1]
    assert again[1] == first[0]
    assert len({*first.tolist(), *again.tolist()}) == 4
    keys.seen(first, torch.ones_like(first))
    keys.seen(again, torch.ones_like(again))
    moved = keys.commit(1)
    rows = moved.of(torch.cat([first, again]))
    assert keys.census.ids_S[rows[[0, 1, 4, 5]]].tolist() == [3, 4, 5, 3]
    assert keys.last == Tally(created=3)


def test_what_was_found_before_a_step_is_not_what_is_found_after_it() -> None:
    """A backward of a forward, a step, and another backward of the same: its keys are the same tensor."""
    _, keys = slab(se.Dynamic(se.LRU()))
    asked = ids(3, 4)
    keys.find(asked, True)
    keys.seen(keys.bring(asked)[:1], None)
    keys.commit(1)
    rows = keys.bring(asked)
    assert rows[0] < keys.census.places <= rows[1]
    assert keys.census.ids_S[rows[0]] == 3


def test_the_last_tally_is_of_one_step_though_tables_come_one_by_one() -> None:
    _, keys = slab(se.Dynamic(se.LRU()))
    keys.seen(keys.bring(ids(3)), None)
    keys.commit(1)
    keys.commit(1)
    assert keys.last == keys.tally == Tally(created=1)
    keys.commit(2)
    assert (keys.last, keys.tally) == (Tally(), Tally(created=1))


def test_rows_begin_with_fresh_state_where_others_had_some() -> None:
    made, keys = slab(se.Dynamic(se.LRU()), rows=1)
    keys.seen(keys.bring(ids(3)), None)
    keys.commit(1)
    made.state["sum"].fill_(7.0)
    keys.seen(keys.bring(ids(4)), None)
    keys.commit(2)
    assert keys.census.ids_S.tolist() == [4]
    assert made.state["sum"][0].tolist() == [0.0, 0.0]
    expected = made.weights[0].clone()
    assert torch.equal(made.weights[keys.find(ids(4), False)][0], expected)
    assert keys.last == Tally(created=1, evicted=1)


def test_padding_learns_nothing_where_nobody_is_new() -> None:
    """What waits for no row is for nobody, and not for the last one."""
    made, keys = slab(se.Dynamic(se.LRU()), rows=1, padding_idx=-1)
    for now in (1, 2):
        rows = made.bring(ids(3, -1))
        made.accumulate(Gradients(rows, None, torch.ones(2, 2)), seen=(rows, None))
        made.commit(now)
        made.step(0.5, now)
    assert keys.census.ids_S.tolist() == [3]
    assert made.state["sum"][0].tolist() == [2.0, 2.0]


def test_a_table_that_grew_in_inference_mode_learns_on() -> None:
    """Of tensors that are made in it, torch lets none be written outside."""
    grown_in: dict[Any, torch.Tensor] = {}
    for mode in (torch.no_grad, torch.inference_mode):
        table = se.TableConfig("item", None, 2, dynamic=se.Dynamic(se.TTL(9), se.MinCount(1)), init=se.Normal(1.0, 0.1))
        emb = se.EmbeddingCollection([table], optimizer=se.optim.Adam(lr=0.5))
        with mode():
            emb({"item": torch.arange(2000)})
            emb.load_rows("item", torch.arange(2000, 5000), torch.ones(3000, 2))
        optimizer = se.Optimizer(emb)
        for first in (0, 4000):
            emb({"item": torch.arange(first, first + 3000)})["item"].sum().backward()
            optimizer.step()
        assert emb.ids("item").tolist() == list(range(7000))
        grown_in[mode] = emb.rows("item", torch.arange(7000)).clone()
    assert torch.equal(grown_in[torch.no_grad], grown_in[torch.inference_mode])
