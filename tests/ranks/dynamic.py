"""A dynamic table on ranks beside its oracle: both play one script of lookups, backwards and steps, and all that there is compared.

Beside the table lies a fixed one that always learns, so that steps come while the dynamic one is frozen. Gradients are eighths, so
their sums are exact in any order. What can be compared to the bit is (ids, counts, steps, tallies, and SGD with a rate that is a
power of two); the rest within the rounding of the formulas.

Legend: n ids, D columns, B bags.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import pytest
import torch

import shardembed as se
from shardembed.kernels import cpu, grouping
from shardembed.kernels.rounding import chance
from shardembed.store.dynamic.census import Census
from shardembed.store.dynamic.outcomes import Tally
from shardembed.store.starting import fill_rows
from shardembed.tables.initial import table_hash
from tests.dynamic_cases import FEW, Learned
from tests.dynamic_oracle import OracleTable, StepCounts
from tests.harness import run_ranks

SEED = 3
EXACT = se.optim.SGD(lr=0.5)  # of eighths: nothing is rounded twice
FEATURES: dict[str, Any] = {"feature_names": ["single", "bags"], "pooling": {"single": None, "bags": "sum"}}
Kind = Literal["learn", "look", "step", "skip", "drop", "freeze", "thaw", "reload"]
Part = tuple[Learned, Learned]  # of one rank: ids that are looked up one by one, and bags of ids


@dataclass(frozen=True)
class Move:
    """Of a script.

    Attributes:
        kind: "learn" is a forward and backward, "look" an evaluation, "skip" a backward whose gradients are not finite and the step
            that is skipped for it, "drop" zero_grad, "freeze" and "thaw" of the dynamic table. "reload" saves, and goes on with a
            collection that has loaded it, with another plan.
        parts: of each rank, where something is looked up.
    """

    kind: Kind
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Setup:
    """ahead: the ids of a lookup are sent before the move ahead of it. backward: each backward is a step. other_plan, folder: after
    every other "reload", and for its checkpoints.
    """

    config: se.TableConfig
    optimizer: se.optim.TableOptimizer
    plan: se.Placement
    world_size: int = 1
    deterministic: bool = True
    ahead: bool = False
    backward: bool = False
    positive: bool = False
    other_plan: se.Placement | None = None
    folder: str = ""

    def grads_nD(self, learned: Learned) -> torch.Tensor:
        """Of each occurrence of "single"; a bag's is that of its first place."""
        grads = learned.grads_nD(self.config.embedding_dim, len(learned.ids) + len(learned.bags))
        return grads.abs() + 0.125 if self.positive else grads


OfId = tuple[int | None, int, torch.Tensor, dict[str, torch.Tensor]]  # count where they are kept, last step, weights, state


@dataclass(frozen=True)
class Strip:
    """What a rank holds of some columns: by id, of those that live; (count, last) of candidates; and how many dead lie there."""

    columns: range
    rows: dict[int, OfId]
    candidates: dict[int, tuple[int, int]]
    tally: Tally
    last: Tally
    unknown: int
    dead: int


Found = tuple[torch.Tensor, torch.Tensor]  # outputs of a lookup: [n, D] and [B, D]


@dataclass
class Seen:
    """By a rank: outputs of every lookup, and what it holds after each step."""

    outputs: list[Found] = field(default_factory=list)
    strips: list[list[Strip]] = field(default_factory=list)


class Player:
    """One rank."""

    def __init__(self, setup: Setup, rank: int) -> None:
        self.setup, self.rank = setup, rank
        self.seen = Seen()
        self._ahead: Any = None
        self._reloads = 0
        self._build(setup.plan)

    def _build(self, plan: se.Placement) -> None:
        setup = self.setup
        other = se.TableConfig("other", 4, 2, dtype=setup.config.dtype)
        os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
        self.emb = se.EmbeddingCollection(
            [setup.config, other],
            optimizer={"item": setup.optimizer, "other": se.optim.SGD(lr=0.5)},
            plan={"item": plan, "other": se.row_wise()},
            gradient_reduction="sum",
            deterministic=setup.deterministic,
            update="backward" if setup.backward else "step",
            seed=SEED,
        )
        skips = {} if setup.backward else {"on_nonfinite": "skip", "micro_batches": 1000}
        self.optimizer = se.Optimizer(self.emb, **skips)  # pyright: ignore[reportArgumentType]

    def _reload(self) -> None:
        self._reloads += 1
        folder = f"{self.setup.folder}/{self._reloads}"
        self.optimizer.zero_grad()
        se.save_checkpoint(folder, self.emb, optimizer=self.optimizer)
        self._build(self.setup.other_plan if self._reloads % 2 and self.setup.other_plan else self.setup.plan)
        se.load_checkpoint(folder, self.emb, optimizer=self.optimizer)

    def play(self, moves: Sequence[Move]) -> Seen:
        """All of them."""
        for number, move in enumerate(moves):
            self.move(move, moves[number + 1] if number + 1 < len(moves) else None)
        return self.seen

    def move(self, move: Move, following: Move | None = None) -> None:
        """One of them. following: the move whose ids may be sent ahead."""
        batch, self._ahead = self._ahead, None
        if batch is None and move.parts:
            batch = self._batch(move)
        if move.kind == "reload":
            self._reload()
        if self.setup.ahead and following is not None and following.parts:
            self._ahead = self.emb.prefetch(self._batch(following))
        if move.kind == "look":
            with torch.no_grad():
                self._look(batch)
        elif move.kind in ("learn", "skip"):
            self._learn(move, batch)
        if move.kind == "drop":
            self.optimizer.zero_grad()
        elif move.kind in ("freeze", "thaw"):
            self.emb.freeze("item", move.kind == "freeze")
        if move.kind in ("step", "skip") and not self.setup.backward:
            self.optimizer.step()
        self.seen.strips.append(self.strips())

    def _batch(self, move: Move) -> dict[str, Any]:
        single, bags = move.parts[self.rank]
        return {"single": torch.tensor(single.ids, dtype=torch.int64), "bags": bags.given, "other": torch.tensor([self.rank])}

    def _look(self, batch: Any) -> dict[str, torch.Tensor]:
        found = self.emb(batch)
        self.seen.outputs.append((found["single"].detach().clone(), found["bags"].detach().clone()))
        return found

    def _learn(self, move: Move, batch: Any) -> None:
        found, (single, bags) = self._look(batch), move.parts[self.rank]
        grads_nD = self.setup.grads_nD(single)[: len(single.ids)]
        grads_BD = self.setup.grads_nD(bags)[: len(bags.bags)]
        if move.kind == "skip":
            grads_BD = grads_BD * torch.inf
        dtype = found["single"].dtype
        parts = [found["other"].sum() * (torch.inf if move.kind == "skip" else 1)]
        parts += [(found["single"] * grads_nD.to(dtype)).sum(), (found["bags"] * grads_BD.to(dtype)).sum()]
        torch.stack(parts).sum().backward()

    def strips(self) -> list[Strip]:
        """Of the dynamic table, here."""
        return [self._strip(slab) for slab in self.emb.journey.slabs if slab.dynamic is not None]

    def _strip(self, slab: Any) -> Strip:
        keys = slab.dynamic
        census: Census = keys.census
        slots = census.living(keys.steps)
        counts = census.counts_S[slots].tolist() if census.policy.counts else [None] * slots.numel()
        state = {name: tensor[slots].clone() for name, tensor in slab.state.items()}
        weights = slab.weights[slots].clone()
        lines = zip(census.ids_S[slots].tolist(), counts, census.lasts_S[slots].tolist(), strict=True)
        rows: dict[int, OfId] = {
            id_: (count, last, weights[i], {name: part[i] for name, part in state.items()})
            for i, (id_, count, last) in enumerate(lines)
        }
        dead = int((census.lasts_S >= 0).sum()) - slots.numel()
        candidates = {} if keys.candidates is None else _candidates(keys.candidates, keys.steps)
        return Strip(slab.spec.lanes[0].columns, rows, candidates, keys.tally, keys.last, keys.unknown, dead)


def _candidates(census: Census, steps: int) -> dict[int, tuple[int, int]]:
    slots = census.living(steps)
    pairs = zip(census.counts_S[slots].tolist(), census.lasts_S[slots].tolist(), strict=True)
    return dict(zip(census.ids_S[slots].tolist(), pairs, strict=True))


class Expected:
    """The oracle, playing the same."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        config, mark = setup.config, table_hash(SEED, setup.config.name)

        def start(ids: torch.Tensor) -> torch.Tensor:
            rows = torch.empty(len(ids), config.embedding_dim, dtype=config.dtype)
            fill_rows(rows, config, SEED, ids, range(config.embedding_dim))
            return rows

        self.table = OracleTable(config, setup.optimizer, start, lambda id_, now: float(chance(mark, torch.tensor([id_]), now)))
        self.frozen = self._waits = False
        self.last, self.totals, self.unknown = StepCounts(0), dict.fromkeys(_COUNTS, 0), 0

    def move(self, move: Move) -> list[Found]:
        """What each rank reads, if anything is read."""
        found = [self._read(part, move.kind != "look") for part in move.parts]
        if move.kind == "look":
            asked = {id_ for part in move.parts for learned in part for id_ in learned.ids}
            self.unknown += sum(1 for id_ in asked if id_ != self.setup.config.padding_idx and id_ not in self.table.rows)
        elif move.kind == "learn":
            self._waits = True
            for part in () if self.frozen else move.parts:
                self._learn(*part)
        elif move.kind in ("drop", "skip"):
            self._waits = False
            self.table.drop()
        elif move.kind == "reload":  # tallies are of a run
            self._waits = self.frozen = False
            self.table.drop()
            self.last, self.totals, self.unknown = StepCounts(0), dict.fromkeys(_COUNTS, 0), 0
        elif move.kind != "step":
            self.frozen = move.kind == "freeze"
        if self._waits and (move.kind == "step" or self.setup.backward):
            self._waits = False
            self.last = self.table.step()
            for name in _COUNTS:
                self.totals[name] += getattr(self.last, name)
        return found

    def _read(self, part: Part, training: bool) -> Found:
        single, bags = part
        rows = self.table.read(bags.ids, training)
        sums = [piece.sum(0) for piece in rows.split([len(bag) for bag in bags.bags])]
        none = torch.zeros(0, self.setup.config.embedding_dim, dtype=torch.float64)
        return self.table.read(single.ids, training), torch.stack(sums) if sums else none

    def _learn(self, single: Learned, bags: Learned) -> None:
        self.table.learn(single.ids, self.setup.grads_nD(single))
        lengths = torch.tensor([len(bag) for bag in bags.bags], dtype=torch.int64)
        grads_BD = self.setup.grads_nD(bags)[: len(bags.bags)]
        self.table.learn(bags.ids, torch.repeat_interleave(grads_BD, lengths, dim=0))


_COUNTS = tuple(part.name for part in fields(Tally))


@contextmanager
def without_numba() -> Iterator[None]:
    """Everything in plain torch, as where Numba is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (grouping, cpu):
            patch.setattr(module, "missing", lambda: "numba is not installed")
        yield


def play(rank: int, world_size: int, setup: Setup, moves: Sequence[Move], plain: bool) -> Seen:
    """On one rank."""
    with without_numba() if plain else nullcontext():
        return Player(setup, rank).play(moves)


def check(setup: Setup, moves: Sequence[Move], plain: bool = False) -> list[Seen]:
    """Play a script on the ranks and on the oracle, and compare after every move. plain: without Numba."""
    runs = run_ranks(setup.world_size, play, setup, moves, plain)
    expected, lookups = Expected(setup), 0
    for number, move in enumerate(moves):
        outputs = expected.move(move)
        if outputs:
            for rank, (run, found) in enumerate(zip(runs, outputs, strict=True)):
                compare_outputs(setup, run.outputs[lookups], found, f"move {number}, rank {rank}")
            lookups += 1
        compare(setup, [run.strips[number] for run in runs], expected, f"move {number} ({move.kind})")
    return runs


def compare_outputs(setup: Setup, found: Found, expected: Found, where: str) -> None:
    for name, one, other in zip(("single", "bags"), found, expected, strict=True):
        close(setup, one, other, f"{where}: output of {name}")


def close(setup: Setup, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within the rounding of some steps."""
    bound = 1e-12 if setup.config.dtype == torch.float64 else 2e-5
    assert found.dtype == setup.config.dtype, what
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound, msg=lambda text: f"{what}: {text}")


def compare(setup: Setup, strips: Sequence[Sequence[Strip]], expected: Expected, where: str) -> None:
    """All that ranks hold of the table, with what the oracle has."""
    of_columns: dict[range, list[Strip]] = {}
    for strip in (strip for rank in strips for strip in rank):
        of_columns.setdefault(strip.columns, []).append(strip)
    assert sorted(i for columns in of_columns for i in columns) == list(range(setup.config.embedding_dim)), where
    for columns, parts in of_columns.items():
        _compare(setup, columns, parts, expected, f"{where}, columns {columns}")


def _compare(setup: Setup, columns: range, parts: list[Strip], expected: Expected, where: str) -> None:
    table = expected.table
    rows = {id_: row for part in parts for id_, row in part.rows.items()}
    assert len(rows) == sum(len(part.rows) for part in parts), f"{where}: an id lives twice"
    assert sorted(rows) == table.live, f"{where}: who lives"
    cut = slice(columns.start, columns.stop)
    exact = setup.config.dtype == torch.float64 and setup.optimizer == EXACT
    for id_, (count, last, weight, state) in rows.items():
        here, of_row = table.rows[id_], f"{where}: id {id_}"
        assert (here.count if count is None else count, last) == (here.count, here.last), f"{of_row}: count and last step"
        if exact:
            assert torch.equal(weight, here.weight_D[cut]), f"{of_row}: {weight}, expected {here.weight_D[cut]}"
        close(setup, weight, here.weight_D[cut], f"{of_row}: weight")
        assert state.keys() == here.state.keys(), of_row
        for name, value in state.items():
            whole = here.state[name]
            close(setup, value, whole if whole.dim() == 0 else whole[cut], f"{of_row}: {name}")
    candidates = {id_: seen for part in parts for id_, seen in part.candidates.items()}
    assert candidates == {id_: (seen.count, seen.last) for id_, seen in table.candidates.items()}, f"{where}: candidates"
    for name in ("created", "evicted", "refused", "waiting"):
        for whose, wanted in (("tally", expected.totals[name]), ("last", getattr(expected.last, name))):
            assert sum(getattr(getattr(part, whose), name) for part in parts) == wanted, f"{where}: {name} of {whose}"
    # The dead are counted when they are found.
    assert sum(part.tally.expired + part.dead for part in parts) == expected.totals["expired"], f"{where}: expired"
    assert sum(part.unknown for part in parts) == expected.unknown, f"{where}: unknown ids"


CROWD = (*FEW, *(id_ * 0x9E3779B97F4A7C15 % 2**64 - 2**63 for id_ in range(700)))  # fill some buckets of 128 and more
KINDS: tuple[Kind, ...] = ("learn", "learn", "look", "step", "drop", "skip")


def script_of(seed: int, ranks: int, moves: int, ids: Sequence[int] = FEW, kinds: Sequence[Kind] = KINDS) -> list[Move]:
    """Moves, most of which are learned from and followed by a step; some bags are empty, and some batches."""
    draw = random.Random(seed)
    longest = 4 if len(ids) < 100 else 60

    def learned() -> Learned:
        bags = draw.choice((0, 1, 3, 5))
        return Learned(tuple(tuple(draw.choices(ids, k=draw.randrange(longest))) for _ in range(bags)), draw.randrange(2**16))

    found: list[Move] = []
    for _ in range(moves):
        kind = draw.choice(("learn", "learn", *kinds))
        parts = tuple((learned(), learned()) for _ in range(ranks)) if kind in ("learn", "look", "skip") else ()
        found.append(Move(kind, parts))
        if kind == "learn" and "step" in kinds and draw.random() < 0.75:
            found.append(Move("step"))
    return found
