"""The distinct ids of a batch, table by table, and which of them each id is: rows by one sort for all tables, the ids of dynamic
tables by a hash table each, since nothing is sorted by 64 bits. Compiled on a CPU, elsewhere in plain torch.

Legend: N ids, U distinct ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardembed.inputs.ids import IdBatch
from shardembed.journey.route.ownership import LookupPlan, RoutingTable
from shardembed.kernels.grouping import compiled, group, sorts
from shardembed.kernels.interning import Interned, intern
from shardembed.wire.message import Numbers


@dataclass(frozen=True)
class Distinct:
    """The distinct ids of the tables that are read by id.

    Attributes:
        ids_U: table by table: rows ascending, numbered through all tables; ids of dynamic tables as they are, in no order.
        counts_U: how often each occurs.
        starts: where each table's begin, one more than tables, int64.
        numbers_N: of each id, feature by feature, its number among `ids_U`.
    """

    ids_U: torch.Tensor
    counts_U: torch.Tensor
    starts: Numbers
    numbers_N: torch.Tensor


def find_distinct(ids: IdBatch, routing: RoutingTable, lookup_plan: LookupPlan) -> Distinct:
    """Each id of the features that are read by id once."""
    if not routing.dynamic:
        return _of_rows(ids, lookup_plan.by_id, routing, lookup_plan)
    asked: dict[int, list[int]] = {}
    for i in lookup_plan.by_id.tolist():
        asked.setdefault(lookup_plan.tables[i], []).append(i)
    pieces = ids.ids.split(ids.sizes)
    interned = {table: intern(cat([pieces[i] for i in asked[table]], ids.ids)) for table in routing.dynamic if table in asked}
    if len(asked) == len(interned) == 1:
        return _of_one(interned, routing)
    by_rows = np.array([i for i in lookup_plan.by_id.tolist() if lookup_plan.tables[i] not in interned], dtype=np.int64)
    return _of_both(_of_rows(ids, by_rows, routing, lookup_plan), by_rows, interned, asked, ids, lookup_plan)


def _of_rows(ids: IdBatch, features: Numbers, routing: RoutingTable, lookup_plan: LookupPlan) -> Distinct:
    """Of features whose ids are rows."""
    if not features.size:
        nothing = ids.ids[:0]
        return Distinct(nothing, nothing, np.zeros(routing.table_starts.size, np.int64), nothing)
    limit = int(routing.table_starts[-1])
    if (kernels := compiled(ids.ids.device)) is not None and sorts(ids.ids.numel(), limit):
        found = kernels.routing.distinct(ids.ids.numpy(), ids.sizes_F, features, lookup_plan.starts, routing.table_starts)
        return Distinct(torch.from_numpy(found[0]), torch.from_numpy(found[1]), found[2], torch.from_numpy(found[3]))
    wanted = ids.ids + of_features(lookup_plan.starts, ids)
    if features.size < len(ids.parts):
        parts = wanted.split(ids.sizes)
        wanted = torch.cat([parts[i] for i in features.tolist()])
    groups = group(wanted, limit)
    starts = torch.searchsorted(groups.numbers_U, torch.from_numpy(routing.table_starts).to(wanted.device))
    return Distinct(groups.numbers_U, groups.counts(), starts.cpu().numpy(), groups.inverse())  # host sync on a GPU


def _of_one(interned: Mapping[int, Interned], routing: RoutingTable) -> Distinct:
    """Of a lone dynamic table: nothing is put together."""
    ((table, found),) = interned.items()
    starts = np.zeros(routing.table_starts.size, np.int64)
    starts[table + 1 :] = found.ids_U.numel()
    return Distinct(found.ids_U, found.counts_U, starts, found.numbers_N)


def _of_both(
    rows: Distinct,
    by_rows: Numbers,
    interned: Mapping[int, Interned],
    asked: Mapping[int, Sequence[int]],
    ids: IdBatch,
    lookup_plan: LookupPlan,
) -> Distinct:
    """What was found of rows and of dynamic tables, table by table. asked: by table the features that ask it."""
    sizes = np.diff(rows.starts)
    for table, found in interned.items():
        sizes[table] = found.ids_U.numel()
    starts = np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])
    numbers: dict[int, torch.Tensor] = {}  # by feature
    for i, part in zip(by_rows.tolist(), rows.numbers_N.split(ids.sizes_F[by_rows].tolist()), strict=True):
        table = lookup_plan.tables[i]
        numbers[i] = part + int(starts[table] - rows.starts[table])
    for table, found in interned.items():
        for i, part in zip(asked[table], found.numbers_N.split([ids.sizes[i] for i in asked[table]]), strict=True):
            numbers[i] = part + int(starts[table])
    ids_U: list[torch.Tensor] = []
    counts_U: list[torch.Tensor] = []
    for table in range(len(sizes)):
        part, found = slice(*rows.starts[table : table + 2].tolist()), interned.get(table)
        ids_U.append(rows.ids_U[part] if found is None else found.ids_U)
        counts_U.append(rows.counts_U[part] if found is None else found.counts_U)
    return Distinct(cat(ids_U, ids.ids), cat(counts_U, ids.ids), starts, cat([numbers[i] for i in sorted(numbers)], ids.ids))


def of_features(numbers: Numbers, ids: IdBatch) -> torch.Tensor:
    """One number a feature, repeated for each of its ids, `[N]`."""
    device = ids.ids.device
    if numbers.size == 1:
        return torch.tensor(int(numbers[0]), device=device)
    sizes = torch.from_numpy(ids.sizes_F).to(device)
    return torch.repeat_interleave(torch.from_numpy(numbers).to(device), sizes, output_size=ids.ids.numel())


def cat(tensors: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Side by side, without a copy where there is but one."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(list(tensors)) if tensors else like.new_empty(0, dtype=torch.int64)
