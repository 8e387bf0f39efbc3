"""What would make room where no plan fits: changes of one thing each, and every one tried before it is named.

Trials look at fewer layouts than planning does, so a change may turn out to be enough a little earlier than it is said to; what is
named is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from typing import Any

import torch

from shardembed.errors import PlanError
from shardembed.optim import SGD, RowwiseAdagrad, TableOptimizer
from shardembed.planner.constraints import Constraints, Pin
from shardembed.planner.cost_model import CostModel
from shardembed.planner.cuts import Cut
from shardembed.planner.highs import TRIAL
from shardembed.planner.needs import needed
from shardembed.planner.packed import packed
from shardembed.planner.problem import Option, Problem
from shardembed.planner.search import solve
from shardembed.planner.space import Space
from shardembed.planner.topology import GIB, Topology
from shardembed.planner.topology_sections import optimizer_name
from shardembed.planner.workload import Counts, TableLoad, Workload
from shardembed.tables.plan import TablePlan

MOST_OPTIONS = 100_000  # of all trials together; what is not tried by then is not named
DOUBLINGS = 10  # of the number of ranks
STEPS = (0.0, 0.002, 0.01, 0.03, 0.1, 0.3)  # over what is needed at least, until a plan is found: parts are whole
NARROW = torch.bfloat16
SHOWN = 3  # tables named one by one
Change = Callable[[TableLoad], TableLoad]


class Thin(Space):
    """Few plans, and those that need little memory: tables dealt out by rows, or cut by columns; all plans of what is pinned."""

    def options(self, number: int, every: bool = True) -> tuple[Option, ...]:
        table = self.model.tables[number]
        if table.load.table.name in self.constraints.tables:
            return super().options(number, every)
        self._sharings[number] = None
        counts = self._counts(table.width)
        found = self._cut(number, Cut("", "unique", 1))
        if found and found[0].divisible:
            counts = [1, counts[-1]]
        else:
            found += [option for strips in counts[1:] for option in self._cut(number, Cut("", "unique", strips))]
        if any(table.read_by_bag("bag")):
            found += [option for strips in counts for option in self._cut(number, Cut("", "bag", strips))]
        return tuple(found) if found else super().options(number, every)

    def _by_columns_alone(self, number: int) -> bool:
        return False


class Trials:
    """One workload that does not fit, and what is tried of it."""

    def __init__(self, workload: Workload, topology: Topology, constraints: Constraints) -> None:
        self.workload, self.topology, self.constraints = workload, topology, constraints
        self._options = 0  # listed so far

    def problem(
        self, workload: Workload | None = None, topology: Topology | None = None, constraints: Constraints | None = None
    ) -> Problem | None:
        """With what is given changed; None where that cannot be, or enough has been tried."""
        if self._options > MOST_OPTIONS:
            return None
        workload, topology, constraints = workload or self.workload, topology or self.topology, constraints or self.constraints
        try:
            constraints.check(workload, topology)
            found = Thin(CostModel(workload, topology), constraints).problem()
        except PlanError:
            return None
        self._options += sum(len(item.options) for item in found.items)
        return found

    def fits(self, problem: Problem | None) -> bool:
        return problem is not None and needed(problem) <= problem.capacity and solvable(problem)

    # Changes, each as it is said; nothing where it does not help.

    def all(self, needed_now: float, problem: Problem, largest: int) -> Iterator[str]:
        yield from self.ranks()
        yield from self.memory(needed_now, problem)
        yield from self.smaller()
        yield from self.rows(largest)

    def ranks(self) -> Iterator[str]:
        now = self.topology.ranks

        def lacks(ranks: int) -> bool:
            found = self.problem(topology=self.topology.scaled(ranks))
            return found is None or needed(found) > found.capacity

        most = next((now << power for power in range(1, DOUBLINGS) if not lacks(now << power)), None)
        if most is None:
            return
        least = _bisect(lacks, most >> 1, most)
        for step in STEPS:
            ranks = max(least + round(least * step), least + (step > 0))
            if self.fits(self.problem(topology=self.topology.scaled(ranks))):
                yield f"{ranks} ranks instead of {now}"
                return

    def memory(self, needed_now: float, problem: Problem) -> Iterator[str]:
        kept, least = self.topology.memory - self.topology.room, max(needed_now, problem.capacity)
        for step in STEPS:
            memory = rounded_up(least * (1 + step) + kept)
            if solvable(replace(problem, capacity=memory - kept)):
                more = gib(memory - self.topology.memory)
                yield f"{gib(memory)} of memory a rank instead of {gib(self.topology.memory)} ({more} more)"
                return

    def smaller(self) -> Iterator[str]:
        """Fewer bytes an element: one change, or two where no single one is enough."""
        lighter = [(text, change) for optimizer in (RowwiseAdagrad(), SGD()) for text, change in self._lighter(optimizer)]
        narrow = list(self._narrow())
        enough = [next((text for text, change in kinds if self._fits_with(change)), None) for kinds in (lighter, narrow)]
        if any(enough):
            yield from (text for text in enough if text)
            return
        for text, change in lighter:
            for also, narrower in narrow:
                if self._fits_with(lambda load, a=change, b=narrower: b(a(load))):
                    yield f"{text}, and {also}"
                    return

    def _fits_with(self, change: Change) -> bool:
        return self.fits(self.problem(_changed(self.workload, change)))

    def _lighter(self, optimizer: TableOptimizer) -> Iterator[tuple[str, Change]]:
        names = sorted({optimizer_name(type(load.optimizer)) for load in self.workload.tables if _heavy(load)})
        if names:
            kind = optimizer_name(type(optimizer)) + ("" if optimizer.state else " (no state)")
            yield (
                f"optimizer {kind} instead of {', '.join(names)}",
                lambda load: replace(load, optimizer=optimizer) if _heavy(load) else load,
            )

    def _narrow(self) -> Iterator[tuple[str, Change]]:
        names = sorted({str(load.table.dtype).removeprefix("torch.") for load in self.workload.tables if _wide(load)})
        if names:
            text = f"dtype {str(NARROW).removeprefix('torch.')} instead of {', '.join(names)}"
            yield text, lambda load: replace(load, table=replace(load.table, dtype=NARROW)) if _wide(load) else load

    def rows(self, largest: int) -> Iterator[str]:
        name = self.workload.tables[largest].table.name
        now = self.workload.tables[largest].rows
        share = self._share(lambda share: _fewer(self.workload, share, name))
        if share is not None:
            yield f"{now * share // 1000:,} rows of table {name!r} instead of {now:,}"
        if len(self.workload.tables) > 1:
            share = self._share(lambda share: _fewer(self.workload, share, None))
            if share is not None:
                yield f"{share / 10}% of every table's rows"

    def _share(self, change: Callable[[int], Workload]) -> int | None:
        """The largest share of the rows, in thousandths, that fits."""

        def lacks(less: int) -> bool:
            found = self.problem(change(1000 - less))
            return found is None or needed(found) > found.capacity

        if lacks(999):
            return None
        least = _bisect(lacks, 0, 999)
        for step in STEPS:
            less = min(999, least + round((1000 - least) * step))
            if self.fits(self.problem(change(1000 - less))):
                return 1000 - less
        return None

    def constraint(self) -> Iterator[str]:
        """Wishes that would have to go, one alone or all."""
        pins, forbid = dict(self.constraints.pins), tuple(self.constraints.forbid)
        tables = [name for name in pins if self.fits(self.problem(constraints=Constraints(_without(pins, name), forbid)))]
        kinds = [text for text in forbid if self.fits(self.problem(constraints=Constraints(pins, _without(forbid, text))))]
        if tables:
            some = ", ".join(f"{name!r} ({wish(pins[name])})" for name in tables[:SHOWN])
            more = f", or one of {len(tables) - SHOWN} more" if len(tables) > SHOWN else ""
            yield f"without the pin of table {some}{more}" if len(tables) == 1 else f"without the pin of any one of {some}{more}"
        if kinds:
            yield f"without forbidding {' or '.join(kinds)}"
        if not tables and not kinds and len(pins) + len(forbid) > 1 and self.fits(self.problem(constraints=Constraints())):
            yield "without pins and forbidden kinds at all (none of them alone is to blame)"


def solvable(problem: Problem) -> bool:
    """Whether a plan that fits is found."""

    return solve(problem, effort=TRIAL) is not None or packed(problem, TRIAL).choices is not None


def _bisect(lacks: Callable[[int], bool], low: int, high: int) -> int:
    """The number that is enough where the one before is not; `low` is not enough, `high` is."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if lacks(middle) else (low, middle)
    return high


def _changed(workload: Workload, change: Change) -> Workload:
    return replace(workload, tables=tuple(change(load) for load in workload.tables))


def _fewer(workload: Workload, share: int, name: str | None) -> Workload:
    """A share of the rows of one table, or of all, in thousandths."""

    def cut(load: TableLoad) -> TableLoad:
        if name not in (None, load.table.name):
            return load
        rows = max(1, load.rows * share // 1000)
        if load.ids is not None:
            return replace(load, ids=rows)
        skew = Counts(load.skew.counts[:rows]) if isinstance(load.skew, Counts) else load.skew
        return replace(load, table=replace(load.table, num_embeddings=rows), skew=skew)

    return _changed(workload, cut)


def _heavy(load: TableLoad) -> bool:
    """Has optimizer state for every element."""
    return "element" in load.optimizer.state.values() and not load.table.frozen


def _wide(load: TableLoad) -> bool:
    return load.table.dtype.itemsize > NARROW.itemsize


def _without(wishes: Any, one: str) -> Any:
    """A mapping or a tuple, less one entry."""
    if isinstance(wishes, tuple):
        return tuple(other for other in wishes if other != one)
    return {name: pin for name, pin in wishes.items() if name != one}


def wish(pin: Pin | str | TablePlan) -> str:
    """A pin, as it is written."""
    if isinstance(pin, str):
        return pin
    if isinstance(pin, TablePlan):
        return f"the {pin.kind} layout that is given"
    kind = pin.kind or ("cuts" if pin.cuts else "ranks" if pin.ranks else "")
    where = "@" + ",".join(map(str, pin.ranks)) if pin.ranks else f":{pin.cuts}" if pin.cuts else ""
    said = [kind + (where if pin.kind else where.replace("@", ":"))] if kind else []
    return " and ".join([*said, *[f"packing:{pin.packing}"] * (pin.packing is not None)])


def gib(nbytes: float) -> str:
    """With three digits at least."""
    size = nbytes / GIB
    return f"{size:,.2f} GiB" if size >= 1 else f"{size:.4f} GiB" if size >= 0.01 else f"{1024 * size:.4f} MiB"


def rounded_up(nbytes: float) -> int:
    """To what `gib` shows, so that the number shown is enough."""
    step = GIB / 100 if nbytes >= GIB else GIB / 10_000 if nbytes >= GIB / 100 else GIB / 1024 / 10_000
    return ceil(ceil(nbytes / step) * step)
