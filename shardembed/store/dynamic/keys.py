"""Ids to rows of one slab of a dynamic table: found for a lookup, brought for gradients, settled by the step.

Only `commit` changes which ids have a row. A lookup reads ids without one from rows behind all others, where they are written for
the moment; a backward gives them numbers behind all rows, under which their gradients wait. So nothing has to be taken back where
no step comes, and a batch that was read ahead finds what is there in its turn.

Legend: E entries, P ids that wait for a row, U distinct ids.
"""

from __future__ import annotations

import torch

from shardembed.kernels.idmap import IdMap
from shardembed.kernels.interning import intern
from shardembed.kernels.mixing import buckets_of
from shardembed.kernels.placing import by_group, redirect
from shardembed.kernels.rounding import chance
from shardembed.store.dynamic.census import Census, Settled
from shardembed.store.dynamic.outcomes import Found, Moved, Tally
from shardembed.store.dynamic.policy import Policy
from shardembed.store.memory import Memory
from shardembed.store.slab_spec import SlabSpec
from shardembed.store.starting import fill_rows
from shardembed.tables.dynamic import MinCount, Probability
from shardembed.tables.initial import table_hash
from shardembed.tables.table_config import TableConfig

SPARE = 1 << 16  # rows for ids without one


class DynamicKeys:
    """The ids of one strip of a dynamic table, on one rank.

    Attributes:
        census: who has a row. Its places are the rows of the slab.
        candidates: who is counted and has none; None where every newcomer is admitted, or by chance.
        steps: of the optimizer that have been taken.
        tally: what became of ids, of all steps. last: of the last one.
        unknown: how many different ids evaluations have asked for in vain.
        noted: ids that had a row at some moment, int64, ascending, on the CPU; None while nobody wants to know (see
            `checkpoint.tracking`).
        seed: of the rows that ids begin with.
    """

    def __init__(self, spec: SlabSpec, table: TableConfig, rank: int, seed: int, memory: Memory, census: Census) -> None:
        assert spec.dynamic is not None
        self._table, self._memory, self._dynamic = table, memory, spec.dynamic
        self.seed = seed
        lane, device = spec.lanes[0], memory.data.weights.device
        self._columns = lane.columns
        self._groups = torch.full((table.cut_rows,), -1, dtype=torch.int64, device=device)  # bucket -> its number here
        for block in lane.blocks:
            if rank in block.shard.ranks:
                buckets = torch.tensor(block.shard.rows, device=device)
                self._groups[buckets] = torch.arange(block.first_key, block.first_key + len(block.shard.rows), device=device)
        self.census = census
        self.candidates: Census | None = None
        if isinstance(spec.dynamic.admission, MinCount):
            self.candidates = census_of(spec, table, rank, device)
        self.steps, self.tally, self.last, self.unknown = 0, Tally(), Tally(), 0
        self.noted: torch.Tensor | None = None
        self._waiting = IdMap.on(device)
        self._ids_P = torch.empty(0, dtype=torch.int64, device=device)
        self._seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._found: Found | None = None  # until something changes
        self._scratch: tuple[torch.Tensor, int] | None = None  # ids whose starts lie in rows from this one on
        self._rescales = spec.policy.max_norm is not None  # rows that are read, also those
        places = self.census.places
        # Behind the places of a table with a limit, which had better not move. A CPU gives memory as it is first written.
        spare = max(min(SPARE, places), places // 4) if device.type == "cpu" else min(SPARE, places // 4)
        memory.ensure(places + (0 if table.grows else spare), places)

    @property
    def nbytes(self) -> int:
        """Memory of what finds and remembers ids, beside their rows and state."""
        known = self.census.nbytes + (self.candidates.nbytes if self.candidates else 0)
        return known + self._waiting.nbytes + self._ids_P.nbytes + self._groups.nbytes

    def find(self, keys_E: torch.Tensor, learning: bool, counted: bool = True) -> torch.Tensor:
        """The row of each id, which is to be read at once: those of ids without one are written over by the next call.

        Args:
            learning: gradients may follow, so such ids read their start; else what evaluation reads.
            counted: those that evaluation asks for in vain are unknown ids.
        """
        first = self.census.places + self._ids_P.numel()
        found = self._look(keys_E, first)
        count = found.absent_U.numel()
        if count:
            self._memory.ensure(first + count, self.census.places)
            rows = self._memory.data.weights[first : first + count]
            starts = learning or self._dynamic.unknown == "start"
            self._scratch = (found.absent_U, first) if starts and not self._rescales else None
            if starts:
                fill_rows(rows, self._table, self.seed, found.absent_U, self._columns)
            else:
                rows.zero_()
            if counted and not learning:
                padding = self._table.padding_idx
                self.unknown += count if padding is None else int((found.absent_U != padding).sum())
        return found.rows_E

    def _look(self, keys_E: torch.Tensor, first: int) -> Found:
        rows_E = self.census.find(keys_E, self.steps)
        missing = (rows_E < 0).nonzero().squeeze(1)  # host sync on a GPU
        absent = self._ids_P[:0]
        if missing.numel():
            interned = intern(keys_E[missing])
            rows_E.index_copy_(0, missing, interned.numbers_N + first)
            absent = interned.ids_U
        self._found = Found(keys_E, rows_E, first, absent)
        return self._found

    def bring(self, keys_E: torch.Tensor) -> torch.Tensor:
        """The number under which gradients for each id may wait: its row, or one behind all rows; -1 for padding."""
        found = self._found
        if found is None or found.keys_E is not keys_E:  # else what the forward found still holds
            found = self._look(keys_E, self.census.places + self._ids_P.numel())
        rows_E = found.rows_E
        if found.absent_U.numel():
            rows_E = redirect(rows_E, found.first, self._numbered(found.absent_U) + self.census.places)
        padding = self._table.padding_idx
        return rows_E if padding is None else torch.where(keys_E == padding, -1, rows_E)

    def _numbered(self, ids_U: torch.Tensor) -> torch.Tensor:
        """The number of each of these distinct ids among those that wait for a row."""
        before = self._ids_P.numel()
        if not before:
            self._ids_P = ids_U  # the same tensor, so that the step knows whose starts have been written
            numbers_U = added = torch.arange(ids_U.numel(), device=ids_U.device)
        else:
            numbers_U = self._waiting.find(ids_U, self._ids_P)
            fresh = numbers_U < 0
            self._ids_P = torch.cat([self._ids_P, ids_U[fresh]])
            added = torch.arange(before, self._ids_P.numel(), device=ids_U.device)
            numbers_U[fresh] = added
        self._waiting.insert(added, self._ids_P)
        # Rows behind all others, too: whoever sorts numbers has to know the largest.
        self._memory.ensure(self.census.places + self._ids_P.numel(), self.census.places)
        return numbers_U

    def in_order(self, rows_U: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows in an order that all who hold columns of them share: (the bucket of each, as numbered here, ascending; the order,
        in which ids of a bucket ascend).
        """
        ids_U = self.census.ids_S[rows_U]
        groups_U = self.groups_of(ids_U)
        order = by_group(ids_U.argsort(), groups_U)
        return groups_U[order], order

    def groups_of(self, ids_U: torch.Tensor) -> torch.Tensor:
        """The bucket of each id, as numbered on this rank, -1 where it lies on another; int64."""
        return self._groups[buckets_of(ids_U, self._table.cut_rows)]

    def seat(self, census: Census, ids_U: torch.Tensor) -> torch.Tensor:
        """Let these ids of this rank, which are distinct, and nobody else be in `census`, one of the two here. Returns the place of
        each. Where it is their row, the optimizer's state is fresh, and what the row holds is for the caller to say.
        """
        self.drop()
        self._forget_found()
        slots_U = census.seat(ids_U, self.groups_of(ids_U))
        if census is self.census:
            self._memory.ensure(census.places, census.places)
            for tensor in self._memory.data.state.values():
                tensor[slots_U] = 0
        return slots_U

    def seen(self, rows_E: torch.Tensor, times_E: torch.Tensor | None) -> None:
        """Gradients wait under these numbers, for ids that occurred so often; once, where that is not known."""
        self._seen.append((rows_E, times_E))

    def drop(self) -> None:
        """Nothing waits any more."""
        self._seen = []
        if self._ids_P.numel():
            self._waiting.clear()
            self._ids_P = self._ids_P[:0]

    def commit(self, now: int) -> Moved:
        """Settle what the step numbered `now` makes of all ids that gradients wait for."""
        base, rows_P, times_P = self.census.places, torch.full_like(self._ids_P, -1), torch.zeros_like(self._ids_P)
        self.last = self.last if now == self.steps else Tally()
        for rows_E, times_E in self._seen:
            self.census.meet(rows_E, now, times_E, times_P)
        came_P = times_P > 0  # others were brought in backwards whose gradients have been forgotten
        if rows_P.numel() and bool(came_P.any()):
            came = came_P.nonzero().squeeze(1)
            starts = None
            if self._scratch is not None and self._scratch[0] is self._ids_P:
                starts = came + self._scratch[1]
            rows_P[came] = self._settle(self._ids_P[came], times_P[came], starts, now)
        self.steps = now
        self.drop()
        self._forget_found()
        return Moved(base, rows_P)

    def _forget_found(self) -> None:
        """Who has a row changes, or what rows begin as: what a forward has found no longer holds."""
        self._found = self._scratch = None

    def _settle(self, ids_U: torch.Tensor, times_U: torch.Tensor, starts_U: torch.Tensor | None, now: int) -> torch.Tensor:
        """The row that each newcomer gets, or -1. starts_U: rows that hold what those begin as, where there are any."""
        groups_U = self.groups_of(ids_U)
        if self._dynamic.admission is None:
            counts = times_U if self.census.policy.counts else None
            found = self._give_rows(ids_U, counts, groups_U, starts_U, now)
            created = int((found.slots_O >= 0).sum())
            self._count(Tally(created, found.evicted, found.expired, ids_U.numel() - created))
            return found.slots_O
        counts_U, admitted = times_U, torch.ones_like(ids_U, dtype=torch.bool)
        admission = self._dynamic.admission
        known_U = torch.full_like(ids_U, -1)
        if self.candidates is not None and isinstance(admission, MinCount):
            known_U = self.candidates.find(ids_U, now - 1)
            counts_U = self.candidates.counts_of(known_U, now) + times_U
            admitted = counts_U >= admission.count
        elif isinstance(admission, Probability):
            admitted = chance(table_hash(self.seed, self._table.name), ids_U, now) < admission.p
        rows_U = torch.full_like(ids_U, -1)
        counts = counts_U[admitted] if self.census.policy.counts else None
        starts = None if starts_U is None else starts_U[admitted]
        found = self._give_rows(ids_U[admitted], counts, groups_U[admitted], starts, now)
        rows_U[admitted] = found.slots_O
        without = rows_U < 0
        if self.candidates is not None:
            promoted = known_U[~without]
            self.candidates.leave(promoted[promoted >= 0])
            self._wait(
                self.candidates, ids_U[without], counts_U[without], times_U[without], known_U[without], groups_U[without], now
            )
        refused, created = int((without & admitted).sum()), int((~without).sum())
        self._count(Tally(created, found.evicted, found.expired, refused, int((~admitted).sum())))
        return rows_U

    def _count(self, came: Tally) -> None:
        self.tally, self.last = self.tally + came, self.last + came

    def _give_rows(
        self,
        ids_O: torch.Tensor,
        counts_O: torch.Tensor | None,
        groups_O: torch.Tensor,
        starts_O: torch.Tensor | None,
        now: int,
    ) -> Settled:
        found = self.census.settle(ids_O, counts_O, groups_O, now, compete=False)
        placed = (found.slots_O >= 0).nonzero().squeeze(1)
        rows = found.slots_O
        if placed.numel() < rows.numel():
            rows, ids_O, starts_O = rows[placed], ids_O[placed], None if starts_O is None else starts_O[placed]
        self.begin(rows, ids_O, starts_O)
        return found

    # Outside of a step: rows that are loaded, and starts that begin again.

    def belong(self, ids_E: torch.Tensor) -> torch.Tensor:
        """Which of these ids fall into buckets that lie here, bool `[E]`."""
        return self.groups_of(ids_E) >= 0

    def lacking(self, ids_U: torch.Tensor) -> int:
        """How many of these ids, which belong here, have no row and would find no place unless somebody leaves."""
        fresh = ids_U[self.census.find(ids_U, self.steps) < 0]
        return self.census.lacking(self.groups_of(fresh), self.steps)

    def give(self, ids_U: torch.Tensor) -> torch.Tensor:
        """The rows of these ids, which belong here. Those without one, for which there must be places, get a row as it begins, and
        stand as if the last step had touched them, with a candidate's count or 0.
        """
        self._forget_found()
        rows_U = self.census.find(ids_U, self.steps)
        missing_U = rows_U < 0
        fresh = ids_U[missing_U]
        counts = torch.zeros_like(fresh) if self.census.policy.counts else None
        if self.candidates is not None:
            known = self.candidates.find(fresh, self.steps)
            counts = self.candidates.counts_of(known, self.steps)
            self.candidates.leave(known[known >= 0])
        groups = self.groups_of(fresh)
        # As of the step to come, before which whoever is dead now is dead; nobody else has to leave.
        found = self._give_rows(fresh, counts, groups, None, self.steps + 1)
        self.census.lasts_S[found.slots_O] = self.steps
        rows_U[missing_U] = found.slots_O
        return rows_U

    def restart(self, seed: int) -> torch.Tensor:
        """Let all ids begin as `seed` says, those with a row at once. Who has one, counts, last steps and state stay. Returns the
        rows that have changed.
        """
        self.seed = seed
        self._forget_found()
        data = self._memory.data
        if data.weights.is_meta:  # nobody is there, and torch cannot count on it
            return torch.empty(0, dtype=torch.int64, device=data.weights.device)
        rows_U = self.census.living(self.steps)
        data.weights[rows_U] = self._starts(self.census.ids_S[rows_U])
        return rows_U

    def _starts(self, ids_U: torch.Tensor) -> torch.Tensor:
        """What these ids begin as, `[U, W]`."""
        weights = self._memory.data.weights
        starts_UW = weights.new_empty(ids_U.numel(), weights.shape[1])
        fill_rows(starts_UW, self._table, self.seed, ids_U, self._columns)
        return starts_UW

    def begin(self, rows_U: torch.Tensor, ids_U: torch.Tensor, starts_U: torch.Tensor | None = None) -> None:
        """Let these rows be as ids begin. starts_U: rows that hold what they begin as; by default it is worked out."""
        self._memory.ensure(self.census.places, self.census.places)
        data = self._memory.data
        # Beside them, where they have been written already: where a table grows, the two may overlap.
        fresh_UW = self._starts(ids_U) if starts_U is None else data.weights.index_select(0, starts_U)
        data.weights.index_copy_(0, rows_U, fresh_UW)
        for tensor in data.state.values():
            tensor.index_fill_(0, rows_U, 0)

    @staticmethod
    def _wait(
        candidates: Census,
        ids_U: torch.Tensor,
        counts_U: torch.Tensor,
        times_U: torch.Tensor,
        known_U: torch.Tensor,
        groups_U: torch.Tensor,
        now: int,
    ) -> None:
        """Count these on among the candidates."""
        known = known_U >= 0
        candidates.meet(known_U[known], now, times_U[known], times_U[:0])
        candidates.settle(ids_U[~known], counts_U[~known], groups_U[~known], now, compete=True)


def census_of(spec: SlabSpec, table: TableConfig, rank: int, device: torch.device) -> Census:
    """Nobody yet, in the buckets that lie on this rank."""
    assert spec.dynamic is not None
    return Census(Policy.of(spec.dynamic), None if table.grows else table.bucket_rows, spec.rows[rank], device)
