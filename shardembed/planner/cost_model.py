"""What a step costs by plan: seconds a phase and bytes of memory, added up from shards.

Phases follow the journey and are separated by collectives, so a step takes the sum over phases of the slowest rank. Every batch is
spread evenly over the ranks, so all ranks ask every owner alike; what a shard adds to its owner is R times one rank's demand (see
`cost_demand`), in the kinds of work of `cost_ops`. E entries, S segments, W columns of the shard, U rows touched by any rank:

    phase             on the owner, a shard                        on every rank, a table
    route                                                          route_*: N ids; distinct ids a strip, or N ids a strip in bags
    ids out           wire and copy of R E keys (+ S lengths)      copy of E keys a strip; base: the counts message
    lookup            lookup of R E rows, W wide                   (copied: of its own E rows)
    vectors back      wire and copy of R S vectors                 copy of S vectors a strip
    combine                                                        pool and pool_adjoint of N ids (bags: of S vectors) a strip
    gradients back    wire and copy of R S vectors                 copy of S vectors a strip
    update            merge of R E gradients, update of U rows     (copied: update of U rows)
    reduce copies                                                  (copied: merge, and one all-reduce of rows x (W + 1))

Of the wire, (R - 1) / R travels: own shares stay on the rank. What a slab costs whatever is asked of it (one call of each kind of
work, one block of a message a rank) is a fixed charge by the slab's kind.

Everything is linear in shards, so that options of a table can be counted once and added up in any combination. What is not linear
is left out. Where a plan puts all tables into one slab, vectors travel as they were looked up; they are counted as copied into a
message and out of it, which can be a third of a small step. Small beside the rest: a slab that mixes packings sends lengths for
all of it; int64 keys are judged by shard, not by slab; a slab that lies on one rank needs no sorting by owner; padding of messages
is counted by slab, at its expected size.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardembed.planner import cost_demand as demands
from shardembed.planner.cost_demand import Demand, Table
from shardembed.planner.cost_ops import all_reduce, all_to_all, op_of
from shardembed.planner.cost_phases import (
    BACK,
    BUFFERS,
    CATEGORIES,
    COMBINE,
    COPIES,
    GRADS,
    IDS,
    LOOKUP,
    PHASES,
    PREFETCH,
    ROUTE,
    STATE,
    UPDATE,
    WAITING,
    WEIGHTS,
    memory_of,
    phases_with,
    seconds_of,
)
from shardembed.planner.topology import Op, Topology
from shardembed.planner.topology_sections import optimizer_name
from shardembed.planner.traffic import Asked, Traffic
from shardembed.planner.workload import Workload
from shardembed.tables.placement import Packing
from shardembed.tables.pooling import POOLINGS, OverIds, Pooling, PoolingKind
from shardembed.wire.header import HEADER_BYTES, SLAB_COUNTS_BYTES

Array = NDArray[np.float64]
# What `combine` does with vectors that came one an id, and what its adjoint does; one op is both ways.
BY_ID: dict[OverIds, tuple[str, ...]] = {
    "sum": ("pool", "pool_adjoint"),
    "mean": ("pool", "pool_adjoint"),
    "max": ("pool_max",),
    None: ("gather", "gather_adjoint"),
}
BY_BAG = ("pool", "pool_adjoint")
TAG_BYTES = 32  # of the all-reduce: `comm.tag.TAG` numbers of float32


class CostModel:
    """The cost of every way to cut the tables of `workload` on `topology`.

    Attributes:
        tables: with their traffic.
        base: `[P]` seconds whatever the plan.
        charges: `[P]` seconds by name; `charges_of` adds the slabs it names.
        charge_memory: likewise bytes.
    """

    phases, categories = PHASES, CATEGORIES

    def __init__(self, workload: Workload, topology: Topology, tables: tuple[Table, ...] | None = None) -> None:
        """tables: of a model with the same workload and as many ranks, where there is one."""
        self.workload, self.topology, self.ranks = workload, topology, topology.ranks
        batch = workload.global_batch_size / topology.ranks
        self.tables = tables or tuple(
            Table(load, Traffic.of(load, batch, self.ranks), batch, self.ranks, (workload.wire_dtype or load.table.dtype).itemsize)
            for load in workload.tables
        )
        poolings: dict[object, set[Pooling]] = defaultdict(set)
        for table in self.tables:
            poolings[self._kind(table)].update(table.poolings)
        self._groups = {kind: len(found) for kind, found in poolings.items()}
        self._exchange, self._reduce = all_to_all(topology), all_reduce(topology)
        self._op = cache(lambda name: op_of(topology, name))
        self._swap_byte = self._exchange.byte / max(1, self.ranks - 1)  # for a byte to one peer alone
        latency = self._exchange.latency
        self.charges: dict[str, Array] = {
            "cut": phases_with({IDS: latency, BACK: latency, GRADS: latency}),
            "copied": phases_with({COPIES: self._reduce.latency + TAG_BYTES * (self._reduce.byte + self._op("all_reduce").byte)}),
            "twins": phases_with({UPDATE: latency}),
            "norms": phases_with({LOOKUP: latency}),
        }
        self.charge_memory: dict[str, float] = dict.fromkeys(self.charges, 0.0)
        self.base = self._base()

    @staticmethod
    def _kind(table: Table) -> object:
        """What tables have in common that share a slab while they are cut alike."""
        config = table.load.table
        return config.embedding_dim, config.dtype, table.load.optimizer, config.policy

    def _base(self) -> Array:
        features = sum(len(table.poolings) for table in self.tables)
        ids = sum(table.traffic.ids for table in self.tables)
        route = self._op("step").call + self._op("route_ids").seconds(features, ids, 0)
        counts = self._op("counts").call + self._exchange.latency + self._exchange.byte * HEADER_BYTES
        learns = any(table.learns for table in self.tables)
        back, applied = (self._op(name).call * learns for name in ("backward", "apply"))
        return phases_with({ROUTE: route, IDS: counts, COMBINE: back, UPDATE: applied})

    def together(self, tables: Sequence[int]) -> CostModel:
        """A model whose only table, number 0, is all of these (see `Table.together`): where this one gives a number, it gives an
        array `[n]`, of tables in one block of rows a strip.
        """
        other = copy.copy(self)
        other.tables = (Table.together([self.tables[table] for table in tables]),)
        return other

    # What a shard adds to its owner.

    def parts(self, table: int, widths: Array, asked: Asked, rows: Array, packing: Packing) -> tuple[Array, Array]:
        """What each of n shards adds to its owner: (`[n, P]` seconds, `[n]` bytes).

        Args:
            widths, rows: columns and rows of the shards, `[n]`. asked: of their rows.
        """
        loads, memory = self.parts_in_detail(table, widths, asked, rows, packing)
        return loads, memory.sum(1)

    def parts_in_detail(self, table: int, widths: Array, asked: Asked, rows: Array, packing: Packing) -> tuple[Array, Array]:
        """As `parts`, with bytes by category `[n, C]`."""
        this, widths, rows = self.tables[table], np.asarray(widths, np.float64), np.asarray(rows, np.float64)
        demand = this.demand(asked, packing)
        keys, vectors = this.key_bytes(demand, rows), this.vector_bytes(demand, widths)
        per_byte = self._exchange.byte + self.ranks * self._op("copy").byte
        loads = np.zeros((len(PHASES), len(widths)))
        loads[IDS] = per_byte * keys
        loads[LOOKUP] = self._lookup(this, demand, widths)
        loads[BACK] = per_byte * vectors
        if this.learns:
            loads[GRADS] = per_byte * vectors
            if this.wire != this.compute:
                loads[GRADS] += self.ranks * self._op("copy").byte * demand.segments * widths * this.compute
            loads[UPDATE] = self._update(table, demand, widths)
        return loads.T, memory_of(this, demand, widths, rows, keys, vectors)

    def _lookup(self, table: Table, demand: Demand, widths: Array) -> Array:
        """R requests; with max_norm, each touched row is read and written once more, in float64."""
        row, ranks = widths * table.itemsize, self.ranks
        seconds = seconds_of(self._op("lookup"), ranks * demand.singles, row)
        seconds = seconds + seconds_of(self._op("lookup_sum"), ranks * demand.bagged, row)
        if table.load.table.max_norm is not None:
            seconds = seconds + seconds_of(self._op("lookup"), demand.touched, row + 8 * widths)
            seconds = seconds + self._swap_byte * table.swapped_bytes(demand, widths)
        return seconds

    def _update(self, number: int, demand: Demand, widths: Array) -> Array:
        """Merge what R ranks sent, update what any of them touched. Where a rowwise optimizer's columns are cut, each strip's
        owner also sends one float64 a touched row to every other strip's owner (`store.twins`).
        """
        table, entries = self.tables[number], self.ranks * demand.entries
        moved = demands.updated_bytes(table, widths)
        seconds = np.empty_like(widths)
        for width in np.unique(widths):
            here = widths == width
            merge, update = self._update_ops(number, float(width))
            seconds[here] = seconds_of(merge, entries[here], width * table.compute)
            seconds[here] += seconds_of(update, demand.touched[here], moved[here])
        if table.load.table.policy.rounding == "stochastic":
            seconds += seconds_of(self._op("round"), demand.touched, widths * table.compute)
        if self.ranks > 1:  # gradients are divided by the number of ranks
            seconds += self.ranks * self._op("copy").byte * demand.segments * widths * table.compute
        if table.twins:
            split = widths < table.width
            seconds += split * seconds_of(self._op("twins"), demand.touched, 8.0)
            seconds += self._swap_byte * table.swapped_bytes(demand, widths)
        return seconds

    def _update_ops(self, table: int, width: float) -> tuple[Op, Op]:
        """Those that merge and update a slab."""
        name = optimizer_name(type(self.tables[table].load.optimizer))
        fused = {"fused", f"fused_{name}"} & self.topology.ops.keys()
        if fused and demands.fusible(self.tables[table], width):
            return self._op("fused_merge"), self._op(f"fused_{name}")
        return self._op("merge"), self._op(f"update_{name}")

    # What every rank does for its own batch.

    def common(self, table: int, widths: Sequence[float], blocks: int | Asked, packing: Packing) -> tuple[Array, float]:
        """What every rank does for its own batch of a table, wherever its shards lie: (`[P]` seconds, bytes).

        Args:
            widths: columns of each strip. blocks: those that each strip's rows are cut into; a number stands for that many
                blocks with equal shares of the ids.
        """
        seconds, memory = self.common_in_detail(table, [(width, blocks) for width in widths], packing)
        return seconds, memory.sum(0)

    def common_in_detail(self, table: int, strips: Sequence[tuple[float, int | Asked]], packing: str) -> tuple[Array, Array]:
        """As `common`, of strips that are cut into blocks in ways of their own, with bytes by category `[C]`."""
        this = self.tables[table]
        loads, memory = (np.zeros((len(lines), *np.shape(this.traffic.ids))) for lines in (PHASES, CATEGORIES))
        bags = this.read_by_bag(packing)
        by_id = sum(this.feature_ids(feature) for feature, bag in enumerate(bags) if not bag)
        loads[ROUTE] += self._op("route_unique").seconds(0, by_id, 0)
        memory[PREFETCH] += (this.traffic.ids + by_id) * demands.ID_BYTES
        for (width, blocks), count in Counter(strips).items():  # strips of one width, cut alike, cost alike
            demand = this.demand(self._evenly(this, blocks), packing)
            strip, held = np.zeros_like(loads), np.zeros_like(memory)
            self._common_strip(this, bags, demand, float(width), strip, held)
            loads += count * strip
            memory += count * held
        outputs = [self._outputs(this, feature) for feature in range(len(bags))]
        row = this.width * this.compute
        if len(strips) > 1:
            if this.twins:
                blocks = sum(cut if isinstance(cut, int) else len(cut.ids) for _, cut in strips)
                loads[UPDATE] += self._op("twins").call * blocks
            loads[COMBINE] += self._op("join").seconds(len(bags), len(strips) * sum(outputs), sum(outputs) * row)
        if this.itemsize < this.compute:  # made of float32, there and back
            loads[COMBINE] += self._op("copy").byte * 2 * sum(outputs) * row
        return loads, memory

    def _evenly(self, table: Table, blocks: int | Asked) -> Asked:
        if isinstance(blocks, Asked):
            return blocks
        traffic = table.traffic
        whole = (traffic.ids, traffic.distinct, traffic.touched)
        return Asked(*(np.broadcast_to(number / blocks, (blocks, *np.shape(number))) for number in whole))

    def _common_strip(
        self, table: Table, bags: tuple[bool, ...], demand: Demand, width: float, loads: Array, memory: Array
    ) -> None:
        entries, segments, singles, sums = (each.sum(0) for each in (demand.entries, demand.segments, demand.singles, demand.sums))
        keys = table.key_bytes(demand, np.zeros_like(demand.singles)).sum(0)
        vectors, wanted = segments * (width * table.wire + table.scale), segments * width * table.compute
        copy = self._op("copy").byte
        by_id = [feature for feature, bag in enumerate(bags) if not bag]
        ids = sum(table.feature_ids(feature) for feature in by_id)
        loads[ROUTE] += self._op("route_place").seconds(1, singles, demands.ID_BYTES * ids)
        loads[ROUTE] += self._op("route_bag").seconds(sum(bags), demand.bagged.sum(0), demands.ID_BYTES * sums)
        loads[IDS] += copy * keys
        loads[BACK] += copy * (vectors + (wanted if table.wire != table.compute else 0.0))
        loads[COMBINE] += self._op("piece").seconds(len(bags), 0, 0)
        for feature in by_id:
            share = table.feature_ids(feature) / np.maximum(ids, 1e-300)
            loads[COMBINE] += self._pool(table, feature, share * singles, width, self._groups[self._kind(table)])
        for feature in (feature for feature, bag in enumerate(bags) if bag):
            share = table.feature_ids(feature) / np.maximum(table.traffic.ids - ids, 1e-300)
            loads[COMBINE] += self._pool_sums(table, feature, share * sums, width)
        if table.learns:
            loads[GRADS] += copy * vectors
        memory[PREFETCH] += keys + demands.ID_BYTES * (ids + 2 * entries)
        # The message beside what it is unpacked into; on the way back, gradients beside the message.
        memory[BUFFERS] += vectors + wanted

    def _pool(self, table: Table, feature: int, segments: float, width: float, groups: int) -> float:
        """There, the vectors of all ids are read and the outputs written; back, gradients of outputs are read for all ids and those
        of segments written.
        """
        ids, row, kind = table.feature_ids(feature), width * table.compute, POOLINGS[table.poolings[feature]]
        outputs, (there, *back) = self._outputs(table, feature), BY_ID[kind.over_ids]
        if not back:
            read = self._op("pool").seconds(0, ids, ids * row)
            return read + self._op(there).seconds(0, ids, outputs * row)
        seconds = self._op(there).seconds(0, ids, (ids + outputs) * row)
        if table.learns:
            # Torch's own adjoint, where `combine` has none: of bags with padding too.
            own = kind.over_ids is not None and table.load.table.padding_idx is None
            # Each of `groups` adjoints of a slab writes gradients of all its segments, and they are added up.
            written = segments * (2 * groups - 1)
            seconds += self._op(back[0] if own else "gather_adjoint").seconds(0, ids, (ids + written) * row)
        return seconds + self._divided(kind, outputs * row) * (2 if kind.divides_ids else 1)

    def _divided(self, kind: PoolingKind, written: float) -> float:
        """Of what is divided by something of the bag, each byte is read and written once more."""
        return 0.0 if kind.divisor is None else self._op("copy").byte * 2 * written

    def _pool_sums(self, table: Table, feature: int, sums: float, width: float) -> float:
        """As `_pool`, where the owners have summed already: each of their sums is read once and belongs to one bag."""
        bags, row = table.traffic.bags[feature], width * table.compute
        seconds = self._op("pool").seconds(0, sums, (sums + bags) * row)
        if table.learns:
            seconds += self._op("pool_adjoint").seconds(0, sums, 2 * sums * row)
        return seconds + self._divided(POOLINGS[table.poolings[feature]], bags * row)

    def _outputs(self, table: Table, feature: int) -> float:
        return table.feature_ids(feature) if table.poolings[feature] is None else table.traffic.bags[feature]

    # Copied tables.

    def copied(self, table: int) -> tuple[Array, float]:
        """A copy of the table on every rank: what each of them does and holds, (`[P]` seconds, bytes)."""
        loads, memory = self.copied_in_detail(table)
        return loads, memory.sum(0)

    def copied_in_detail(self, table: int) -> tuple[Array, Array]:
        """As `copied`, with bytes by category `[C]`."""
        this, copy = self.tables[table], self._op("copy").byte
        traffic, width, rows = this.traffic, float(this.width), this.rows * 1.0
        loads, memory = self.common_in_detail(table, [(width, 1)], "unique")
        found, row = traffic.distinct, width * this.itemsize
        loads[LOOKUP] += self._op("lookup").seconds(0, found, found * row)
        loads[BACK] += copy * found * (width * this.wire + this.scale)
        widths = np.array([width])
        memory[WEIGHTS] += rows * row
        memory[STATE] += rows * float(demands.state_bytes(this, widths)[0])
        memory[BUFFERS] += found * row
        if this.learns:
            loads[GRADS] += copy * found * (width * this.wire + this.scale)
            gradients = width * this.compute
            buffer = self.reduced_bytes(table)
            _, update = self._update_ops(table, width)
            loads[COPIES] += self._op("merge").seconds(0, found, found * gradients)
            loads[COPIES] += self._op("dense").seconds(0, rows, buffer) + buffer * (self._reduce.byte + self._op("all_reduce").byte)
            moved = float(demands.updated_bytes(this, widths)[0])
            loads[UPDATE] += update.seconds(0, traffic.touched, traffic.touched * moved)
            if this.load.table.policy.rounding == "stochastic":
                loads[UPDATE] += self._op("round").seconds(0, traffic.touched, traffic.touched * gradients)
            memory[WAITING] += (found + traffic.touched) * (gradients + demands.ID_BYTES)
            memory[BUFFERS] += buffer
        return loads, memory

    def reduced_bytes(self, table: int) -> float:
        """Of a copied table in the all-reduce: its rows, and for each whether it is touched."""
        this = self.tables[table]
        return this.rows * (this.width + 1) * this.compute if this.learns else 0.0

    # What a plan pays once.

    def charges_of(self, table: int, widths: Sequence[float], packing: Packing | str) -> frozenset[str]:
        """The fixed charges of a table cut into strips of these widths; packing "copied": of a copy on every rank."""
        this, copied = self.tables[table], packing == "copied"
        split = this.whole_rows and len(widths) > 1
        names = {"copied"} if copied and this.learns else set()
        if not copied:
            names.add("cut")
            names |= {"twins"} if split and this.twins else set()
            names |= {"norms"} if split and this.load.table.max_norm is not None else set()
        for width in dict.fromkeys(widths):
            slab = self._slab_name(this, int(width), copied, split)
            names.add(self._charge(f"slab:{slab}", lambda width=width: self._slab(table, float(width), copied)))
            for kind in self._pools(this, packing):
                names.add(self._charge(f"pool {kind}:{slab}", lambda kind=kind: self._pool_call(this, kind)))
        return frozenset(names)

    def _charge(self, name: str, seconds: Callable[[], Array]) -> str:
        if name not in self.charges:
            self.charges[name] = seconds()
            self.charge_memory[name] = 0.0
        return name

    def _pools(self, table: Table, packing: Packing | str) -> set[Pooling | Literal["bags"]]:
        """What `combine` does in one call for all tables of a slab that are alike in it."""
        bags = table.read_by_bag(packing)
        return {"bags" if bag else pooling for bag, pooling in zip(bags, table.poolings, strict=True)}

    def _pool_call(self, table: Table, pooling: Pooling | Literal["bags"]) -> Array:
        ops = BY_BAG if pooling == "bags" else BY_ID[POOLINGS[pooling].over_ids]
        calls = sum(self._op(op).call for op in (ops if table.learns else ops[:1]))
        return phases_with({COMBINE: calls, ROUTE: self._op("route_slab").call if pooling == "bags" else 0.0})

    def _slab_name(self, table: Table, width: int, copied: bool, split: bool) -> str:
        config = table.load.table
        kind = (config.dtype, table.load.optimizer.describe(), config.policy, copied, split)
        return f"{width} columns, " + ", ".join(map(str, kind))

    def _slab(self, number: int, width: float, copied: bool) -> Array:
        """One call of each kind of work a slab; a message has a block a rank on both sides, of which a copied slab has its own."""
        table = self.tables[number]
        call = {name: self._op(name).call for name in ("route_slab", "lookup", "copy", "block")}
        blocks = 2 * (call["copy"] + call["block"] * (1 if copied else self.ranks))
        item = int(width) * table.wire + table.scale
        fill_keys, fill_vectors = (0.0, 0.0) if copied else (self._exchange.byte * demands.padding(size) for size in (4, item))
        counts = self._exchange.byte * SLAB_COUNTS_BYTES + self._op("counts").row
        seconds = {ROUTE: call["route_slab"], IDS: blocks + fill_keys + counts, LOOKUP: call["lookup"], BACK: blocks + fill_vectors}
        if table.learns:
            merge, update = self._update_ops(number, width)
            seconds[GRADS] = blocks + fill_vectors
            seconds[UPDATE] = update.call + (0.0 if copied else merge.call)
            seconds[COPIES] = self._op("merge").call + self._op("dense").call if copied else 0.0
        return phases_with(seconds)
