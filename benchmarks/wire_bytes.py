"""Bytes of a training step through the loopback interface, as the kernel counts them, beside TorchRec's and beside formulas.

Whatever else uses the interface counts too: what passes in an idle moment is subtracted. A network namespace of one's own
(`unshare --net`) keeps others out altogether.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardembed as se
from benchmarks import contenders, formulas, pages, peer_torchrec, rounds, tasks
from benchmarks.contenders import OURS, Setting
from benchmarks.crew import Contender, Crew
from benchmarks.jobs import Result, say
from benchmarks.options import Options
from benchmarks.roster import Entry, Roster
from benchmarks.tasks import Batch, Task
from shardembed.errors import ConfigError
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import resolve

TITLE = "Bytes of a step on the wire"
ABOUT = (
    "Forward and backward of the embedding part, all tables cut by rows, int64 ids, float32. Counted by the kernel at the loopback "
    "interface, which all ranks use, over several steps; what passes there in an idle moment is subtracted."
)
INTERFACE = "lo"
COUNTERS = Path("/proc/net/dev")
IDLE_SECONDS = 1.0
PROBES = (1, 1 << 20)  # bytes of the messages that tell what a message and a byte take on the wire


def collect(options: Options, words: Sequence[str]) -> list[Result]:
    """
    Raises:
        ConfigError: bytes cannot be counted here, or there are none.
    """
    del words
    if not COUNTERS.exists() or min(options.ranks) < 2:
        raise ConfigError("bytes are counted on Linux, between at least 2 ranks; pass --ranks 2 4")
    found = []
    for ranks in options.ranks:
        for name in options.workloads or ("dlrm-dcnv2",):
            say(f"{name}, {ranks} ranks")
            found.append(one(tasks.task_of(name, options.max_rows, options.samples), ranks, options))
    return found


def one(task: Task, ranks: int, options: Options) -> Result:
    settings = {OURS: Setting(), f'{OURS}, packing="bag"': Setting(packing="bag")}
    entries = [Entry(name, partial(contenders.ours, task, "row_wise", setting)) for name, setting in settings.items()]
    entries.append(Entry("TorchRec", partial(peer_torchrec.torchrec_step, task, "row_wise")))
    roster = Roster(task, ranks, [entry for entry in entries if entry.name == OURS or options.wants(entry.name)])
    message, factor = overheads(task, ranks)
    counted: dict[str, Any] = {}
    for heat in roster.heats():
        counted |= {name: _count(crew, options.rounds) for name, crew in heat.items() if name not in counted}
    for name, setting in settings.items():
        if name in counted:
            cut = {table.name: contenders.placement("row_wise", i, ranks, setting) for i, table in enumerate(task.tables)}
            expected = formulas.our_bytes(task.workload, resolve(task.tables, cut, Cluster(ranks, ranks)), task.samples)
            messages = counted[name]["collectives"] * ranks * (ranks - 1)
            counted[name] |= {"formula": expected.total, "on the wire": expected.total * factor + messages * message}
    if "TorchRec" in counted:
        counted["TorchRec"]["formula"] = formulas.torchrec_bytes(task.workload, task.samples, ranks).total
    least = formulas.reduce_scatter_bytes(task.workload, task.samples, ranks)
    where = {"workload": task.name, "size": task.describe(), "ranks": ranks}
    wire = {"message": message, "factor": factor, "reduce-scatter": least.total, "its all-gather alone": 2 * least.backward}
    return {**where, "counted": counted, "left_out": roster.left_out, "wire": wire}


def _count(crew: Crew, steps: int) -> dict[str, float]:
    """Bytes and collectives of a step."""
    crew.do(rounds.turn, 0, 2, 0)
    before = crew.do(tallied)
    passed = passing(lambda: crew.do(run, steps)) / steps
    after = crew.do(tallied)
    sent = sum(now[1] - then[1] for now, then in zip(after, before, strict=True))
    return {"bytes": passed, "collectives": (after[0][0] - before[0][0]) / steps, "tally": sent / steps}


def run(contender: Contender, steps: int) -> None:
    """So many steps, without the barriers that a clock needs."""
    for number in range(steps):
        contender.step(contender.batches[number % len(contender.batches)])


def tallied(contender: Contender) -> tuple[int, int]:
    """(collectives, bytes) that this rank has sent, by our own count; of peers nothing."""
    tally = se.Comm.of().tally if contender.emb is not None else None
    return (sum(tally.calls.values()), sum(tally.bytes.values())) if tally else (0, 0)


def passing(action: Callable[[], object]) -> float:
    """Bytes that pass the interface because of what a contender's ranks do; all others are idle."""
    idle = _rate()
    before, began = _counter(), time.perf_counter()
    action()
    taken = time.perf_counter() - began
    return _counter() - before - idle * taken


def _rate() -> float:
    """Bytes a second while nobody does anything."""
    before, began = _counter(), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    return (_counter() - before) / (time.perf_counter() - began)


def _counter() -> float:
    """Bytes that the interface has sent; each is received there too, and counted once here."""
    lines = COUNTERS.read_text().splitlines()
    fields = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return float(fields[8])


def overheads(task: Task, ranks: int, steps: int = 40) -> tuple[float, float]:
    """(bytes that a message takes on the wire beside its content, bytes that a byte of content takes)."""
    roster = Roster(task, ranks, [Entry("probes", exchanging)])
    found = []
    for heat in roster.heats():
        for first in range(len(PROBES)):
            passed = passing(lambda: heat["probes"].do(same, first, steps))  # noqa: B023
            found.append(passed / steps / (ranks * (ranks - 1)))
    factor = (found[1] - found[0]) / (PROBES[1] - PROBES[0])
    return found[0] - factor * PROBES[0], factor


def exchanging(batches: Sequence[Batch]) -> Contender:
    """An all-to-all for each of `PROBES` is a step."""
    del batches
    dist.init_process_group("gloo")
    sent = [torch.zeros(size * dist.get_world_size(), dtype=torch.uint8) for size in PROBES]
    return Contender(lambda send: dist.all_to_all_single(torch.empty_like(send), send), sent)


def same(contender: Contender, number: int, steps: int) -> None:
    """So many steps with one batch."""
    for _ in range(steps):
        contender.step(contender.batches[number])


# The page.


def page(results: list[Result], path: Path | None) -> list[str]:
    del path  # no pictures
    lines: list[str] = []
    for result in results:
        lines += [*_section(result), ""]
    return lines


def _section(result: Result) -> list[str]:
    wire, counted = result["wire"], result["counted"]
    size = ", ".join(f"{key} {value}" for key, value in result["size"].items())
    lines = [f"## {result['workload']}, {result['ranks']} ranks", ""]
    lines += pages.paragraph(
        f"{size[0].upper()}{size[1:]}. {OURS} is `row_wise()` as it comes. A message takes "
        f"{wire['message']:.0f} bytes beside its content and a byte of content {wire['factor']:.4f} (measured with messages of "
        f"{PROBES[0]} and {PROBES[1]} bytes); our formula on the wire has both. A true reduce-scatter of all bags, with every "
        f"id sent as int64 and an all-gather of the gradients, would send {wire['reduce-scatter'] / 1e6:.2f} MB."
    )
    theirs = counted.get("TorchRec", {}).get("bytes")
    rows = []
    for name, figures in counted.items():
        against = figures.get("on the wire", figures["formula"])
        rows.append(
            [
                name,
                f"{figures['bytes'] / 1e6:.2f}",
                f"**{figures['bytes'] / theirs:.3f}**" if theirs else "",
                f"{figures['bytes'] / wire['reduce-scatter']:.3f}",
                f"{figures['tally'] / 1e6:.2f}" if figures["tally"] else "",
                f"{figures['formula'] / 1e6:.2f}",
                f"{figures['bytes'] / against - 1:+.1%}",
                f"{figures['collectives']:g}" if figures["collectives"] else "",
            ]
        )
    head = [
        "contender",
        "MB a step",
        "of TorchRec",
        "of a true reduce-scatter",
        "MB of content",
        "by formula",
        "off",
        "collectives",
    ]
    lines += pages.table(head, rows)
    return [*lines, *(f"- Left out: {name}: {reason}" for name, reason in result["left_out"].items())]
