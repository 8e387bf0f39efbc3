"""The planner's cost: linear in shards, the same from options as from a plan's shards, and true to the library."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed.errors import ConfigError, PlanError
from shardembed.kernels.choose import choose
from shardembed.kernels.kernel import SlabFacts
from shardembed.planner import cost_copies, cost_demand
from shardembed.planner.cost import CostModel, estimate
from shardembed.planner.cost_copies import paid
from shardembed.planner.cost_ops import FREE, all_reduce, all_to_all, op_of
from shardembed.planner.cost_phases import BACK, CATEGORIES, COPIES, GRADS, IDS, LOOKUP, PHASES, UPDATE
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.topology import load as load_topology
from shardembed.planner.topology_sections import REQUIRED_OPS
from shardembed.planner.workload import TableLoad, Uniform, Workload, Zipf
from shardembed.tables.layout import Shard, Strip
from shardembed.tables.placement import Cluster, Placement
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.pooling import POOLINGS
from tests.amount import examples

OPTIMIZERS = [kind() for kind in se.optim.KINDS]
RANKS = 4


def topology(ranks: int = RANKS, seed: int = 0, fused: bool = True) -> Topology:
    """Speeds that differ for each op, so that none can stand for another."""
    numbers = np.random.default_rng(seed)
    names = [*REQUIRED_OPS, *(["fused_merge", "fused"] if fused else []), "update_adam"]
    ops = {name: Op(*(numbers.random(3) * [1e-5, 1e-8, 1e-10])) for name in names}
    return Topology("test", ranks, 2, 1 << 30, 0, Link(1e10, 1e-5, 1e-6), Link(1e9, 1e-4, 1e-5), ops)


@st.composite
def loads(draw: st.DrawFn) -> TableLoad:
    index = draw(st.integers(0, 10**6))
    features = draw(st.integers(1, 3))
    poolings = {f"f{index}_{i}": draw(st.sampled_from(list(POOLINGS))) for i in range(features)}
    table = se.TableConfig(
        f"t{index}",
        draw(st.integers(10, 5000)),
        draw(st.integers(RANKS, 200)),
        feature_names=list(poolings),
        pooling=poolings,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        frozen=draw(st.booleans()),
    )
    lengths = tuple(draw(st.floats(0.1, 30.0)) for _ in poolings)
    skew = draw(st.sampled_from([Uniform(), Zipf(1.1)]))
    return TableLoad(
        table, lengths, skew, draw(st.sampled_from(["sorted", "hashed", "unknown"])), draw(st.sampled_from(OPTIMIZERS))
    )


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    packing = draw(st.sampled_from(["unique", "bag"]))
    some = tuple(draw(st.permutations(range(RANKS)))[: draw(st.integers(1, RANKS))])
    kinds = [
        se.table_wise(draw(st.integers(0, RANKS - 1)), packing=packing),
        se.row_wise(some, strided=draw(st.booleans()), packing=packing),
        se.row_wise((0, 3), bounds=(draw(st.integers(1, 9)),), packing=packing),
        se.column_wise(some, packing=packing),
        se.grid(2, packing=packing),
        se.replicated(),
    ]
    return draw(st.sampled_from(kinds))


@st.composite
def planned(draw: st.DrawFn) -> tuple[Workload, Plan]:
    chosen = draw(st.lists(loads(), min_size=1, max_size=4, unique_by=lambda load: load.table.name))
    plans = []
    for load in chosen:
        placement = draw(placements())
        layout = placement.layout(load.table.num_embeddings, load.table.embedding_dim, Cluster(RANKS, 2))
        plans.append(TablePlan(load.table.name, layout, placement.packing or "unique"))
    return Workload("drawn", 256, tuple(chosen)), Plan(tuple(plans), RANKS)


@examples(60)
@given(planned())
def test_a_plan_costs_what_its_options_add_up_to(drawn: tuple[Workload, Plan]) -> None:
    workload, plan = drawn
    model = CostModel(workload, topology())
    seconds, memory = np.repeat(model.base[:, None], RANKS, 1), np.zeros(RANKS)
    used: set[str] = set()
    for number, table in enumerate(plan.tables):
        strips = table.layout.strips
        widths = [len(strip.columns) for strip in strips]
        if table.layout.copied:
            loads, held = model.copied(number)
            used |= model.charges_of(number, widths, "copied")
        else:
            asked = model.tables[number].traffic.blocks([block.rows for block in strips[0].blocks])
            loads, held = model.common(number, widths, asked, table.packing)
            used |= model.charges_of(number, widths, table.packing)
            for strip in strips:
                rows = np.array([float(len(block.rows)) for block in strip.blocks])
                parts, part_memory = model.parts(number, np.full(len(rows), float(len(strip.columns))), asked, rows, table.packing)
                for block, load, size in zip(strip.blocks, parts, part_memory, strict=True):
                    seconds[:, block.ranks[0]] += load
                    memory[block.ranks[0]] += size
        seconds += loads[:, None]
        memory += held
    for name in used:
        seconds += model.charges[name][:, None]
    found = estimate(plan, workload, model.topology, model)
    # Of what copies share, which is not linear, options have the least that a plan may do with.
    copies = [table for table, cut in zip(model.tables, plan.tables, strict=True) if cut.layout.copied]
    shared = model.copies.shared(copies)
    assert (found.seconds[COPIES] >= seconds[COPIES] * (1 - 1e-12)).all()
    if any(table.learns for table in copies):
        seconds[COPIES] = found.seconds[COPIES]
    assert found.phases == PHASES
    assert found.categories == CATEGORIES
    if model.one_slab and "slabs" in used:  # of copies, which are not linear then, options have the least that a plan may do with
        assert (found.phase_seconds >= seconds.max(1) * (1 - 1e-9)).all()
    else:
        np.testing.assert_allclose(found.seconds, seconds, rtol=1e-12)
    np.testing.assert_allclose(found.memory_bytes, memory, rtol=1e-12)
    once = paid({"packed slabs" if name == "slabs" else name for name in used}, shared)
    fixed = model.base + sum((model.charges[name] for name in once), np.zeros(len(PHASES)))
    np.testing.assert_allclose(found.table_seconds.sum(0) + RANKS * fixed, found.seconds.sum(1), rtol=1e-9)
    assert (found.seconds >= 0).all()
    assert (found.bytes >= 0).all()


def test_a_single_slab_is_spared_copies() -> None:
    """Two tables of one kind: cut by rows alone they share a slab; copies cost from the first strip or copy on."""
    loads = tuple(TableLoad(se.TableConfig(name, 1000, 16), (3.0,)) for name in ("a", "b"))
    free = dict.fromkeys([*REQUIRED_OPS], Op(0.0, 0.0, 0.0))
    here = Topology("copies", 2, 2, 1 << 30, 0, Link(float("inf"), 0.0), Link(1.0, 0.0), {**free, "copy": Op(0.0, 0.0, 1.0)})

    def copied(first: Placement, workload: Workload) -> np.ndarray:
        layouts = [kind.layout(1000, 16, Cluster(2, 2)) for kind in (first, se.row_wise())]
        plan = Plan(tuple(TablePlan(load.table.name, layout) for load, layout in zip(loads, layouts, strict=True)), 2)
        return estimate(plan, workload, here).phase_seconds

    alike = Workload("alike", 64, loads)
    others = Workload("others", 64, (loads[0], TableLoad(se.TableConfig("b", 1000, 16), (3.0,), optimizer=se.optim.Adam())))
    assert copied(se.row_wise(), alike)[[LOOKUP, BACK, GRADS]].tolist() == [0, 0, 0]
    assert (copied(se.row_wise(), others)[[BACK, GRADS]] > 0).all()
    for first in (se.column_wise(ranks=[0, 1]), se.replicated()):
        np.testing.assert_allclose(copied(first, alike)[[LOOKUP, BACK]], copied(first, others)[[LOOKUP, BACK]])


@examples(40)
@given(st.lists(st.tuples(st.integers(500, 60_000), st.floats(0.1, 60.0), st.integers(0, 63)), min_size=1, max_size=4))
def test_copies_have_no_more_in_options_than_the_way_that_a_plan_goes_takes(drawn: list[tuple[int, float, int]]) -> None:
    loads = tuple(TableLoad(se.TableConfig(f"t{i}", rows, 4 + wide), (ids,)) for i, (rows, ids, wide) in enumerate(drawn))
    for seed in range(4):
        model = CostModel(Workload("copies", 256, loads), topology(seed=seed))
        layouts = [se.replicated().layout(load.table.num_embeddings, load.table.embedding_dim, Cluster(RANKS, 2)) for load in loads]
        plan = Plan(tuple(TablePlan(load.table.name, layout) for load, layout in zip(loads, layouts, strict=True)), RANKS)
        names = set().union(*(model.charges_of(number, [load.table.embedding_dim], "copied") for number, load in enumerate(loads)))
        options = sum(model.copied(number)[0][COPIES] for number in range(len(loads))) + sum(
            model.charges[n][COPIES] for n in names
        )
        ways, shared = {}, model.copies.shared(model.tables)
        for way in cost_copies.WAYS:
            goes = replace(shared, way=way, counted=shared.counted or way == "rows")
            ways[way] = sum(model.copied_in_detail(number, shared=goes)[0][COPIES] for number in range(len(loads)))
            ways[way] += sum(model.charges[name][COPIES] for name in paid(names, goes))
        found = estimate(plan, model.workload, model.topology, model).phase_seconds[COPIES]
        assert found == pytest.approx(ways[shared.way])
        assert options <= found * (1 + 1e-12)
        if "rows" in model.copies.ways:
            assert options <= ways["rows"] * (1 + 1e-12)
        else:
            assert options == pytest.approx(found), "where no copy goes by rows, options are exact"


@pytest.mark.parametrize("latency", [1e-6, 1e-3])
@pytest.mark.parametrize("node", [2, RANKS])
@pytest.mark.parametrize(("rows", "way"), [(500, "whole"), (60_000, "rows")])
def test_what_copies_share_has_the_latencies_of_the_way_at_most(rows: int, way: str, node: int, latency: float) -> None:
    """Nothing else takes time: a large table's options have the counts and the faster way, all others the way there is."""
    ops = {name: Op(0.0, 0.0, 0.0) for name in REQUIRED_OPS}
    links = Link(float("inf"), latency, 1e-6), Link(float("inf"), 1e-5, 1e-6)
    here = Topology("latency", RANKS, node, 1 << 30, 0, *links, ops)
    large, small = (TableLoad(se.TableConfig(name, size, 4), (1.0,)) for name, size in (("a", rows), ("b", 10)))
    model = CostModel(Workload("latency", 256, (large, small)), here)
    layouts = [se.replicated().layout(load.table.num_embeddings, 4, Cluster(RANKS, node)) for load in (large, small)]
    plan = Plan(tuple(TablePlan(name, layout) for name, layout in zip("ab", layouts, strict=True)), RANKS)
    assert model.copies.shared(model.tables).way == way
    reduced, exchanged = all_reduce(here).latency, all_to_all(here).latency
    options = [sum(model.charges[name][COPIES] for name in model.charges_of(number, [4], "copied")) for number in (0, 1)]
    expected = [reduced] * 2 if way == "whole" else [exchanged + min(reduced, exchanged), min(reduced, 2 * exchanged)]
    assert options == pytest.approx(expected)
    found = estimate(plan, model.workload, here, model).phase_seconds[COPIES]
    assert found == pytest.approx(reduced if way == "whole" else 2 * exchanged)


def one(load: TableLoad, **changes: float) -> CostModel:
    return CostModel(Workload("one", 1024, (load,)), topology(**changes))  # type: ignore[arg-type]


LOAD = TableLoad(se.TableConfig("t", 10_000, 128), (10.0,), Zipf(1.05))


def test_a_number_of_blocks_stands_for_blocks_of_equal_traffic() -> None:
    model = one(TableLoad(se.TableConfig("t", 10_000, 128), (10.0,)))
    blocks = model.tables[0].traffic.blocks([range(start, start + 2500) for start in range(0, 10_000, 2500)])
    for packing in ("unique", "bag"):
        counted, listed = model.common(0, [64, 64], 4, packing), model.common(0, [64, 64], blocks, packing)
        np.testing.assert_allclose(counted[0], listed[0])
        assert counted[1] == pytest.approx(listed[1])


def test_cutting_columns_again_asks_for_keys_again_and_moves_the_same_vectors() -> None:
    model = one(LOAD)
    asked = model.tables[0].traffic.blocks([range(10_000)])
    table = model.tables[0]
    demand = table.demand(asked, "unique")
    whole, halves = np.array([128.0]), np.array([64.0, 64.0])
    assert table.vector_bytes(demand, halves).sum() == table.vector_bytes(demand, whole).sum()
    assert table.key_bytes(demand, np.array([10_000.0] * 2)).sum() == 2 * table.key_bytes(demand, np.array([10_000.0])).sum()


def test_bags_are_asked_of_more_owners_the_finer_rows_are_cut_and_ids_are_not() -> None:
    table = one(TableLoad(se.TableConfig("t", 10_000, 16), (10.0,))).tables[0]
    for packing, grows in (("unique", False), ("bag", True)):
        whole, cut = (
            table.demand(table.traffic.blocks([range(i, i + 10_000 // n) for i in range(0, 10_000, 10_000 // n)]), packing)
            for n in (1, 4)
        )
        assert cut.entries.sum() == pytest.approx(whole.entries.sum())
        assert (cut.segments.sum() > 1.5 * whole.segments.sum()) == grows


def test_a_bag_is_asked_once_of_an_owner_however_many_residues_it_has() -> None:
    """Rows dealt out to two ranks in shares of 1 to 2: three residues, and as many segments as of two blocks of these shares."""
    table = one(TableLoad(se.TableConfig("t", 9000, 16), (10.0,))).tables[0]
    columns = range(16)
    shards = tuple(Shard(range(residue, 9000, 3), columns, (residue % 2,)) for residue in range(3))
    dealt, blocks = Strip(columns, shards), [range(6000), range(6000, 9000)]
    held = cost_demand.Holdings.of(dealt, table.traffic.blocks([shard.rows for shard in shards]))
    assert held.ranks.tolist() == [0, 1]
    assert held.rows.tolist() == [6000, 3000]
    for packing in ("unique", "bag"):
        mine, theirs = (table.demand(asked, packing) for asked in (held.asked, table.traffic.blocks(blocks)))
        for what in ("entries", "segments", "touched", "lengths"):
            np.testing.assert_allclose(getattr(mine, what), getattr(theirs, what))


def test_bags_of_one_id_send_no_lengths() -> None:
    table = one(TableLoad(se.TableConfig("t", 10_000, 16), (1.0,))).tables[0]
    demand = table.demand(table.traffic.blocks([range(5000), range(5000, 10_000)]), "bag")
    assert not demand.lengths.any()


def test_features_without_a_sum_are_read_by_id_in_a_table_packed_as_bags() -> None:
    config = se.TableConfig("t", 1000, 16, feature_names=["bag", "list"], pooling={"bag": "sum", "list": None})
    table = one(TableLoad(config, (5.0, 2.0))).tables[0]
    demand = table.demand(table.traffic.blocks([range(1000)]), "bag")
    assert demand.bagged.sum() == pytest.approx(5.0 * 256)
    assert 0 < demand.singles.sum() < table.traffic.distinct


def test_rows_that_learn_nothing_cost_no_way_back() -> None:
    still = one(TableLoad(se.TableConfig("t", 100, 16, frozen=True), (3.0,), optimizer=se.optim.Adam()))
    asked = still.tables[0].traffic.blocks([range(100)])
    loads, _ = still.parts(0, np.array([16.0]), asked, np.array([100.0]), "unique")
    assert loads[0, UPDATE] == 0
    assert not still.tables[0].load.table.policy.max_norm
    assert still.copied(0)[0][COPIES] == 0
    assert cost_demand.state_bytes(still.tables[0], np.array([16.0])) == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planner_knows_which_kernel_updates_a_slab(optimizer: se.optim.TableOptimizer, dtype: torch.dtype) -> None:
    for width in (16, 128):
        for columns in (width, 2 * width):
            table = one(TableLoad(se.TableConfig("t", 100, columns, dtype=dtype), (1.0,), optimizer=optimizer)).tables[0]
            split = optimizer.rowwise and columns > width
            kernel = choose("auto", SlabFacts(optimizer, dtype, width, 100, torch.device("cpu")))
            assert cost_demand.compiled(table) == (kernel == "numba")
            assert cost_demand.merged_first(table, width) == split


def test_updates_fall_back_on_the_plain_name() -> None:
    here = topology()
    assert op_of(here, "update_adam") is here.ops["update_adam"]
    assert op_of(here, "update_ftrl") is here.ops["update"]
    assert op_of(here, "join") is here.ops["copy"]
    assert op_of(here, "counts") is FREE
    with pytest.raises(ConfigError, match="topology 'test' gives no speed for the op 'lookup'"):
        op_of(Topology("test", 1, 1, 0, 0, here.intra, here.inter, {}), "lookup")


@pytest.mark.parametrize("name", ["h200x8", "h100x8", "a100x8", "cpu"])
def test_every_topology_that_comes_along_gives_what_the_model_needs(name: str) -> None:
    model = CostModel(Workload("all", 1024, (LOAD,)), load_topology(name, 16))
    layout = se.column_wise().layout(10_000, 128, Cluster(16, 8))
    assert estimate(Plan((TablePlan("t", layout),), 16), model.workload, model.topology).step_seconds > 0


def test_an_all_to_all_takes_as_long_as_its_slower_links() -> None:
    here = topology(ranks=8)  # two a node: one peer near, six far
    exchange = all_to_all(here)
    assert exchange.latency == pytest.approx(1e-4 + 5 * 1e-5)
    assert exchange.byte == pytest.approx(6 / 1e9)
    assert all_to_all(topology(ranks=2)).byte == pytest.approx(1 / 1e10)
    assert all_to_all(topology(ranks=1)).latency == all_reduce(topology(ranks=1)).byte == 0


def test_an_all_reduce_moves_the_buffer_nearly_twice_whatever_the_number_of_ranks() -> None:
    assert all_reduce(topology(ranks=2)).byte == pytest.approx(1 / 1e10)
    assert all_reduce(topology(ranks=64)).byte == pytest.approx(2 * 63 / 64 / (2 * 1e9))


def test_a_plan_for_other_tables_or_ranks_is_refused() -> None:
    model = one(LOAD)
    layout = se.row_wise().layout(10_000, 128, Cluster(RANKS, 2))
    with pytest.raises(PlanError, match="the plan is for 3 rank"):
        estimate(Plan((), 3), model.workload, model.topology)
    with pytest.raises(PlanError, match="other"):
        estimate(Plan((TablePlan("other", layout),), RANKS), model.workload, model.topology)
    with pytest.raises(PlanError, match="nothing"):
        estimate(Plan((), RANKS), model.workload, model.topology)


def test_a_thousand_ranks_are_counted_in_one_go() -> None:
    big = topology(ranks=1024)
    loads = tuple(TableLoad(se.TableConfig(f"t{i}", 100_000, 16), (1.0,)) for i in range(20))
    workload = Workload("big", 65_536, loads)
    layout = se.row_wise().layout(100_000, 16, Cluster(1024, 2))
    found = estimate(Plan(tuple(TablePlan(load.table.name, layout) for load in loads), 1024), workload, big)
    assert found.seconds.shape == (len(PHASES), 1024)
    assert found.seconds[IDS].max() == pytest.approx(found.seconds[IDS].min(), rel=0.05)
