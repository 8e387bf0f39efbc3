"""What a user says of a table whose ids come and go, and what follows for its cuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import shardembed as se
from shardembed.errors import ConfigError, PlanError
from shardembed.tables.dynamic import BUCKET_ROWS, NOMINAL, buckets_of_table
from shardembed.tables.placement import Cluster, Placement, column_wise, grid, replicated, row_wise, table_row_wise, table_wise
from shardembed.tables.plan import Plan, default_placements, resolve
from shardembed.tables.settings import Settings, agreed_lines

# Whatever they are given: what is wrong is wrong of its type, too.
LFU: Any = se.LFU
TTL: Any = se.TTL
MinCount: Any = se.MinCount
Probability: Any = se.Probability
dynamic: Any = se.Dynamic
KINDS = pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
TWO = Cluster(2, 2)
LOW, HIGH = -(2**63), 2**63 - 1


def table(rows: int | None = 1000, **settings: Any) -> se.TableConfig:
    return se.TableConfig("item", rows, 4, **{"dynamic": se.Dynamic(), **settings})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LFU(0), r"LFU: halve_every must be a number of steps, 1 or more, or None to never halve counts, not 0"),
        (lambda: LFU(1.5), r"LFU: halve_every must be .*, not 1.5"),
        (lambda: TTL(0), r"TTL: steps must be a number of steps, 1 or more, not 0"),
        (lambda: TTL(True), r"TTL: steps must be .*, not True"),
        (lambda: TTL(2**62 + 1), r"TTL: steps must be"),
        (lambda: se.MinCount(-1), r"MinCount: count must be a number of occurrences, 1 or more, not -1"),
        (lambda: Probability(0), r"Probability: p must be a number above 0 and at most 1, not 0"),
        (lambda: Probability(1.1), r"Probability: p must be"),
        (lambda: Probability(float("nan")), r"Probability: p must be .*, not nan"),
        (lambda: Probability("half"), r"Probability: p must be .*, not 'half'"),
        (lambda: dynamic(eviction="lru"), r"Dynamic: eviction must be LRU\(\), LFU\(\), TTL\(steps\) or None, not 'lru'"),
        (lambda: dynamic(eviction=se.LRU), r"Dynamic: eviction must be .*\(the class; call it\)"),
        (lambda: dynamic(eviction=se.MinCount(2)), r"Dynamic: eviction must be .*, not MinCount\(count=2\)"),
        (
            lambda: dynamic(admission=se.LRU()),
            r"Dynamic: admission must be MinCount\(count\), Probability\(p\) or None, not LRU",
        ),
        (lambda: dynamic(unknown="default"), r"Dynamic: unknown must be 'start' or 'zeros', not 'default'"),
        (lambda: table(dynamic=True), r"table 'item': dynamic must be se.Dynamic\(...\) or None, not True"),
        (lambda: table(dynamic=se.Dynamic), r"table 'item': dynamic must be se.Dynamic\(...\) or None"),
        (lambda: table(0), r"table 'item': num_embeddings must be a positive integer, not 0"),
        (lambda: table(None, dynamic=None), r"table 'item': .*num_embeddings=None.* needs dynamic=se.Dynamic"),
        (lambda: table(10, dynamic=None, grows=True), r"table 'item': .* needs dynamic=se.Dynamic"),
        (lambda: table(None, dynamic=se.Dynamic(se.LRU())), r"table 'item': LRU\(\) makes room, .*say with num_embeddings"),
        (lambda: table(None, dynamic=se.Dynamic(se.LFU(9))), r"table 'item': LFU\(halve_every=9\) makes room"),
        (
            lambda: table(padding_idx=HIGH + 1),
            r"table 'item': padding_idx must be an id from -9223372036854775808 to 92233",
        ),
        (lambda: table(padding_idx=0.5), r"table 'item': padding_idx must be an id .*, not 0.5"),
    ],
)
def test_what_means_nothing_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_a_class_made_from_an_eviction_is_refused() -> None:
    class Oldest(se.LRU):
        pass

    with pytest.raises(ConfigError, match="eviction must be"):
        se.Dynamic(Oldest())


def test_numbers_of_numpy_become_pythons() -> None:
    eight = np.int32(8)
    for given, expected in [
        (LFU(eight), LFU(8)),
        (TTL(eight), TTL(8)),
        (MinCount(torch.tensor(8)), MinCount(8)),
        (Probability(np.float32(0.5)), Probability(0.5)),
        (table(padding_idx=np.int64(LOW)), table(padding_idx=LOW)),
    ]:
        assert given == expected
        assert repr(given) == repr(expected)
        assert hash(given) == hash(expected)


def test_a_table_without_a_limit_has_nominal_rows_and_stays_so() -> None:
    growing = table(None, dynamic=se.Dynamic(se.TTL(5)))
    assert growing.grows
    assert growing.num_embeddings == NOMINAL == 2**20
    assert growing.capacity is None
    assert growing.start == se.Uniform(-(2**-10), 2**-10)
    again = replace(growing, name="other")
    assert again.grows
    assert again.num_embeddings == NOMINAL
    assert growing != table(NOMINAL, dynamic=se.Dynamic(se.TTL(5)))


@pytest.mark.parametrize(
    ("rows", "buckets", "places"),
    [(1, 1, 1), (127, 1, 127), (128, 1, 128), (255, 1, 255), (256, 2, 128), (257, 2, 129), (1000, 7, 143), (10**7, 78125, 128)],
)
def test_ids_fall_into_buckets_that_have_room_for_all(rows: int, buckets: int, places: int) -> None:
    made = table(rows)
    assert (made.cut_rows, made.bucket_rows, made.capacity) == (buckets, places, buckets * places)
    assert buckets_of_table(rows) == buckets
    assert rows <= buckets * places < rows + buckets
    assert places >= min(rows, BUCKET_ROWS)


def test_other_tables_are_cut_by_rows() -> None:
    dense = se.TableConfig("item", 1000, 4)
    assert (dense.cut_rows, dense.bucket_rows, dense.capacity, dense.dynamic, dense.grows) == (1000, 1, 1000, None, False)


@pytest.mark.parametrize("padding", [-1, 0, 5000, LOW, HIGH])
def test_any_id_may_stand_for_nothing(padding: int) -> None:
    """As it is: neither counted from the end nor taken modulo."""
    assert table(padding_idx=padding).padding_idx == padding


def test_ranks_agree_on_all_that_is_said() -> None:
    """A line of the texts that ranks compare differs wherever a setting does."""

    def lines(one: se.TableConfig) -> list[str]:
        return agreed_lines([one], resolve([one], row_wise(), TWO), [se.optim.SGD()], Settings(), torch.device("cpu"))

    others = [
        table(dynamic=None),
        table(dynamic=dynamic(unknown="zeros")),
        table(dynamic=dynamic(se.TTL(3))),
        table(dynamic=dynamic(se.TTL(4))),
        table(dynamic=dynamic(se.LRU())),
        table(dynamic=dynamic(se.LFU())),
        table(dynamic=dynamic(se.LFU(10))),
        table(dynamic=dynamic(admission=se.MinCount(2))),
        table(dynamic=dynamic(admission=se.Probability(0.5))),
        table(NOMINAL),
        table(None),
        table(999),  # in as many buckets
    ]
    said = ["\n".join(lines(one)) for one in [table(), *others]]
    assert len(set(said)) == len(said)
    assert any("dynamic=Dynamic(eviction=LFU(halve_every=10), admission=None, unknown='start')" in one for one in said)


@pytest.mark.parametrize(
    ("placement", "cuts"),
    [
        (table_wise(1), [range(7)]),
        (row_wise(), [range(0, 7, 2), range(1, 7, 2)]),
        (row_wise(strided=False), [range(4), range(4, 7)]),
        (row_wise(bounds=[5]), [range(5), range(5, 7)]),
        (table_row_wise(0), [range(0, 7, 2), range(1, 7, 2)]),
        (column_wise(), [range(7), range(7)]),
        (grid(2, [0, 1]), [range(7), range(7)]),
    ],
)
def test_buckets_are_cut_where_rows_would_be(placement: Placement, cuts: list[range]) -> None:
    plan = resolve([table(1000)], placement, TWO)
    assert [shard.rows for shard in plan.tables[0].layout.shards] == cuts
    again = Plan.from_json(json.loads(plan.to_text()))
    assert again == plan
    assert resolve([table(1000)], again, TWO) == plan


def test_a_plan_of_other_buckets_is_refused() -> None:
    plan = resolve([table(1000)], row_wise(), TWO)
    with pytest.raises(
        PlanError, match=r"table 'item' is \(8, 4\) in the model and \(7, 4\) in the plan \(buckets of its ids, columns"
    ):
        resolve([table(1024)], plan, TWO)
    with pytest.raises(
        PlanError, match=r"'item' is dynamic and cut by its 7 bucket\(s\) of ids: row bounds .* ascending numbers up to 7"
    ):
        resolve([table(1000)], row_wise(bounds=[8]), TWO)


def test_no_default_copies_what_comes_and_goes() -> None:
    assert default_placements([table(10), se.TableConfig("fixed", 10, 4)]) == {"item": row_wise(), "fixed": replicated()}
    assert resolve([table(10)], "auto", TWO).tables[0].kind == "table_wise"  # of its one bucket


@KINDS
def test_the_drop_ins_take_it(kind: str) -> None:
    """What they refuse is told before any row is made."""
    with pytest.raises(ConfigError, match=r"table 'embedding' is dynamic: its rows have no numbers, .* give init="):
        getattr(se, kind)(2, 3, _weight=torch.zeros(2, 3), dynamic=se.Dynamic(), feature="embedding")
    with pytest.raises(ConfigError, match=r"table 'embedding' is dynamic: its rows come and go, .*optimizer=se.optim"):
        getattr(se, kind)(None, 3, dynamic=se.Dynamic(), feature="embedding")
    with pytest.raises(ConfigError, match=r"table 'embedding': without a limit .* needs dynamic=se.Dynamic"):
        getattr(se, kind)(None, 3, feature="embedding")
