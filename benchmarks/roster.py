"""Who takes part: every way to make the same training step that this machine, the workload and the number of ranks allow.

Contenders are started in heats, as many at a time as fit into memory, each heat with ours beside them. What cannot take part is
left out, and the page says why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks import peer_dtensor, peer_torchrec, peers
from benchmarks.contenders import AUTO, OURS, Setting, ours
from benchmarks.crew import Crew, CrewError, Make
from benchmarks.tasks import Task
from shardembed import optim

ONE_RANK = "one rank"
MEMORY = 0.5  # of what is free, that tables and their state may fill
OPTIMIZERS = (optim.SGD(lr=0.01), optim.Adagrad(lr=0.01), optim.Adam(lr=0.01), optim.AdamW(lr=0.01), optim.FTRL(lr=0.01))
log = logging.getLogger("shardembed")


@dataclass(frozen=True)
class Entry:
    """A contender to be.

    Attributes:
        name: on the page; of ours it begins with `OURS`.
        make: its step, in the process of each rank.
        size: of its tables, state and dense gradients, in multiples of the tables'.
        every: rounds between its turns, for one that is much slower than all others.
    """

    name: str
    make: Make
    size: float = 1.0
    every: int = 1


@dataclass
class Roster:
    """The contenders of one task.

    Attributes:
        task: what they train.
        ranks: of each.
        entries: ours first.
        left_out: by name, why some do not take part.
    """

    task: Task
    ranks: int
    entries: list[Entry]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def every(self) -> dict[str, int]:
        return {entry.name: entry.every for entry in self.entries}

    def heats(self) -> Iterator[dict[str, Crew]]:
        """Contenders to be timed together, ours first, which stays; the others of a heat are gone when the next is started.

        Raises:
            CrewError: one of ours cannot take part.
        """
        elements = sum(table.num_embeddings * table.embedding_dim for table in self.task.tables)
        first, room = self.entries[0], budget() / (4 * elements)  # of what is free before ours is there
        with closing(self._start(first)) as lead:
            for entries in divided(self.entries[1:], first, room):
                with ExitStack() as heat:
                    crews = {first.name: lead}
                    for entry in entries[1:]:
                        try:
                            crews[entry.name] = heat.enter_context(closing(self._start(entry)))
                        except CrewError as error:
                            if entry.name.startswith(OURS):
                                raise
                            self.left_out[entry.name] = error.args[0]
                            log.warning("%s is left out: %s", entry.name, error.args[0])
                    yield crews

    def _start(self, entry: Entry) -> Crew:
        return Crew.start(entry.make, self.task, self.ranks)


def divided(entries: Sequence[Entry], first: Entry, room: float) -> list[list[Entry]]:
    """Heats in order, each led by `first`, and each with no more than `room`, or with one entry."""
    heats: list[list[Entry]] = [[first]]
    for entry in entries:
        if len(heats[-1]) > 1 and sum(other.size for other in heats[-1]) + entry.size > room:
            heats.append([first])
        heats[-1].append(entry)
    return heats


def budget() -> float:
    """Bytes for the tables of all ranks, which share this machine."""
    listing = Path("/proc/meminfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0.0)
    return MEMORY * (free or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def roster_of(
    task: Task,
    kind: str,
    ranks: int,
    full: bool = False,
    wants: Callable[[str], bool] = lambda name: True,
    keep_memory: bool = True,
) -> Roster:
    """All that can take part, if it is wanted; ours by default always is."""
    entries = _alone(task, full, keep_memory) if kind == ONE_RANK else _together(task, kind, full, keep_memory)
    return Roster(task, ranks, [entries[0], *(entry for entry in entries[1:] if wants(entry.name))])


def _alone(task: Task, full: bool, keep_memory: bool) -> list[Entry]:
    setting, kind = Setting(keep_memory=keep_memory), "row_wise"
    found = [
        Entry(OURS, partial(ours, task, kind, setting)),
        Entry("FBGEMM TBE", partial(peers.fbgemm, task)),
        Entry(f"nn.Embedding{'Bag' * task.pooled}(sparse), torch Adagrad", partial(peers.plain_torch, task), 2),
    ]
    for optimizer in OPTIMIZERS if full else ():
        other = partial(ours, task.optimized_by(optimizer), kind, setting)
        found.append(Entry(f"{OURS}, {type(optimizer).__name__}", other, 1 + len(optimizer.state)))
    return found


def _together(task: Task, kind: str, full: bool, keep_memory: bool) -> list[Entry]:
    settings = {OURS: Setting(keep_memory=keep_memory)}
    if full:
        settings |= {f"{OURS}, {said}": replace(setting, keep_memory=keep_memory) for said, setting in _said(task, kind).items()}
    found = [Entry(name, partial(ours, task, kind, setting)) for name, setting in settings.items()]
    for name, how in peer_torchrec.variants(task, full).items():
        found.append(Entry(name, partial(peer_torchrec.torchrec_step, task, kind, **how)))
    if kind == AUTO:
        found.append(Entry(f"{peer_torchrec.NAME}, row-wise", partial(peer_torchrec.torchrec_step, task, "row_wise")))
    if full and kind == "row_wise":  # its gradients and its optimizer step are dense
        found.append(Entry("DTensor, torch Adagrad", partial(peer_dtensor.dtensor, task), 3, every=5))
    return found


def _said(task: Task, kind: str) -> dict[str, Setting]:
    """What else a user may say of ours, by how a page calls it; the packing, where it is not what he gets anyway."""
    found: dict[str, Setting] = {}
    if task.pooled and kind in ("row_wise", "mixed"):
        found['packing="bag"'] = Setting(packing="bag")
    if task.pooled and kind in ("table_wise", "column_wise", "mixed"):
        found['packing="unique"'] = Setting(packing="unique")
    if kind == "row_wise":
        found["strided=False"] = Setting(strided=False)
    if task.pooled:
        found["out.concatenated()"] = Setting(whole=True)
    found["bfloat16 wire"] = Setting(wire_dtype=torch.bfloat16)
    found["prefetched"] = Setting(ahead=True)
    found["from an IdBatch"] = Setting(read=True)
    return found
