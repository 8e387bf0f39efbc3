"""What lies between two plans: which tables change, and how many bytes would have to travel to get from one to the other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from shardembed.config.shown import one_line
from shardembed.planner import report, words
from shardembed.tables.layout import Layout
from shardembed.tables.plan import Plan, TablePlan

FLOAT32 = 4
SHOWN = 20  # tables; the ones that move most
RANKS = 16


@dataclass(frozen=True)
class TableChange:
    """A table whose plan differs.

    Attributes:
        name: of the table.
        old: its plan before; None where there was none.
        new: its plan afterwards; None where it is gone.
        arriving: bytes that come to ranks which do not hold them under the old plan.
        added: bytes of rows or columns that the old plan's table does not have, which come from nowhere.
    """

    name: str
    old: TablePlan | None
    new: TablePlan | None
    arriving: int = 0
    added: int = 0

    @property
    def what(self) -> str:
        """What changed, in a few words."""
        old, new = self.old, self.new
        if old is None or new is None:
            return "only in the new plan" if old is None else "only in the old plan"
        said = []
        if (old.num_embeddings, old.embedding_dim) != (new.num_embeddings, new.embedding_dim):
            said.append(f"was {old.num_embeddings:,} x {old.embedding_dim}, is {new.num_embeddings:,} x {new.embedding_dim}")
        if old.kind != new.kind:
            said.append(f"{old.kind} -> {new.kind}")
        elif old.layout != new.layout:
            said.append(f"{new.kind}, {_how(old.layout, new.layout)}")
        if _repacked(old, new):
            said.append(f"packing {old.packing} -> {new.packing}")
        return "; ".join(said)


@dataclass(frozen=True, eq=False)
class Diff:
    """What lies between two plans.

    Attributes:
        old: the plan before.
        new: the plan afterwards.
        changes: of tables that differ, those that move most first.
        arriving: bytes that come to each rank, int64 `[ranks]` of the larger world.
        held: bytes of weights that each rank holds, int64 `[2, ranks]`, old and new.
    """

    old: Plan
    new: Plan
    changes: tuple[TableChange, ...]
    arriving: NDArray[np.int64]
    held: NDArray[np.int64]

    @property
    def moving(self) -> int:
        return sum(self.arriving.tolist())  # in whole numbers without end: copies of a huge table are many


def compare(old: Plan, new: Plan, itemsizes: Mapping[str, int] | None = None) -> Diff:
    """itemsizes: bytes by table of an element, or of a bucket's in a column; 4 where it is not given, since a plan does not say."""
    ranks = max(old.world_size, new.world_size)
    arriving, held = np.zeros(ranks, np.int64), np.zeros((2, ranks), np.int64)
    before, after = ({table.name: table for table in plan.tables} for plan in (old, new))
    changes = []
    for name in dict.fromkeys([*after, *before]):
        was, now = before.get(name), after.get(name)
        itemsize = (itemsizes or {}).get(name, FLOAT32)
        for line, table in zip(held, (was, now), strict=True):
            if table is not None:
                _hold(line, table.layout, itemsize)
        if was == now:
            continue
        moved, added = _arriving(was.layout, now.layout) if was and now else ({}, 0)
        for rank, elements in moved.items():
            arriving[rank] += elements * itemsize
        changes.append(TableChange(name, was, now, sum(moved.values()) * itemsize, added * itemsize))
    order = sorted(changes, key=lambda change: -change.arriving)
    return Diff(old, new, tuple(order), arriving, held)


def _repacked(old: TablePlan, new: TablePlan) -> bool:
    """A copied table has no packing: no id travels."""
    return old.packing != new.packing and not (old.layout.copied or new.layout.copied)


def _how(old: Layout, new: Layout) -> str:
    if len(old.shards) != len(new.shards):
        return f"{words.plural(len(old.shards), 'shard')} -> {len(new.shards):,}"
    cuts = [[(shard.rows, shard.columns) for shard in layout.shards] for layout in (old, new)]
    return "on other ranks" if cuts[0] == cuts[1] else "cut elsewhere"


def _hold(held: NDArray[np.int64], layout: Layout, itemsize: int) -> None:
    """Add the bytes that each rank holds of a table."""
    for shard in layout.shards:
        for rank in shard.ranks:
            held[rank] += len(shard.rows) * len(shard.columns) * itemsize


def _arriving(old: Layout, new: Layout) -> tuple[dict[int, int], int]:
    """Elements that come to each rank that has a shard, and those that the old table does not have."""
    before: dict[int, list[tuple[range, range]]] = defaultdict(list)
    for shard in old.shards:
        for rank in shard.ranks:
            before[rank].append((shard.rows, shard.columns))
    arriving: dict[int, int] = defaultdict(int)
    added = 0
    known = range(old.num_embeddings), range(old.embedding_dim)
    for shard in new.shards:
        existing = common(shard.rows, known[0]) * common(shard.columns, known[1])
        added += len(shard.ranks) * (len(shard.rows) * len(shard.columns) - existing)
        # What the rank held before need not come, in whatever shards it lay: these overlap nowhere.
        for rank in shard.ranks:
            kept = sum(common(shard.rows, rows) * common(shard.columns, columns) for rows, columns in before[rank])
            arriving[rank] += existing - kept
    return arriving, added


def common(one: range, other: range) -> int:
    """How many numbers two ascending ranges share, however long they are."""
    if not one or not other:
        return 0
    divisor = math.gcd(one.step, other.step)
    apart = other.start - one.start
    if apart % divisor:
        return 0
    modulus = other.step // divisor
    # one.start + k one.step meets other's residue for k = first modulo `modulus`.
    first = apart // divisor * pow(one.step // divisor, -1, modulus) % modulus if modulus > 1 else 0
    step = one.step * modulus
    start = one.start + first * one.step
    low = max(one.start, other.start)
    start += max(0, -(-(low - start) // step)) * step
    last = min(one[-1], other[-1])
    return 0 if start > last else (last - start) // step + 1


def show(console: Console, diff: Diff, names: tuple[str, str] = ("old", "new")) -> None:
    """What changes, the tables that move most, and what comes to each rank."""
    old, new = diff.old, diff.new
    was, now = (f"{one_line(name)} ({words.plural(plan.world_size, 'rank')})" for name, plan in zip(names, (old, new), strict=True))
    console.print(f"{was} -> {now}", style="bold")
    if old.world_size < new.world_size:
        console.print(f"Ranks {words.rank_list(range(old.world_size, new.world_size))} are new and hold nothing yet.")
    elif old.world_size > new.world_size:
        console.print(f"Ranks {words.rank_list(range(new.world_size, old.world_size))} are gone; all they hold has to leave them.")
    if not diff.changes:
        console.print("The plans are the same: nothing moves.")
        return
    total = int(diff.held[1].sum())
    share = words.percent(diff.moving / total) if total else "0 %"
    console.print(f"{words.plural(len(diff.changes), 'table')} of {len(new.tables):,} differ; {_counted(diff)}.")
    console.print(f"{words.size(diff.moving)} of weights would have to move between ranks, {share} of what the new plan holds;")
    console.print("optimizer state moves with them, and adds its size.")
    if added := sum(change.added for change in diff.changes):
        console.print(f"{words.size(added)} belong to rows or columns that the old plan does not have.")
    table = report.grid("<table", "<what changes", "moves")
    for change in diff.changes[:SHOWN]:
        table.add_row(words.shorten(change.name, report.NAME), change.what, words.size(change.arriving))
    console.print("")
    console.print(table)
    if len(diff.changes) > SHOWN:
        console.print(f"and {len(diff.changes) - SHOWN:,} more", style="dim")
    console.print("\nweights of each rank", style="bold")
    console.print(_ranks(console, diff))


def _ranks(console: Console, diff: Diff) -> object:
    count = len(diff.arriving)
    shown = list(range(count))
    if count > RANKS:
        shown = np.argsort(-diff.arriving, kind="stable")[:RANKS].tolist()
        console.print(f"those {RANKS} of {count:,} to which most comes", style="dim")
    most = max(1, int(diff.arriving.max()))
    table = report.grid("rank", "old", "new", "change", "comes from others", "<")
    for rank in shown:
        was, now = diff.held[:, rank].tolist()
        sign = "+" if now > was else "-" if now < was else ""
        held = [words.size(was) if rank < diff.old.world_size else "-", words.size(now) if rank < diff.new.world_size else "-"]
        comes = int(diff.arriving[rank])
        table.add_row(str(rank), *held, sign + words.size(abs(now - was)), words.size(comes), report.bar(console, comes / most, 20))
    return table


def _counted(diff: Diff) -> str:
    both = [(change.old, change.new) for change in diff.changes if change.old is not None and change.new is not None]
    kinds = sum(old.kind != new.kind for old, new in both)
    packings = sum(_repacked(old, new) for old, new in both)
    moved = sum(change.arriving > 0 for change in diff.changes)
    return f"{moved:,} move, {kinds:,} change their kind, {packings:,} their packing"


def as_json(diff: Diff) -> dict[str, Any]:
    """What a script would read; sizes are bytes of weights."""
    return {
        "world_size": [diff.old.world_size, diff.new.world_size],
        "moving_bytes": diff.moving,
        "arriving_bytes": diff.arriving.tolist(),
        "held_bytes": diff.held.tolist(),
        "tables": {
            change.name: {"change": change.what, "arriving_bytes": change.arriving, "added_bytes": change.added}
            for change in diff.changes
        },
    }
