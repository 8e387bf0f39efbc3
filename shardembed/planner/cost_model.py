"""What a step costs by plan: seconds a phase and bytes of memory, added up from shards.

Phases follow the journey and are separated by collectives, so a step takes the sum over phases of the slowest rank. Every batch is
spread evenly over the ranks, so all ranks ask every owner alike; what a shard adds to its owner is R times one rank's demand (see
`cost_demand`), in the kinds of work of `cost_ops`. E entries, S segments, W columns of the shard, U rows touched by any rank:

    phase             on the owner, a table                        on every rank, a table
    route                                                          route_*: N ids; distinct ids a strip, or N ids a strip in bags
    ids out           wire and copy of R E keys (+ S lengths)      copy of E keys a strip; base: the counts message
    lookup            lookup of R E rows, W wide, and copy of      (copied: of its own E rows)
                      sums into the message
    vectors back      wire of R S vectors                          copy of S vectors a strip
    combine           order of R E rows                            pool and pool_adjoint of N ids (bags: of S vectors) a strip; join
    gradients back    wire and copy of R S vectors                 copy of S vectors a strip
    update            merge of R E gradients, update of U rows     (copied: update of U rows)
    reduce copies                                                  (copied: merge, and what `cost_copies` says)

Of the wire, (R - 1) / R travels: own shares stay on the rank. An owner's part is what a rank holds of a strip, in however many
blocks (`cost_demand.Holdings`). What a slab costs whatever is asked of it is a fixed charge by the slab's kind.

All is linear in owners' parts, so that options can be counted once and added up in any combination. A plan that puts all tables
into one slab spares itself copies, since its vectors are the message (`MessageLayout.dense`). Where all tables are of one kind,
options therefore have no copies of vectors, and what is copied or cut by columns has a fixed charge for those of all tables, by the
fewest vectors that they can do with: no more than a plan pays, so that a bound holds, and exact where a plan has one slab.
`cost.estimate`, which sees the plan, counts them as they are (`packed`). Left out, and small: a slab that mixes packings sends
lengths for all of it and answers with sums; tables of one kind that are all cut into the same strips share a slab, too; int64 keys
are judged by table; a slab on one rank needs no sorting by owner; padding of messages is counted at its expected size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
from numpy.typing import NDArray

from shardembed.planner import cost_copies
from shardembed.planner import cost_demand as demands
from shardembed.planner.cost_combine import Combining, Group, groups_of, outputs_of
from shardembed.planner.cost_copies import Copies, Shared
from shardembed.planner.cost_demand import Demand, Table
from shardembed.planner.cost_ops import FREE, all_reduce, all_to_all, op_of
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
    UPDATE,
    memory_of,
    phases_with,
    seconds_of,
)
from shardembed.planner.topology import Op, Topology
from shardembed.planner.topology_sections import optimizer_name
from shardembed.planner.traffic import Asked, Traffic
from shardembed.planner.workload import Workload
from shardembed.tables.placement import PACKINGS, Packing
from shardembed.wire.header import HEADER_BYTES, SLAB_COUNTS_BYTES
from shardembed.wire.message import ALIGNMENT

Array = NDArray[np.float64]


class CostModel:
    """The cost of every way to cut the tables of `workload` on `topology`.

    Attributes:
        tables: with their traffic.
        base: `[P]` seconds whatever the plan.
        charges: `[P]` seconds by name; `charges_of` adds the slabs it names.
        charge_memory: likewise bytes.
        copies: prices of what copies share.
        one_slab: a plan may have all tables in one slab whose vectors are the message as they are.
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
        self._exchange = all_to_all(topology)
        self._op = cache(lambda name: op_of(topology, name))
        self.copies = Copies.of(self.tables, self.ranks, self._op, self._exchange, all_reduce(topology))
        self._combining = Combining(self.tables, self._op)
        whole = {(table.width * table.wire + table.scale) % ALIGNMENT == 0 for table in self.tables}
        self.one_slab = len({table.kind for table in self.tables}) == 1 and whole == {True}
        # A CPU reads single rows straight into a message of several slabs. A GPU looks them up first; it sorts rows in the forward.
        self._straight = topology.device == "cpu"
        self._order = FREE if self._straight else self._op("order")
        self._swap_byte = self._exchange.byte / max(1, self.ranks - 1)  # for a byte to one peer alone
        latency = self._exchange.latency
        self.charges: dict[str, Array] = {
            "cut": self._cut(),
            "twins": phases_with({UPDATE: latency}),
            "norms": phases_with({LOOKUP: latency}),
            "slabs": self._several_slabs(),
            "packed slabs": self._several_slabs(copies=False),
            **{name: phases_with({COPIES: took}) for name, took in self.copies.once().items()},
        }
        self.charge_memory: dict[str, float] = dict.fromkeys(self.charges, 0.0)
        self.base = self._base()

    def _base(self) -> Array:
        features = sum(len(table.poolings) for table in self.tables)
        ids = sum(table.traffic.ids for table in self.tables)
        route = self._op("step").call + self._op("route_ids").seconds(features, ids, 0)
        counts = self._op("counts").call + self._exchange.latency + self._exchange.byte * HEADER_BYTES
        learns = any(table.learns for table in self.tables)
        back, applied = (self._op(name).call * learns for name in ("backward", "apply"))
        combine = back + features * self._op("output").call
        return phases_with({ROUTE: route, IDS: counts, COMBINE: combine, UPDATE: applied})

    def _cut(self) -> Array:
        """An exchange there, one back and one of gradients, each a message that is put together and taken apart."""
        latency, message = self._exchange.latency, self._op("message").call
        packed = 0.0 if self.one_slab else message
        return phases_with({IDS: latency + 2 * message, LOOKUP: packed, BACK: latency + packed, GRADS: latency + 2 * packed})

    def _several_slabs(self, copies: bool = True) -> Array:
        """What tables that are all of one kind take more once they do not share a slab; of copies the least, on a mean rank."""
        found, message = phases_with({COMBINE: sum(map(self._combining.rejoined, self.tables))}), self._op("message").call
        if self.one_slab:
            found[[LOOKUP, BACK, GRADS]] = message * np.array([1, 1, 2])
        for table in self.tables if self.one_slab and copies else ():
            fewest = min(float(table.demand(table.whole, packing).segments[0]) for packing in PACKINGS)
            copied = self._op("copy").byte * fewest * (table.width * table.wire + table.scale)
            found[BACK] += copied
            found[GRADS] += 2 * copied * table.learns
        return found

    # What is asked of an owner.

    def parts(self, table: int, widths: Array, asked: Asked, rows: Array, packing: Packing) -> tuple[Array, Array]:
        """What n ranks have to do for what they hold of a strip: (`[n, P]` seconds, `[n]` bytes).

        Args:
            widths, rows: columns and rows that each holds, `[n]`. asked: of each (`cost_demand.Holdings`).
        """
        loads, memory = self.parts_in_detail(table, widths, asked, rows, packing)
        return loads, memory.sum(1)

    def parts_in_detail(
        self, table: int, widths: Array, asked: Asked, rows: Array, packing: Packing, packed: bool | None = None
    ) -> tuple[Array, Array]:
        """As `parts`, with bytes by category `[n, C]`.

        packed: vectors are copied into messages and out of them; by default unless one slab may have all.
        """
        packed = not self.one_slab if packed is None else packed
        this, widths, rows = self.tables[table], np.asarray(widths, np.float64), np.asarray(rows, np.float64)
        demand = this.demand(asked, packing)
        keys, vectors = this.key_bytes(demand, rows), this.vector_bytes(demand, widths)
        copy = self.ranks * self._op("copy").byte
        loads = np.zeros((len(PHASES), len(widths)))
        # Keys arrive in 32 bits, and are widened.
        loads[IDS] = (self._exchange.byte + copy) * keys + copy * demands.ID_BYTES * demand.entries
        loads[LOOKUP] = self._lookup(this, demand, widths, packed)
        loads[BACK] = self._exchange.byte * vectors
        if this.learns:
            loads[COMBINE] = self._order.row * self.ranks * demand.entries
            loads[GRADS] = (self._exchange.byte + copy * packed) * vectors
            if this.wire != this.compute:
                loads[GRADS] += copy * demand.segments * widths * this.compute
            loads[UPDATE] = self._update(table, demand, widths)
        return loads.T, memory_of(this, demand, widths, rows, keys, vectors)

    def _lookup(self, table: Table, demand: Demand, widths: Array, packed: bool) -> Array:
        """R requests; with max_norm, each touched row is read and written once more, in float64."""
        row, ranks, copy = widths * table.itemsize, self.ranks, self._op("copy").byte
        seconds = seconds_of(self._op("lookup"), ranks * demand.singles, row)
        seconds = seconds + seconds_of(self._op("lookup_sum"), ranks * demand.bagged, row)
        cast, sent = table.wire != table.itemsize, widths * table.wire + table.scale
        if packed:
            copied = demand.sums + (0.0 if self._straight and not cast else demand.singles)
            seconds = seconds + copy * ranks * copied * sent
        if cast:
            seconds = seconds + copy * ranks * demand.singles * row
        if self._straight and table.itemsize < table.compute:  # gathered and widened before they are summed
            seconds = seconds + copy * ranks * demand.bagged * (row + 2 * widths * table.compute)
        if table.wire != table.compute:
            seconds = seconds + copy * ranks * demand.sums * widths * table.compute
        if table.load.table.max_norm is not None:
            seconds = seconds + seconds_of(self._op("lookup"), demand.touched, row + 8 * widths)
            seconds = seconds + self._swap_byte * table.swapped_bytes(demand, widths)
        return seconds

    def _update(self, number: int, demand: Demand, widths: Array) -> Array:
        """Merge what R ranks sent, update what any touched; with cut columns of a rowwise optimizer, swap statistics of rows."""
        table, entries = self.tables[number], self.ranks * demand.entries
        moved = demands.updated_bytes(table, widths)
        seconds = np.zeros_like(widths)
        for width in np.unique(widths):
            here = widths == width
            merge, update = self._update_ops(number, float(width))
            grads, touched, row = entries[here], demand.touched[here], width * table.compute
            if not self._fused(number, float(width)):
                grads = self.ranks * demand.segments[here] + touched
                if self.ranks > 1:  # else divided on the way by the number of ranks
                    seconds[here] += self._op("copy").byte * touched * row
            seconds[here] += merge.row * entries[here] + merge.byte * grads * row + seconds_of(update, touched, moved[here])
        if table.load.table.policy.rounding == "stochastic":
            seconds += seconds_of(self._op("round"), demand.touched, widths * table.compute)
        if table.twins:
            split = widths < table.width
            seconds += split * seconds_of(self._op("twins"), demand.touched, 8.0)
            seconds += self._swap_byte * table.swapped_bytes(demand, widths)
        return seconds

    def _compiled(self, table: int) -> bool:
        """A compiled kernel updates the table, and the topology has its speed."""
        name = optimizer_name(type(self.tables[table].load.optimizer))
        given = {"fused", f"fused_{name}"} & self.topology.ops.keys()
        return bool(given) and (self.topology.device == "cuda" or demands.compiled(self.tables[table]))

    def _fused(self, table: int, width: float) -> bool:
        """One call merges and updates a slab."""
        return self._compiled(table) and not demands.merged_first(self.tables[table], width)

    def _update_ops(self, table: int, width: float) -> tuple[Op, Op]:
        """Those that merge and update a slab."""
        name = optimizer_name(type(self.tables[table].load.optimizer))
        merge = self._op("fused_merge" if self._fused(table, width) else "merge")
        return merge, self._op(f"fused_{name}" if self._compiled(table) else f"update_{name}")

    # What every rank does for its own batch.

    def common(self, table: int, widths: Sequence[float], blocks: int | Asked, packing: Packing) -> tuple[Array, float]:
        """What every rank does for its own batch of a table, wherever its shards lie: (`[P]` seconds, bytes).

        Args:
            widths: columns of each strip. blocks: what owners are asked of each strip; a number stands for that many
                with equal shares of the ids.
        """
        seconds, memory = self.common_in_detail(table, [(width, blocks) for width in widths], packing)
        return seconds, memory.sum(0)

    def common_in_detail(
        self, table: int, strips: Sequence[tuple[float, int | Asked]], packing: str, packed: bool | None = None
    ) -> tuple[Array, Array]:
        """As `common`, of strips that are cut by rows in ways of their own, with bytes by category `[C]`. packed: as for parts."""
        packed = not self.one_slab if packed is None else packed
        this = self.tables[table]
        loads, memory = (np.zeros((len(lines), *np.shape(this.traffic.ids))) for lines in (PHASES, CATEGORIES))
        bags = this.read_by_bag(packing)
        by_id = sum(this.feature_ids(feature) for feature, bag in enumerate(bags) if not bag)
        loads[ROUTE] += self._op("route_unique").seconds(0, by_id, 0)
        memory[PREFETCH] += (this.traffic.ids + by_id) * demands.ID_BYTES
        for (width, blocks), count in Counter(strips).items():  # strips of one width, cut alike, cost alike
            demand = this.demand(self._evenly(this, blocks), packing)
            strip, held = np.zeros_like(loads), np.zeros_like(memory)
            self._common_strip(this, bags, demand, float(width), packed, strip, held)
            loads += count * strip
            memory += count * held
        if len(strips) > 1 and this.twins:
            owners = sum(cut if isinstance(cut, int) else len(cut.ids) for _, cut in strips)
            loads[UPDATE] += self._op("twins").call * owners
        loads[COMBINE] += self._combining.join(this, len(strips))
        if this.itemsize < this.compute:  # made of float32, there and back
            outputs = sum(outputs_of(this, feature) for feature in range(len(bags)))
            loads[COMBINE] += self._op("copy").byte * 2 * outputs * this.width * this.compute
        return loads, memory

    def _evenly(self, table: Table, blocks: int | Asked) -> Asked:
        if isinstance(blocks, Asked):
            return blocks
        traffic = table.traffic
        whole = (traffic.ids, traffic.distinct, traffic.touched)
        return Asked(*(np.broadcast_to(number / blocks, (blocks, *np.shape(number))) for number in whole))

    def _common_strip(
        self, table: Table, bags: tuple[bool, ...], demand: Demand, width: float, packed: bool, loads: Array, memory: Array
    ) -> None:
        entries, segments, singles, sums = (each.sum(0) for each in (demand.entries, demand.segments, demand.singles, demand.sums))
        keys = table.key_bytes(demand, np.zeros_like(demand.singles)).sum(0)
        vectors, wanted = segments * (width * table.wire + table.scale), segments * width * table.compute
        copy = self._op("copy").byte
        by_id = [feature for feature, bag in enumerate(bags) if not bag]
        ids = sum(table.feature_ids(feature) for feature in by_id)
        loads[ROUTE] += self._op("route_place").seconds(0, singles, demands.ID_BYTES * ids)
        loads[ROUTE] += self._op("route_bag").seconds(0, demand.bagged.sum(0), demands.ID_BYTES * sums)
        loads[IDS] += copy * keys
        loads[BACK] += copy * (vectors * packed + (wanted if table.wire != table.compute else 0.0))
        for feature in by_id:
            share = table.feature_ids(feature) / np.maximum(ids, 1e-300)
            loads[COMBINE] += self._combining.pool(table, feature, share * singles, width)
        for feature in (feature for feature, bag in enumerate(bags) if bag):
            share = table.feature_ids(feature) / np.maximum(table.traffic.ids - ids, 1e-300)
            loads[COMBINE] += self._combining.pool_sums(table, feature, share * sums, width)
        if table.learns:
            loads[GRADS] += copy * vectors * packed
        memory[PREFETCH] += keys + demands.ID_BYTES * (ids + 2 * entries)
        # The message beside what it is unpacked into; on the way back, gradients beside the message.
        memory[BUFFERS] += vectors + wanted

    # Copied tables.

    def copied(self, table: int) -> tuple[Array, float]:
        """A copy of the table on every rank: what each does and holds, (`[P]` seconds, bytes)."""
        loads, memory = self.copied_in_detail(table)
        return loads, memory.sum(0)

    def copied_in_detail(self, table: int, packed: bool | None = None, shared: Shared | None = None) -> tuple[Array, Array]:
        """As `copied`, with bytes by category `[C]`. packed: as for parts. shared: by default whichever way takes less."""
        packed = not self.one_slab if packed is None else packed
        this, copy = self.tables[table], self._op("copy").byte
        traffic, width = this.traffic, float(this.width)
        loads, memory = self.common_in_detail(table, [(width, 1)], this.own_packing, packed)
        whole = this.demand(this.whole, this.own_packing)
        singles, bagged, found = (each[0] for each in (whole.singles, whole.bagged, whole.segments))
        row, vector = width * this.itemsize, copy * (width * this.wire + this.scale) * packed
        loads[LOOKUP] += self._op("lookup").seconds(0, singles, singles * row)
        loads[LOOKUP] += self._op("lookup_sum").seconds(0, bagged, bagged * row)
        straight = self._straight and this.wire == this.itemsize
        loads[LOOKUP] += vector * (found - singles if straight else found)
        if this.learns:
            loads[COMBINE] += self._order.row * (singles + bagged)
            loads[GRADS] += vector * found
            gradients = width * this.compute
            _, update = self._update_ops(table, width)
            loads[COPIES] += self._op("merge").seconds(0, singles + bagged, (found + traffic.distinct) * gradients)
            loads[COPIES] += self.copies.seconds(this, shared)
            moved = float(demands.updated_bytes(this, np.array([width]))[0])
            loads[UPDATE] += update.seconds(0, traffic.touched, traffic.touched * moved)
            if this.load.table.policy.rounding == "stochastic":
                loads[UPDATE] += self._op("round").seconds(0, traffic.touched, traffic.touched * gradients)
        return loads, memory + cost_copies.memory_of(this, whole)

    # What a plan pays once.

    def charges_of(self, table: int, widths: Sequence[float], packing: Packing | str) -> frozenset[str]:
        """The fixed charges of a table cut into strips of these widths; packing "copied": of a copy on every rank."""
        this, copied = self.tables[table], packing == "copied"
        split = this.whole_rows and len(widths) > 1
        names: set[str] = set()
        if copied and this.learns:
            slab = this.slab(this.width, True, split)
            names |= self.copies.names(this, slab)
            for name, took in self.copies.a_slab(slab).items():  # that of no way is what options have
                self._charge(name, partial(phases_with, {COPIES: took}))
        if not copied:
            names.add("cut")
            names |= {"twins"} if split and this.twins else set()
            names |= {"norms"} if split and this.load.table.max_norm is not None else set()
        names |= {"slabs"} if copied or len(widths) > 1 else set()
        for width in dict.fromkeys(widths):
            slab = this.slab(int(width), copied, split)
            names.add(self._charge(f"slab:{slab}", lambda width=width: self._slab(table, float(width), copied)))
            for group in groups_of(this, this.own_packing if copied else packing):
                names.add(self._charge(f"pool {group}:{slab}", lambda group=group: self._group(this, group)))
        return frozenset(names)

    def _charge(self, name: str, seconds: Callable[[], Array]) -> str:
        if name not in self.charges:
            self.charges[name] = seconds()
            self.charge_memory[name] = 0.0
        return name

    def _group(self, table: Table, group: Group) -> Array:
        return phases_with({COMBINE: self._combining.call(table, group), ROUTE: self._op("route_slab").call * (group != "bags")})

    def _slab(self, number: int, width: float, copied: bool) -> Array:
        """One call of each kind of work a slab; a message has a block a rank on both sides, of which a copied slab has its own."""
        table, op = self.tables[number], self._op
        block = op("copy").call + op("block").row * (1 if copied else self.ranks)
        item = int(width) * table.wire + table.scale
        fill_keys, fill_vectors = (0.0, 0.0) if copied else (self._exchange.byte * demands.padding(size) for size in (4, item))
        counts = self._exchange.byte * SLAB_COUNTS_BYTES
        seconds = {ROUTE: op("route_slab").call, IDS: 2 * block + fill_keys + counts}
        seconds |= {LOOKUP: op("lookup").call + block, BACK: block + fill_vectors}
        if table.learns:
            merge, update = self._update_ops(number, width)
            merged = not copied and not self._fused(number, width)
            seconds[COMBINE] = self._order.call
            seconds[GRADS] = 2 * block + fill_vectors
            seconds[UPDATE] = update.call + merge.call * merged
            seconds[COPIES] = op("merge").call * copied
        return phases_with(seconds)
