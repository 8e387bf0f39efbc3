"""What benchmark pages count for themselves: bytes from shards, tight limits, and the text around the figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import shardembed as se
from benchmarks.drawn import drawn
from benchmarks.instances import Instance, counted_memory, many_tables, table_bytes, tight
from benchmarks.pages import geometric_mean, paragraph, table
from shardembed.planner.result import Estimate
from shardembed.planner.topology import Link, Topology
from shardembed.planner.topology import load as load_topology
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.table_config import TableConfig

WORKLOAD = Workload(
    "three",
    64,
    (
        TableLoad(TableConfig("a", 10, 8), (1.0,)),  # rowwise: 4 bytes of state a row, and a strip
        TableLoad(TableConfig("b", 6, 4, dtype=torch.bfloat16), (1.0,), optimizer=se.optim.Adam(lr=0.1)),  # state in float32
        TableLoad(TableConfig("c", 2, 4), (1.0,), optimizer=se.optim.SGD(lr=0.1)),
    ),
)
PLAN = Plan(
    (
        TablePlan(
            "a",
            Layout(
                10, 8, (Shard(range(7), range(4), (0,)), Shard(range(7, 10), range(4), (1,)), Shard(range(10), range(4, 8), (1,)))
            ),
        ),
        TablePlan("b", Layout(6, 4, (Shard(range(0, 6, 2), range(4), (0,)), Shard(range(1, 6, 2), range(4), (2,))))),
        TablePlan("c", Layout(2, 4, (Shard(range(2), range(4), (0, 1, 2)),))),
    ),
    3,
)


def test_memory_is_counted_from_the_shards() -> None:
    a, b, c = 4 * 4 + 4, 4 * 2 + 2 * 4 * 4, 4 * 4  # bytes of a shard's row: weights and state
    np.testing.assert_array_equal(counted_memory(PLAN, WORKLOAD), [7 * a + 3 * b + 2 * c, 13 * a + 2 * c, 3 * b + 2 * c])


def test_a_tables_bytes_are_its_weights_and_state() -> None:
    assert table_bytes(WORKLOAD) == 10 * (8 * 4 + 4) + 6 * (4 * 2 + 2 * 4 * 4) + 2 * 4 * 4


def test_tight_memory_follows_the_tables_and_what_a_rank_needs_beside_them() -> None:
    link = Link(1e9, 1e-6)
    topology = Topology("t", 3, 8, 10**9, 10**6, link, link, {})
    memory = np.array([[100.0, 200.0, 300.0], [10.0, 20.0, 30.0], [5.0, 50.0, 7.0]])
    nothing = np.zeros((1, 3))
    categories = ("weights", "optimizer state", "waiting gradients")
    loose = Estimate(("step",), nothing, nothing, categories, memory, np.zeros((3, 1)), np.zeros((3, 3)))
    limit = tight(topology, WORKLOAD, loose)
    assert limit.memory == topology.reserve + round(1.15 * table_bytes(WORKLOAD) / 3 + 50)
    assert (limit.ranks, limit.reserve) == (topology.ranks, topology.reserve)


def test_many_tables_are_the_same_every_time_and_take_all_sizes() -> None:
    first, second = many_tables(200), many_tables(200)
    assert [load.table for load in first.tables] == [load.table for load in second.tables]
    rows = [load.table.num_embeddings for load in first.tables]
    assert min(rows) < 10**4 < 10**7 < max(rows)
    assert {load.table.embedding_dim for load in first.tables} == {16, 32, 64, 128}
    assert all(1 <= load.ids_per_sample[0] <= 50 for load in first.tables)


def test_an_instance_says_how_tight_its_memory_is() -> None:
    assert Instance(WORKLOAD, 8, True).name == "three on 8, tight"
    assert Instance(WORKLOAD, 8, False).memory == "loose"


def test_pages_wrap_their_text_and_align_their_figures() -> None:
    lines = paragraph("word " * 50, "last.")
    assert max(map(len, lines)) <= 130
    assert " ".join(lines).split() == ["word"] * 50 + ["last."]
    assert lines[-1] == ""
    assert table(("a", "b"), [("x", "1")]) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]


def test_the_geometric_mean_of_a_ratio_and_its_inverse_is_one() -> None:
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)


def test_drawn_instances_follow_from_their_number_and_differ() -> None:
    machines = load_topology("h100x8")
    some = [drawn(number, machines) for number in (0, 14, 14, 26, 31)]
    assert (some[1].workload, some[1].topology) == (some[2].workload, some[2].topology)
    assert len({(len(one.workload.tables), one.topology.ranks) for one in some}) == 4
    assert {one.tight for one in (drawn(number, machines) for number in (14, 5))} == {True, False}
    for one in some:
        held = table_bytes(one.workload)
        assert held < one.topology.room * one.topology.ranks  # tables fit, tight as it may be
        assert one.topology.room <= machines.scaled(one.topology.ranks).room
