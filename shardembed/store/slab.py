"""One slab on one rank: rows and optimizer state of one width, and the gradients that wait for the step.

Legend: E entries, S segments, U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from shardembed.kernels.choose import ENTRIES, choose
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import Kernel, SlabFacts, Source
from shardembed.kernels.reference import is_finite
from shardembed.kernels.rounding import Blocks, Named, Origin
from shardembed.store.dynamic.census import Census
from shardembed.store.dynamic.keys import DynamicKeys, census_of
from shardembed.store.memory import Memory, empty_data, grown
from shardembed.store.slab_spec import Block, Lane, SlabSpec
from shardembed.tables import initial
from shardembed.tables.layout import Shard
from shardembed.tables.table_config import Loaded, TableConfig

if TYPE_CHECKING:  # since Triton may be absent
    from shardembed.kernels.triton.order import Order


NOBODY: frozenset[int] = frozenset()
Seen = tuple[torch.Tensor, torch.Tensor | None]  # rows, and how often each occurs


@dataclass(frozen=True)
class LocalShard:
    """A shard this rank holds.

    Attributes:
        table: its name.
        shard: which rows and columns, and who has them.
        first_key: the row of the slab that it begins at.
        weights: a view, `[rows, columns]`.
        state: views of the optimizer state, by name.
    """

    table: str
    shard: Shard
    first_key: int
    weights: torch.Tensor
    state: dict[str, torch.Tensor]


class Slab:
    """All shards of one kind that this rank holds.

    Attributes:
        dynamic: of a dynamic table, which ids have a row; else None, and keys are rows.
        touched: bool `[rows]`, set for rows that change; None while nobody wants to know (see `checkpoint.tracking`).
        looked_up: rows read by all lookups so far.
        tables: the numbers of those that have a lane here.
        reduction_factor: what sums of gradients are multiplied with: 1 / ranks for a mean.
    """

    def __init__(
        self,
        spec: SlabSpec,
        tables: Sequence[TableConfig],
        rank: int,
        seed: int,
        device: torch.device,
        kernel: str,
        reduction_factor: float = 1.0,
    ) -> None:
        self.spec, self.reduction_factor = spec, reduction_factor
        self._tables, self._seed = tables, seed
        self.rank = rank
        self.tables = frozenset(lane.table for lane in spec.lanes)
        rows = spec.rows[rank] if spec.dynamic is None else 0
        shares, at_random = spec.split_rows and spec.optimizer.rowwise, spec.policy.rounding == "stochastic"
        name = choose(kernel, SlabFacts(spec.optimizer, spec.dtype, spec.width, rows, device, shares, at_random, spec.is_dynamic))
        self.looked_up = 0
        self._padding = torch.tensor(self._padding_rows(), dtype=torch.int64, device=device)
        self.touched: torch.Tensor | None = None
        self._waiting: list[Gradients] = []
        self._merged = False
        census = census_of(spec, tables[spec.lanes[0].table], rank, device) if spec.is_dynamic else None
        self._memory = Memory(empty_data(spec, rows, device, self._origins(device, census)), ENTRIES[name].make)
        self.dynamic: DynamicKeys | None = None
        if census is not None:
            self.dynamic = DynamicKeys(spec, tables[spec.lanes[0].table], rank, seed, self._memory, census)
        self._order: Order | None = None  # of what waits, if it has been found out
        self.fill([table.name for table in tables if not isinstance(table.init, Loaded)], seed)

    @property
    def weights(self) -> torch.Tensor:
        """`[rows, W]`."""
        return self._memory.data.weights

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """Optimizer state by name, `[rows, W]` or `[rows]`, in the compute dtype."""
        return self._memory.data.state

    @property
    def kernel(self) -> Kernel:
        """What looks up, merges and updates."""
        return self._memory.kernel

    def fill(self, names: Collection[str], seed: int) -> None:
        """Set the rows of these tables to their starting values."""
        for table, local in self._local():
            if table.name in names:
                self.touch(slice(local.first_key, local.first_key + len(local.shard.rows)))
                initial.fill(local.weights, table, seed, local.shard.rows, local.shard.columns)
        if self.dynamic is not None and self._tables[self.spec.lanes[0].table].name in names:
            self.touch(self.dynamic.restart(seed))

    def touch(self, rows: slice | torch.Tensor) -> None:
        """Note that these slab rows change."""
        if self.touched is not None:
            if self.touched.shape[0] < self.weights.shape[0]:  # a dynamic table has grown
                self.touched = grown(self.touched, self.weights.shape[0], zeros=True)
            self.touched[rows] = True

    def shards(self) -> Iterator[LocalShard]:
        """The shards this rank holds, in lane order; of a dynamic table, whose rows lie anywhere, none."""
        for _, local in self._local():
            yield local

    def _local(self) -> Iterator[tuple[TableConfig, LocalShard]]:
        for lane, block in self._blocks() if self.dynamic is None else ():
            table = self._tables[lane.table]
            keys = slice(block.first_key, block.first_key + len(block.shard.rows))
            state = {name: tensor[keys] for name, tensor in self.state.items()}
            yield table, LocalShard(table.name, block.shard, block.first_key, self.weights[keys], state)

    def table_of(self, lane: Lane) -> str:
        """The name of a lane's table."""
        return self._tables[lane.table].name

    def is_all(self, lane: Lane) -> bool:
        """Whether a lane has all columns of its table."""
        return len(lane.columns) == self._tables[lane.table].embedding_dim

    def _blocks(self) -> Iterator[tuple[Lane, Block]]:
        """What this rank holds: rows of tables, and of dynamic ones buckets."""
        for lane in self.spec.lanes:
            yield from ((lane, block) for block in lane.blocks if self.rank in block.shard.ranks)

    def _padding_rows(self) -> list[int]:
        """The slab rows that stand for nothing, and so get no gradient."""
        rows = []
        for lane, block in self._blocks() if self.spec.dynamic is None else ():
            padding = self._tables[lane.table].padding_idx
            if padding is not None and padding in block.shard.rows:
                rows.append(block.first_key + block.shard.rows.index(padding))
        return rows

    def columns_of(self, rows_U: torch.Tensor) -> torch.Tensor:
        """The embedding_dim of the table that each slab row belongs to, `[U]`."""
        return self._pick(rows_U, self._dims)

    @cached_property
    def _dims(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The embedding_dim of each block: asked for in every step, and the same for good."""
        return self._numbers(lambda lane, block: self._tables[lane.table].embedding_dim)

    def of_table(self, rows_U: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
        """The one of `numbers`, one a table of the collection, of the table that each slab row belongs to, `[U]`."""
        return self._of_block(rows_U, lambda lane, block: numbers[lane.table])

    def _of_block(self, rows_U: torch.Tensor, what: Callable[[Lane, Block], float]) -> torch.Tensor:
        """A number of the block that each slab row lies in, int64 or float64 `[U]`."""
        return self._pick(rows_U, self._numbers(what))

    def _numbers(self, what: Callable[[Lane, Block], float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where blocks begin, ascending, and a number of each; one entry where all have the same, none where there is no block."""
        blocks = sorted((block.first_key, what(lane, block)) for lane, block in self._blocks())
        if len({number for _, number in blocks}) == 1:
            blocks = blocks[:1]
        starts = torch.tensor([start for start, _ in blocks], dtype=torch.int64, device=self.weights.device)
        return starts, torch.from_numpy(np.array([number for _, number in blocks])).to(self.weights.device)

    @staticmethod
    def _pick(rows_U: torch.Tensor, of_blocks: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        starts, numbers = of_blocks
        if not rows_U.numel():  # there may be no block at all
            return torch.empty_like(rows_U)
        if numbers.numel() == 1:
            return numbers.expand(rows_U.numel())
        return numbers[torch.searchsorted(starts, rows_U, right=True) - 1]

    def _origins(self, device: torch.device, census: Census | None) -> Blocks | Named | None:
        """Where rows come from, for noise that does not depend on the plan; None where they are rounded to the nearest."""
        if self.spec.policy.rounding != "stochastic":
            return None

        if census is not None:
            lane = self.spec.lanes[0]
            return Named(initial.table_hash(self._seed, self.table_of(lane)), lane.columns.start, census)

        def origin(lane: Lane, block: Block) -> Origin:
            rows, table = block.shard.rows, initial.table_hash(self._seed, self.table_of(lane))
            return Origin(block.first_key, table, rows.start, rows.step, lane.columns.start)

        return Blocks.of([origin(lane, block) for lane, block in self._blocks()], device)

    def locate(self, keys_E: torch.Tensor, learning: bool, counted: bool = True) -> torch.Tensor:
        """The slab row of each key, int64, to be read at once (see `DynamicKeys.find`). Dense tables: the key itself."""
        return keys_E.to(torch.int64) if self.dynamic is None else self.dynamic.find(keys_E, learning, counted)

    def bring(self, keys_E: torch.Tensor) -> torch.Tensor:
        """The number under which gradients of each key wait, int64. Plain tables: the key itself. See `DynamicKeys.bring`."""
        return keys_E.to(torch.int64) if self.dynamic is None else self.dynamic.bring(keys_E)

    def lookup(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> Source:
        """One vector a segment, `[S, W]`: the row itself, perhaps not yet gathered, or its rows' sum in the compute dtype."""
        self.looked_up += rows_E.numel()
        return self.kernel.lookup(rows_E, offsets)

    def to_order(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> Gradients | None:
        """Of a lookup of these rows, what `orders` sorts before gradients come; None where the step cannot use it."""
        if not self.kernel.orders or self.spec.policy.frozen or self._waiting or self.dynamic is not None:
            return None
        asked = Gradients(rows_E, offsets, rows_E)  # of which the gradients are not looked at
        return asked.without(self._padding) if self._padding.numel() else asked

    def learns(self, frozen: frozenset[int]) -> bool:
        """Whether some table here learns from a backward that these do not learn from. Else its keys must not be brought: ids of
        dynamic tables would wait for a step that nothing asks for.
        """
        return not self.spec.policy.frozen and not self.tables <= frozen

    def accumulate(
        self, gradients: Gradients, order: Order | None = None, frozen: frozenset[int] = NOBODY, seen: Seen | None = None
    ) -> None:
        """Keep the gradients of one backward until the step, but those of padding. They must be in the compute dtype.

        Args:
            order: of their rows, by `order`.
            frozen: tables that do not learn from this backward.
            seen: rows of a dynamic table, by `bring`, and how often their ids occur; by default those of `gradients`, once each.
        """
        if not self.learns(frozen):
            return
        if self.dynamic is not None:
            self.dynamic.seen(*(seen or (gradients.rows_E, None)))
            if self._tables[self.spec.lanes[0].table].padding_idx is not None:
                gradients = gradients.only(gradients.rows_E >= 0)
        if self._padding.numel():
            gradients = gradients.without(self._padding)
        if not self.tables.isdisjoint(frozen):
            gradients, order = gradients.only(self._of_others(gradients.rows_E, frozen)), None
        assert not self._merged, "what is merged has been multiplied with the reduction factor, and what comes now has not"
        self._order = None if self._waiting else order
        self._waiting.append(gradients)

    def waiting(self) -> Gradients | None:
        """All gradients that wait, as one."""
        if len(self._waiting) > 1:
            self._waiting = [Gradients.join(self._waiting)]
        return self._waiting[0] if self._waiting else None

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct rows `[U]`, ascending, and their summed gradients times the reduction factor, `[U, W]`.

        Kept, so that a second call is free.
        """
        waiting = self.waiting()
        if waiting is None:
            return self.weights.new_empty(0, dtype=torch.int64), self.weights.new_empty(
                0, self.spec.width, dtype=self.spec.compute_dtype
            )
        if not self._merged:
            rows_U, sums_UW = self.kernel.merge(waiting, self._order)
            self.replace(rows_U, sums_UW if self.reduction_factor == 1.0 else sums_UW.mul_(self.reduction_factor))
        kept = self._waiting[0]
        return kept.rows_E, kept.grads_SW

    def replace(self, rows_U: torch.Tensor, grads_UW: torch.Tensor) -> None:
        """Let these merged gradients wait instead of what did."""
        self._waiting = [Gradients(rows_U, None, grads_UW)]
        self._merged, self._order = True, None

    def finite(self) -> bool:
        """No waiting gradient holds inf or nan."""
        return all(is_finite(part.grads_SW) for part in self._waiting)  # host sync on a GPU

    def lost(self) -> torch.Tensor:
        """The numbers of the tables for which a gradient waits that holds inf or nan, int64, each once."""
        parts = [torch.empty(0, dtype=torch.int64, device=self.weights.device)]
        for part in self._waiting:
            lost_S = ~torch.isfinite(part.grads_SW).all(1)
            lost_E = lost_S if part.offsets is None else lost_S.repeat_interleave(part.offsets.diff())
            parts.append(self._of_block(part.rows_E[lost_E], lambda lane, block: lane.table).to(torch.int64))
        return torch.cat(parts).unique()

    def zero_nonfinite(self) -> None:
        """Replace every inf and nan among the waiting gradients by zero."""
        for part in self._waiting:
            torch.nan_to_num_(part.grads_SW, nan=0.0, posinf=0.0, neginf=0.0)

    def forget(self, numbers: frozenset[int]) -> None:
        """Forget the waiting gradients of the tables with these numbers."""
        if self.tables <= numbers:
            self.drop()
        elif not self.tables.isdisjoint(numbers):
            self._waiting = [part.only(self._of_others(part.rows_E, numbers)) for part in self._waiting]
            self._order = None

    def _of_others(self, rows_E: torch.Tensor, numbers: frozenset[int]) -> torch.Tensor:
        """Which of these rows belong to none of these tables, bool `[E]`."""
        return self._of_block(rows_E, lambda lane, block: int(lane.table not in numbers)) > 0

    def drop(self) -> None:
        """Forget the waiting gradients."""
        self._waiting = []
        self._merged, self._order = False, None
        if self.dynamic is not None:
            self.dynamic.drop()

    def commit(self, now: int) -> torch.Tensor | None:
        """Before the step numbered `now`: settle which ids of a dynamic table have a row, and forget the gradients of the others.

        Returns the rows that have been created, int64; None for a dense table.
        """
        if self.dynamic is None:
            return None
        moved = self.dynamic.commit(now)
        created = moved.rows_P[moved.rows_P >= 0]
        if moved.rows_P.numel():
            all_stay = created.numel() == moved.rows_P.numel()
            self._waiting = [self._moved(part, moved.of(part.rows_E), all_stay) for part in self._waiting]
        return created

    def _moved(self, part: Gradients, rows_E: torch.Tensor, all_stay: bool) -> Gradients:
        """The same gradients for other rows; unless `all_stay`, some are for none, below 0."""
        part = replace(part, rows_E=rows_E)
        if not all_stay:
            part = part.only(rows_E >= 0)
        if not self._merged:
            return part
        rows_U, order = part.rows_E.sort()
        return Gradients(rows_U, None, part.grads_SW[order])

    def step(
        self,
        lr: float,
        number: int,
        factor: float = 1.0,
        mean_square_U: torch.Tensor | None = None,
        missed: Mapping[int, int] | None = None,
    ) -> None:
        """Apply the waiting gradients, times `factor`, to the rows they touch; then forget them.

        Args:
            number: steps taken, this one included.
            mean_square_U: mean of g^2 (without `factor`) over whole rows, for slabs that hold rows split over ranks.
            missed: how many of the steps tables were frozen in, by their number; others have missed none.
        """
        waiting = self.waiting()
        if waiting is not None:
            self.touch(waiting.rows_E)
        if waiting is not None and not (lr == 0 and self.spec.optimizer.lr_divides):
            counts = {missed.get(table, 0) for table in self.tables} if missed else {0}
            if len(counts) == 1:
                self._update(Step(lr, number - counts.pop(), mean_square_U), factor)
            else:
                self._update_apart(counts, missed or {}, Step(lr, number, mean_square_U), factor)
        self.drop()

    def _update_apart(self, counts: Collection[int], missed: Mapping[int, int], step: Step, factor: float) -> None:
        """Tables that have taken different numbers of steps, one number after the other."""
        rows_U, grads_UW = self.merged()
        missed_U = self._of_block(rows_U, lambda lane, block: missed.get(lane.table, 0))
        for count in sorted(counts):
            part = missed_U == count
            self.replace(rows_U[part], grads_UW[part])
            square = None if step.mean_square_U is None else step.mean_square_U[part]
            self._update(Step(step.lr, step.number - count, square), factor)

    def _update(self, step: Step, factor: float) -> None:
        if not self.kernel.fuses:
            self.merged()
        square = None if step.mean_square_U is None else step.mean_square_U * factor**2
        left = factor if self._merged else factor * self.reduction_factor
        self.kernel.update(self._waiting[0], self._order, self._merged, replace(step, mean_square_U=square), left)
