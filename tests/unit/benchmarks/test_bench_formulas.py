"""Bytes by formula, against sums by hand; medians and ratios; and contenders put into heats."""

from __future__ import annotations

import pytest

import shardembed as se
from benchmarks import figures, formulas, growth
from benchmarks.roster import Entry, divided
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import Plan, resolve
from shardembed.tables.table_config import TableConfig
from shardembed.wire.header import numbers

BAG = TableLoad(TableConfig("large", 1_000_000, 8), (3.0,))  # uniform ids: nearly all are distinct
FEW = TableLoad(TableConfig("few", 4, 8), (3.0,))
SAMPLES = 64


def plan_of(load: TableLoad, placement: se.Placement, ranks: int) -> Plan:
    return resolve([load.table], {load.table.name: placement}, Cluster(ranks, ranks))


def test_bags_send_a_partial_sum_for_each_owner_that_has_an_id() -> None:
    table = plan_of(BAG, se.row_wise(packing="bag"), 4).tables[0]
    keys, vectors = formulas.table_bytes(BAG, table, SAMPLES, 4)
    sums = 4 * SAMPLES * (1 - (1 - 1 / 4) ** 3)  # of one rank's batch, over all owners
    assert vectors == pytest.approx(3 * sums * 8 * 4)
    assert keys == pytest.approx(3 * (SAMPLES * 3 * 4 + sums * 4))


def test_unique_sends_distinct_ids() -> None:
    table = plan_of(FEW, se.row_wise(), 2).tables[0]
    keys, vectors = formulas.table_bytes(FEW, table, SAMPLES, 2)
    assert keys == pytest.approx(4 * 4, rel=1e-6)
    assert vectors == pytest.approx(4 * 8 * 4, rel=1e-6)


def test_columns_multiply_keys_and_not_vectors() -> None:
    whole = formulas.table_bytes(BAG, plan_of(BAG, se.table_wise(0), 2).tables[0], SAMPLES, 2)
    cut = formulas.table_bytes(BAG, plan_of(BAG, se.column_wise([0, 1]), 2).tables[0], SAMPLES, 2)
    assert cut == (pytest.approx(2 * whole[0]), pytest.approx(whole[1]))


def test_copies_send_nothing() -> None:
    assert formulas.table_bytes(FEW, plan_of(FEW, se.replicated(), 2).tables[0], SAMPLES, 2) == (0.0, 0.0)


def test_our_bytes_are_the_sum_of_the_tables_and_a_header() -> None:
    workload = Workload("both", 2 * SAMPLES, (BAG, FEW))
    plan = resolve([BAG.table, FEW.table], {"large": se.row_wise(packing="bag"), "few": se.row_wise()}, Cluster(2, 2))
    sent = formulas.our_bytes(workload, plan, SAMPLES)
    tables = [formulas.table_bytes(load, table, SAMPLES, 2) for load, table in zip((BAG, FEW), plan.tables, strict=True)]
    assert sent.counts == 8 * numbers(slabs=1) * 2
    assert (sent.ids, sent.forward) == tuple(map(sum, zip(*tables, strict=True)))
    assert sent.forward == sent.backward


def test_a_reduce_scatter_sends_every_bag_to_and_from_every_rank() -> None:
    sent = formulas.reduce_scatter_bytes(Workload("one", 128, (BAG,)), SAMPLES, 4)
    assert sent.forward == sent.backward == 4 * SAMPLES * 8 * 12
    assert sent.ids == 8 * 3 * SAMPLES * 3
    theirs = formulas.torchrec_bytes(Workload("one", 128, (BAG,)), SAMPLES, 4)
    assert theirs.total - sent.total == sent.forward


def test_ratios_are_of_steps_that_both_made() -> None:
    found = figures.ratio([2.0, None, 9.0], [1.0, 5.0, 3.0])
    assert (found.median, found.least) == (2.5, 2.0)
    assert figures.spread([4.0, None, 1.0, 2.0]).median == 2.0
    assert f"{figures.spread([1.0, 1.0]):.1f}" == "1.0 (1.0 to 1.0)"


def test_heats_hold_what_fits_beside_ours() -> None:
    entries = [Entry(str(size), lambda batches: "", size) for size in (1, 1, 3, 9, 1)]
    heats = divided(entries, Entry("ours", lambda batches: "", 1), 5)
    assert [[entry.name for entry in heat] for heat in heats] == [["ours", "1", "1"], ["ours", "3"], ["ours", "9"], ["ours", "1"]]


def test_the_slope_is_taken_near_its_place() -> None:
    assert growth.slope([8, 100, 200, 300, 800], [9.0, 1.0, 2.0, 3.0, 99.0]) == pytest.approx(0.01)
    assert growth.slope([8, 100], [1.0, 2.0]) is None
