"""One rank of many, without a network and without the others: what `ranks` measures, and where `launches` counts.

The step is a rank's real one, over a Comm that hands back what it is given: every other rank asks of this one what this one asks
of it. So a rank sends and gets as many ids, vectors and gradients however many ranks they are for. Tables are cut by rows, as many
of each on every rank, so this rank holds the same however many there are: what grows with their number is overhead. Seconds are of
this process on the processor, which other programs disturb less than the clock's:

    read      the input to flat ids                     combine   vectors to outputs
    route     ids to what each rank is asked            adjoint   gradients of outputs to those of vectors
    ids       counts and keys, packed and unpacked      grads     gradients, packed and unpacked
    lookup    keys to vectors, packed                   update    duplicates merged, optimizer applied
    back      vectors, unpacked
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.comm.stages import Stage
from shardembed.inputs.ids import IdBatch
from shardembed.journey.journey import Journey
from shardembed.journey.setup import Setup
from shardembed.optim import RowwiseAdagrad
from shardembed.planner.calibrate.stages import Backward
from shardembed.tables.placement import Cluster, Packing
from shardembed.tables.plan import resolve
from shardembed.tables.settings import Settings
from shardembed.tables.table_config import Constant, TableConfig, features_of
from shardembed.wire.message import Numbers

CPU = torch.device("cpu")
WIDTH = 16
PARTS = ("read", "route", "ids", "lookup", "back", "combine", "adjoint", "grads", "update")
PART_OF = {  # stages of a journey that are parts of their own
    "read": "read",
    "make route": "route",
    "send ids": "ids",
    "lookup": "lookup",
    "send back": "back",
    "send grads": "grads",
    "accumulate": "update",
}
Figures = dict[str, float]  # seconds by part


@dataclass(frozen=True)
class Case:
    """Tables of one size in so many slabs, and one rank's batch of ids that are all equally likely.

    Attributes:
        tables: how many.
        slabs: that they lie in.
        rows: of each table on each rank.
        samples: of the batch.
        ids: of a sample for each table.
        packing: of all tables.
    """

    tables: int
    slabs: int
    rows: int
    samples: int
    ids: int
    packing: Packing

    @property
    def name(self) -> str:
        ids = "1 id" if self.ids == 1 else f"{self.ids} ids"
        slabs = "1 slab" if self.slabs == 1 else f"{self.slabs} slabs"
        return f"{self.tables} tables in {slabs}, {ids}, {self.packing}"

    def batches(self, ranks: int) -> list[dict[str, torch.Tensor]]:
        """A few that take turns, by feature `[samples]` or `[samples, ids]`; the same for whoever asks."""
        numbers = np.random.default_rng(0)
        return [{f"t{i}": torch.from_numpy(self._ids(numbers, ranks)) for i in range(self.tables)} for _ in range(BATCHES)]

    def _ids(self, numbers: np.random.Generator, ranks: int) -> np.ndarray:
        if self.ids == 1:
            return numbers.integers(0, self.rows * ranks, self.samples)
        ids = numbers.integers(0, self.rows * ranks, (self.samples, self.ids))
        ids[0, 1] = ids[0, 0]  # so that a segment has several keys on any number of ranks, as in a large batch
        return ids


BATCHES = 4


class _Mirror:
    """In place of a process group: what is sent comes back."""

    def alltoall_base(self, received: torch.Tensor, sent: torch.Tensor, *sizes_and_options: Any) -> _Mirror:
        received.set_(sent)  # type: ignore[arg-type]
        return self

    def wait(self) -> None:
        return


class Echo(Comm):
    """Rank 0 of many, none of which is there."""

    def __init__(self, ranks: int) -> None:
        super().__init__(None, timeout=60.0)
        self.world_size = ranks

    def _channel(self, group: Any, number: int) -> Any:
        return _Mirror()

    def tell(self, group: Any, stage: str, rows: Numbers, patient: bool = False) -> Numbers:
        return rows  # as they are: to `launches` a tensor of them would look like one that has to leave the device

    def agree(self, what: str, lines: Sequence[str]) -> None:
        return


class Stopwatch:
    """Seconds by part of a step. What stages of the journey do not have is the rest of the forward or of the backward."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        part = PART_OF.get(name)
        began = time.process_time()
        yield
        if part is not None:
            self.spent[part] += time.process_time() - began

    @contextmanager
    def rest(self, part: str) -> Iterator[None]:
        """What happens in here and in none of the stages."""
        before, began = sum(self.spent.values()), time.process_time()
        yield
        inside = sum(self.spent.values()) - before
        self.spent[part] += time.process_time() - began - inside


class Rank:
    """Rank 0 of so many, and batches for it."""

    def __init__(self, case: Case, ranks: int, settings: Settings = Settings()) -> None:  # noqa: B008
        configs = tuple(TableConfig(f"t{i}", case.rows * ranks, WIDTH, init=Constant(0.01)) for i in range(case.tables))
        # What sets the slabs apart is a setting of the optimizer, so that their work is the same however many they are.
        optimizers = [RowwiseAdagrad(lr=0.01 + 1e-6 * (i % case.slabs)) for i in range(case.tables)]
        plan = resolve(list(configs), se.row_wise(packing=case.packing), Cluster(ranks, ranks))
        self.journey = Journey(Setup.of(configs, plan, optimizers, settings, Echo(ranks), CPU))
        self.features = features_of(configs)
        self.batches = case.batches(ranks)
        self._backward = Backward()

    def step(self, number: int) -> Figures:
        watch = Stopwatch()
        self.walk(number, watch.stage, watch.rest)
        return {part: watch.spent[part] for part in PARTS}

    def walk(self, number: int, stage: Stage, rest: Callable[[str], AbstractContextManager[None]]) -> None:
        """One step. stage: around the stages of the journey. rest: around what else there is, which has them inside."""
        batch = self.batches[number % len(self.batches)]
        self.journey.watch(stage)
        with rest("combine"):
            outputs = self.journey.forward(lambda: IdBatch.of(batch, self.features), self.features)
        with rest("adjoint"):
            self._backward(outputs.each if outputs.whole is None else [outputs.whole])
        with rest("update"):
            self.journey.step()
