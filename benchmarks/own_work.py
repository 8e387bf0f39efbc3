"""A rank's own work a step on many ranks, without a network and without the ranks:

    python -m benchmarks.own_work [--ranks 2 8 64 256 1024] [--rounds 15] [--only 26] [--json FILE] [--before FILE]

The step is a rank's real one, over a Comm that hands back what it is given: every other rank asks of this one what this one asks
of it. So a rank sends and gets as many ids, vectors and gradients however many ranks they are for, and what grows with the number
of ranks is overhead. Tables are cut by rows, and looked up from dicts of tensors. Milliseconds of this process's own time on the
processor, which other programs disturb less than the clock's; medians, and of the step the least too:

    read      the input to flat ids                     combine   vectors to outputs
    route     ids to what each rank is asked            adjoint   gradients of outputs to those of vectors
    ids       counts and keys, packed and unpacked      grads     gradients, packed and unpacked
    lookup    keys to vectors                           update    duplicates merged, optimizer applied
    back      vectors, packed and unpacked              step      all of it (least: of all rounds)

`--before` puts the figures that another tree wrote with `--json` beside these; `--only` picks cases by their beginning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import shardembed as se
from benchmarks import pages
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
PARTS = ("read", "route", "ids", "lookup", "back", "combine", "adjoint", "grads", "update", "step")
PART_OF = {  # stages of a journey that are parts of their own
    "read": "read",
    "make route": "route",
    "send ids": "ids",
    "lookup": "lookup",
    "send back": "back",
    "send grads": "grads",
    "accumulate": "update",
}
LEAST = "least"
Figures = dict[str, float]  # milliseconds by part


@dataclass(frozen=True)
class Case:
    """Tables of one size in so many slabs, and one rank's batch."""

    tables: int
    slabs: int
    rows: int
    samples: int
    ids: int
    packing: Packing

    @property
    def name(self) -> str:
        ids = "1 id" if self.ids == 1 else f"{self.ids} ids"
        return f"{self.tables} tables in {self.slabs} slabs, {self.samples} samples, {ids}, {self.packing}"


CASES = (
    Case(26, 4, 102_400, 256, 1, "unique"),
    Case(26, 4, 102_400, 256, 10, "unique"),
    Case(26, 4, 102_400, 256, 1, "bag"),
    Case(26, 4, 102_400, 256, 10, "bag"),
    Case(104, 104, 20_480, 64, 1, "unique"),
    Case(104, 104, 20_480, 64, 10, "bag"),
    Case(1000, 4, 4_096, 16, 1, "unique"),
)
MOST_BLOCKS = 300_000  # of a plan; more take minutes to build


class Echo(Comm):
    """Rank 0 of many, none of which is there: every exchange hands back what was sent."""

    def __init__(self, ranks: int) -> None:
        super().__init__(None, timeout=60.0)
        self.world_size = ranks

    def all_to_all(self, group: Any, stage: str, send: torch.Tensor, *sizes: Any, **number: Any) -> torch.Tensor:
        return send

    def tell(self, group: Any, stage: str, rows: Numbers) -> Numbers:
        return rows

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
        configs = tuple(TableConfig(f"t{i}", case.rows, WIDTH, init=Constant(0.01)) for i in range(case.tables))
        # What sets the slabs apart is a setting of the optimizer, so that their work is the same however many they are.
        optimizers = [RowwiseAdagrad(lr=0.01 + 1e-6 * (i % case.slabs)) for i in range(case.tables)]
        plan = resolve(list(configs), se.row_wise(packing=case.packing), Cluster(ranks, ranks))
        self.journey = Journey(Setup.of(configs, plan, optimizers, settings, Echo(ranks), CPU))
        self.features = features_of(configs)
        numbers = np.random.default_rng(0)
        shape = (case.samples, case.ids) if case.ids > 1 else (case.samples,)
        self.batches = [
            {feature.name: torch.from_numpy(numbers.integers(0, case.rows, shape)) for feature in self.features} for _ in range(4)
        ]
        self._backward = Backward()

    def step(self, number: int) -> Figures:
        watch = Stopwatch()
        self.walk(number, watch.stage, watch.rest)
        return {**watch.spent, "step": sum(watch.spent.values())}

    def walk(self, number: int, stage: Stage, rest: Callable[[str], AbstractContextManager[None]]) -> None:
        """One step. stage: around the stages of the journey. rest: around what else there is, which has them inside."""
        batch = self.batches[number % len(self.batches)]
        self.journey.watch(stage)
        with rest("combine"):
            outputs = self.journey.forward(lambda: IdBatch.of(batch, self.features), self.features).each
        with rest("adjoint"):
            self._backward(outputs)
        with rest("update"):
            self.journey.step()


def measure(case: Case, ranks: int, rounds: int) -> Figures:
    rank = Rank(case, ranks)
    found = [rank.step(number) for number in range(rounds + 2)][2:]  # the first compile and warm up
    figures = {part: 1e3 * statistics.median(step.get(part, 0.0) for step in found) for part in PARTS}
    return {**figures, LEAST: 1e3 * min(step["step"] for step in found)}


def page(results: dict[str, dict[int, Figures]], before: dict[str, dict[int, Figures]]) -> list[str]:
    lines = pages.heading("A rank's own work", "benchmarks.own_work")
    lines += pages.paragraph("Milliseconds on the processor of a step of one rank among so many, without a network; medians.")
    for name, by_ranks in results.items():
        lines += [f"## {name}", ""]
        rows = []
        for ranks, found in by_ranks.items():
            old = before.get(name, {}).get(ranks)
            rows += [[f"{ranks} before", *_cells(old)]] if old else []
            rows.append([str(ranks), *_cells(found)])
        lines += [*pages.table(["ranks", *PARTS, LEAST], rows), ""]
    return lines


def _cells(found: Figures) -> list[str]:
    return [f"{found[part]:.2f}" for part in (*PARTS, LEAST)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, dict[int, Figures]] = {}
    for case in CASES:
        for ranks in args.ranks:
            if case.name.startswith(args.only) and case.tables * ranks <= MOST_BLOCKS:
                results.setdefault(case.name, {})[ranks] = measure(case, ranks, args.rounds)
                print(f"{case.name}: {ranks} ranks, {results[case.name][ranks]['step']:.2f} ms", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results))
    told = json.loads(args.before.read_text()) if args.before else {}
    before = {name: {int(ranks): found for ranks, found in by_ranks.items()} for name, by_ranks in told.items()}
    text = "\n".join(page(results, before))
    if args.markdown:
        args.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
