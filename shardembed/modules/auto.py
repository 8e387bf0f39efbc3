"""`plan="auto"`: rank 0 asks the planner, and every rank takes its plan.

A collection knows its tables, not its traffic, so the planner is told the assumptions below. For a plan that follows real traffic,
make one with `shardembed plan` and pass `Plan.load(path)`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from shardembed.comm.comm import Comm
from shardembed.config.collector import uncollected
from shardembed.errors import PlanError, ShardEmbedError
from shardembed.optim import SGD, TableOptimizer
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import Plan, PlanLike
from shardembed.tables.settings import AGREED, Settings, agreed_lines
from shardembed.tables.table_config import TableConfig

if TYPE_CHECKING:  # the planner's libraries take a second to import, and most collections need no plan
    from shardembed.planner.topology import Topology
    from shardembed.planner.workload import Workload

BATCH = 2048  # samples a rank
IDS_A_BAG, IDS_A_LOOKUP = 10.0, 1.0  # of a pooled feature, and of one that is not
EXPONENT = 1.05  # of the power law by which ids repeat; where popular rows lie is not known
TINY = 64 << 20  # bytes of all tables together, for which the default plan is as good as any
BUILT_IN = ("h200", "h100", "a100")  # topologies, by a part of the GPU's name


def settle(
    tables: tuple[TableConfig, ...],
    wanted: PlanLike,
    default: Plan,
    optimizers: Sequence[TableOptimizer],
    settings: Settings,
    cluster: Cluster,
    comm: Comm,
    device: torch.device,
) -> Plan:
    """The plan of a collection: `default`, or the planner's for the tables that the user left to it. Collective.

    Args:
        default: what `resolve` made of `wanted`: the user's own placements, and default ones for the others.

    Raises:
        PlanError: on all ranks, when there is no plan that fits into memory.
        DisagreementError: on all ranks, when they were given different tables or placements.
    """
    if not wants_planning(tables, wanted, cluster):
        return default
    # Ranks that were given something else do not come here; they meet this call with one of the same kind, and both say so.
    comm.agree(AGREED, [*agreed_lines(tables, default, optimizers, settings, device), 'plan="auto"'])
    text = ""
    if comm.rank == 0:
        pinned = frozenset(wanted) if isinstance(wanted, Mapping) else frozenset()
        text = ask_planner(tables, optimizers, settings, default, pinned, cluster, device)
    answer = json.loads(_from_rank_zero(comm, text))
    if "error" in answer:
        raise PlanError(f'{answer["error"]}\n(plan="auto"; pass placements, such as plan=se.row_wise(), to do without the planner)')
    return Plan.from_json(answer["plan"])


def wants_planning(tables: Sequence[TableConfig], wanted: PlanLike, cluster: Cluster) -> bool:
    """Something is left to the planner, and there is something to gain."""
    left = wanted == "auto" or (isinstance(wanted, Mapping) and any(table.name not in wanted for table in tables))
    size = sum(table.num_embeddings * table.embedding_dim * table.dtype.itemsize for table in tables)
    return left and cluster.world_size > 1 and size > TINY


def workload_of(tables: Sequence[TableConfig], optimizers: Sequence[TableOptimizer], settings: Settings, ranks: int) -> Workload:
    """The tables with the traffic that is assumed. An optimizer of the user's own is taken for one without state."""
    from shardembed.planner.workload import TableLoad, Workload, Zipf

    loads = []
    for table, optimizer in zip(tables, optimizers, strict=True):
        ids = tuple(IDS_A_LOOKUP if table.pooling_of(name) is None else IDS_A_BAG for name in table.feature_names or ())
        loads.append(TableLoad(table, ids, Zipf(EXPONENT), "unknown", optimizer=optimizer if optimizer.stepped else SGD()))
    return Workload("this collection", BATCH * ranks, tuple(loads), settings.wire_dtype)


def topology_of(cluster: Cluster, device: torch.device) -> Topology:
    """The built-in one that is nearest to this rank's device, with the memory that is really there."""
    from shardembed.planner.topology import load

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = next((name for name in BUILT_IN if name in properties.name.lower()), "h100")
        found, memory = load(f"{name}x8"), properties.total_memory
    else:
        found = load("cpu")
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // cluster.ranks_per_node
    reserve = min(found.reserve, memory // 8)
    return replace(found, ranks=cluster.world_size, ranks_per_node=cluster.ranks_per_node, memory=memory, reserve=reserve)


def ask_planner(
    tables: Sequence[TableConfig],
    optimizers: Sequence[TableOptimizer],
    settings: Settings,
    default: Plan,
    pinned: frozenset[str],
    cluster: Cluster,
    device: torch.device,
) -> str:
    """The planner's answer as JSON, or the default plan where that is as fast; errors too, since the other ranks are waiting."""
    with uncollected():  # importing takes ten times as long as the search
        from shardembed import planner
        from shardembed.planner.constraints import Constraints
        from shardembed.planner.highs import WAITED_FOR  # the other ranks wait meanwhile

    try:
        workload, topology = workload_of(tables, optimizers, settings, cluster.world_size), topology_of(cluster, device)
        pins = {table.name: table for table in default.tables if table.name in pinned}
        found = planner.plan(workload, topology, Constraints(pins=pins), effort=WAITED_FOR)
        usual = planner.estimate(default, workload, topology)
        fits = float(usual.memory_bytes.max()) <= topology.room
        as_good = fits and usual.step_seconds <= found.estimate.step_seconds  # the search looks only so far
        return json.dumps({"plan": (default if as_good else found.plan).to_json()})
    except ShardEmbedError as error:
        return json.dumps({"error": str(error)})
    except Exception as error:
        return json.dumps({"error": f"the planner failed on rank 0: {type(error).__name__}: {error}"})


def _from_rank_zero(comm: Comm, text: str) -> str:
    """Rank 0's text, on every rank. Collective."""
    data = zlib.compress(text.encode())
    size = comm.broadcast("plan: its size", torch.tensor([len(data)]))
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8) if comm.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
    return zlib.decompress(bytes(comm.broadcast("plan", mine).numpy())).decode()
