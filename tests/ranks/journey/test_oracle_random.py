"""Drawn collections against whole tables: several tables at once, mixed layouts, dtypes, poolings, optimizers and uneven batches.

Hypothesis draws the structure, which is what shrinks well; the numbers come from a drawn seed. A layout is drawn as data: any
tiling of the table by strips and row blocks over any ranks, and not only what `row_wise()` and its siblings build.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import shardembed as se
from shardembed import optim
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.pooling import POOLINGS
from tests.amount import examples
from tests.oracle import EXAMPLES, Batch, Case, make_bags
from tests.ranks import cases as crossed
from tests.ranks.sharded import check

DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.float16)
LINEAR = list(dict.fromkeys(crossed.POOLINGS[name][0] for name in crossed.LINEAR))
HALF = (torch.bfloat16, torch.float16)
# Settings that are drawn; the others are those of the examples.
DRAWN: dict[type[optim.TableOptimizer], dict[str, st.SearchStrategy[Any]]] = {
    optim.SGD: {"lr": st.sampled_from([0.0, 0.1, 1.0])},
    optim.Adam: {"betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5)])},
    optim.AdamW: {"betas": st.just((0.9, 0.999)), "weight_decay": st.sampled_from([0.0, 0.5])},
    optim.FTRL: {"beta": st.sampled_from([0.5, 1.0]), "l1": st.sampled_from([0.0, 0.1])},
}
OPTIMIZERS = st.one_of(*(st.builds(partial(replace, one), **DRAWN.get(type(one), {})) for one in EXAMPLES.values()))


def cuts(draw: st.DrawFn, size: int, most: int) -> list[range]:
    """A random tiling of `size` by at most `most` contiguous parts."""
    inner = draw(st.sets(st.integers(1, size - 1), max_size=most - 1)) if size > 1 else set()
    edges = [0, *sorted(inner), size]
    return [range(start, stop) for start, stop in pairwise(edges)]


def row_cut(draw: st.DrawFn, rows: int) -> list[range]:
    if draw(st.booleans()):
        stride = draw(st.integers(2, 5))
        return [range(residue, rows, stride) for residue in range(min(stride, rows))]
    return cuts(draw, rows, 4)


@st.composite
def layouts(draw: st.DrawFn, rows: int, columns: int, world_size: int, alike: bool, copies: bool = True) -> Layout:
    """Any layout; `alike`: strips cut by rows in the same way, as rowwise optimizers need."""
    if copies and draw(st.integers(0, 5)) == 0:
        return Layout(rows, columns, (Shard(range(rows), range(columns), tuple(range(world_size))),))
    owner = st.integers(0, world_size - 1)
    shards: list[Shard] = []
    first = row_cut(draw, rows)
    for strip in cuts(draw, columns, 3):
        blocks = first if alike else row_cut(draw, rows)
        shards += [Shard(block, strip, (draw(owner),)) for block in blocks]
    return Layout(rows, columns, tuple(shards))


@st.composite
def cases(draw: st.DrawFn, world_size: int) -> Case:
    optimizers: dict[str, optim.TableOptimizer] = {}
    tables: list[se.TableConfig] = []
    plans: list[se.TablePlan] = []
    steps = draw(st.integers(1, 3))
    for number in range(draw(st.integers(1, 4))):
        name = f"t{number}"
        rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 9))
        dtype = draw(st.sampled_from(DTYPES))
        optimizers[name] = draw(OPTIMIZERS)
        # A half table's later maxima may turn on the last bit of a rounded weight.
        poolings = LINEAR if dtype in HALF and steps > 1 else list(POOLINGS)
        features = {f"{name}f{i}": draw(st.sampled_from(poolings)) for i in range(draw(st.integers(1, 2)))}
        tables.append(se.TableConfig(name, rows, columns, list(features), features, dtype, se.Normal(0.25, 1.0)))
        layout = draw(layouts(rows, columns, world_size, optimizers[name].rowwise))
        plans.append(se.TablePlan(name, layout, draw(st.sampled_from(["unique", "bag"]))))
    # Numbers that narrow tables can be held to (see `sharded`): one of them makes all contributions positive.
    positive = any(table.dtype != torch.float64 for table in tables)
    micro = draw(st.integers(1, 2))
    batches = [[[draw(batch(tables, positive)) for _ in range(world_size)] for _ in range(micro)] for _ in range(steps)]
    return Case(
        tuple(tables),
        optimizers,
        se.Plan(tuple(plans), world_size),
        batches,
        curved=not positive,
        reduction=draw(st.sampled_from(["mean", "sum"])),
        update=draw(st.sampled_from(["step", "step", "step", "backward"])),
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def batch(draw: st.DrawFn, tables: list[se.TableConfig], positive: bool) -> Batch:
    """One rank's batch: perhaps empty, perhaps of empty bags, perhaps all of one id."""
    size, longest = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    skew = draw(st.sampled_from([1.0, 3.0, 50.0]))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return {
        feature: make_bags(
            numbers,
            table.num_embeddings,
            table.embedding_dim,
            pooling := table.pooling_of(feature),
            size,
            longest,
            # By feature, so that the ranks agree.
            weighted=POOLINGS[pooling].takes_weights and table.num_embeddings % 2 == 0,
            positive=positive,
            skew=skew,
        )
        for table in tables
        for feature in table.feature_names or ()
    }


@examples(30, HealthCheck.data_too_large)
@given(cases(1))
def test_one_rank(case: Case) -> None:
    check(case)


@examples(50, HealthCheck.data_too_large)
@given(cases(2))
def test_two_ranks(case: Case) -> None:
    check(case)


@examples(25, HealthCheck.data_too_large)
@given(cases(3))
def test_three_ranks(case: Case) -> None:
    check(case)


@examples(12, HealthCheck.data_too_large)
@given(cases(4))
def test_four_ranks(case: Case) -> None:
    check(case)


@examples(12, HealthCheck.data_too_large)
@given(cases(3))
def test_the_reference_kernel(case: Case) -> None:
    """What "auto" leaves to the compiled kernels elsewhere."""
    check(replace(case, kernel="reference"))
