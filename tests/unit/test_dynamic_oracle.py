"""Each rule by which ids come and go, by hand, on the oracle that dynamic tables are held against.

Tables here have fewer than 256 rows, so one bucket, unless they say otherwise. `by_mix` names ids in the order in which ties fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given

import shardembed as se
from tests.amount import examples
from tests.dynamic_cases import Learned, dynamic_configs, steps_of_ids
from tests.dynamic_oracle import OracleTable, StepCounts, bucket_of, buckets_of, mixed
from tests.oracle import EXAMPLES, LEARNERS

LOW, HIGH = -(2**63), 2**63 - 1
LR = 0.5
A, B, C, D = by_mix = sorted([-1, 3, LOW, HIGH], key=mixed)
GRAD = torch.tensor([1.0, -2.0], dtype=torch.float64)


def start(ids: torch.Tensor) -> torch.Tensor:
    """Rows that tell ids apart."""
    first = ids.remainder(97).double()
    return torch.stack([first, -first / 8], 1)


def start_of(id_: int) -> torch.Tensor:
    return start(torch.tensor([id_]))[0]


def table(
    rows: int | None = 2, draw: Any = None, padding_idx: int | None = None, optimizer: Any = None, **settings: Any
) -> OracleTable:
    config = se.TableConfig("item", rows, 2, padding_idx=padding_idx, dynamic=se.Dynamic(**settings))
    return OracleTable(config, optimizer or se.optim.SGD(lr=LR), start, draw)


def step(made: OracleTable, *ids: int) -> StepCounts:
    """One step in which each of these ids occurs, with the same gradient each time."""
    if ids:
        made.learn(ids, GRAD.expand(len(ids), 2))
    return made.step()


def run(made: OracleTable, steps: Sequence[Sequence[int]]) -> list[StepCounts]:
    return [step(made, *ids) for ids in steps]


def counts(made: OracleTable) -> dict[int, tuple[int, int]]:
    return {id_: (row.count, row.last) for id_, row in made.rows.items()}


def waiting(made: OracleTable) -> dict[int, tuple[int, int]]:
    return {id_: (seen.count, seen.last) for id_, seen in made.candidates.items()}


# Words.


def test_the_mix_is_splitmix64s() -> None:
    """Its first outputs from seed 0, as the reference implementation prints them."""
    gamma = 0x9E3779B97F4A7C15
    assert [mixed(k * gamma) for k in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mixed(gamma - 2**64) == mixed(gamma)  # with a sign
    assert len({mixed(id_) for id_ in (0, -1, -2, LOW, HIGH)}) == 5


def test_buckets_are_equal_parts_of_the_mixed_numbers() -> None:
    assert [buckets_of(rows) for rows in (1, 127, 255, 256, 1000)] == [1, 1, 1, 2, 7]
    ids = [*range(-500, 500), LOW, HIGH]
    assert {bucket_of(id_, 1) for id_ in ids} == {0}
    for id_ in ids:
        assert bucket_of(id_, 2) == (mixed(id_) >= 2**63)
        assert bucket_of(id_, 7) == mixed(id_) // 2**32 * 7 // 2**32
    assert {bucket_of(id_, 7) for id_ in ids} == set(range(7))


# Reading.


def test_who_has_no_row_reads_its_start() -> None:
    made = table()
    for training in (True, False):
        assert torch.equal(made.read([A, 5, A], training), torch.stack([start_of(A), start_of(5), start_of(A)]))
    assert made.live == []  # and has none afterwards


def test_evaluation_may_read_zeros() -> None:
    made = table(unknown="zeros")
    step(made, A)
    assert torch.equal(made.read([A, B], training=False), torch.stack([start_of(A) - LR * GRAD, torch.zeros(2)]))
    assert torch.equal(made.read([B], training=True)[0], start_of(B))


def test_padding_reads_zeros_and_is_no_id() -> None:
    made = table(padding_idx=-1)
    assert step(made, -1, -1) == StepCounts(0)
    assert made.live == []
    for training in (True, False):
        assert torch.equal(made.read([-1], training), torch.zeros(1, 2))


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean", "max", None])
def test_lookups_answer_and_learn_as_torchs(pooling: Any, weighted: bool, padding: int | None) -> None:
    """With ids that a fixed table takes too."""
    if weighted and pooling != "sum":
        return
    plain: Any = (
        torch.nn.Embedding(9, 2, padding) if pooling is None else torch.nn.EmbeddingBag(9, 2, mode=pooling, padding_idx=padding)
    )
    plain = plain.double()
    with torch.no_grad():
        plain.weight.copy_(start(torch.arange(9)))
        if padding is not None:
            plain.weight[padding] = 0
    made = table(rows=9, padding_idx=padding)
    ids, offsets = torch.tensor([1, 4, 4, 8, 1, 1, 4, 0]), torch.tensor([0, 3, 3, 6, 7, 8])
    weights = torch.linspace(0.5, 2.0, 8, dtype=torch.float64) if weighted else None
    looked = made.look_up(ids, offsets, pooling, weights)
    expected = plain(ids) if pooling is None else plain(ids, offsets[:-1], per_sample_weights=weights)
    torch.testing.assert_close(looked.output, expected)
    for output in (looked.output, expected):
        (output * torch.arange(1.0, output.numel() + 1).view_as(output)).sum().backward()
    looked.learn()
    made.step()
    torch.optim.SGD(plain.parameters(), lr=LR).step()
    torch.testing.assert_close(made.read(range(9), True), plain.weight.detach())
    assert counts(made) == {id_: (number, 1) for id_, number in ((0, 1), (1, 3), (4, 3), (8, 1)) if id_ != padding}


def test_lookups_of_evaluation_learn_nothing_and_may_be_empty() -> None:
    made = table(unknown="zeros")
    step(made, A)
    empty = made.look_up([], torch.zeros(3, dtype=torch.int64), "mean")
    assert torch.equal(empty.output, torch.zeros(2, 2))
    found = made.look_up([A, B], torch.tensor([0, 2]), "sum", training=False)
    assert torch.equal(found.output[0], start_of(A) - LR * GRAD)
    assert not found.output.requires_grad


# What a step does.


def test_gradients_of_a_step_are_added_and_applied_once() -> None:
    made = table()
    made.learn([A, A], torch.stack([GRAD, 3 * GRAD]))
    made.learn([A], GRAD.unsqueeze(0), occurrences=[5])
    assert made.live == []  # nothing before the step
    assert made.step() == StepCounts(1, created=1)
    assert counts(made) == {A: (7, 1)}
    assert torch.equal(made.rows[A].weight_D, start_of(A) - LR * 5 * GRAD)


def test_what_is_dropped_has_not_been() -> None:
    made = table(admission=se.MinCount(2))
    made.learn([A, B, B], GRAD.expand(3, 2))
    made.drop()
    assert (made.now, made.rows, made.candidates) == (0, {}, {})
    assert made.step() == StepCounts(0)


def test_a_row_outlives_its_last_gradient_by_so_many_steps() -> None:
    made = table(rows=4, eviction=se.TTL(2))
    assert run(made, [[A, B], [], [B]]) == [StepCounts(2, created=2), StepCounts(2), StepCounts(1, expired=1)]
    assert counts(made) == {B: (2, 3)}
    assert torch.equal(made.read([A], True)[0], start_of(A))  # which is what the next step would change


def test_a_gradient_that_comes_in_time_keeps_a_row() -> None:
    made = table(eviction=se.TTL(2))
    run(made, [[A], [], [A]])
    assert counts(made) == {A: (2, 3)}


def test_a_gradient_that_comes_late_finds_a_newcomer() -> None:
    made = table(eviction=se.TTL(2))
    assert run(made, [[A], [], [], [A]])[2:] == [StepCounts(0, expired=1), StepCounts(1, created=1)]
    assert counts(made) == {A: (1, 4)}
    assert torch.equal(made.rows[A].weight_D, start_of(A) - LR * GRAD)


def test_a_late_gradient_has_to_be_admitted_anew() -> None:
    made = table(eviction=se.TTL(1), admission=se.MinCount(2))
    assert run(made, [[A, A], [], [A]])[2] == StepCounts(0, waiting=1)
    assert waiting(made) == {A: (1, 3)}


def test_candidates_die_as_rows_do() -> None:
    made = table(eviction=se.TTL(1), admission=se.MinCount(2))
    run(made, [[A, B]])
    assert waiting(made) == {A: (1, 1), B: (1, 1)}
    assert step(made) == StepCounts(0)  # they are no rows that expire
    assert waiting(made) == {}
    assert step(made, B) == StepCounts(0, waiting=1)
    assert waiting(made) == {B: (1, 3)}


def test_counts_add_up_and_the_last_step_is_kept() -> None:
    made = table()
    run(made, [[A, A, B], [], [A]])
    assert counts(made) == {A: (3, 3), B: (1, 1)}


def test_counts_are_halved_once_for_each_multiple_that_has_passed() -> None:
    made = table(eviction=se.LFU(halve_every=3))
    run(made, [[A] * 9])
    run(made, [[A]])
    assert counts(made) == {A: (10, 2)}
    run(made, [[A]])  # step 3 halves
    assert counts(made) == {A: (6, 3)}
    run(made, [[], [], [], [], [], [A]])  # steps 6 and 9
    assert counts(made) == {A: (2, 9)}


def test_counts_may_be_halved_to_nothing() -> None:
    made = table(eviction=se.LFU(halve_every=1))
    run(made, [[A] * 100, *[[]] * 200, [A]])
    assert counts(made) == {A: (1, 202)}


def test_an_id_is_admitted_when_it_has_occurred_often_enough() -> None:
    made = table(admission=se.MinCount(3))
    assert run(made, [[A, A, B], [A, A]]) == [StepCounts(0, waiting=2), StepCounts(1, created=1)]
    assert counts(made) == {A: (4, 2)}  # all that it has occurred
    assert waiting(made) == {B: (1, 1)}
    assert torch.equal(made.rows[A].weight_D, start_of(A) - LR * 2 * GRAD)  # the first gradients are gone


def test_counts_of_candidates_are_halved_too() -> None:
    made = table(eviction=se.LFU(halve_every=2), admission=se.MinCount(4))
    run(made, [[A, A, A], [A]])  # 3 halved is 1
    assert waiting(made) == {A: (2, 2)}


def test_ids_are_admitted_by_lot() -> None:
    """Drawn for each id in each step that brings it a gradient; who has a row draws no more."""
    lots = {(A, 1): 0.25, (B, 1): 0.3, (B, 2): 0.29}
    made = table(admission=se.Probability(0.3), draw=lambda id_, now: lots[id_, now])
    assert run(made, [[A, B], [A, B, B]]) == [StepCounts(1, created=1, waiting=1), StepCounts(2, created=1)]
    assert counts(made) == {A: (2, 2), B: (2, 2)}
    assert made.candidates == {}


def test_all_are_admitted_at_once_by_default() -> None:
    assert run(table(rows=4), [[A, B, C, D]]) == [StepCounts(4, created=4)]


def test_without_a_limit_nobody_is_refused() -> None:
    made = table(rows=None)
    assert step(made, *range(-300, 300)) == StepCounts(600, created=600)


@pytest.mark.parametrize("eviction", [None, se.TTL(100)])
def test_a_full_bucket_refuses_the_lowest_mix(eviction: Any) -> None:
    made = table(eviction=eviction)
    assert step(made, A, C, B) == StepCounts(2, created=2, refused=1)
    assert set(made.rows) == {B, C}
    assert step(made, D) == StepCounts(2, refused=1)  # and nobody leaves
    assert set(made.rows) == {B, C}
    assert torch.equal(made.read([D], training=True)[0], start_of(D))


def test_dead_rows_make_room() -> None:
    made = table(eviction=se.TTL(1))
    run(made, [[A, B], []])
    assert step(made, C, D) == StepCounts(2, created=2)


def test_rows_that_die_with_a_step_have_their_places_in_it() -> None:
    made = table(eviction=se.TTL(1))
    run(made, [[A, B]])
    assert step(made, C, D) == StepCounts(0, expired=2, refused=2)


def test_free_places_are_taken_first() -> None:
    made = table(eviction=se.LRU())
    assert run(made, [[A], [B]])[1] == StepCounts(2, created=1)


def test_who_was_not_seen_longest_leaves() -> None:
    made = table(eviction=se.LRU())
    run(made, [[B], [A], [B]])
    assert step(made, D) == StepCounts(2, created=1, evicted=1)
    assert set(made.rows) == {B, D}


def test_of_those_not_seen_as_long_the_lowest_mix_leaves() -> None:
    made = table(rows=3, eviction=se.LRU())
    run(made, [[B, A, C], [D]])
    assert set(made.rows) == {B, C, D}


def test_who_occurred_least_leaves_however_recent() -> None:
    made = table(eviction=se.LFU())
    run(made, [[A, A], [B]])
    assert step(made, C) == StepCounts(2, created=1, evicted=1)
    assert set(made.rows) == {A, C}


def test_of_equal_counts_the_older_leaves_and_then_the_lowest_mix() -> None:
    made = table(eviction=se.LFU())
    run(made, [[B], [A], [C]])
    assert set(made.rows) == {A, C}
    made = table(eviction=se.LFU())
    run(made, [[B, A], [C]])
    assert set(made.rows) == {B, C}


def test_fame_fades() -> None:
    """What counts is the count as it is now."""
    for halve_every, left in ((None, A), (2, B)):
        made = table(eviction=se.LFU(halve_every))
        run(made, [[A, A, A], [], [], [B, B], [C]])  # halved at 2 and 4, A has none left of 3
        assert set(made.rows) == {left, C}


def test_rows_of_this_step_never_leave() -> None:
    for eviction in (se.LRU(), se.LFU()):
        made = table(eviction=eviction)
        run(made, [[A, B], [C, C, C]])
        assert step(made, *made.live, D, D, D, D) == StepCounts(2, refused=1)
        assert D not in made.rows


def test_newcomers_take_places_by_mix_or_by_count_and_mix() -> None:
    made = table(eviction=se.LRU())
    assert step(made, A, A, A, B, C, D) == StepCounts(2, created=2, refused=2)
    assert set(made.rows) == {C, D}
    made = table(eviction=se.LFU())
    step(made, A, A, A, B, C, D)
    assert set(made.rows) == {A, D}


def test_the_refused_stay_candidates() -> None:
    made = table(admission=se.MinCount(2))
    assert run(made, [[C, C, D, D], [A, A, B]])[1] == StepCounts(2, refused=1, waiting=1)
    assert waiting(made) == {A: (2, 2), B: (1, 2)}


def test_an_evicted_id_begins_anew() -> None:
    made = table(rows=1, eviction=se.LRU(), admission=se.MinCount(2), optimizer=se.optim.Adagrad(lr=LR))
    run(made, [[A, A], [A], [B, B]])
    assert waiting(made) == {}
    assert step(made, A) == StepCounts(1, waiting=1)
    assert step(made, A) == StepCounts(1, created=1, evicted=1)
    assert counts(made) == {A: (2, 5)}
    assert torch.equal(made.rows[A].state["sum"], GRAD.square())


def test_candidates_are_no_more_than_places() -> None:
    made = table(admission=se.MinCount(9))
    assert step(made, A, B, B, C) == StepCounts(0, waiting=3)
    assert waiting(made) == {B: (2, 1), C: (1, 1)}  # of equal ones the lowest mix left
    step(made, A)  # the last of C is before that of A
    assert waiting(made) == {B: (2, 1), A: (1, 2)}
    step(made, C)
    assert waiting(made) == {B: (2, 1), C: (1, 3)}


def test_who_is_touched_now_may_cease_to_be_a_candidate() -> None:
    made = table(admission=se.MinCount(9))
    run(made, [[A, A, B, B], [C]])
    assert waiting(made) == {A: (2, 1), B: (2, 1)}


def test_each_bucket_has_its_own_room() -> None:
    made = table(rows=256, eviction=se.LRU())
    ids = range(-2000, 2000)
    low, high = ([id_ for id_ in ids if bucket_of(id_, 2) == bucket] for bucket in (0, 1))
    step(made, *low)
    assert step(made, *high[:100]) == StepCounts(228, created=100)
    stranger = next(id_ for id_ in low if id_ not in made.rows)
    assert step(made, stranger, *high[100:150]) == StepCounts(256, created=51, evicted=1 + 22)


# Learning.


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_learns_as_a_row_of_a_whole_table(name: str) -> None:
    """Steps are those of the table, also of a row that came late or was left out."""
    optimizer = EXAMPLES[name]
    made = table(rows=4, optimizer=optimizer)
    ids = [A, B, C]
    weight = torch.nn.Parameter(start(torch.tensor(ids)))
    learner = LEARNERS[type(optimizer)](weight, optimizer)
    generator = torch.Generator().manual_seed(0)
    for touched in ([A, B], [A], [C], [], [A, B, C]):
        grads = torch.randn(3, 2, dtype=torch.float64, generator=generator)
        here = torch.tensor([id_ in touched for id_ in ids])
        made.learn(touched, grads[here])
        made.step()
        learner.step(grads * here.unsqueeze(1), here)
    torch.testing.assert_close(made.read(ids, True), weight.detach(), rtol=1e-14, atol=1e-14)
    for key, whole in learner.state().items():
        torch.testing.assert_close(torch.stack([made.rows[id_].state[key] for id_ in ids]), whole, rtol=1e-14, atol=1e-14)


@examples(40)
@given(dynamic_configs(), steps_of_ids())
def test_what_holds_of_every_table(config: se.TableConfig, steps: list[list[Learned]]) -> None:
    made = OracleTable(config, se.optim.SGD(lr=LR), start, lambda id_, now: mixed(id_ ^ now) / 2**64)
    live = 0
    for batches in steps:
        for batch in batches:
            made.learn(batch.ids, batch.grads_nD(2))
        touched = {id_ for batch in batches for id_ in batch.ids if id_ != config.padding_idx}
        before = set(made.rows)
        found = made.step()
        assert found.live == len(made.rows) == live + found.created - found.evicted - found.expired
        live = found.live
        assert before & touched <= set(made.rows)  # none of them has left
        assert not set(made.rows) & set(made.candidates)
        assert config.padding_idx not in made.rows
        for kept in (made.rows, made.candidates):
            in_bucket = [bucket_of(id_, made.buckets) for id_ in kept]
            assert made.places is None or all(in_bucket.count(bucket) <= made.places for bucket in set(in_bucket))
        assert all(made.rows[id_].last == made.now for id_ in touched & set(made.rows))
