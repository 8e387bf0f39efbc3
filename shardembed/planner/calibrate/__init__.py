"""Measures a machine: times real steps of small workloads under plans of all kinds, and fits the planner's model to them.

What the numbers mean stands in `planner.cost_ops`; how they are found, in `fit`. Ranks must be in a job, or alone.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device, ranks_per_node
from shardembed.kernels.memory import keep_freed_memory
from shardembed.kernels.packing import pack, unpack
from shardembed.planner.calibrate import drawn, fit
from shardembed.planner.calibrate.stages import Case, Runner, gathered, in_turns
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.topology_sections import REQUIRED_OPS
from shardembed.tables.placement import Cluster
from shardembed.wire.message import MessageLayout, Part

Array = NDArray[np.float64]
CASES, SEED = 80, 11
SECONDS = 26.0  # of timing; making the tables, fitting and starting take as much again on two cores
RESERVE = 0.1  # of the memory
FASTEST = 1e12  # bytes a second of a link whose bytes took no time that could be told from copies
BATCHES = 3  # that each case steps through

Say = Callable[[str], None]


def calibrate(name: str, seconds: float = SECONDS, cases: int | None = None, say: Say = lambda text: None) -> Topology:
    """Measure; every rank gets the topology. Collective.

    Args:
        seconds: of timing, about. cases: workloads to time, 80 by default.
    """
    cases = cases or CASES
    keep_freed_memory()
    comm = Comm.of()
    cluster = Cluster(comm.world_size, ranks_per_node(comm.world_size))
    began = time.monotonic()
    say(f"making {cases} small collections on {comm.world_size} rank(s)")
    chosen = drawn.cases(cluster, cases, SEED)
    runners = [Runner(case, BATCHES, SEED) for case in chosen]
    say(f"timing their steps in turns, for about {seconds:.0f} s")
    timed = in_turns(runners, seconds)
    del runners
    say("fitting the model")
    topology, error = fitted(name, cluster, chosen, timed)
    say(f"the model is within {error:.0%} of these steps in the mean; all took {time.monotonic() - began:.0f} s")
    return topology


def fitted(name: str, cluster: Cluster, cases: list[Case], timed: Sequence[Array]) -> tuple[Topology, float]:
    """The machine on which these cases took so long, the phases of each step by case, and how far its model is off in the mean.
    Collective.
    """
    blank, steps = _blank(name, cluster), [typical(phases) for phases in timed]
    designs = _designs(cases, blank)
    values = fit.fit(designs, steps, {fit.Unknown("block", "row"): _block_seconds()})
    error = _error(designs, steps, values)
    return _finished(fit.topology_of(blank, values), cluster, len(cases), error), error


def typical(phases: Array) -> Array:
    """`[P]` seconds of a step in the middle: the mean of the third of the steps nearest to the median one."""
    steps = phases.sum(1)
    near = np.argsort(np.abs(steps - np.median(steps)), kind="stable")[: max(1, len(steps) // 3)]
    return phases[near].mean(0)


def _blank(name: str, cluster: Cluster) -> Topology:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = _memory(cluster.ranks_per_node)
    # With several nodes, what is measured is told as between nodes, for they are the slower links.
    per_node = cluster.ranks_per_node if cluster.world_size <= cluster.ranks_per_node else 1
    return Topology(name, cluster.world_size, per_node, memory, int(RESERVE * memory), fit.FREE, fit.FREE, {}, device=device)


def _memory(ranks: int) -> int:
    """Bytes of a rank."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    # Of ranks that share a node.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks


def _block_seconds(few: int = 64, many: int = 1024, slabs: int = 4, rounds: int = 15) -> float:
    """What each further rank adds to a slab's part of a message, on one side; the same on all ranks. Few ranks cannot tell it from
    what a slab takes, and many would pay for the error.
    """
    taken = np.array([[_empty_message(ranks, slabs) for ranks in (few, many)] for _ in range(rounds)])
    low, high = np.median(taken, 0)
    return max(0.0, float(np.mean(gathered(np.array([(high - low) / (2 * slabs * (many - few))])))))


def _empty_message(ranks: int, slabs: int) -> float:
    """Seconds of putting a message without content together and taking it apart."""
    parts, counts = [Part(torch.float32, (8,))] * slabs, np.zeros((slabs, ranks), dtype=np.int64)
    vectors = [torch.ones(0, 8, device=default_device()) for _ in parts]
    began = time.perf_counter()
    layout = MessageLayout.of(parts, counts)
    unpack(pack(vectors, layout), layout)
    return time.perf_counter() - began


def _designs(cases: list[Case], blank: Topology) -> list[Array]:
    """Ranks share the work."""
    comm = Comm.of()
    mine = range(comm.rank, len(cases), comm.world_size)
    shape = (-(-len(cases) // comm.world_size), *fit.shape(blank))
    found = np.zeros(shape)
    for line, number in enumerate(mine):
        found[line] = fit.design(cases[number], blank)
    theirs = gathered(found)
    return [theirs[number % comm.world_size][number // comm.world_size] for number in range(len(cases))]


def _error(designs: list[Array], timed: list[Array], values: dict[fit.Unknown, float]) -> float:
    """Mean absolute error of a step, relative."""
    numbers = np.array([values.get(unknown, 0.0) for unknown in fit.UNKNOWNS])
    said = np.array([(matrix @ numbers).max(1).sum() for matrix in designs])
    steps = np.array([phases.sum() for phases in timed])
    return float(np.abs(said / steps - 1.0).mean())


def _finished(topology: Topology, cluster: Cluster, cases: int, error: float) -> Topology:
    ops = dict(topology.ops)
    # What no case told of: nothing is known of it, but a topology must name it.
    ops |= {name: Op(0.0, 0.0, 0.0) for name in REQUIRED_OPS if name not in ops}
    updates = [op for name, op in ops.items() if name.startswith("update_")]
    if updates:  # for optimizers whose kernel no case had
        ops["update"] = Op(*(max(getattr(op, field) for op in updates) for field in ("call", "row", "byte")))
    link, where = topology.intra, f"{cases} cases on {cluster.world_size} rank(s)"
    if cluster.world_size == 1:  # no link was used; a copy within the device is the nearest thing to one
        link = Link(1.0 / ops["copy"].byte if ops["copy"].byte else FASTEST, 0.0)
    link = replace(link, bandwidth=min(link.bandwidth, FASTEST))
    source = {
        "measured": f"shardembed calibrate, {datetime.date.today()}: {where}, steps within {error:.1%} in the mean",
        "machine": f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} thread(s) a rank",
        "reserve": f"{RESERVE:.0%} of the memory; set it to what your model and its activations need",
        "links": _links(cluster),
        "freed memory": "kept by the process, as with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ at 4000000000; without, "
        "glibc gives large buffers back and each step pays for getting them again",
    }
    return replace(topology, ranks_per_node=cluster.ranks_per_node, intra=link, inter=link, ops=ops, source=source)


def _links(cluster: Cluster) -> str:
    if cluster.world_size == 1:
        return "not measured: there was one rank; the bandwidth is that of a copy within its memory"
    if cluster.world_size > cluster.ranks_per_node:
        return "measured over all ranks; intra repeats inter, and peer is part of latency. A run on one node gives intra"
    return "inter repeats intra, for there was one node; peer is part of latency"


def processor() -> str:
    """What this machine computes on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor() or "unknown processor")
