"""The layouts, and cases that cross them with packings and poolings.

Legend: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

import shardembed as se
from shardembed import optim
from shardembed.tables.layout import Layout
from shardembed.tables.placement import PACKINGS, Cluster, Packing, Placement
from shardembed.tables.pooling import POOLINGS as POOLING_KINDS
from tests.oracle import Batch, Case, make_bags

ROWS = 23
BATCH_SIZES = (3, 0, 5, 2)  # by rank, turning from step to step: every rank is empty once
UNWEIGHTED = {str(kind.name).lower(): kind for kind in POOLING_KINDS.values()}
WEIGHTED = {f"weighted_{name}": kind for name, kind in UNWEIGHTED.items() if kind.takes_weights}
POOLINGS: dict[str, tuple[str | None, bool]] = {
    **{name: (kind.name, False) for name, kind in UNWEIGHTED.items()},
    **{name: (kind.name, True) for name, kind in WEIGHTED.items()},
}
# A linear function of the rows, which does not turn on the last bit of one as a maximum does.
LINEAR = tuple(name for name, kind in {**UNWEIGHTED, **WEIGHTED}.items() if kind.partial_sums or kind.over_ids is None)


def layouts(world_size: int) -> dict[str, tuple[int, Placement]]:
    """Every way to cut a table over these ranks, with the columns it is tried on."""
    last = world_size - 1
    ranks = list(range(world_size))
    bounds = [0, 2, 2, 11][1:world_size] if world_size > 2 else [2][:last]  # one block may be empty
    return {
        "table_wise": (4, se.table_wise(last)),
        "row_even": (4, se.row_wise(strided=False)),
        "row_uneven": (4, se.row_wise(bounds=bounds)),
        "row_dealt": (4, se.row_wise()),
        "row_twice": (4, se.row_wise([last, 0, last], strided=False)),
        "column_even": (2 * world_size, se.column_wise()),
        "column_uneven": (7, se.column_wise([rank % world_size for rank in (0, 1, 2)])),
        "column_twice": (8, se.column_wise([last, 0, last, last])),
        "table_row_wise": (4, se.table_row_wise(last // 2, strided=False)),
        "table_row_wise_dealt": (4, se.table_row_wise(last // 2)),
        "grid": (5, se.grid(2, ranks=ranks + ranks[::-1], strided=False)),
        "grid_dealt": (6, se.grid(2, ranks=ranks[1:] + ranks[:1] + ranks)),
        "replicated": (4, se.replicated()),
    }


# What makes a layout what it is called, asked of the shards themselves. One rank alone has less to cut.
IS: dict[str, Callable[[Layout, int], bool]] = {
    "table_wise": lambda cut, W: len(cut.shards) == 1 and cut.ranks == {W - 1},
    "row_even": lambda cut, W: len(cut.shards) == W and max(_sizes(cut)) - min(_sizes(cut)) <= 1 and not cut.copied,
    "row_uneven": lambda cut, W: len(cut.strips) == 1 and (W == 1 or max(_sizes(cut)) - min(_sizes(cut)) > 1),
    "row_dealt": lambda cut, W: len(cut.strips) == 1 and cut.strips[0].stride == W,
    "row_twice": lambda cut, W: len(cut.strips) == 1 and [s.ranks for s in cut.shards].count((W - 1,)) >= 2,
    "column_even": lambda cut, W: len(cut.strips) == len(cut.shards) == W and len(_widths(cut)) == 1,
    "column_uneven": lambda cut, W: sorted(len(s.columns) for s in cut.shards) == [2, 2, 3],
    "column_twice": lambda cut, W: len(cut.strips) == 4 and [s.ranks for s in cut.shards].count((W - 1,)) >= 3,
    "table_row_wise": lambda cut, W: len(cut.strips) == 1 and cut.ranks == set(range((W - 1) // 2 * 2, W)),
    "table_row_wise_dealt": lambda cut, W: cut.ranks == set(range((W - 1) // 2 * 2, W)) and cut.strips[0].stride in (1, 2),
    "grid": lambda cut, W: len(cut.strips) == 2 and len(cut.shards) == 2 * W and cut.strips[0].stride == 1,
    "grid_dealt": lambda cut, W: len(cut.strips) == 2 and len(cut.shards) == 2 * W and cut.strips[0].stride == W,
    "replicated": lambda cut, W: all(len(s.ranks) == W for s in cut.shards) and len(cut.shards) == 1,
}


def _sizes(cut: Layout) -> list[int]:
    return [len(shard.rows) for shard in cut.shards]


def _widths(cut: Layout) -> set[int]:
    return {len(shard.columns) for shard in cut.shards}


def _every(layout: str) -> bool:
    return True


def cross(
    world_size: int,
    optimizer: optim.TableOptimizer,
    dtype: torch.dtype,
    *,
    steps: int = 5,
    micro: int = 1,
    seed: int = 0,
    poolings: tuple[str, ...] = tuple(POOLINGS),
    packings: tuple[Packing, ...] = PACKINGS,
    positive: bool | None = None,
    chosen: Callable[[str], bool] = _every,
) -> Case:
    """One collection with a table for every layout and packing, and a feature of each for every pooling.

    positive: contributions above zero and a linear loss, as narrow dtypes need; default: for all but float64.
    """
    positive = dtype != torch.float64 if positive is None else positive
    tables, plan = _tables(world_size, dtype, poolings, packings, chosen)
    batches = _batches(world_size, tables, steps, micro, seed, poolings, positive)
    return Case(tables, {table.name: optimizer for table in tables}, plan, batches, curved=not positive, seed=seed)


def _tables(
    world_size: int, dtype: torch.dtype, poolings: tuple[str, ...], packings: tuple[Packing, ...], chosen: Callable[[str], bool]
) -> tuple[tuple[se.TableConfig, ...], dict[str, Placement]]:
    tables, plan = [], {}
    for layout, (columns, placement) in layouts(world_size).items():
        for packing in packings if chosen(layout) else ():
            name = f"{layout}-{packing}"
            features = {f"{name}-{pooling}": POOLINGS[pooling][0] for pooling in poolings}
            # Normal, and not the default of a collection: spread starting values make wrong rows visible.
            tables.append(se.TableConfig(name, ROWS, columns, list(features), features, dtype, se.Normal(0.25, 1.0)))
            plan[name] = replace(placement, packing=packing)
    return tuple(tables), plan


_drawn: dict[tuple[object, ...], list[list[list[Batch]]]] = {}  # the last ones: all would be much for the garbage collector to walk


def _batches(
    world_size: int,
    tables: tuple[se.TableConfig, ...],
    steps: int,
    micro: int,
    seed: int,
    poolings: tuple[str, ...],
    positive: bool,
) -> list[list[list[Batch]]]:
    """Drawn once for cases that follow each other and differ in their optimizer or dtype alone: nobody writes to batches."""
    widths = tuple((table.name, table.embedding_dim) for table in tables)
    key = (world_size, widths, steps, micro, seed, poolings, positive)
    if key in _drawn:
        return _drawn[key]
    draw = torch.Generator().manual_seed(seed)

    def batch(rank: int, step: int) -> Batch:
        size = BATCH_SIZES[(rank + step) % len(BATCH_SIZES)]
        found: Batch = {}
        for name, columns in widths:
            for pooling in poolings:
                kind, weighted = POOLINGS[pooling]
                bags = make_bags(draw, ROWS, columns, kind, size, 4, weighted=weighted, positive=positive)
                found[f"{name}-{pooling}"] = bags
        return found

    batches = [[[batch(rank, step * micro + part) for rank in range(world_size)] for part in range(micro)] for step in range(steps)]
    _drawn.clear()
    _drawn[key] = batches
    return batches


def covered(case: Case) -> set[tuple[str, str, str]]:
    """(layout, packing, pooling) of all that a case looks up, read off the shards its plan makes and the batches it has."""
    found = set()
    cluster = Cluster(case.world_size, min(case.ranks_per_node, case.world_size))
    assert isinstance(case.plan, dict)
    for table in case.tables:
        placement = case.plan[table.name]
        cut = placement.layout(table.num_embeddings, table.embedding_dim, cluster)
        layout = table.name.split("-")[0]
        assert IS[layout](cut, case.world_size), f"{cut} is no {layout}"
        for feature in table.feature_names or ():
            bags = [batch[feature] for step in case.batches for micro in step for batch in micro]
            weighted = any(part.weights is not None for part in bags)
            pooling = ("weighted_" if weighted else "") + str(table.pooling_of(feature)).lower()
            if sum(len(part.ids) for part in bags):
                found.add((layout, placement.packing, pooling))
    return found
