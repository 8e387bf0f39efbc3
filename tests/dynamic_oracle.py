"""The truth that dynamic tables are held against: dicts by id, one process, all ranks' batches together, a rule after the other.

Nothing of shardembed computes here; only its frozen settings are read. Ids are Python's integers of 64 bits with a sign, rows are
float64, and each row learns by an optimizer of its own: the counterpart that `tests.oracle` has for whole tables, over one row.

Legend: n occurrences of ids, U distinct ones, B bags, D columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import shardembed as se
from tests.oracle import LEARNERS, lookup

BUCKET_ROWS = 128
ALL_64 = (1 << 64) - 1

COUNTING = (se.optim.Adam, se.optim.RowwiseAdam)  # and AdamW: those whose formula has t, the number of the step

Start = Callable[[torch.Tensor], torch.Tensor]  # ids, int64 [n] -> the rows that they begin with [n, D]
Draw = Callable[[int, int], float]  # (id, step) -> in [0, 1), for Probability


def mixed(id_: int) -> int:
    """splitmix64's finalizer of an id, as a number without a sign: a bijection."""
    x = id_ & ALL_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ALL_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ALL_64
    return x ^ (x >> 31)


def buckets_of(num_embeddings: int) -> int:
    """Of a table with so many rows."""
    return max(1, num_embeddings // BUCKET_ROWS)


def bucket_of(id_: int, buckets: int) -> int:
    """The bucket that an id falls into."""
    return ((mixed(id_) >> 32) * buckets) >> 32


@dataclass
class Seen:
    """What is remembered of an id, with a row or without. last: the step of its last gradient."""

    count: int
    last: int


class Row(Seen):
    """A row that lives."""

    def __init__(self, weight_D: torch.Tensor, optimizer: se.optim.TableOptimizer, count: int, now: int) -> None:
        super().__init__(count, now)
        self.parameter = torch.nn.Parameter(weight_D.to(torch.float64, copy=True).unsqueeze(0))
        self.optimizer, self.learner = optimizer, LEARNERS[type(optimizer)](self.parameter, optimizer)
        self.steps = 0

    def learn(self, grad_D: torch.Tensor, now: int) -> None:
        """Optimizers that count count the steps of the table, so they first take those that did not touch the row."""
        self.steps = self.steps if isinstance(self.optimizer, COUNTING) else now - 1
        while self.steps < now:
            self.steps += 1
            here = self.steps == now
            gradient = grad_D if here else torch.zeros_like(grad_D)
            self.learner.step(gradient.unsqueeze(0).clone(), torch.tensor([here]))

    @property
    def weight_D(self) -> torch.Tensor:
        return self.parameter.detach()[0].clone()

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """By name, `[D]`, or `[]` where a row has one number."""
        return {name: tensor[0].clone() for name, tensor in self.learner.state().items()}


@dataclass(frozen=True)
class StepCounts:
    """What a step did to a table.

    live: rows after it. created, evicted: rows that came, left for want of room. expired: rows that are dead for the next step, so
    their places are free then. refused: admitted ids that found no place. waiting: newcomers that were not admitted.
    """

    live: int
    created: int = 0
    evicted: int = 0
    expired: int = 0
    refused: int = 0
    waiting: int = 0


@dataclass
class OracleTable:
    """A dynamic table. config, optimizer: as users give them. start: the row that an id begins with. draw: as Probability draws.

    `look_up` answers, `learn` keeps gradients, `step` applies them, `drop` throws them away (a skipped step, zero_grad): then
    nothing has happened.
    """

    config: se.TableConfig
    optimizer: se.optim.TableOptimizer
    start: Start
    draw: Draw | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    candidates: dict[int, Seen] = field(default_factory=dict)
    now: int = 0
    _grads: dict[int, torch.Tensor] = field(default_factory=dict)
    _occurrences: Counter[int] = field(default_factory=Counter)

    @property
    def settings(self) -> se.Dynamic:
        assert self.config.dynamic is not None
        return self.config.dynamic

    @property
    def buckets(self) -> int:
        return buckets_of(self.config.num_embeddings)

    @property
    def places(self) -> int | None:
        """In a bucket, for rows and again for candidates; None where there is no limit."""
        return None if self.config.grows else -(-self.config.num_embeddings // self.buckets)

    @property
    def live(self) -> list[int]:
        """Ids that have a row, ascending."""
        return sorted(self.rows)

    # Reading.

    def read(self, ids: Sequence[int] | torch.Tensor, training: bool) -> torch.Tensor:
        """The rows that these ids read, `[n, D]` in float64; changes nothing."""
        given = _numbers(ids)
        found = torch.zeros(len(given), self.config.embedding_dim, dtype=torch.float64)
        for place, id_ in enumerate(given):
            if id_ == self.config.padding_idx:
                continue
            if id_ in self.rows:
                found[place] = self.rows[id_].weight_D
            elif training or self.settings.unknown == "start":
                found[place] = self._start(id_)
        return found

    def _start(self, id_: int) -> torch.Tensor:
        return self.start(torch.tensor([id_], dtype=torch.int64))[0].to(torch.float64)

    def look_up(
        self,
        ids: Sequence[int] | torch.Tensor,
        offsets: torch.Tensor,
        pooling: str | None,
        weights: torch.Tensor | None = None,
        training: bool = True,
    ) -> Looked:
        """What a feature of all ranks' bags answers: ids, offsets and weights as `tests.oracle.lookup` takes them, with any ids."""
        given, padding = _numbers(ids), self.config.padding_idx
        if pooling is not None and padding in given:  # bags leave it out
            kept = torch.tensor([id_ != padding for id_ in given])
            offsets = torch.cat([offsets.new_zeros(1), kept.long().cumsum(0)])[offsets]
            given, weights = [id_ for id_ in given if id_ != padding], None if weights is None else weights[kept]
        distinct = sorted(set(given))
        numbers = torch.tensor([distinct.index(id_) for id_ in given], dtype=torch.int64)
        rows_UD = self.read(distinct, training).requires_grad_(training)
        # A row more, since torch's bags refuse a table that is empty.
        whole_UD = torch.cat([rows_UD, rows_UD.new_zeros(1, rows_UD.shape[1])])
        occurrences = [given.count(id_) for id_ in distinct]
        return Looked(self, distinct, occurrences, rows_UD, lookup(whole_UD, pooling, numbers, offsets, weights))

    # Learning.

    def learn(self, ids: Sequence[int] | torch.Tensor, grads_nD: torch.Tensor, occurrences: Sequence[int] | None = None) -> None:
        """Keep gradients of these ids, which may repeat, until the step. occurrences: that each line stands for; 1 by default."""
        for place, id_ in enumerate(_numbers(ids)):
            if id_ == self.config.padding_idx:
                continue
            before = self._grads.get(id_, torch.zeros(self.config.embedding_dim, dtype=torch.float64))
            self._grads[id_] = before + grads_nD[place].to(torch.float64)
            self._occurrences[id_] += 1 if occurrences is None else int(occurrences[place])

    def drop(self) -> None:
        """Take back what waits."""
        self._grads, self._occurrences = {}, Counter()

    def step(self) -> StepCounts:
        """One optimizer step, by the rules in their order."""
        self.now += 1
        for id_ in self._touched(self.rows):
            self._see(self.rows[id_], id_)
        admitted, waiting = self._admit()
        created, evicted, refused = self._make_room(admitted)
        self._trim_candidates()
        for id_, count in created.items():
            self.rows[id_] = Row(self._start(id_), self.optimizer, count, self.now)
        for id_ in self._touched(self.rows):
            self.rows[id_].learn(self._grads[id_], self.now)
        expired = self._expire()
        self.drop()
        return StepCounts(len(self.rows), len(created), evicted, expired, refused, waiting)

    def _touched(self, among: Iterable[int]) -> list[int]:
        return sorted(set(self._grads) & set(among))

    def _expire(self) -> int:
        """Rule 1, of candidates too, for the step that comes next: whatever it touches of these is a newcomer, so a forward before
        it reads the start already.
        """
        eviction = self.settings.eviction
        if not isinstance(eviction, se.TTL):
            return 0
        following = self.now + 1
        dead = [id_ for id_, row in self.rows.items() if row.last + eviction.steps < following]
        for id_ in dead:
            del self.rows[id_]
        self.candidates = {id_: seen for id_, seen in self.candidates.items() if seen.last + eviction.steps >= following}
        return len(dead)

    def _halved(self, seen: Seen) -> int:
        """Rule 2: its count at this step."""
        eviction = self.settings.eviction
        if isinstance(eviction, se.LFU) and eviction.halve_every is not None:
            return seen.count >> (self.now // eviction.halve_every - seen.last // eviction.halve_every)
        return seen.count

    def _see(self, seen: Seen, id_: int) -> None:
        seen.count, seen.last = self._halved(seen) + self._occurrences[id_], self.now

    def _admit(self) -> tuple[dict[int, int], int]:
        """Rule 3: newcomers that are admitted, with their counts, and how many are not."""
        newcomers = sorted(set(self._grads) - set(self.rows))
        admission = self.settings.admission
        admitted: dict[int, int] = {}
        for id_ in newcomers:
            count = self._occurrences[id_]
            if isinstance(admission, se.MinCount):
                seen = self.candidates.setdefault(id_, Seen(0, self.now))
                self._see(seen, id_)
                if seen.count < admission.count:
                    continue
                count = seen.count
            elif isinstance(admission, se.Probability):
                assert self.draw is not None, "say how Probability draws"
                if not self.draw(id_, self.now) < admission.p:
                    continue
            admitted[id_] = count
        return admitted, len(newcomers) - len(admitted)

    def _make_room(self, admitted: dict[int, int]) -> tuple[dict[int, int], int, int]:
        """Rule 4: the newcomers that find a place, how many rows leave for them, and how many find none."""
        created: dict[int, int] = {}
        evicted = 0
        for bucket in sorted({bucket_of(id_, self.buckets) for id_ in admitted}):
            wishing = [id_ for id_ in admitted if bucket_of(id_, self.buckets) == bucket]
            wishing.sort(key=lambda id_: self._rank_of_newcomer(id_, admitted[id_]), reverse=True)
            if self.places is None:
                created.update((id_, admitted[id_]) for id_ in wishing)
                continue
            here = [id_ for id_ in self.rows if bucket_of(id_, self.buckets) == bucket]
            free = self.places - len(here)
            leaving = self._leaving([id_ for id_ in here if id_ not in self._grads])[: max(0, len(wishing) - free)]
            for id_ in leaving:
                del self.rows[id_]
            evicted += len(leaving)
            created.update((id_, admitted[id_]) for id_ in wishing[: free + len(leaving)])
        for id_ in created:
            self.candidates.pop(id_, None)
        return created, evicted, len(admitted) - len(created)

    def _rank_of_newcomer(self, id_: int, count: int) -> Any:
        return (count, mixed(id_)) if isinstance(self.settings.eviction, se.LFU) else mixed(id_)

    def _leaving(self, ids: list[int]) -> list[int]:
        """Those that may leave, in the order in which they would."""
        rows, eviction = self.rows, self.settings.eviction
        if isinstance(eviction, se.LRU):
            return sorted(ids, key=lambda id_: (rows[id_].last, mixed(id_)))
        if isinstance(eviction, se.LFU):
            return sorted(ids, key=lambda id_: (self._halved(rows[id_]), rows[id_].last, mixed(id_)))
        return []

    def _trim_candidates(self) -> None:
        """Rule 5."""
        if self.places is None:
            return
        by_bucket: dict[int, list[int]] = {}
        for id_ in self.candidates:
            by_bucket.setdefault(bucket_of(id_, self.buckets), []).append(id_)
        for ids in by_bucket.values():
            ids.sort(key=lambda id_: (self._halved(self.candidates[id_]), self.candidates[id_].last, mixed(id_)))
            for id_ in ids[: max(0, len(ids) - self.places)]:
                del self.candidates[id_]


@dataclass
class Looked:
    """A lookup. output: `[B, D]`, or `[n, D]` where nothing is pooled, in float64, for a loss; `learn` after its backward."""

    table: OracleTable
    ids: list[int]
    occurrences: list[int]
    rows_UD: torch.Tensor
    output: torch.Tensor

    def learn(self) -> None:
        """Keep the gradients until the table's step; every id that occurred has one, zeros where nothing hangs on it."""
        grads_UD = torch.zeros_like(self.rows_UD) if self.rows_UD.grad is None else self.rows_UD.grad
        self.table.learn(self.ids, grads_UD, self.occurrences)


def _numbers(ids: Sequence[int] | torch.Tensor) -> list[int]:
    return ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
