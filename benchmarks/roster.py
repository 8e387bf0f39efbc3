"""Who takes part: every way to make the same training step that this machine, the workload and the number of ranks allow.

Contenders are built in heats, as many at a time as fit into memory, each heat with ours beside them. What cannot take part is left
out, and the page says why.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import shardembed as se
from benchmarks import peer_dtensor, peer_torchrec, peers
from benchmarks.contenders import OURS, Contender, ours, plan_of, prefetching
from benchmarks.tasks import Batch, Task
from shardembed import optim
from shardembed.planner.calibrate.stages import gathered
from shardembed.tables.placement import Packing

ONE_RANK = "one rank"
MEMORY = 0.5  # of what is free, that tables and their state may fill
OPTIMIZERS = (optim.SGD(lr=0.01), optim.Adagrad(lr=0.01), optim.Adam(lr=0.01), optim.AdamW(lr=0.01), optim.FTRL(lr=0.01))
log = logging.getLogger("shardembed")


@dataclass(frozen=True)
class Entry:
    """A contender to be. size: of its tables, state and dense gradients, in multiples of the tables'."""

    name: str
    make: Callable[[], Contender | str]
    size: float = 1.0


@dataclass
class Roster:
    """The entries, and by name why some do not take part. elements: of all tables."""

    elements: int
    entries: list[Entry] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def heats(self) -> Iterator[list[Contender]]:
        """Contenders to be timed together, ours first. Those of a heat are gone when the next is built. Collective."""
        for entries in divided(self.entries[1:], self.entries[0], budget() / (4 * self.elements)):
            heat = [made for made in map(self._made, entries) if made is not None]
            yield heat
            heat.clear()  # whoever took the list has it still
            give_back()

    def _made(self, entry: Entry) -> Contender | None:
        """Built, and tried with one step; None where that does not work."""
        try:
            made = entry.make()
            if isinstance(made, Contender):
                made.step(made.batches[0])
                return replace(made, name=entry.name)
            reason = made
        except Exception as error:  # whatever another library raises for what it cannot do
            if entry.name.startswith(OURS):
                raise
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        log.warning("%s is left out: %s", entry.name, reason)
        self.left_out[entry.name] = reason
        return None


def divided(entries: Sequence[Entry], first: Entry, room: float) -> list[list[Entry]]:
    """Heats in order, each led by `first`, and each with no more than `room`, or with one entry."""
    heats: list[list[Entry]] = [[first]]
    for entry in entries:
        if len(heats[-1]) > 1 and sum(other.size for other in heats[-1]) + entry.size > room:
            heats.append([first])
        heats[-1].append(entry)
    return heats


def budget() -> float:
    """Bytes for the tables of all ranks, which share this machine; the same on all. Collective."""
    listing = Path("/proc/meminfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0.0)
    free = free or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return MEMORY * float(np.min(gathered(np.array([free]))))


def give_back() -> None:
    """What a heat has left behind goes back to the system: memory that a process keeps may lie in pieces that are too small."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def roster_of(task: Task, kind: str, batches: list[Batch], full: bool, wants: Callable[[str], bool] = lambda name: True) -> Roster:
    """All that can take part, if it is wanted; ours always is."""
    entries = _alone(task, batches, full) if kind == ONE_RANK else _together(task, kind, batches, full)
    elements = sum(table.num_embeddings * table.embedding_dim for table in task.tables)
    return Roster(elements, [entries[0], *(entry for entry in entries[1:] if wants(entry.name))])


def _alone(task: Task, batches: list[Batch], full: bool) -> list[Entry]:
    plan = plan_of(task, "table_wise", 1, None)
    found = [Entry(OURS, lambda: ours(task, plan, batches))]
    if task.pooled:  # nothing is sent, so neither packing sends less
        found.append(Entry(f"{OURS}, unique", lambda: ours(task, plan_of(task, "table_wise", 1, "unique"), batches)))
    found.append(Entry("FBGEMM TBE", lambda: peers.fbgemm(task, batches)))
    name = "nn.EmbeddingBag(sparse)" if task.pooled else "nn.Embedding(sparse)"
    found.append(Entry(f"{name}, torch Adagrad", lambda: peers.plain_torch(task, batches), 2))
    for optimizer in OPTIMIZERS if full else ():
        other = task.optimized_by(optimizer)
        size = 1 + len(optimizer.state)
        found.append(Entry(f"{OURS}, {type(optimizer).__name__}", lambda other=other: ours(other, plan, batches), size))
    return found


def _together(task: Task, kind: str, batches: list[Batch], full: bool) -> list[Entry]:
    ranks = se.world_size()
    auto = plan_of(task, kind, ranks, None)
    found = [
        Entry(OURS, lambda: ours(task, auto, batches)),
        Entry(f"{OURS}, from a dict", lambda: ours(task, auto, batches, from_dict=True)),
        Entry(f"{OURS}, bfloat16 wire", lambda: ours(task, auto, batches, torch.bfloat16)),
        Entry(f"{OURS}, prefetched", lambda: prefetching(task, auto, batches)),
    ]
    if kind == "row_wise":
        blocks = plan_of(task, kind, ranks, None, strided=False)
        found.append(Entry(f"{OURS}, rows in blocks", lambda: ours(task, blocks, batches)))
    if full:
        found.append(Entry(f"{OURS}, prefetched, bfloat16 wire", lambda: prefetching(task, auto, batches, torch.bfloat16)))
        packings: tuple[Packing, ...] = ("unique", "bag") if task.pooled else ()
        plans = {packing: plan_of(task, kind, ranks, packing) for packing in packings}
        for packing, plan in plans.items():
            if plan != auto:
                found.append(Entry(f"{OURS}, {packing}", lambda plan=plan: ours(task, plan, batches)))
    for name, (bags, narrow) in peer_torchrec.variants(task, full).items():
        made = partial(peer_torchrec.torchrec_step, task, kind, batches, bags, narrow)
        found.append(Entry(name, made))
    if full and kind == "row_wise":
        found.append(Entry("DTensor, torch Adagrad", lambda: peer_dtensor.dtensor(task, batches), 3))
    return found
