"""Why a table has its layout: what it is asked for, and what the step would take if this table alone lay otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shardembed.config.hints import nearest
from shardembed.config.shown import one_line
from shardembed.errors import ConfigError, PlanError
from shardembed.planner import report, words
from shardembed.planner.result import Array, Estimate, Planned
from shardembed.planner.traffic import Traffic
from shardembed.planner.workload import Workload
from shardembed.tables.placement import (
    PACKINGS,
    Cluster,
    Packing,
    Placement,
    column_wise,
    grid,
    replicated,
    row_wise,
    table_row_wise,
    table_wise,
)
from shardembed.tables.plan import Plan, TablePlan, packing_of
from shardembed.tables.table_config import TableConfig

Count = Callable[[Plan], Estimate]
SHARDS = 12  # lines; more are summed up


@dataclass(frozen=True, eq=False)
class Alternative:
    """What the whole plan would cost if one table lay otherwise, every other one where it is.

    Attributes:
        table: how it would lie.
        step_seconds: of the whole plan.
        memory: of the fullest rank, in bytes.
        seconds: `[phases]`, the table's own work, mean of the ranks.
        chosen: it lies so.
    """

    table: TablePlan
    step_seconds: float
    memory: float
    seconds: Array
    chosen: bool = False

    def fits(self, planned: Planned) -> bool:
        return self.memory <= report.limit(planned)


def number_of(workload: Workload, name: str) -> int:
    """Which table is called `name`.

    Raises:
        ConfigError: none is.
    """
    names = [load.table.name for load in workload.tables]
    if name not in names:
        known = f"the tables are {', '.join(names[:8])}{f' and {len(names) - 8:,} more' if len(names) > 8 else ''}"
        raise ConfigError(f"--explain {name}: there is no such table{nearest(name, names)} ({known})")
    return names.index(name)


def alternatives(planned: Planned, index: int, count: Count) -> list[Alternative]:
    """The table as it is, and the best layout of every other kind and packing, the fastest first."""
    now = planned.plan.tables[index]
    chosen = _costed(planned.estimate, index, now, True)
    found: dict[tuple[str, str], Alternative] = {}
    for table in dict.fromkeys(_others(planned, index)):
        if table != now:
            tables = (*planned.plan.tables[:index], table, *planned.plan.tables[index + 1 :])
            other = _costed(count(replace(planned.plan, tables=tables)), index, table, False)
            kind = table.kind, table.packing
            found[kind] = min(found.get(kind, other), other, key=lambda one: (not one.fits(planned), one.step_seconds))
    return sorted([chosen, *found.values()], key=lambda one: one.step_seconds)


def _costed(estimate: Estimate, index: int, table: TablePlan, chosen: bool) -> Alternative:
    seconds = estimate.table_seconds[index] / estimate.seconds.shape[1]
    return Alternative(table, estimate.step_seconds, float(estimate.memory_bytes.max()), seconds, chosen)


def _others(planned: Planned, index: int) -> Iterator[TablePlan]:
    table = planned.workload.tables[index].table
    topology = planned.topology
    cluster = Cluster(topology.ranks, topology.ranks_per_node)
    for placement in _placements(planned, index, cluster):
        try:
            layout = placement.layout(table.cut_rows, table.embedding_dim, cluster)
        except PlanError:  # fewer rows or columns than the kind needs
            continue
        yield TablePlan(table.name, layout, packing_of(placement, table, layout))


def _placements(planned: Planned, index: int, cluster: Cluster) -> Iterator[Placement]:
    """One of every kind, on the ranks that have least to do without this table; rows also over all ranks."""
    table = planned.workload.tables[index].table
    if table.can_be_copied:
        yield replicated()
    free = _least_busy(planned, index)
    per_node = cluster.ranks_per_node
    node = min(range(-(-cluster.world_size // per_node)), key=lambda node: _mean_place(free, cluster.node(node)))
    for packing in packings(table):
        yield table_wise(free[0], packing=packing)
        yield row_wise(packing=packing)
        yield row_wise(strided=False, packing=packing)
        yield table_row_wise(node, packing=packing)
        for strips in (2, 4, 8):
            if strips <= min(cluster.world_size, table.embedding_dim):
                yield column_wise(free[:strips], packing=packing)
        if cluster.world_size % 2 == 0:
            yield grid(2, range(cluster.world_size), packing=packing)


def packings(table: TableConfig) -> tuple[Packing, ...]:
    """Both, unless every feature has to be read by id anyway."""
    return PACKINGS if table.sums else PACKINGS[:1]


def _least_busy(planned: Planned, index: int) -> list[int]:
    """All ranks, those with least work first; the table's own is taken off, in equal parts."""
    seconds = planned.estimate.seconds.sum(0).copy()
    held = planned.plan.tables[index].layout.ranks
    seconds[sorted(held)] -= float(planned.estimate.table_seconds[index].sum()) / len(held)
    return np.argsort(seconds, kind="stable").tolist()


def _mean_place(order: list[int], ranks: tuple[int, ...]) -> float:
    place = {rank: number for number, rank in enumerate(order)}
    return sum(place[rank] for rank in ranks) / len(ranks)


def explain(console: Console, planned: Planned, name: str, found: list[Alternative], pinned: bool = False) -> dict[str, Any]:
    """Print what is known about one table, `found` being its `alternatives`; the same for a script comes back.

    Raises:
        ConfigError: there is no such table.
    """
    index = number_of(planned.workload, name)
    table, load = planned.plan.tables[index], planned.workload.tables[index]
    state, kept = planned.estimate.table_memory[index], load.table
    console.print(f"{one_line(name)}: {words.sentence(table)}", style="bold")
    dtype = str(kept.dtype).removeprefix("torch.")
    console.print(
        f"{load.rows:,} x {kept.embedding_dim} {dtype}, {type(load.optimizer).__name__}; "
        f"{words.size(float(state.sum()))} with its state, at most {words.size(float(state.max()))} on a rank"
    )
    if pinned:
        console.print("Its layout was given (--pin or --forbid); the planner chose within that.")
    console.print("\nwhat it is asked for, a step", style="bold")
    console.print(_asked(planned, index))
    console.print("\nits layouts, every other table left where it is", style="bold")
    console.print(_steps(planned, found))
    console.print("* as planned; the planner moves all tables together, which no other line shows", style="dim")
    console.print("\nits own work in them, milliseconds of a rank (mean of the ranks)", style="bold")
    console.print(_phases(planned, found))
    console.print("\nits shards", style="bold")
    console.print(_shards(table))
    return {"table": name, "layout": words.sentence(table), "layouts": [_as_json(planned, one) for one in found]}


def _as_json(planned: Planned, one: Alternative) -> dict[str, Any]:
    phases = dict(zip(planned.estimate.phases, one.seconds.tolist(), strict=True))
    return {
        "kind": one.table.kind,
        "packing": one.table.packing,
        "ranks": len(one.table.layout.ranks),
        "step_seconds": one.step_seconds,
        "memory_bytes": round(one.memory),
        "fits": one.fits(planned),
        "chosen": one.chosen,
        "phase_seconds": phases,
    }


def _asked(planned: Planned, index: int) -> str:
    ranks, load = planned.topology.ranks, planned.workload.tables[index]
    batch = planned.workload.global_batch_size / ranks
    traffic = Traffic.of(load, batch, ranks)
    repeats = traffic.ids / traffic.distinct if traffic.distinct else 1.0
    features = words.plural(len(load.ids_per_sample), "feature")
    return (
        f"a rank's {words.number(batch)} samples ask for {words.number(traffic.ids)} ids ({features}, "
        f"{words.number(sum(load.ids_per_sample))} a sample), {words.number(traffic.distinct)} of them distinct "
        f"({repeats:.1f} asks a row); all ranks together touch {words.number(traffic.touched)} rows "
        f"({words.percent(min(1.0, traffic.touched / load.table.num_embeddings))} of the table)"
    )


def _steps(planned: Planned, found: list[Alternative]) -> Table:
    best = next(one for one in found if one.chosen)
    table = report.grid("<", "<layout", "ranks", "step", "<", "fullest rank", "<")
    for one in found:
        ratio = one.step_seconds / best.step_seconds
        apart = "same" if abs(ratio - 1) < 5e-4 else f"{100 * ratio - 100:+.1f} %" if ratio < 2 else f"{ratio:,.1f} times"
        more = "" if one.chosen else apart
        full = "" if one.fits(planned) else "does not fit"
        ranks = f"{len(one.table.layout.ranks):,}"
        cells = [words.kind_of(one.table), ranks, words.duration(one.step_seconds), more, words.size(one.memory), full]
        table.add_row("*" if one.chosen else "", *cells)
    return table


def _phases(planned: Planned, found: list[Alternative]) -> Table:
    """Milliseconds of a rank, a phase a column."""
    table = report.grid("<", "<layout", *(phase.replace(" ", "\n") for phase in planned.estimate.phases))
    for one in found:
        cells = [f"{1e3 * seconds:,.3f}" if seconds < 10 else f"{1e3 * seconds:,.0f}" for seconds in one.seconds.tolist()]
        table.add_row("*" if one.chosen else "", words.kind_of(one.table), *cells)
    return table


def _shards(table: TablePlan) -> Table:
    shards = table.layout.shards
    shown = report.grid("<rows", "<columns", "<rank", "of the table")
    whole = table.num_embeddings * table.embedding_dim
    for shard in shards[:SHARDS]:
        rows = f"{shard.rows.start:,} to {shard.rows.stop - 1:,}" + (
            f", every {shard.rows.step:,}th" if shard.rows.step > 1 else ""
        )
        share = words.percent(len(shard.rows) * len(shard.columns) / whole)
        shown.add_row(rows, f"{shard.columns.start} to {shard.columns.stop - 1}", words.rank_list(shard.ranks), share)
    if len(shards) > SHARDS:
        shown.add_row(f"and {len(shards) - SHARDS:,} more", "", words.rank_list(table.layout.ranks), "")
    return shown
