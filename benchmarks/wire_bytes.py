"""Bytes of a training step through the loopback interface, as the kernel counts them, beside TorchRec's and beside formulas.

Whatever else uses the interface counts too: what passes in an idle moment is subtracted. A network namespace of one's own
(`unshare --net`) keeps others out altogether.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import shardembed as se
from benchmarks import contenders, formulas, pages, peer_torchrec, tasks
from benchmarks.contenders import OURS, Contender, plan_of
from benchmarks.jobs import Result, say
from benchmarks.options import Options
from benchmarks.roster import Entry, Roster
from benchmarks.tasks import Task
from shardembed.errors import ConfigError
from shardembed.planner.calibrate.stages import barrier, gathered

TITLE = "Bytes of a step on the wire"
ABOUT = (
    "Forward and backward of the embedding part, all tables cut by rows, int64 ids, float32. Counted by the kernel at the loopback "
    "interface, which all ranks use, over several steps; what passes there in an idle moment is subtracted."
)
INTERFACE = "lo"
COUNTERS = Path("/proc/net/dev")
IDLE_SECONDS = 1.0
PROBES = (1, 1 << 20)  # bytes of the messages that tell what a message and a byte take on the wire


def measure(options: Options) -> list[Result]:
    """Collective."""
    if not COUNTERS.exists() or se.world_size() < 2:
        raise ConfigError("bytes are counted on Linux, between at least 2 ranks; pass --ranks 2 4")
    found = []
    for name in options.workloads or ("dlrm-dcnv2",):
        say(f"{name}, {se.world_size()} ranks")
        found.append(one(tasks.task_of(name, options.max_rows, options.samples), options))
    return found


def one(task: Task, options: Options) -> Result:
    ranks = se.world_size()
    batches = task.batches(se.rank(), 4)
    plans = {OURS: plan_of(task, "row_wise", ranks, None)}
    plans |= {f"{OURS}, all {packing}": plan_of(task, "row_wise", ranks, packing) for packing in ("unique", "bag")}
    entries = [Entry(name, lambda plan=plan: contenders.ours(task, plan, batches)) for name, plan in plans.items()]
    entries.append(Entry("TorchRec", lambda: peer_torchrec.torchrec_step(task, "row_wise", batches)))
    elements = sum(table.num_embeddings * table.embedding_dim for table in task.tables)
    roster = Roster(elements, [entry for entry in entries if entry.name == OURS or options.wants(entry.name)])
    message, factor = overheads()
    counted: dict[str, Any] = {}
    for heat in roster.heats():
        for contender in heat:
            if contender.name not in counted:
                counted[contender.name] = _count(contender, options.rounds)
    for name, plan in plans.items():
        if name in counted:
            expected = formulas.our_bytes(task.workload, plan, task.samples)
            messages = counted[name]["collectives"] * ranks * (ranks - 1)
            counted[name] |= {"formula": expected.total, "on the wire": expected.total * factor + messages * message}
    if "TorchRec" in counted:
        counted["TorchRec"]["formula"] = formulas.torchrec_bytes(task.workload, task.samples, ranks).total
    least = formulas.reduce_scatter_bytes(task.workload, task.samples, ranks)
    packings = Counter(table.packing for table in plans[OURS].tables)
    where = {"workload": task.name, "size": task.describe(), "ranks": ranks, "packings": packings}
    wire = {"message": message, "factor": factor, "reduce-scatter": least.total, "its all-gather alone": 2 * least.backward}
    return {**where, "counted": counted, "left_out": roster.left_out, "wire": wire}


def _count(contender: Contender, steps: int) -> dict[str, float]:
    """Bytes and collectives of a step. Collective."""
    batches, tally = contender.batches, se.Comm.of().tally
    for number in range(2):
        contender.step(batches[number % len(batches)])
    calls, sent = tally.calls.copy(), tally.bytes.copy()

    def train() -> None:
        for number in range(steps):
            contender.step(batches[number % len(batches)])

    passed = passing(train) / steps
    ran = {key: count for key, count in (tally.calls - calls).items() if not key[1].startswith("benchmark")}
    mine = sum(tally.bytes[key] - sent[key] for key in ran) / steps
    return {"bytes": passed, "collectives": sum(ran.values()) / steps, "tally": float(np.sum(gathered(np.array([mine]))))}


def passing(action: Callable[[], object]) -> float:
    """Bytes that pass the interface because of what all ranks do. Collective; rank 0's figure counts."""
    idle = _rate()
    barrier()
    before, began = _counter(), time.perf_counter()
    action()
    barrier()
    taken = time.perf_counter() - began
    return _counter() - before - idle * taken


def _rate() -> float:
    """Bytes a second while the ranks do nothing."""
    barrier()
    before, began = _counter(), time.perf_counter()
    time.sleep(IDLE_SECONDS)
    return (_counter() - before) / (time.perf_counter() - began)


def _counter() -> float:
    """Bytes that the interface has sent; each is received there too, and counted once here."""
    lines = COUNTERS.read_text().splitlines()
    fields = next(line.split(":")[1].split() for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return float(fields[8])


def overheads(rounds: int = 40) -> tuple[float, float]:
    """(bytes that a message takes on the wire beside its content, bytes that a byte of content takes). Collective."""
    ranks, found = se.world_size(), []
    for size in PROBES:
        send = torch.zeros(size * ranks, dtype=torch.uint8)
        received = torch.empty_like(send)

        def exchange(send: torch.Tensor = send, received: torch.Tensor = received) -> None:
            for _ in range(rounds):
                dist.all_to_all_single(received, send)

        found.append(passing(exchange) / rounds / (ranks * (ranks - 1)))
    factor = (found[1] - found[0]) / (PROBES[1] - PROBES[0])
    return found[0] - factor * PROBES[0], factor


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
    packed = " and ".join(f"{count} tables as {packing}" for packing, count in result["packings"].items())
    lines = [f"## {result['workload']}, {result['ranks']} ranks", ""]
    lines += pages.paragraph(
        f"{size[0].upper()}{size[1:]}. {OURS} packs {packed}, whichever sends fewer bytes. A message takes "
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
