"""A step on a GPU asks for a number of operators that depends on slabs alone, and waits twice: counted on the CPU, on the path that
tensors on CUDA devices take (`benchmarks.launches`), against the bits of the compiled path of the CPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from benchmarks.launches import Launches, as_on_a_device, count
from benchmarks.own_work import Case, Rank
from shardembed.inputs.ids import IdBatch
from shardembed.tables.placement import Packing
from shardembed.tables.settings import Settings
from tests.amount import sampled

SAMPLES = 80  # so that rows of one table in a slab are more than one program sums by itself
LIMITS = {1: 60, 10: 120}
HOST_SYNCS = 2


@cache
def launches(tables: int, slabs: int, ranks: int, ids: int, packing: Packing) -> tuple[int, int]:
    samples = max(3, -(-SAMPLES * slabs // (tables * ids)))  # of less, messages may happen to need no padding, and no call
    counted: Launches = count(Case(tables, slabs, 1_000, samples, ids, packing), ranks)
    return counted.operators, counted.host_syncs


@pytest.mark.parametrize(("slabs", "ids", "packing"), sampled(product([1, 10], [1, 10], ["unique", "bag"])))
def test_launches_depend_on_slabs_alone(slabs: int, ids: int, packing: Packing) -> None:
    few = max(8, slabs)
    found = {(tables, ranks): launches(tables, slabs, ranks, ids, packing) for tables, ranks in [(few, 2), (few, 64), (200, 2)]}
    operators, host_syncs = zip(*found.values(), strict=True)
    assert len(set(operators)) == 1, f"operators by tables and ranks: {found}"
    assert max(operators) <= LIMITS[slabs]
    assert max(host_syncs) <= HOST_SYNCS


@pytest.mark.exhaustive
@pytest.mark.parametrize("packing", ["unique", "bag"])
@pytest.mark.parametrize("slabs", [1, 8])
def test_the_largest_case_launches_no_more(slabs: int, packing: Packing) -> None:
    assert launches(200, slabs, 64, 10, packing) <= (LIMITS[10 if slabs > 1 else 1], HOST_SYNCS)


SMALL = Case(tables=4, slabs=2, rows=60, samples=70, ids=1, packing="unique")


@pytest.mark.parametrize("packing", ["unique", "bag"])
@pytest.mark.parametrize("ids", [1, 3])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_device_gives_the_bits_of_the_cpu(ranks: int, ids: int, packing: Packing) -> None:
    case = replace(SMALL, ids=ids, packing=packing)
    here, there = (Rank(case, ranks, Settings(kernel="triton")) for _ in range(2))
    for number in range(2):
        outputs = forward(here, number)
        with as_on_a_device():
            assert all(torch.equal(one, other) for one, other in zip(outputs, forward(there, number), strict=True))
            there.step(number)
        here.step(number)
    for one, other in zip(here.journey.slabs, there.journey.slabs, strict=True):
        assert torch.equal(one.weights, other.weights)
        assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


def forward(rank: Rank, number: int) -> list[torch.Tensor]:
    with torch.no_grad():
        return rank.journey.forward(lambda: IdBatch.of(rank.batches[number], rank.features), rank.features).each
