"""From tables, optimizers and a plan to the journey of this rank: every default is settled here, alike on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist

from shardembed.comm.comm import Comm
from shardembed.comm.job import chosen_device, ranks_per_node
from shardembed.errors import ConfigError
from shardembed.journey.deterministic import check_poolings
from shardembed.journey.journey import Journey
from shardembed.journey.setup import Setup
from shardembed.modules.auto import settle
from shardembed.optim import NoOptimizer, TableOptimizer, refused
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import PlanLike, resolve
from shardembed.tables.settings import AGREED, Settings
from shardembed.tables.table_config import TableConfig, features_of

TableOptimizers = TableOptimizer | Mapping[str, TableOptimizer | None]


def build_journey(
    tables: Sequence[TableConfig | Any],
    optimizer: TableOptimizers | None,
    plan: PlanLike,
    device: torch.device | str | None,
    process_group: dist.ProcessGroup | None,
    settings: Settings,
) -> Journey:
    """Settle every default and build the shards of this rank. Collective: ranks check that they were given the same.

    Raises:
        ConfigError, PlanError: settings that do not fit. DisagreementError: on all ranks, when they differ between ranks.
    """
    comm = Comm.of(process_group)
    cluster = Cluster(comm.world_size, ranks_per_node(comm.world_size))
    where = chosen_device(device, process_group)
    with comm.preparing(AGREED):
        configs = tuple(TableConfig.of(table) for table in tables)
        features = features_of(configs)
        if settings.deterministic:
            check_poolings(features)
        optimizers = _per_table(configs, optimizer)
        default = resolve(configs, plan, cluster)
    settled = settle(configs, plan, default, optimizers, settings, cluster, comm, where)
    return Journey(Setup.of(configs, settled, optimizers, settings, comm, where))


def _per_table(tables: Sequence[TableConfig], optimizer: TableOptimizers | None) -> list[TableOptimizer]:
    """One optimizer a table: one for all, or a mapping by table name or pattern."""
    chosen: list[TableOptimizer] = []
    names = [table.name for table in tables]
    for pattern in optimizer if isinstance(optimizer, Mapping) else ():
        if not any(name == pattern or fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"an optimizer is given for {pattern!r}, which matches no table; the tables are {names}")
    for table in tables:
        one = optimizer_of(table.name, optimizer)
        if one is not None and (problem := refused(one)):
            raise ConfigError(f"table {table.name!r}: {problem}")
        chosen.append(NoOptimizer(sparse=table.sparse) if one is None else one)
    return chosen


def optimizer_of(name: str, wanted: TableOptimizers | None) -> TableOptimizer | None:
    """What `wanted` says about one table: its own name in a mapping comes before patterns, and those go in their order.

    Raises:
        ConfigError: a mapping says nothing about the table.
    """
    if not isinstance(wanted, Mapping):
        return wanted
    for pattern in [name, *wanted]:
        if pattern in wanted and (pattern == name or fnmatchcase(name, pattern)):
            return wanted[pattern]
    raise ConfigError(f"table {name!r}: no optimizer is given for it; add its name, or '*' for all others, to {sorted(wanted)}")
