"""The same numbers: every layout, packing, pooling, optimizer, world size and kernel against whole tables in one process.

One collection has a table for every layout and packing, with a feature for every pooling, so a case covers all of their
combinations; `test_every_combination_is_covered` reads that off the cases themselves.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from shardembed import optim
from shardembed.kernels import cpu
from shardembed.tables.placement import PACKINGS
from tests.amount import exhaustive, sample_of, sampled
from tests.oracle import EXAMPLES, Case
from tests.ranks.cases import LINEAR, POOLINGS, covered, cross, layouts
from tests.ranks.sharded import check

WORLD_SIZES = (1, 2, 3, 4)
PAIRS = list(product(WORLD_SIZES, EXAMPLES))
# What trains them by itself, in float64.
CHOSEN = {name: "numba" if type(one) in cpu.FORMULAS else "reference" for name, one in EXAMPLES.items()}
KERNELS = {"reference": tuple(EXAMPLES), "numba": ("RowwiseAdagrad", "Adam", "FTRL")}
FLOAT32 = [(world, name, kernel) for kernel, names in KERNELS.items() for world, name in product(WORLD_SIZES, names)]


def float64_case(world_size: int, name: str) -> Case:
    return cross(world_size, EXAMPLES[name], torch.float64, seed=world_size)


def float32_case(world_size: int, name: str, kernel: str) -> Case:
    """ "sum" here and "mean" above, so that both reductions meet everything; and two micro-batches a step, added up."""
    case = cross(
        world_size,
        EXAMPLES[name],
        torch.float32,
        steps=3,
        micro=2,
        seed=10 + world_size,
    )
    return replace(case, reduction="sum", kernel=kernel)


@pytest.mark.parametrize(("world_size", "name"), sampled(PAIRS))
def test_float64_agrees_to_ten_digits(world_size: int, name: str) -> None:
    runs = check(float64_case(world_size, name))
    assert {kernel for run in runs for kernel, _ in run.kernels} == {CHOSEN[name]}


@pytest.mark.parametrize(("world_size", "name", "kernel"), sampled(FLOAT32))
def test_float32_agrees_within_rounding(world_size: int, name: str, kernel: str) -> None:
    runs = check(float32_case(world_size, name, kernel))
    assert {kernel for run in runs for kernel, _ in run.kernels} == {kernel}


@pytest.mark.parametrize(("world_size", "kernel"), sample_of(product(WORLD_SIZES, KERNELS), (2, "reference"), (3, "numba")))
def test_float32_with_signs_agrees_within_the_sum_of_magnitudes(world_size: int, kernel: str) -> None:
    """Gradients that cancel: SGD is linear in them, so an update's error is the gradient's."""
    case = cross(world_size, optim.SGD(lr=0.5), torch.float32, steps=1, positive=False, seed=20)
    check(replace(case, kernel=kernel, curved=False))


@pytest.mark.parametrize(
    ("world_size", "dtype"),
    sample_of(product(WORLD_SIZES, [torch.bfloat16, torch.float16]), (2, torch.bfloat16), (3, torch.float16)),
    ids=str,
)
def test_half_tables_agree_within_their_rounding(world_size: int, dtype: torch.dtype) -> None:
    """One step with every pooling, then five without max: it may choose another row by the last bit of a rounded weight."""
    check(cross(world_size, EXAMPLES["Adagrad"], dtype, steps=1, seed=30))
    for name in ("RowwiseAdagrad", "AdamW"):
        check(cross(world_size, EXAMPLES[name], dtype, seed=31, poolings=LINEAR))


@pytest.mark.parametrize("world_size", [exhaustive(1), exhaustive(2), 3, exhaustive(4)])
def test_the_sum_of_the_ranks_gradients_when_asked(world_size: int) -> None:
    check(replace(cross(world_size, EXAMPLES["Adagrad"], torch.float64, steps=2, micro=2, seed=40), reduction="sum"))


@pytest.mark.parametrize("world_size", [exhaustive(1), 2, exhaustive(3), exhaustive(4)])
def test_updates_in_the_backward_are_the_same(world_size: int) -> None:
    """Every backward is a step of its own then, also the second micro-batch."""
    case = cross(world_size, EXAMPLES["RowwiseAdagrad"], torch.float64, steps=2, micro=2, seed=50)
    check(replace(case, update="backward"))


def test_every_combination_is_covered() -> None:
    found = {(w, n, "float64", CHOSEN[n], *what) for w, n in PAIRS for what in covered(float64_case(w, n))}
    found |= {(w, n, "float32", k, *what) for w, n, k in FLOAT32 for what in covered(float32_case(w, n, k))}
    kinds = list(product(layouts(2), PACKINGS, POOLINGS))
    wanted = {(w, n, "float64", CHOSEN[n], *kind) for w, n in PAIRS for kind in kinds}
    wanted |= {(w, n, "float32", k, *kind) for w, n, k in FLOAT32 for kind in kinds}
    assert found == wanted
    assert len(found) == len(PAIRS + FLOAT32) * len(kinds)
