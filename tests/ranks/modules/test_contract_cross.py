"""Every kind of cut with every argument of the drop-ins and every optimizer in turn, on one to four ranks.

`test_contract` draws such modules at random; here none is left to chance.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.tables.placement import PACKINGS, Cluster
from tests.amount import exhaustive
from tests.oracle import EXAMPLES
from tests.ranks.cases import BATCH_SIZES, ROWS, layouts
from tests.ranks.contract import NAME, TORCH_OPTIMIZERS, Drawn, Given, Table, compare, give

WORLD_SIZES = (1, 2, 3, 4)
EACH = 2  # combinations for each layout and packing
OF_ALL_RANKS = ("max_norm", "norm_type", "scale_grad_by_freq")  # not for copies
PADDING: list[dict[str, Any]] = [{}, {"padding_idx": 0}, {"padding_idx": -3}]
POLICIES: list[dict[str, Any]] = [
    {},
    {"max_norm": 1.5},
    {"scale_grad_by_freq": True},
    {"max_norm": 0.8, "norm_type": 3.5},
    {"max_norm": 0.5, "norm_type": float("inf"), "scale_grad_by_freq": True},
    {"max_norm": 2, "norm_type": 1},
]
MODES: list[dict[str, Any]] = [{"mode": "sum"}, {"mode": "mean", "include_last_offset": True}, {"mode": "max"}, {"mode": "sum"}]


def tables(columns: int) -> list[Table]:
    """Every combination that a module takes; the last of the modes comes with weights."""
    bags = [
        Table("EmbeddingBag", ROWS, columns, {**mode, **padding, **policy}, weighted=number == 3)
        for (number, mode), padding, policy in product(enumerate(MODES), PADDING, POLICIES)
        if not (mode["mode"] == "max" and "scale_grad_by_freq" in policy)
    ]
    return bags + [Table("Embedding", ROWS, columns, {**padding, **policy}) for padding, policy in product(PADDING, POLICIES)]


def batches(table: Table, world_size: int, numbers: torch.Generator) -> list[list[list[Given]]]:
    """A step of two micro-batches and one of a single one; some rank is empty in each."""

    def one(rank: int, step: int) -> Given:
        size = BATCH_SIZES[(rank + step) % len(BATCH_SIZES)]
        shape = (size, 2) if table.kind == "Embedding" else (size, 3) if step % 2 else None
        return give(numbers, table, shape, size, 4)

    return [[[one(rank, 2 * step + micro) for rank in range(world_size)] for micro in range(2 - step)] for step in range(2)]


def modules(world_size: int) -> list[Drawn]:
    """Every layout with both packings, and with some of the combinations each; where one world size stops, the next goes on."""
    found: list[Drawn] = []
    numbers = torch.Generator().manual_seed(world_size)
    optimizers = cycle([*EXAMPLES.values(), *TORCH_OPTIMIZERS])
    cuts = layouts(world_size).items()
    order = torch.randperm(len(tables(1)), generator=torch.Generator().manual_seed(0)).tolist()
    for packing, (number, (name, (columns, placement))) in product(PACKINGS, enumerate(cuts)):
        first = (world_size * (len(cuts) - 1) + number) * EACH  # the last layout, copies, does not count
        for place in range(first, first + EACH):
            table = tables(columns)[order[place % len(order)]]
            if name == "replicated" and world_size > 1:
                table = replace(table, settings={key: table.settings[key] for key in table.settings if key not in OF_ALL_RANKS})
            optimizer = next(optimizers)
            if isinstance(optimizer, str):
                table = replace(table, settings={**table.settings, "sparse": optimizer == "SparseAdam"})
            layout = placement.layout(ROWS, columns, Cluster(world_size, min(2, world_size)))
            start = torch.randn(ROWS, columns, generator=numbers, dtype=torch.float64) if len(found) % 2 else None
            plan = se.TablePlan(NAME, layout, packing)
            found.append(Drawn(table, False, start, optimizer, plan, batches(table, world_size, numbers)))
    return found


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3, exhaustive(4)])
def test_every_cut_meets_every_argument(world_size: int) -> None:
    compare(modules(world_size))


def test_every_combination_of_arguments_is_tried_with_both_packings() -> None:
    drawn = [one for world_size in WORLD_SIZES for one in modules(world_size)]
    for packing in PACKINGS:
        tried = {told(one.table) for one in drawn if one.layout.packing == packing}
        assert tried >= {told(table) for table in tables(1)}


def told(table: Table) -> tuple[str, bool, str]:
    return table.kind, table.weighted, str(sorted((key, value) for key, value in table.settings.items() if key != "sparse"))
