"""TorchRec's default planner and ours on the same instances, held to TorchRec's own cost, and to ours.

    python -m benchmarks.torchrec_plans [WORKLOAD ...] [--limit 300] [--markdown docs/benchmarks/PAGE.md]

Needs TorchRec. Its enumerator and its estimators say what each kind of sharding of each table takes; its rating and its storage
say how good a plan is and whether it fits; nothing of them is rewritten. Our optimiser gets the same options as numbers. Both are
limited to the kinds that both have, and to rows in device memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.instances import TIGHT, WORKLOADS
from benchmarks.pages import geometric_mean, heading, paragraph, table
from benchmarks.torchrec_child import GRACE, Found, default_plan, remembered
from benchmarks.torchrec_space import GIB, Assigned, Space, least_capacity, memory_for, quiet
from shardembed.errors import PlanError
from shardembed.planner import plan
from shardembed.planner.cost import estimate
from shardembed.planner.cost_model import CostModel
from shardembed.planner.exact import improved
from shardembed.planner.highs import PLAN
from shardembed.planner.search import solve
from shardembed.planner.topology import Topology
from shardembed.planner.topology import load as load_topology
from shardembed.planner.workload import Workload
from shardembed.planner.workload import load as load_workload
from shardembed.tables.placement import PACKINGS, Packing

MEMORY = 80_000_000_000  # of an H100, before TorchRec's reservation
RANKS = ((2, "loose"), (8, "loose"), (8, "tight"), (16, "tight"), (64, "loose"), (64, "tight"))


@dataclass(frozen=True)
class TheirCost:
    """Milliseconds by TorchRec's rating; None where there is no plan. fits: by TorchRec's storage."""

    theirs: float | None
    ours: float | None
    bound: float | None
    fits: tuple[bool, bool]
    found: Found
    listing: float  # seconds that TorchRec's enumerator took, which both need
    seconds: float  # that our optimiser took

    @property
    def ratio(self) -> float | None:
        return self.theirs / self.ours if self.theirs and self.ours else None


@dataclass(frozen=True)
class OurCost:
    """Milliseconds of a step by our cost: TorchRec's plan, the plan that our optimiser chose for TorchRec's cost, our planner's."""

    theirs: float | None
    ours_for_theirs: float | None
    ours: float | None
    bound: float | None
    fits: bool  # TorchRec's plan, by our count of memory
    seconds: float

    @property
    def ratio(self) -> float | None:
        return self.theirs / self.ours if self.theirs and self.ours else None


@dataclass(frozen=True)
class Compared:
    space: Space
    memory: str
    their_cost: TheirCost
    our_cost: OurCost


def compare(workload: Workload, ranks: int, memory: str, topology: Topology, args: argparse.Namespace) -> Compared:
    loose = Space(workload, ranks, MEMORY, args.least_columns)
    least = least_capacity(loose.problem)
    if least > loose.capacity:
        raise ValueError(f"needs {least / GIB:.3g} GiB a rank at least, TorchRec's reservation leaves {loose.capacity / GIB:.3g}")
    limit = memory_for(loose, TIGHT * least) if memory == "tight" else MEMORY
    space = Space(workload, ranks, limit, args.least_columns)  # a new one: its listing is timed
    key = f"{workload.name} {ranks} {memory} {args.least_columns}"
    found = remembered(args.keep, key, space, args.limit) if args.keep else default_plan(space, args.limit)
    theirs, chosen = their_cost(space, found)
    return Compared(space, memory, theirs, our_cost(space, found.assigned, chosen, topology))


def their_cost(space: Space, found: Found) -> tuple[TheirCost, Assigned | None]:
    """Both plans by TorchRec's rating, and our optimiser's plan."""
    start = time.perf_counter()
    problem = space.problem
    listing = time.perf_counter() - start
    solution = improved(problem, solve(problem), PLAN)
    seconds = time.perf_counter() - start - listing
    theirs, theirs_fits = space.rate(found.assigned) if found.assigned else (None, False)
    if solution is None:
        return TheirCost(theirs, None, None, (theirs_fits, False), found, listing, seconds), None
    chosen = space.assigned(solution.choices)
    ours, ours_fits = space.rate(chosen)
    return TheirCost(theirs, ours, _milliseconds(solution.bound), (theirs_fits, ours_fits), found, listing, seconds), chosen


def our_cost(space: Space, found: Assigned | None, chosen: Assigned | None, topology: Topology) -> OurCost:
    """The same plans by our cost, beside what our planner makes of the instance with all that it may choose from."""
    here = topology.scaled(space.ranks)
    here = replace(here, memory=space.capacity + here.memory - here.room)
    model = CostModel(space.workload, here)
    theirs, fits = _step(space, found, model) if found else (None, False)
    for_theirs, _ = _step(space, chosen, model) if chosen else (None, False)
    start = time.perf_counter()
    try:
        planned = plan(space.workload, here)
    except PlanError as error:
        print(f"{space.workload.name} on {space.ranks}: {error}", file=sys.stderr)
        return OurCost(theirs, for_theirs, None, None, fits, time.perf_counter() - start)
    step, bound = 1e3 * planned.estimate.step_seconds, _milliseconds(planned.lower_bound_seconds)
    return OurCost(theirs, for_theirs, step, bound, fits, planned.plan_seconds)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _step(space: Space, assigned: Assigned, model: CostModel) -> tuple[float, bool]:
    """Milliseconds of a plan of TorchRec's, each table packed the cheaper way (TorchRec has no choice), and whether it fits."""
    names = [load.table.name for load in space.workload.tables]

    def counted(packings: Mapping[str, Packing]):
        return estimate(space.plan(assigned, packings), space.workload, model.topology, model)

    each = np.array([counted(dict.fromkeys(names, packing)).table_seconds.sum(1) for packing in PACKINGS])
    best = counted({name: PACKINGS[i] for name, i in zip(names, each.argmin(0), strict=True)})
    fits = best.memory_bytes.max() <= model.topology.room
    return 1e3 * best.step_seconds, bool(fits)


def above(value: float | None, bound: float | None) -> str:
    return "" if value is None or bound is None else f"{100 * (value / bound - 1):.1f}"


def number(value: float | None) -> str:
    return "no plan" if value is None else f"{value:.4g}"


def named(row: Compared) -> tuple[str, str, str]:
    return row.space.workload.name, str(row.space.ranks), f"{row.memory}, {row.space.capacity / GIB:.3g} GiB"


def their_cells(row: Compared) -> tuple[str, ...]:
    cost, found = row.their_cost, row.their_cost.found
    wait = f"{found.seconds:.1f}" + (" (stopped)" if found.stopped else "")
    ratio = "" if cost.ratio is None else f"{cost.ratio:.3f}"
    figures = (
        number(cost.theirs),
        number(cost.ours),
        number(cost.bound),
        above(cost.theirs, cost.bound),
        above(cost.ours, cost.bound),
    )
    return (*named(row), *figures, ratio, wait, f"{cost.listing:.1f} + {cost.seconds:.1f}")


def our_cells(row: Compared) -> tuple[str, ...]:
    cost = row.our_cost
    ratio = "" if cost.ratio is None else f"{cost.ratio:.3f}"
    theirs = number(cost.theirs) + ("" if cost.fits or cost.theirs is None else " (too large)")
    figures = (theirs, number(cost.ours_for_theirs), number(cost.ours), number(cost.bound))
    return (*named(row), *figures, above(cost.theirs, cost.bound), above(cost.ours, cost.bound), ratio, f"{cost.seconds:.1f}")


PLACE = ("workload", "ranks", "memory")
THEIR_HEAD = (
    *PLACE,
    "TorchRec ms",
    "ours ms",
    "bound ms",
    "TorchRec above %",
    "ours above %",
    "ratio",
    "TorchRec plans in s",
    "ours in s",
)
OUR_HEAD = (
    *PLACE,
    "TorchRec ms",
    "ours for its cost ms",
    "ours ms",
    "bound ms",
    "TorchRec above %",
    "ours above %",
    "ratio",
    "ours in s",
)


def summary(rows: Sequence[Compared], limit: float) -> list[str]:
    lines = []
    for name, costs in (
        ("TorchRec's cost", [row.their_cost for row in rows]),
        ("our cost", [row.our_cost for row in rows]),
    ):
        known = [cost.ratio for cost in costs if cost.ratio is not None]
        if known:
            missing = sum(cost.theirs is not None and cost.ours is None for cost in costs)
            worse = sum(ratio < 1 - 1e-9 for ratio in known) + missing
            lines.append(
                f"- By {name}, TorchRec's plan takes {geometric_mean(known):.3f} times as long as ours in the geometric mean of "
                f"{len(known)} instances; ours is worse, or missing, on {worse}."
            )
    times = [row.their_cost.found.seconds for row in rows]
    ours = [row.their_cost.seconds for row in rows]
    lines.append(
        f"- Planning took TorchRec {min(times):.1f} to {max(times):.1f} s (stopped after {limit:.0f} s of proposals, killed "
        f"{GRACE:.0f} s later), our optimiser {min(ours):.1f} to {max(ours):.1f} s on top of TorchRec's enumeration."
    )
    return lines


def page(rows: Sequence[Compared], args: argparse.Namespace) -> str:
    least = args.least_columns or "TorchRec's default of 128, so that none of these tables is cut by columns"
    lines = heading("TorchRec's default planner beside ours", "benchmarks.torchrec_plans")
    lines += [*summary(rows, args.limit), ""]
    lines += paragraph(
        "Both planners choose from data parallel, table-wise, column-wise, row-wise, table-row-wise and grid, with rows in",
        f"device memory (kernels `fused` and `dense`). The narrowest column shard: {least}.",
        "The topology has an H100's figures (3.35 TB/s of memory, 450 GB/s in a node of eight, 50 GB/s between nodes); a rank's",
        "batch is the global batch over the ranks, the pooling factors are the ids a sample.",
        "Memory is what TorchRec's default reservation leaves (85 %, less 20 batches of ids).",
        f"Tight memory leaves {TIGHT} times the least at which every table has a kind that fits, and the lightest kinds together.",
    )
    lines += ["## By TorchRec's cost", ""]
    lines += paragraph(
        "Its `EmbeddingPerfEstimator` and `EmbeddingStorageEstimator`, rated by its `NoopPerfModel`: the slowest rank's sum over",
        "its shards. The bound is under that cost, over all options that TorchRec lists. Our time: its enumeration, then our",
        "optimiser.",
    )
    lines += [*table(THEIR_HEAD, map(their_cells, rows)), "", "## By our cost", ""]
    lines += paragraph(
        "TorchRec's plan and the plan that our optimiser chose above, with each table packed the cheaper way, and what our",
        "planner makes of the same memory with everything it may choose from (uneven and strided row cuts, any power of two of",
        "blocks, both packings). Where our count of memory says that TorchRec's plan is too large, its time is shown all the same.",
    )
    lines += table(OUR_HEAD, map(our_cells, rows))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help="workload files, or names of those that come along")
    parser.add_argument("--topology", default="h100x8", help="of our cost")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of proposals that TorchRec's planner may make")
    parser.add_argument("--least-columns", type=int, help="the narrowest column shard, for both")
    parser.add_argument("--keep", type=Path, help="a file that keeps TorchRec's plans, so that the next run need not wait for them")
    parser.add_argument("--markdown", type=Path, help="also write the page here")
    args = parser.parse_args()
    topology, rows = load_topology(args.topology), []
    with quiet():
        for workload in map(load_workload, args.workloads):
            for ranks, memory in RANKS:
                try:
                    row = compare(workload, ranks, memory, topology, args)
                except ValueError as error:
                    print(workload.name, ranks, memory, "left out:", error, flush=True)
                    continue
                rows.append(row)
                print("  ".join(their_cells(row)), "|", "  ".join(our_cells(row)[3:]), flush=True)
    if args.markdown:
        args.markdown.write_text(page(rows, args))
    print("\n".join(summary(rows, args.limit)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
