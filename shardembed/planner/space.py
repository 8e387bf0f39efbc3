"""The space of plans: every option of every table, as the optimiser sees it, and the way back from a choice to a layout.

A table is copied to all ranks, or cut into C strips of columns (even, or as near as the columns allow), each cut into n blocks of
rows. C and n are any power of two, the number of ranks of a node, or of the job, as long as there are columns and rows for them and
C x n is no more than the ranks. A block's parts lie on different ranks, any of them. Table-wise, row-wise, column-wise,
table-row-wise and grid layouts are C and n, and where the parts lie. Blocks of a strip are

- `dealt`: every n-th row, balanced however rows are ordered;
- `even`: contiguous blocks of as many rows each, where popular rows come first: uneven traffic;
- `traffic`: contiguous blocks of as many ids each, likewise.

With packing "bag" all of these; with "unique", where cuts by rows cost nothing, the table may be dealt out over any ranks in any
shares, as many as `PARTS` allows: this serves every n of its C. A table that the user has laid out himself has that option alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from shardembed.errors import PlanError
from shardembed.planner.constraints import Constraints
from shardembed.planner.cost_demand import INT32_MAX, Holdings
from shardembed.planner.cost_model import CostModel
from shardembed.planner.cuts import Cut, dealt, flavours, kinds_of, ordered, widths_of
from shardembed.planner.light import Light, Listing
from shardembed.planner.problem import Choice, Item, Option, Problem, Sharing
from shardembed.planner.relax import figures, undominated
from shardembed.planner.shares import sharing_of, stacked
from shardembed.planner.traffic import Asked
from shardembed.planner.workload import TableLoad, Uniform
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.placement import KINDS, PACKINGS, Packing
from shardembed.tables.plan import Plan, TablePlan

PARTS = 1 << 16  # of rows, where a table's shares are contiguous
RESIDUES = 64  # a rank, where they are strided: each is a shard
MOST_RESIDUES = 8192
FEW_RANKS = 128
MOST_KINDS = 40  # of tables, whose options are all listed: the heaviest
MOST_MIDDLING = 400  # of which most are: those that would make ranks wait longest
HEAVY = 0.1  # of a rank's share of all work, that a table would make all ranks wait
FINEST = 16  # blocks of these
SMOOTH = 1000  # rows a block, from which on rows that do not divide evenly are not worth a thought


class Space:
    """All options of all tables of a cost model's workload."""

    def __init__(self, model: CostModel, constraints: Constraints) -> None:
        self.model, self.constraints, self.ranks = model, constraints, model.ranks
        self.node = min(model.topology.ranks_per_node, model.ranks)
        self._sharings: dict[int, Sharing | None] = {}

    def problem(self) -> Problem:
        """The problem of placing all tables, with dominated options left out (see `relax`)."""
        kinds: dict[object, list[int]] = {}
        for number in range(len(self.model.tables)):
            kinds.setdefault(self._alike(number), []).append(number)
        options: dict[int, tuple[Option, ...]] = {}
        light: dict[object, list[list[int]]] = {}
        for kind, listing in self._listings(list(kinds.values())):
            if listing == "light":
                light.setdefault(self._alike_but_for_traffic(kind[0]), []).append(kind)
            else:
                options.update(dict.fromkeys(kind, self._options(kind[0], listing == "all")))
        for alike in light.values():
            for kind, found in zip(alike, self._light([kind[0] for kind in alike]), strict=True):
                options.update(dict.fromkeys(kind, found))
        items = tuple(Item(table.load.table.name, options[number]) for number, table in enumerate(self.model.tables))
        model, charges = self.model, self.model.charges

        def finer(number: int, option: int, blocks: int) -> tuple[Option, ...]:
            key = options[number][option].key
            assert isinstance(key, Cut)
            more = key.blocks * blocks
            there = key.strips * more <= self.ranks and more <= self.model.tables[number].cut_rows
            return tuple(self._cut(number, replace(key, kind="", blocks=more))) if there else ()

        held = model.charge_memory
        return Problem(model.phases, self.ranks, self._capacity, items, charges, held, model.base, self.node, finer)

    @property
    def _capacity(self) -> float:
        return float(self.model.topology.room)

    def _alike(self, number: int) -> object:
        """Tables with equal keys have the same options."""
        table = self.model.tables[number]
        load, config = table.load, table.load.table
        return self._alike_but_for_traffic(number), config.num_embeddings, load.ids_per_sample, load.skew, load.order

    def _alike_but_for_traffic(self, number: int) -> object:
        """Tables with equal keys differ in rows and traffic alone."""
        table = self.model.tables[number]
        config = table.load.table
        kind = (config.embedding_dim, config.dtype, config.policy, config.padding_idx is None, table.poolings, table.load.optimizer)
        own = None if config.dynamic is None else config.name  # whose slabs are its own
        return *kind, own, len(table.traffic.lengths), self._constrained(number)

    def _listings(self, kinds: list[list[int]]) -> Iterator[tuple[list[int], Listing]]:
        """How much is listed of each kind of tables. Heavy ones are told by what one does for all ranks together, cut in no way."""
        if len(kinds) <= MOST_KINDS:
            for kind in kinds:
                yield kind, "all"
            return
        alike: dict[object, list[int]] = {}
        for number, kind in enumerate(kinds):
            alike.setdefault(self._alike_but_for_traffic(kind[0]), []).append(number)
        loads = np.zeros((len(kinds), len(self.model.phases)))
        for numbers in alike.values():
            loads[numbers] = Light(self.model, [kinds[number][0] for number in numbers]).whole()
        share = loads.T @ [len(kind) for kind in kinds] / self.ranks
        beyond = np.maximum(loads - share, 0.0).sum(1) / share.sum()  # what it would make all ranks wait, if not cut
        order = sorted(range(len(kinds)), key=lambda kind: (-loads[kind].sum(), kinds[kind][0]))
        heavy = set(order[:MOST_KINDS])
        middling = sorted((kind for kind in order if beyond[kind] > HEAVY), key=lambda kind: -beyond[kind])[:MOST_MIDDLING]
        for number, kind in enumerate(kinds):
            few = number not in heavy and self._by_columns_alone(kind[0])
            some: Listing = "some" if number in middling else "light"
            yield kind, some if few else "all"

    def _by_columns_alone(self, number: int) -> bool:
        """Whether a light table may be listed cut by columns alone."""
        table = self.model.tables[number]
        name, bags = table.load.table.name, table.read_by_bag("bag")
        if name in self.constraints.tables or self.constraints.ranks(name) is not None or self.constraints.cuts(name) is not None:
            return False
        # A cut by columns stands for its cuts by rows too, so it has to be there where those are allowed.
        free = all(
            self._allowed(number, "table_wise", packing)
            and (self._allowed(number, "column_wise", packing) or not self._allowed(number, "grid", packing))
            for packing in PACKINGS
        )
        return free and table.rows <= INT32_MAX and len(set(bags)) <= 1

    def _light(self, numbers: list[int]) -> list[tuple[Option, ...]]:
        """The options of light tables that differ in rows and traffic alone."""
        light, first = Light(self.model, numbers), self.model.tables[numbers[0]]
        packings: list[Packing] = ["unique", "bag"] if any(first.read_by_bag("bag")) else ["unique"]
        ways = []
        for packing in packings:
            dealt = packing == "unique" and {"table_wise", "row_wise"} <= self._unforbidden(numbers[0], packing)
            for strips in self._counts(first.width):
                kinds = [kind for kind in kinds_of(Cut("", packing, strips), self.node) if self._allowed(numbers[0], kind, packing)]
                if strips == 1 and dealt:
                    ways.append(light.cut(Cut("row_wise"), dealt=True))
                elif kinds:
                    ways.append(light.cut(Cut(kinds[0], packing, strips)))
        if self._copies(numbers[0]):
            ways.append(light.copied())
        kept = light.worth_listing(ways, self._capacity)
        return [
            tuple(ways[way].option(table, self._fineness(number)) for way in np.flatnonzero(kept[table]))
            for table, number in enumerate(numbers)
        ]

    def _copies(self, number: int) -> bool:
        copied = self.model.tables[number].load.table.can_be_copied
        return self.ranks > 1 and copied and self._allowed(number, "replicated")

    def _options(self, number: int, every: bool) -> tuple[Option, ...]:
        found = self.options(number, every)
        if not found:
            name = self.model.tables[number].load.table.name
            raise PlanError(
                f"table {name!r}: no layout in the planner's space on {self.ranks} rank(s), {self.node} a node, keeps to what is "
                "pinned and forbidden; take back some of it, or fix the layout itself with a placement"
            )
        # A floor of 0, since what other tables make certain is not known yet: keeps more than `bound` will.
        floor = np.zeros(len(self.model.phases))
        kept = undominated(figures(found, self.ranks), self._capacity, floor).option
        return tuple(found[index] for index in sorted(set(kept.tolist()))) if len(kept) else found

    def options(self, number: int, every: bool = True) -> tuple[Option, ...]:
        """Every option of a table that the constraints allow.

        Args:
            every: list all; else, of strips that are cut by rows too, at most those of two blocks, to stand for all.
        """
        table = self.model.tables[number]
        fixed = self.constraints.fixed(table.load.table.name)
        if fixed is not None:
            return (self._fixed(number, fixed),)
        found: list[Option] = []
        pinned = len(self.constraints.ranks(table.load.table.name) or ()) or self.constraints.cuts(table.load.table.name) or 1
        packings: list[Packing] = ["unique", "bag"] if any(table.read_by_bag("bag")) else ["unique"]
        for packing in packings:
            for strips in self._counts(table.width, pinned):
                whole = self._cut(number, Cut("", packing, strips, 1)) if strips <= self.ranks else []
                if every:
                    found += whole + self._in_blocks(number, packing, strips, self._blocks(number, packing, strips, pinned))
                else:
                    found += self._standing(number, packing, strips, whole)
        if self._copies(number):
            found.append(self._copied(number, Cut("replicated")))
        return tuple(found)

    def _in_blocks(self, number: int, packing: Packing, strips: int, counts: list[int]) -> list[Option]:
        found: list[Option] = []
        for blocks in counts:
            if 1 < blocks <= self.ranks // strips:
                for flavour in flavours(self.model.tables[number].load, packing, blocks):
                    found += self._cut(number, Cut("", packing, strips, blocks, flavour))
        return found

    def _standing(self, number: int, packing: Packing, strips: int, whole: list[Option]) -> list[Option]:
        """Strips that are not cut by rows, and few options that stand for all cuts of them. One with unequal shares stands for all
        numbers of blocks. Dealt rows ask for more sums in blocks of blocks, so the finest stands for finer ones, and two blocks of
        strips for any even number; where there may be another number, or flavour, the whole does.
        """
        counts = [blocks for blocks in self._counts(self.model.tables[number].cut_rows) if 1 < blocks <= self.ranks // strips]
        if not counts or not self._allowed(number, "grid" if strips > 1 else "row_wise", packing) or whole[0].divisible:
            return whole
        if whole[0].sharing is not None:
            return whole + self._in_blocks(number, packing, strips, [blocks for blocks in counts if blocks <= FINEST])
        nested = all(blocks % 2 == 0 for blocks in counts) and counts[-1] & (counts[-1] - 1) == 0
        if packing == "unique" or not nested or flavours(self.model.tables[number].load, packing, 2) != ["dealt"]:
            if strips == 1 and packing == "bag":
                return whole + self._in_blocks(number, packing, strips, counts)
            return [*whole, *(replace(option, cuttable=True) for option in whole)]
        found = self._in_blocks(number, packing, strips, [blocks for blocks in counts if blocks <= (FINEST if strips == 1 else 2)])
        return [*whole, *found[:-1], replace(found[-1], cuttable=True)]

    def _copied(self, number: int, key: Cut | TablePlan) -> Option:
        seconds, held = self.model.copied(number)
        charges = self.model.charges_of(number, [self.model.tables[number].width], "copied")
        return Option(key, np.zeros((0, len(seconds))), np.zeros(0), seconds, held, charges=charges)

    def _fixed(self, number: int, plan: TablePlan) -> Option:
        """The layout that the user gives, as `cost.estimate` counts it; a part is all that a rank holds of the table."""
        if plan.layout.copied and self.ranks > 1:
            return self._copied(number, plan)
        ranks = tuple(sorted(plan.layout.ranks))
        loads, memory = np.zeros((len(ranks), len(self.model.phases))), np.zeros(len(ranks))
        strips: list[tuple[float, Asked]] = []
        for strip in plan.layout.strips:
            asked = self._asked(number, [block.rows for block in strip.blocks])
            width, held = float(len(strip.columns)), Holdings.of(strip, asked, self.model.tables[number].bucket_rows)
            strips.append((width, held.asked))
            where = np.searchsorted(ranks, held.ranks)
            seconds, bytes_ = self.model.parts(number, np.full(len(where), width), held.asked, held.rows, plan.packing)
            loads[where] += seconds
            memory[where] += bytes_
        common, alike = self.model.common_in_detail(number, strips, plan.packing)
        charges = self.model.charges_of(number, [width for width, _ in strips], plan.packing)
        return Option(plan, loads, memory, common, float(alike.sum()), charges=charges, ranks=ranks)

    def _constrained(self, number: int) -> tuple[object, ...]:
        """All that constraints say of a table."""
        name = self.model.tables[number].load.table.name
        allowed = (self.constraints.allowed(name, kind, packing) for kind in KINDS for packing in PACKINGS)
        return (*allowed, self.constraints.ranks(name), self.constraints.cuts(name), self.constraints.fixed(name))

    def _allowed(self, number: int, kind: str, packing: Packing | None = None) -> bool:
        return self.constraints.allowed(self.model.tables[number].load.table.name, kind, packing)

    def _blocks(self, number: int, packing: Packing, strips: int, pinned: int) -> list[int]:
        """Into how many blocks of rows. Where shares may be unequal, any number is as good as the next, in small steps."""
        counts = self._counts(self.model.tables[number].cut_rows, pinned)
        if packing == "unique" or strips > 1 or self._shares(number) is None:
            return counts
        base = 1.1 if self.ranks <= FEW_RANKS else 1.3
        steps = itertools.takewhile(lambda count: count <= self.ranks, (round(base**power) for power in itertools.count()))
        return sorted({*counts, *steps})

    def _counts(self, most: int, pinned: int = 1) -> list[int]:
        """Into how many strips or blocks something is cut, of which there are `most`. pinned: parts that the user wishes."""
        limit = min(most, self.ranks)
        powers = {1 << power for power in range(limit.bit_length())}
        divisors = {count for count in range(1, pinned + 1) if pinned % count == 0}
        return sorted(count for count in powers | divisors | {self.node, self.ranks} if count <= limit)

    def _cut(self, number: int, cut: Cut) -> list[Option]:
        """The options of one way to cut: by every kind that it is, where the parts may lie; none if that is forbidden."""
        name = self.model.tables[number].load.table.name
        kinds = [kind for kind in kinds_of(cut, self.node) if self._allowed(number, kind, cut.packing)]
        ranks, cuts = self.constraints.ranks(name), self.constraints.cuts(name)
        parts = cut.strips * cut.blocks
        if not kinds or (ranks is not None and len(ranks) != parts) or (cuts is not None and parts != cuts):
            return []
        free = ranks is None and cuts is None and {"table_wise", "row_wise"} <= self._unforbidden(number, cut.packing)
        if cut.packing == "unique" and cut.strips == 1 and free:
            return [self._divisible(number)] if cut.blocks == 1 else []
        return [self._option(number, Cut(kinds[0], cut.packing, cut.strips, cut.blocks, cut.flavour), ranks)]

    def _unforbidden(self, number: int, packing: Packing) -> set[str]:
        return {kind for kind in ("table_wise", "row_wise") if self._allowed(number, kind, packing)}

    def _divisible(self, number: int) -> Option:
        table = self.model.tables[number]
        rows, parts = table.held_rows, self._fineness(number)
        whole = self._asked(number, [range(table.cut_rows)])
        width = np.array([float(table.width)])
        loads, memory = self.model.parts(number, width, whole, np.array([float(rows)]), "unique")
        common, held = self.model.common(number, [table.width], 1, "unique")
        charges = self.model.charges_of(number, [table.width], "unique")
        return Option(Cut("row_wise"), loads, memory, common, held, divisible=parts, charges=charges)

    def _fineness(self, number: int) -> int:
        """Into how many equal parts a table's rows may be dealt out."""
        table = self.model.tables[number]
        parts = min(table.cut_rows, min(RESIDUES * self.ranks, MOST_RESIDUES) if ordered(table.load) else PARTS)
        return 1 << (parts.bit_length() - 1)  # so that fewer, larger parts are whole numbers of these

    def _option(self, number: int, cut: Cut, ranks: tuple[int, ...] | None) -> Option:
        table = self.model.tables[number]
        widths = widths_of(table.width, cut.strips)
        if isinstance(table.load.skew, Uniform) and table.cut_rows >= SMOOTH * cut.blocks:  # blocks all alike: one stands for them
            traffic, count = table.traffic, cut.blocks
            asked = Asked(*(np.array([whole / count]) for whole in (traffic.ids, traffic.distinct, traffic.touched)))
            sizes, times, together = np.array([table.held_rows / count]), count, count
        else:
            rows = self.rows_of(table.load, cut)
            sizes, times = np.array([float(len(block)) for block in rows]) * table.bucket_rows, 1
            asked = together = self._asked(number, rows)
        pieces = {
            width: self.model.parts(number, np.full(len(sizes), float(width)), asked, sizes, cut.packing) for width in set(widths)
        }
        common, held = self.model.common(number, widths, together, cut.packing)
        # Not where the number of parts is given: figures of shares would stand for all numbers.
        whole_or_rows = cut.kind == "row_wise" or (cut.kind == "table_wise" and self._allowed(number, "row_wise", "bag"))
        pinned = ranks is not None or self.constraints.cuts(table.load.table.name) is not None
        shared = whole_or_rows and cut.packing == "bag" and not pinned
        return Option(
            cut,
            stacked([pieces[width][0] for width in widths], times),
            stacked([pieces[width][1] for width in widths], times),
            common,
            held,
            sharing=self._shares(number) if shared else None,
            charges=self.model.charges_of(number, widths, cut.packing),
            ranks=ranks,
            node=cut.kind == "table_row_wise",
        )

    def _shares(self, number: int) -> Sharing | None:
        if number not in self._sharings:
            self._sharings[number] = sharing_of(self.model, number, PARTS)
        return self._sharings[number]

    def _asked(self, number: int, rows: Sequence[range]) -> Asked:
        return self.model.tables[number].asked_of(tuple(rows))

    def rows_of(self, load: TableLoad, cut: Cut) -> list[range]:
        """The row blocks of each strip of a cut."""
        rows, blocks = load.table.cut_rows, cut.blocks
        if blocks == 1:
            return [range(rows)]
        if cut.flavour == "traffic":
            edges = self._traffic_edges(load, blocks)
        elif cut.flavour == "dealt":
            return [range(residue, rows, blocks) for residue in range(blocks)]
        else:
            edges = [rows * block // blocks for block in range(blocks + 1)]
        return [range(low, high) for low, high in itertools.pairwise(edges)]

    def _traffic_edges(self, load: TableLoad, blocks: int) -> list[int]:
        """Where contiguous blocks of equal traffic begin; each has a row at least."""
        table = next(table for table in self.model.tables if table.load is load)
        rows, profile = load.table.num_embeddings, table.traffic.profile
        low, high = np.zeros(blocks - 1, dtype=np.int64), np.full(blocks - 1, rows, dtype=np.int64)
        wanted = np.arange(1, blocks) / blocks * profile.before(np.array([rows]))[0, 0]
        # Bisection for all edges at once: a profile answers for many rows as fast as for one.
        while (high - low > 1).any():
            middle = (low + high) // 2
            below = profile.before(middle)[0] < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        edges = np.maximum.accumulate(high - np.arange(1, blocks)) + np.arange(1, blocks)
        edges = np.minimum(edges, rows - blocks + np.arange(1, blocks))
        return [0, *edges.tolist(), rows]

    # From a choice back to a layout.

    def plan(self, problem: Problem, choices: Sequence[Choice]) -> Plan:
        tables = []
        for table, item, choice in zip(self.model.tables, problem.items, choices, strict=True):
            cut, config = item.options[choice.option].key, table.load.table
            if isinstance(cut, TablePlan):
                tables.append(replace(cut, name=config.name))
                continue
            assert isinstance(cut, Cut)
            shards = self._shards(table.load, cut, choice)
            layout = Layout(config.cut_rows, config.embedding_dim, tuple(shards))
            tables.append(TablePlan(config.name, layout, cut.packing))
        return Plan(tuple(tables), self.ranks)

    def _shards(self, load: TableLoad, cut: Cut, choice: Choice) -> list[Shard]:
        rows, columns = load.table.cut_rows, load.table.embedding_dim
        if cut.kind == "replicated":
            return [Shard(range(rows), range(columns), tuple(range(self.ranks)))]
        if choice.shares is not None:
            return dealt(load, choice.ranks, choice.shares)
        blocks, edges = self.rows_of(load, cut), np.cumsum([0, *widths_of(columns, cut.strips)]).tolist()
        strips = [range(low, high) for low, high in itertools.pairwise(edges)]
        places = iter(choice.ranks)
        return [Shard(block, strip, (next(places),)) for strip in strips for block in blocks]
