"""A plan on a terminal, in at most 100 columns, and as one JSON object. Nothing is said by colour alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from shardembed.config.shown import one_line
from shardembed.planner import whole, words
from shardembed.planner.result import Planned

WIDTH = 100
ALL_RANKS = 16  # up to here each rank has its line; beyond, the ends and the middle stand for all
DEAREST = 5
LAYOUTS = 12
NAME = 28
_EIGHTHS = " ▏▎▍▌▋▊▉"


def show(console: Console, planned: Planned, price: float | None = None) -> None:
    """Everything about a plan that fits a screen or two. price: of an hour of one rank."""
    console.print(heading(planned), style="bold")
    console.print(_summary(planned, price))
    for title, table in (
        ("where a step's time goes: the slowest rank of every phase, since phases end together", _phases(console, planned)),
        (_ranks_title(planned), _ranks(console, planned)),
        (f"the {DEAREST} dearest tables, by their work on all ranks together", _tables(planned, dearest(planned)[:DEAREST])),
        ("layouts", _layouts(planned)),
    ):
        console.print(f"\n{title}", style="bold")
        console.print(table)


def as_json(planned: Planned, price: float | None = None) -> dict[str, Any]:
    """What a script would read. Times are seconds, sizes bytes; lists have one entry a rank. price: of an hour of one rank."""
    estimate = planned.estimate
    return {
        "step_seconds": estimate.step_seconds,
        "lower_bound_seconds": planned.lower_bound_seconds,
        "gap": planned.gap,
        "plan_seconds": planned.plan_seconds,
        "stopped": planned.stopped,
        "workload": planned.workload.name,
        "topology": planned.topology.name,
        "world_size": planned.plan.world_size,
        "ranks_per_node": planned.topology.ranks_per_node,
        "global_batch_size": planned.workload.global_batch_size,
        "samples_per_second": planned.workload.global_batch_size / estimate.step_seconds,
        **whole.as_json(planned, price),
        "plan_hash": planned.plan.hash,
        "memory_limit_bytes": limit(planned),
        "memory_bytes": [round(each) for each in estimate.memory_bytes.tolist()],
        "memory_by_category": dict(zip(estimate.categories, estimate.memory.max(1).tolist(), strict=True)),
        "phase_seconds": dict(zip(estimate.phases, estimate.phase_seconds.tolist(), strict=True)),
        "rank_seconds": estimate.seconds.sum(0).tolist(),
        "sent_bytes": estimate.bytes.sum(0).tolist(),
        "tables": {
            table.name: {
                "kind": table.kind,
                "packing": table.packing,
                "shards": len(table.layout.shards),
                "ranks": words.runs(table.layout.ranks),
                "seconds": float(seconds),
                "memory_bytes": round(float(memory)),
            }
            for table, seconds, memory in zip(
                planned.plan.tables, estimate.table_seconds.sum(1), estimate.table_memory.sum(1), strict=True
            )
        },
    }


def limit(planned: Planned) -> int:
    """Bytes of a rank that tables may fill."""
    return planned.topology.room


def heading(planned: Planned) -> str:
    topology, workload = planned.topology, planned.workload
    nodes = -(-topology.ranks // topology.ranks_per_node)
    machines = f"{words.plural(topology.ranks, 'rank')} of {one_line(topology.name)} ({words.plural(nodes, 'node')})"
    tables = words.plural(len(workload.tables), "table")
    return f"{one_line(workload.name)}: {tables} on {machines}, batch {workload.global_batch_size:,}"


def dearest(planned: Planned) -> list[int]:
    """Numbers of the tables, the most work first."""
    return np.argsort(-planned.estimate.table_seconds.sum(1), kind="stable").tolist()


def grid(*columns: str) -> Table:
    """A table without lines; a column whose name begins with `<` is flush left."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=any(columns))
    for column in columns:
        table.add_column(column.removeprefix("<"), justify="left" if column.startswith("<") else "right", no_wrap=True)
    return table


def meaning(planned: Planned) -> str:
    """What the certified gap says, in a sentence."""
    if planned.gap is None:
        return "no lower bound was proved, so how good the plan is, nobody knows"
    return f"no plan takes less than {words.bound(planned.lower_bound_seconds)}"


def early(planned: Planned) -> str:
    """What there is to say of a search that did not end by itself."""
    return f"{planned.stopped}: the best until then, with its own bound" if planned.stopped else ""


def _summary(planned: Planned, price: float | None) -> Table:
    estimate, step = planned.estimate, planned.estimate.step_seconds
    memory = estimate.memory_bytes
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold", justify="right")
    table.add_column(style="dim")
    rate = words.number(planned.workload.global_batch_size / step)
    table.add_row("step time", words.duration(step), f"predicted, of the tables; {rate} samples a second")
    meant = ("no plan takes less, by the same cost model", "so a better plan could save at most this")
    if planned.gap is None:
        meant = ("how good the plan is, nobody knows", "")
    table.add_row("lower bound", words.bound(planned.lower_bound_seconds), meant[0])
    table.add_row("gap", words.gap(planned.gap), meant[1])
    table.add_row("time to plan", words.duration(planned.plan_seconds), early(planned))
    full = float(memory.max())
    table.add_row(
        "fullest rank",
        words.size(full),
        f"of {words.size(limit(planned))} that tables may fill ({words.percent(full / limit(planned))})",
    )
    for line in whole.lines(planned, price):
        table.add_row(*line)
    return table


def _phases(console: Console, planned: Planned) -> Table:
    estimate = planned.estimate
    slowest = estimate.phase_seconds
    texts = words.durations([*slowest, *estimate.seconds.mean(1)])
    table = grid("<phase", "slowest rank", "mean", "of the step", "<", "most sent by a rank")
    for index, phase in enumerate(estimate.phases):
        seconds, sent = float(slowest[index]), float(estimate.bytes[index].max())
        share = words.percent(seconds / estimate.step_seconds)
        length = bar(console, seconds / float(slowest.max()), 24)
        said = words.size(sent) if sent else ""
        table.add_row(phase, texts[index], texts[len(slowest) + index], share, length, said)
    return table


def chosen_ranks(planned: Planned) -> dict[int, str]:
    """Ranks worth a line, with what they stand for; all of them where they are few."""
    memory, busy = planned.estimate.memory_bytes, planned.estimate.seconds.sum(0)
    if len(memory) <= ALL_RANKS:
        return dict.fromkeys(range(len(memory)), "")
    by_memory, by_time = np.argsort(-memory, kind="stable"), np.argsort(-busy, kind="stable")
    said: dict[int, list[str]] = {}
    for name, order in (("memory", by_memory), ("time", by_time)):
        most, least = ("fullest", "emptiest") if name == "memory" else ("slowest", "fastest")
        for place, label in ((0, most), (1, f"2nd {most}"), (2, f"3rd {most}"), (len(order) // 2, f"median {name}"), (-1, least)):
            said.setdefault(int(order[place]), []).append(label)
    return {rank: ", ".join(labels) for rank, labels in said.items()}


def _ranks_title(planned: Planned) -> str:
    ranks = planned.plan.world_size
    return "ranks" if ranks <= ALL_RANKS else f"ranks: {len(chosen_ranks(planned))} that stand for {ranks:,}"


def _ranks(console: Console, planned: Planned) -> Table:
    memory, busy, most = planned.estimate.memory_bytes, planned.estimate.seconds.sum(0), limit(planned)
    few = planned.plan.world_size <= ALL_RANKS
    columns = ["rank", "memory", f"<of {words.size(most)}", "time", "<of the slowest"]
    table = grid(*columns) if few else grid(*columns, "<")
    times = words.durations(busy.tolist())
    for rank, label in chosen_ranks(planned).items():
        used, seconds = float(memory[rank]), float(busy[rank])
        over = " over the limit" if used > most else ""
        cells = [str(rank), words.size(used), bar(console, used / most, 20) + over]
        cells += [times[rank], bar(console, seconds / float(busy.max()), 20)]
        table.add_row(*cells, *([] if few else [label]))
    return table


def _tables(planned: Planned, numbers: Sequence[int]) -> Table:
    estimate = planned.estimate
    total = float(estimate.table_seconds.sum())
    times = words.durations([float(estimate.table_seconds[index].sum()) / planned.plan.world_size for index in numbers])
    table = grid("<table", "size", "<layout", "a rank", "of all", "<most of it in", "memory")
    for time, index in zip(times, numbers, strict=True):
        one, seconds = planned.plan.tables[index], estimate.table_seconds[index]
        table.add_row(
            words.shorten(one.name, NAME),
            f"{words.number(planned.workload.tables[index].rows)} x {one.embedding_dim}",
            words.kind_of(one),
            time,
            words.percent(float(seconds.sum()) / total if total else 0.0),
            estimate.phases[int(seconds.argmax())],
            words.size(float(estimate.table_memory[index].sum())),
        )
    return table


def groups(planned: Planned) -> list[tuple[str, list[int]]]:
    """Numbers of the tables of each kind, packing and number of ranks, the largest groups of bytes first."""
    found: dict[str, list[int]] = {}
    for index, table in enumerate(planned.plan.tables):
        ranks = "" if table.layout.copied else f" on {words.plural(len(table.layout.ranks), 'rank')}"
        found.setdefault(f"{words.kind_of(table)}{ranks}", []).append(index)
    held = planned.estimate.table_memory.sum(1)
    return sorted(found.items(), key=lambda item: (-float(held[item[1]].sum()), item[0]))


def _layouts(planned: Planned) -> Table:
    held, seconds = planned.estimate.table_memory.sum(1), planned.estimate.table_seconds.sum(1)
    found = groups(planned)
    total = float(seconds.sum()) or 1.0
    table = grid("<layout", "tables", "memory", "of all work", "<for example")
    for name, numbers in found[:LAYOUTS]:
        example = words.shorten(planned.plan.tables[numbers[0]].name, NAME)
        share = float(seconds[numbers].sum()) / total
        table.add_row(name, f"{len(numbers):,}", words.size(float(held[numbers].sum())), words.percent(share), example)
    if left := [number for _, numbers in found[LAYOUTS:] for number in numbers]:
        share = float(seconds[left].sum()) / total
        table.add_row(
            f"{len(found) - LAYOUTS} others", f"{len(left):,}", words.size(float(held[left].sum())), words.percent(share), ""
        )
    return table


def bar(console: Console, share: float, width: int) -> str:
    """`share` of `width` characters; blocks where the terminal knows them."""
    share = min(max(share, 0.0), 1.0)
    if not (console.encoding or "").lower().startswith("utf"):
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
