"""Routes lead every id to its row: all ranks in one process, keys carried by hand, against a plain lookup.

Weights are whole numbers in float64, so sums are exact in any order and equality is equality.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import IdRangeError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.route import Route, RoutingTable, combine, empty_route, make_route
from shardembed.journey.route.ownership import IdGroup
from shardembed.journey.route.segments import SlabRoute
from shardembed.journey.route.side_by_side import Outputs
from shardembed.kernels import grouping, triton
from shardembed.kernels.pooling import BagsOf, spread
from shardembed.store.slab_spec import SlabSpec, build_slabs
from shardembed.tables.pooling import POOLINGS
from shardembed.tables.table_config import Feature, TableConfig, features_of
from tests.oracle import lookup
from tests.unit.drawn import Case, cases

CPU = torch.device("cpu")


def atlases(case: Case, specs: tuple[SlabSpec, ...]) -> list[RoutingTable]:
    packings, world = tuple(table.packing for table in case.plan.tables), case.plan.world_size
    return [RoutingTable.of(case.tables, packings, specs, rank, world, CPU) for rank in range(world)]


def whole_numbers(table: TableConfig, number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(-50, 50, (table.num_embeddings, table.embedding_dim)).astype(float)


def lay_out(specs: tuple[SlabSpec, ...], weights: list[np.ndarray], world_size: int) -> list[list[np.ndarray]]:
    """`slabs[rank][slab]`, filled shard by shard."""
    slabs = [[np.full((spec.rows[rank], spec.width), np.nan) for spec in specs] for rank in range(world_size)]
    for spec in specs:
        for lane in spec.lanes:
            for block in lane.blocks:
                part = weights[lane.table][np.ix_(block.shard.rows, block.shard.columns)]
                for rank in block.shard.ranks:
                    slabs[rank][spec.index][block.first_key : block.first_key + len(part)] = part
    return slabs


def answer(route: SlabRoute, spec: SlabSpec, slabs: list[list[np.ndarray]]) -> torch.Tensor:
    """What the owners say, segment by segment, and what every request must look like."""
    segments, keys_R = route.counts.tolist()
    assert sum(keys_R) == route.keys_E.numel()
    lengths = torch.ones(sum(segments), dtype=torch.int64) if route.lengths_S is None else route.lengths_S
    assert lengths.numel() == sum(segments)
    assert lengths.sum() == route.keys_E.numel()
    assert (lengths > 0).all()  # an empty segment is never sent
    sums = []
    asked = zip(route.keys_E.split(keys_R), lengths.split(segments), strict=True)
    for owner, (keys, lengths_S) in enumerate(asked):
        assert lengths_S.sum() == keys.numel()
        if keys.numel():
            assert keys.min() >= 0
            assert keys.max() < spec.rows[owner]
        for segment in keys.split(lengths_S.tolist()):
            sums.append(slabs[owner][spec.index][segment.numpy()].sum(0))
    return torch.from_numpy(np.array(sums).reshape(-1, spec.width))


def plain(value: Any, feature: Feature, weights: np.ndarray) -> torch.Tensor:
    table = torch.from_numpy(weights)
    given: Any = (*value, None, None)[:3] if isinstance(value, tuple) else (value, None, None)
    ids, offsets, scale = given
    if feature.pooling is None:
        return F.embedding(ids, table)
    if offsets is None:
        offsets = torch.arange(len(ids) + 1, dtype=ids.dtype) * (ids.shape[1] if ids.dim() == 2 else 1)
    return lookup(table, feature.pooling, ids.reshape(-1), offsets, scale)


@st.composite
def inputs(draw: st.DrawFn, feature: Feature, rows: int, bags: int | None = None) -> Any:
    """bags: of features that pool, where all are to have as many."""
    ids = draw(st.lists(st.integers(0, rows - 1), max_size=12))
    tensor = torch.tensor(ids, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    alike = bags is not None and feature.pooling is not None
    form = draw(st.sampled_from(["ragged", "weighted"] if alike else ["vector", "matrix", "ragged", "weighted"]))
    if form == "vector":
        return tensor
    if form == "matrix":
        return tensor[: len(ids) // 3 * 3].view(-1, 3)
    fewest, most = (bags - 1, bags - 1) if alike and bags is not None else (0, 4)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), min_size=fewest, max_size=most)))
    offsets = torch.tensor([0, *cuts, len(ids)], dtype=tensor.dtype)
    if form == "weighted" and POOLINGS[feature.pooling].takes_weights:
        return (
            tensor,
            offsets,
            torch.tensor(draw(st.lists(st.integers(-3, 3), min_size=len(ids), max_size=len(ids))), dtype=torch.float64),
        )
    return tensor, offsets


def check_whole(outputs: Outputs, features: tuple[Feature, ...], bags: int | None) -> None:
    """Pooled outputs of as many bags are parts of one tensor."""
    pooled = [output for feature, output in zip(features, outputs.each, strict=True) if feature.pooling is not None]
    if not pooled or (bags is None and len({len(output) for output in pooled}) > 1):
        assert outputs.whole is None
        return
    assert outputs.whole is not None
    assert torch.equal(outputs.whole, torch.cat(pooled, 1))
    assert all(part.untyped_storage().data_ptr() == outputs.whole.untyped_storage().data_ptr() for part in pooled)


@given(cases(), st.data())
def test_routes_answer_like_a_plain_lookup(case: Case, data: st.DataObject) -> None:
    case = replace(case, tables=tuple(replace(table, dtype=torch.float64) for table in case.tables))
    bags = data.draw(st.sampled_from([None, 1, 3]))
    specs = build_slabs(case.tables, case.plan, case.optimizers)
    features = features_of(case.tables)
    weights = [whole_numbers(table, number) for number, table in enumerate(case.tables)]
    slabs = lay_out(specs, weights, case.plan.world_size)
    for routing in atlases(case, specs):
        batch = {f.name: data.draw(inputs(f, case.tables[f.table].num_embeddings, bags)) for f in features}
        route = make_route(IdBatch.of(batch, features, CPU), features, routing)
        answers = [answer(slab, spec, slabs) for slab, spec in zip(route.slabs, specs, strict=True)]
        outputs = combine(answers, route)
        check_whole(outputs, features, bags)
        for feature, output in zip(features, outputs.each, strict=True):
            wanted = plain(batch[feature.name], feature, weights[feature.table])
            assert output.shape == wanted.shape
            torch.testing.assert_close(output, wanted, rtol=1e-15, atol=1e-12)  # a mean divides
        check_deduplication(case, route)
        for name, serves in (("plain torch", False), ("Triton", True)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(grouping, "missing", lambda: "numba is not installed")
                patch.setattr(triton, "serves", lambda device, serves=serves: serves)
                again = make_route(IdBatch.of(batch, features, CPU), features, routing)
            for one, other in zip(route.slabs, again.slabs, strict=True):
                assert same(one, other), f"compiled for the CPU and in {name}, routes are the same"
                check_way_back(other)


def same(one: Any, other: Any) -> bool:
    """Equal, tensors by their numbers; where they are whole, of any type."""
    if isinstance(one, torch.Tensor | np.ndarray):
        return isinstance(other, type(one)) and one.tolist() == other.tolist()
    if isinstance(one, IdGroup):
        return one is other
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one) if field.compare)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def check_way_back(route: SlabRoute) -> None:
    """Where a route knows the bags of each segment, gradients come back by them as by the segments of each bag."""
    count = int(route.counts[0].sum())
    for part in route.unique:
        if not part.how.padded:
            starts = part.starts_B if part.how.pooling is not None else torch.arange(part.segments_N.numel())
            check_spread(part.segments_N, starts, count, part.bags_of)
    if route.bag_segments is not None and route.bag_starts is not None:
        check_spread(route.bag_segments, route.bag_starts, count, route.bags_of)


def check_spread(segments_N: torch.Tensor, starts_B: torch.Tensor, count: int, bags_of: BagsOf | None) -> None:
    if bags_of is not None:
        grads_BW = torch.arange(2.0 * starts_B.numel()).view(-1, 2)
        assert torch.equal(
            spread(segments_N, starts_B, grads_BW, count, bags_of=bags_of), spread(segments_N, starts_B, grads_BW, count)
        )


def check_deduplication(case: Case, route: Route) -> None:
    """A table packed as "unique" asks for each distinct id once a strip, whatever its features repeat."""
    for i, table in enumerate(case.plan.tables):
        if len(case.tables) == 1 and table.packing == "unique":
            distinct = {int(x) for f, part in zip(route.features, route.ids.parts, strict=True) if f.table == i for x in part.ids}
            assert sum(slab.keys_E.numel() for slab in route.slabs) == len(distinct) * len(table.layout.strips)


@given(cases())
def test_an_empty_route_asks_nothing(case: Case) -> None:
    specs = build_slabs(case.tables, case.plan, case.optimizers)
    for routing in atlases(case, specs):
        for slab in empty_route(features_of(case.tables), routing).slabs:
            assert (slab.keys_E.numel(), slab.counts.tolist()) == (0, [[0] * routing.world_size] * 2)


@given(cases(), st.data())
def test_an_id_outside_its_table_is_named(case: Case, data: st.DataObject) -> None:
    specs = build_slabs(case.tables, case.plan, case.optimizers)
    features = features_of(case.tables)
    batch = {feature.name: torch.zeros(3, dtype=torch.int64) for feature in features}
    wrong = data.draw(st.sampled_from(features))
    table = case.tables[wrong.table]
    at, bad = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([-1, -(2**40), table.num_embeddings, 2**62]))
    batch[wrong.name][at] = bad
    with pytest.raises(IdRangeError) as caught:
        make_route(IdBatch.of(batch, features, CPU), features, atlases(case, specs)[0])
    text = str(caught.value)
    for part in (
        f"table {table.name!r}",
        f"feature {wrong.name!r}",
        f"id {bad} at position {at}",
        f"0 to {table.num_embeddings - 1}",
    ):
        assert part in text
