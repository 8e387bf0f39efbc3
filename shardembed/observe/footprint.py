"""`memory(model)`: what the plan was expected to take, beside what is there."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardembed.comm.job import ranks_per_node
from shardembed.journey.journey import Journey
from shardembed.modules.auto import BATCH, topology_of, workload_of
from shardembed.observe.tables import bytes_text, journeys_of, rendered
from shardembed.optim import TableOptimizer
from shardembed.store.dynamic.keys import DynamicKeys
from shardembed.store.slab import Slab
from shardembed.tables.placement import Cluster

WEIGHTS, STATE, WAITING = "weights", "optimizer state", "waiting gradients"
STRANGERS = "rows of unknown ids"
BUFFERS, PREFETCH = "exchange buffers", "prefetch"
COMMUNICATORS = "communicators"
DENSE, DENSE_GRADS, RESIDENT, PEAK = "dense parameters", "dense gradients", "process", "process, at most"
ALLOCATED, ALLOCATED_PEAK = "on the GPU", "on the GPU, at most"
Figures = dict[str, dict[str, float | None]]


class Memory:
    """What `memory` found on all ranks."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found

    def as_dict(self) -> dict[str, Any]:
        """What a script would read, in bytes.

        rank, world_size, samples (that a rank's batch was assumed to have), and by category and by table ("categories", "tables")
        planned and actual of this rank, and of the rank that has most: largest_planned, largest_actual and largest_rank (of what is
        there, else of what was planned). Where one does not know, None.
        """
        return self._found

    def table(self) -> str:
        """The same for a terminal."""
        found = self._found
        columns = ["", "planned", "actual", "largest planned", "largest actual", "on rank"]
        rows = []
        for part in ("categories", "tables"):
            for name, line in found[part].items():
                keys = ("planned", "actual", "largest_planned", "largest_actual")
                rank = "" if line["largest_rank"] is None else str(line["largest_rank"])
                label = name if part == "categories" else f"table {name}"
                rows.append([label, *(bytes_text(line[key]) for key in keys), rank])
        title = (
            f"memory of rank {found['rank']} of {found['world_size']}; planned for {found['samples']} samples a rank with the "
            'traffic that plan="auto" assumes'
        )
        return rendered(title, columns, rows)


def memory(model: nn.Module, samples: int = BATCH) -> Memory:
    """Bytes of the model's tables by category and by table, as the planner counts them and as they are, on this rank and on the
    one that has most. Collective (a gather of texts).

    Weights and optimizer state are planned exactly. With the state of a dynamic table goes what finds and remembers its ids, which
    is planned roughly, as are the rows of one without a limit; "rows of unknown ids" are set aside for ids without a row, and are
    taken as they are written. What waits and travels depends on the traffic, and is planned for `samples` a
    rank with ids as `plan="auto"` assumes them. Gradients that wait are counted as they are now, so call it between a
    backward and its step. Of "exchange buffers" what is there is the largest message so far, sent and received. State of a torch
    optimizer of your own (`optimizer=None`) is in the figures of the process alone. On GPUs "communicators" is what NCCL takes for
    all collections of a process group: as estimated, and as it was measured when they were made (`planner/communicators.py`).

    Raises:
        ConfigError: the model has no sharded tables, or they lie on several process groups.
    """
    journeys, comm, device = journeys_of(model)
    categories, tables = Counter[str](), {}
    for journey in journeys:
        categories.update(_held(journey, tables))
    largest = max(tally.largest for tally in comm.tallies)
    actual: dict[str, float | None] = {**categories, BUFFERS: largest, PREFETCH: None}
    actual |= {**_dense(model, journeys), **_process(device)}
    planned, planned_tables = _planned(journeys, samples)
    if COMMUNICATORS in planned:  # on GPUs
        actual[COMMUNICATORS] = comm.communicator_bytes
    mine = {"categories": actual, "tables": tables}
    told = comm.gather_texts("control", "memory: gather what ranks hold", json.dumps(mine))
    ranks = [json.loads(text) for text in told]
    return Memory(
        {
            "rank": comm.rank,
            "world_size": comm.world_size,
            "samples": samples,
            "categories": _lines(planned, [rank["categories"] for rank in ranks], comm.rank),
            "tables": _lines(planned_tables, [rank["tables"] for rank in ranks], comm.rank),
        }
    )


def _held(journey: Journey, tables: dict[str, float]) -> dict[str, int]:
    """Bytes by category; those of weights and state also go to their table."""
    found: dict[str, int] = dict.fromkeys((WEIGHTS, STATE, WAITING), 0)
    for table in journey.tables:
        tables.setdefault(table.name, 0)
    for slab in journey.slabs:
        for local in slab.shards():
            state = sum(size_of(tensor) for tensor in local.state.values())
            found[WEIGHTS] += size_of(local.weights)
            found[STATE] += state
            tables[local.table] += size_of(local.weights) + state
        if slab.dynamic is not None:
            _held_by_id(slab, slab.dynamic, found, tables)
        found[WAITING] += _waiting(slab)
    return found


def _held_by_id(slab: Slab, keys: DynamicKeys, found: dict[str, int], tables: dict[str, float]) -> None:
    """Of a dynamic table: its places, whether ids have them or not."""
    weights = size_of(slab.weights[: keys.census.places])
    state = sum(map(size_of, slab.state.values())) + keys.nbytes
    found[WEIGHTS] += weights
    found[STATE] += state
    found[STRANGERS] = found.get(STRANGERS, 0) + size_of(slab.weights) - weights
    tables[slab.table_of(slab.spec.lanes[0])] += weights + state


def _waiting(slab: Slab) -> int:
    gradients = slab.waiting()
    if gradients is None:
        return 0
    parts = (getattr(gradients, each.name) for each in fields(gradients))
    return sum(size_of(part) for part in parts if isinstance(part, torch.Tensor))


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()


def _dense(model: nn.Module, journeys: Sequence[Journey]) -> dict[str, int]:
    """Of parameters that are no shards."""
    shards = {slab.weights.untyped_storage().data_ptr() for journey in journeys for slab in journey.slabs}
    dense = [parameter for parameter in model.parameters() if parameter.untyped_storage().data_ptr() not in shards]
    grads = [parameter.grad for parameter in dense if parameter.grad is not None]
    return {DENSE: sum(map(size_of, dense)), DENSE_GRADS: sum(map(size_of, grads))}


def _process(device: torch.device) -> dict[str, float]:
    found: dict[str, float] = {}
    status = Path("/proc/self/status")
    if sys.platform == "linux" and status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        found = {RESIDENT: 1024 * int(lines["VmRSS"].split()[0]), PEAK: 1024 * int(lines["VmHWM"].split()[0])}
    if device.type == "cuda":
        found[ALLOCATED] = torch.cuda.memory_allocated(device)
        found[ALLOCATED_PEAK] = torch.cuda.max_memory_allocated(device)
    return found


def _planned(journeys: Sequence[Journey], samples: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Bytes of every rank, by category and by table."""
    from shardembed import planner  # its libraries take a second to import

    categories: dict[str, list[float]] = {}
    tables: dict[str, list[float]] = {}
    for journey in journeys:
        ranks = journey.comm.world_size
        workload = workload_of(journey.tables, _optimizers(journey), journey.settings, ranks)
        workload = replace(workload, global_batch_size=samples * ranks)
        topology = topology_of(Cluster(ranks, ranks_per_node(ranks)), journey.device)
        found = planner.estimate(journey.plan, workload, topology)
        if topology.communicators:  # shared by all collections
            categories[COMMUNICATORS] = [float(topology.communicators)] * ranks
        for name, line in zip(found.categories, found.memory.tolist(), strict=True):
            categories[name] = [one + more for one, more in zip(categories.get(name, [0.0] * ranks), line, strict=True)]
        for table, line in zip(journey.tables, found.table_memory.tolist(), strict=True):
            tables[table.name] = line
    return categories, tables


def _optimizers(journey: Journey) -> list[TableOptimizer]:
    chosen = {lane.table: spec.optimizer for spec in journey.specs for lane in spec.lanes}
    return [chosen[number] for number in range(len(journey.tables))]


def _lines(planned: Mapping[str, list[float]], actual: Sequence[Mapping[str, float | None]], rank: int) -> Figures:
    """A line each: this rank and the one that has most."""
    found: Figures = {}
    for name in dict.fromkeys([*planned, *actual[rank]]):
        expected = planned.get(name)
        there = [one.get(name) for one in actual]
        known = [size for size in there if size is not None]
        most = max(known) if known else None
        where = there.index(most) if known else expected.index(max(expected)) if expected else None
        found[name] = {
            "planned": None if expected is None else expected[rank],
            "actual": there[rank],
            "largest_planned": None if expected is None else max(expected),
            "largest_actual": most,
            "largest_rank": where,
        }
    return found
