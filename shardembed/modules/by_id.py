"""Dynamic tables from outside of a step: who lives, what became of ids so far, and rows that are given by id.

Of a table whose columns are cut, the owners of the first strip speak: the others have the same ids.

Legend: n ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardembed.comm.comm import Comm
from shardembed.errors import ConfigError, InputError, ShardEmbedError, StepError
from shardembed.journey.journey import Journey
from shardembed.modules.loading import CHUNK_BYTES, read_rows, shape_of
from shardembed.store.dynamic.keys import DynamicKeys
from shardembed.store.slab import Slab
from shardembed.tables.table_config import TableConfig
from shardembed.wire.header import Mode

WINDOW = 1 << 20  # ids that a rank tells at once


@dataclass(frozen=True)
class Living:
    """The ids of a dynamic table that have a row, on every rank all of them, on the device of the tables.

    Attributes:
        ids: int64 `[n]`, ascending.
        lasts: int64 `[n]`, the optimizer step that brought each its last gradient (of one that was loaded since: the step before
            which it was).
        counts: int64 `[n]`, how often each has occurred, halved as `LFU` says; None where nobody counts, which `LFU` and `MinCount`
            do.
    """

    ids: torch.Tensor
    lasts: torch.Tensor
    counts: torch.Tensor | None


@dataclass(frozen=True)
class TableTally:
    """What has become of the ids of a dynamic table, all ranks together.

    Attributes:
        live: have a row now.
        candidates: are counted and have none yet (`MinCount`).
        created: got a row in a step.
        evicted: lost it to others.
        expired: lost it with age (`TTL`).
        refused: were admitted and found no place, once for each step.
        waiting: were not admitted, once for each step.
        unknown: were read by evaluations and had no row, once for each call.
    """

    live: int
    candidates: int
    created: int
    evicted: int
    expired: int
    refused: int
    waiting: int
    unknown: int


def not_dynamic(table: TableConfig, what: str) -> ConfigError:
    """For a call that is about ids which come and go."""
    return ConfigError(
        f"{what}: table {table.name!r} is not dynamic, its ids are the row numbers 0 to {table.num_embeddings - 1}; "
        "TableConfig(..., dynamic=se.Dynamic()) makes a table whose ids come and go"
    )


def living(journey: Journey, table: int, problem: ShardEmbedError | None, only_ids: bool = False) -> Living:
    """Who has a row. Collective. only_ids: the rest is not asked for, and empty.

    Raises:
        ConfigError: on every rank, when the table is not dynamic.
    """
    config = journey.tables[table]
    problem = problem or (None if config.dynamic else not_dynamic(config, "ids()"))
    keys = _speaker(journey, table) if config.dynamic else None
    slots = keys.census.living(keys.steps) if keys else torch.empty(0, dtype=torch.int64)
    counts = journey.open_table_call(Mode.IDS, table, problem, (slots.numel(), 0))[0]
    assert keys is not None, "else there is a problem"
    return gathered(keys, slots, counts, journey.comm, only_ids)


def gathered(keys: DynamicKeys, slots: torch.Tensor, counts: Sequence[int], comm: Comm, only_ids: bool = False) -> Living:
    """All ranks' ids from this rank's `slots`; `counts` says how many each rank has. Collective."""
    census = keys.census
    columns = [census.ids_S[slots]]
    if not only_ids:
        columns.append(census.lasts_S[slots].to(torch.int64))
        if census.policy.counts:
            columns.append(census.counts_of(slots, keys.steps))
    told = _to_all(torch.stack(columns, 1), counts, comm)
    told = told[told[:, 0].argsort()]
    lasts = told[:, 1] if told.shape[1] > 1 else told[:0, 0]
    return Living(told[:, 0].contiguous(), lasts.contiguous(), told[:, 2].contiguous() if told.shape[1] > 2 else None)


def _to_all(rows: torch.Tensor, counts: Sequence[int], comm: Comm) -> torch.Tensor:
    """The int64 `[n, columns]` of all ranks, of which each has as many rows as `counts` says."""
    columns = rows.shape[1]
    parts: list[torch.Tensor] = []
    for first in range(0, max(counts), WINDOW):
        sizes = [max(0, min(count - first, WINDOW)) * columns for count in counts]
        mine = rows[first : first + WINDOW].reshape(-1)
        send = mine.repeat(comm.world_size)
        parts.append(comm.all_to_all("forward", "ids: tell who lives", send, [mine.numel()] * comm.world_size, sizes))
    return torch.cat(parts).view(-1, columns) if parts else rows[:0]


def tally(journey: Journey, table: int, problem: ShardEmbedError | None) -> TableTally:
    """What has become of ids so far. Collective.

    Raises:
        ConfigError: on every rank, when the table is not dynamic.
    """
    config, comm = journey.tables[table], journey.comm
    problem = problem or (None if config.dynamic else not_dynamic(config, "tally()"))
    journey.open_table_call(Mode.TALLY, table, problem)
    numbers = torch.tensor([*_counted(_speaker(journey, table))], dtype=torch.int64, device=journey.device)
    equal = [numbers.numel()] * comm.world_size
    told = comm.all_to_all("forward", "tally: add up", numbers.repeat(comm.world_size), equal, equal)
    return TableTally(*told.view(comm.world_size, -1).sum(0).tolist())


def _counted(keys: DynamicKeys) -> Iterator[int]:
    """This rank's share of a `TableTally`, in its order."""
    census, so_far = keys.census, keys.tally
    live = census.living(keys.steps).numel()
    yield live
    yield keys.candidates.living(keys.steps).numel() if keys.candidates else 0
    # Whoever has died keeps the place until somebody needs it.
    dead = int((census.lasts_S >= 0).sum()) - live
    yield from (so_far.created, so_far.evicted, so_far.expired + dead, so_far.refused, so_far.waiting, keys.unknown)


def load(journey: Journey, table: int, ids: Any, values: Any) -> None:
    """Write `values` to the rows of `ids`, which are created where there are none. Collective; all ranks give the same.

    Raises:
        InputError: on every rank, when any was given malformed or other ids than the others.
        ConfigError: on every rank, when values have another shape, or some ids find no place.
        StepError: on every rank, when gradients wait for a step.
    """
    config = journey.tables[table]
    given = torch.empty(0, dtype=torch.int64)
    lacking = 0
    problem: Exception | None = None
    try:
        given = _checked(config, ids, values).to(journey.device)
        if journey.pending.waiting:
            raise StepError(
                f"load_rows: gradients wait for the rows of table {config.name!r}; take the step or zero_grad() before it"
            )
        keys = _speaker(journey, table)
        lacking = keys.lacking(given[keys.belong(given)])
    except Exception as error:  # whatever it is: the other ranks wait to hear of it
        problem = error
    told = journey.open_table_call(Mode.LOAD, table, problem, (lacking, _checksum(given)), k=given.numel())
    if len(set(told[1])) > 1:
        raise InputError(f"load_rows: ranks give different ids for table {config.name!r}; give all ids on every rank")
    if missing := sum(told[0]):
        raise ConfigError(
            f"load_rows: {missing} of {given.numel()} ids find no place in table {config.name!r}, which has room for "
            f"{config.bucket_rows} in each of its {config.cut_rows} bucket(s), into which a mix of their bits puts ids; no row has "
            "changed. Give the table a larger num_embeddings (half as much again as ids is mostly enough), or None to let it grow, "
            "or load fewer"
        )
    write(journey, table, given, values)


def write(journey: Journey, table: int, ids: torch.Tensor, values: Any) -> None:
    """Write rows of distinct ids, for which there are places. Not collective: each rank writes what lies here.

    Args:
        ids: int64 `[n]`, on the device of the tables.
        values: `[n, embedding_dim]`, as `load_rows` takes them, read some 64 MiB at a time.
    """
    config = journey.tables[table]
    step = max(1, CHUNK_BYTES // (config.embedding_dim * config.dtype.itemsize))
    for slab in _slabs(journey, table):
        assert slab.dynamic is not None
        columns = slab.spec.lanes[0].columns
        for first in range(0, ids.numel(), step):
            piece = ids[first : first + step]
            here = slab.dynamic.belong(piece)
            rows_U = slab.dynamic.give(piece[here])
            part = read_rows(values, range(first, first + piece.numel()), columns)
            slab.weights[rows_U] = part[here.to(part.device)].to(slab.weights.device, slab.weights.dtype)
            slab.touch(rows_U)


def _slabs(journey: Journey, table: int) -> Iterator[Slab]:
    """Of a dynamic table, one a strip."""
    for slab in journey.slabs:
        if slab.dynamic is not None and slab.spec.lanes[0].table == table:
            yield slab


def _speaker(journey: Journey, table: int) -> DynamicKeys:
    """The ids of the first strip, of which this rank may hold none."""
    slab = next(slab for slab in _slabs(journey, table) if slab.spec.lanes[0].strip == 0)
    assert slab.dynamic is not None
    return slab.dynamic


def speaker(journey: Journey, table: int) -> DynamicKeys | None:
    """As far as this rank holds them, the ids of a table's first strip; None of a table that is not dynamic."""
    return _speaker(journey, table) if journey.tables[table].dynamic else None


def _checked(config: TableConfig, ids: Any, values: Any) -> torch.Tensor:
    if values is None:
        raise ConfigError(f"table {config.name!r} is dynamic, so rows are loaded by id: load_rows(table, ids, values)")
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"load_rows: ids of table {config.name!r} must be integers [n] of 64 bits with a sign: {error}") from error
    if not given.numel():
        given = given.to(torch.int64)  # an empty list has a dtype that nobody said
    if given.dim() != 1 or given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise InputError(f"load_rows: ids of table {config.name!r} must be integers [n], not {given.dtype} {list(given.shape)}")
    given = given.to(torch.int64)
    if shape_of(values) != (given.numel(), config.embedding_dim):
        raise ConfigError(
            f"load_rows: values for {given.numel()} ids of table {config.name!r} must be "
            f"[{given.numel()}, {config.embedding_dim}], not {list(shape_of(values))}"
        )
    seen, times = given.unique(return_counts=True)
    if seen.numel() < given.numel():
        raise InputError(f"load_rows: id {int(seen[times.argmax()])} of table {config.name!r} is given {int(times.max())} times")
    if config.padding_idx is not None and bool((given == config.padding_idx).any()):
        raise InputError(
            f"load_rows: id {config.padding_idx} of table {config.name!r} is its padding_idx, which has no row and reads zeros; "
            "leave it out"
        )
    return given


def _checksum(ids: torch.Tensor) -> int:
    """Of ids in their order; sums wrap around."""
    return int((ids * torch.arange(1, 2 * ids.numel() + 1, 2, device=ids.device)).sum())
