"""Outputs with the very bits of torch's, what a narrow wire does to them, and every accepted form of input.

Legend: B bags, D columns.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import shardembed as se
from shardembed import optim
from shardembed.tables.placement import Packing, Placement
from shardembed.tables.pooling import POOLINGS as KINDS
from shardembed.wire import narrow
from tests.amount import exhaustive, sample_of, sampled
from tests.harness import run_ranks
from tests.held import Piece, pieces, whole
from tests.oracle import Batch, Case, lookup, make_bags
from tests.ranks.cases import LINEAR, POOLINGS, ROWS, UNWEIGHTED, cross, layouts
from tests.ranks.sharded import build, check

WORLD_SIZES = (1, 2, 3, 4)
WIRES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HUGE = 1e6  # beyond float16, whose largest number is 65504


Seen = tuple[list[Piece], list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def look(rank: int, world_size: int, case: Case) -> Seen:
    """Weights held, outputs batch by batch, and all rows of every table."""
    emb = build(rank, world_size, case)
    outputs = [
        {name: output.detach() for name, output in emb({name: bags.given for name, bags in ranks[rank].items()}).items()}
        for step in case.batches
        for ranks in step
    ]
    rows = {table.name: emb.rows(table.name, torch.arange(table.num_embeddings)) for table in case.tables}
    return pieces(emb), outputs, rows


@pytest.mark.parametrize(
    ("world_size", "dtype", "wire"),
    sampled(case for case in product(WORLD_SIZES, DTYPES, (None, "float32")) if case[1:] != ("float64", "float32")),
)
def test_unique_packing_has_the_bits_of_torch(world_size: int, dtype: str, wire: str | None) -> None:
    """Sum, mean, max, weighted and unpooled, over every layout, as F.embedding_bag over the same weights answers.

    Half tables are pooled in float32 and rounded once, where torch rounds a mean twice (and a bfloat16 sum on its way): theirs are
    the bits of torch's answer over the same rows in float32, rounded. Rows and max have the very bits of torch's.
    """
    case = cross(world_size, optim.SGD(), DTYPES[dtype], steps=2, positive=False, seed=100, packings=("unique",))
    seen: list[Seen] = run_ranks(world_size, look, replace(case, wire_dtype=DTYPES[wire] if wire else None))
    tables = whole(held for held, _, _ in seen)
    for rank, (_, outputs, rows) in enumerate(seen):
        for name, table in tables.items():
            assert torch.equal(rows[name], table)
        for found, step in zip(outputs, case.batches, strict=True):
            for feature in case.features:
                bags = step[0][rank][feature.name]
                table = tables[case.tables[feature.table].name]
                wide = table.to(torch.float32) if dtype.endswith("16") and KINDS[feature.pooling].partial_sums else table
                wanted = lookup(wide, feature.pooling, bags.ids, bags.offsets, bags.weights).to(table.dtype)
                assert found[feature.name].dtype == wanted.dtype
                assert torch.equal(found[feature.name], wanted), f"{feature.name} on rank {rank}"


@pytest.mark.parametrize(
    ("world_size", "wire"),
    sample_of(product(WORLD_SIZES, [torch.bfloat16, torch.float16]), (2, torch.bfloat16), (3, torch.float16)),
    ids=str,
)
def test_a_narrow_wire_rounds_rows_and_nothing_else(world_size: int, wire: torch.dtype) -> None:
    """Rows are rounded once, also those that stay at home, so that the plan does not change the numbers; pooling is in float32."""
    case = cross(world_size, optim.SGD(), torch.float32, steps=2, positive=False, seed=101, packings=("unique",))
    case = replace(case, wire_dtype=wire)
    seen: list[Seen] = run_ranks(world_size, look, case)
    tables = whole(held for held, _, _ in seen)
    for rank, (_, outputs, _) in enumerate(seen):
        for found, step in zip(outputs, case.batches, strict=True):
            for feature in case.features:
                bags = step[0][rank][feature.name]
                table = tables[case.tables[feature.table].name].to(wire).to(torch.float32)
                wanted = lookup(table, feature.pooling, bags.ids, bags.offsets, bags.weights)
                assert torch.equal(found[feature.name], wanted), f"{feature.name} on rank {rank}"


@pytest.mark.parametrize(
    ("world_size", "wire"),
    sample_of(product(WORLD_SIZES, WIRES), *zip((2, 3, 4), WIRES, strict=True)),
    ids=str,
)
def test_gradients_over_a_narrow_wire_are_rounded_once(world_size: int, wire: torch.dtype) -> None:
    """Both packings, float32 and float64 tables: within one rounding of each contribution (see `sharded`)."""
    for dtype in (torch.float32, torch.float64):
        # Without max, whose choice may turn on a rounded value.
        case = cross(world_size, optim.SGD(lr=0.25), dtype, steps=1, positive=True, seed=102, poolings=LINEAR)
        check(replace(case, wire_dtype=wire))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_travel_in_8_bits_when_asked(world_size: int) -> None:
    """Rows and gradients are what `narrow` makes of them, also those that stay at home."""
    for output, grads in run_ranks(world_size, in_8_bits):
        rows = ROWS_IN_8_BITS
        assert torch.equal(output, narrow.decode(narrow.encode(rows), torch.float32))
        # Each rank sends the gradient of each row, rounded by itself.
        sums = sum(narrow.decode(narrow.encode(rows.flip(0) * (rank + 1)), torch.float64) for rank in range(world_size))
        torch.testing.assert_close(grads, sums)


ROWS_IN_8_BITS = torch.linspace(-3.0, 5.0, 56).view(8, 7)


def in_8_bits(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tables = [se.TableConfig("t", 8, 7, pooling=None)]
    emb = se.EmbeddingCollection(
        tables, optimizer=se.optim.SGD(lr=1.0), plan=se.row_wise(), wire_dtype=torch.int8, gradient_reduction="sum"
    )
    emb.load_rows("t", ROWS_IN_8_BITS)
    output = emb({"t": torch.arange(8)})["t"]
    (output * ROWS_IN_8_BITS.flip(0) * (rank + 1)).sum().backward()
    found = [slab.merged() for slab in emb.journey.slabs]
    (block,) = emb.journey.specs[0].lanes[0].blocks[rank : rank + 1]
    mine = torch.zeros(8, 7, dtype=torch.float64)
    mine[torch.tensor(block.shard.rows)[found[0][0]]] = found[0][1].double()
    total = emb.journey.comm.all_reduce("test", mine)
    return output.detach(), total


def overflow(rank: int, world_size: int, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    tables = [se.TableConfig("t", 8, 2, init=se.Constant(1.0))]
    plan = {"t": se.row_wise(packing=packing)}
    emb = se.EmbeddingCollection(
        tables, optimizer=se.optim.SGD(lr=1.0), plan=plan, wire_dtype=torch.float16, gradient_reduction="sum"
    )
    source = torch.ones(8, 2)
    source[3, 0], source[5, 1] = HUGE, -HUGE
    emb.load_rows("t", source)
    output = emb({"t": torch.arange(8)})["t"]
    slopes = torch.ones(8, 2)
    slopes[0, 1] = HUGE if rank == 0 else 1.0
    (output.nan_to_num(posinf=0.0, neginf=0.0) * slopes).sum().backward()
    se.Optimizer(emb).step()
    weights = emb.rows("t", torch.arange(8))
    return output.detach(), weights


@pytest.mark.parametrize("packing", ["unique", "bag"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_overflow_on_the_wire_arrives_as_inf(world_size: int, packing: Packing) -> None:
    """Documented at `wire_dtype`: what a narrower dtype cannot hold arrives as inf, forward and backward; nothing else changes."""
    for output, weights in run_ranks(world_size, overflow, packing):
        wanted = torch.ones(8, 2)
        wanted[3, 0], wanted[5, 1] = torch.inf, -torch.inf
        assert torch.equal(output, wanted)
        after = torch.full((8, 2), 1.0 - world_size)
        after[0, 1] = -torch.inf  # the gradient of one rank was inf, so the sum is
        # What was huge got no gradient through nan_to_num, and is still huge: rows() travels in the wire dtype too.
        after[3, 0], after[5, 1] = torch.inf, -torch.inf
        assert torch.equal(weights, after)


class _Forms:
    """The same ragged ids in every accepted form."""

    def __init__(self, batch: Batch, names: list[str]) -> None:
        self.batch, self.names = batch, names

    def pairs(self) -> dict[str, Any]:
        return {name: self.batch[name].given for name in self.names}

    def int32(self) -> dict[str, Any]:
        return {name: (self.batch[name].ids.int(), self.batch[name].offsets.int()) for name in reversed(self.names)}

    def nested(self) -> dict[str, Any]:
        return {name: torch.nested.nested_tensor_from_jagged(self.batch[name].ids, self.batch[name].offsets) for name in self.names}

    def nested_from_list(self) -> dict[str, Any]:
        if len(self.batch[self.names[0]].offsets) == 1:
            return self.nested()  # torch makes none from an empty list
        split = {name: list(self.batch[name].ids.split(self.batch[name].offsets.diff().tolist())) for name in self.names}
        return {name: torch.nested.nested_tensor(parts, layout=torch.jagged) for name, parts in split.items()}

    def keyed(self) -> Any:
        from torchrec import KeyedJaggedTensor

        ids = torch.cat([self.batch[name].ids for name in self.names])
        lengths = torch.cat([self.batch[name].offsets.diff() for name in self.names])
        return KeyedJaggedTensor(keys=self.names, values=ids, lengths=lengths)


def every_form(rank: int, world_size: int, case: Case, pooling: str | None) -> list[str]:
    """What differed."""
    emb = build(rank, world_size, case)
    names = [feature.name for feature in case.features]
    forms = _Forms(case.batches[0][0][rank], names)
    wanted = emb(forms.pairs())
    wrong = []

    def same(form: str, name: str, found: torch.Tensor) -> None:
        if found.shape != wanted[name].shape or not torch.equal(found, wanted[name]):
            wrong.append(f"rank {rank}: {name} as {form}")

    for form in ("int32", "nested", "nested_from_list"):
        for name, found in emb(getattr(forms, form)()).items():
            if form.startswith("nested") and pooling is None:
                same(f"{form}, offsets", name, wanted[name] if torch.equal(found.offsets(), forms.batch[name].offsets) else found)
                found = found.values()
            same(form, name, found)
    for name, found in emb(se.IdBatch.of(forms.keyed(), emb.features)).items():
        same("IdBatch", name, found)
    keyed = emb(forms.keyed())
    kind = "KeyedTensor" if pooling else "dict"
    if type(keyed).__name__ != kind:
        wrong.append(f"a KeyedJaggedTensor gave {type(keyed).__name__}, not {kind}")
    for name in names:
        same("keyed", name, keyed[name] if pooling else keyed[name].values())
        if not pooling and not torch.equal(keyed[name].offsets().long(), forms.batch[name].offsets):
            wrong.append(f"offsets of {name}")
    return wrong


def dense_forms(rank: int, world_size: int, case: Case) -> list[str]:
    """`[B, L]` ids against the same bags as (ids, offsets); and any shape where nothing is pooled."""
    emb = build(rank, world_size, case)
    size, length = (rank, 3) if rank else (2, 3)
    ids = torch.arange(size * length).view(size, length) * 5 % ROWS
    offsets = torch.arange(size + 1) * length
    names = [feature.name for feature in case.features]
    wanted = emb({name: (ids.view(-1), offsets) for name in names})
    found = emb(se.IdBatch.of(dict.fromkeys(names, ids), emb.features))
    flat = emb(dict.fromkeys(names, ids.view(-1)))
    singles = emb({name: (ids.view(-1), torch.arange(ids.numel() + 1)) for name in names})
    wrong = []
    for feature in case.features:
        name = feature.name
        columns = case.tables[feature.table].embedding_dim
        shape = (size, length, columns) if feature.pooling is None else (size, columns)
        if not torch.equal(found[name], wanted[name].view(shape)):
            wrong.append(f"rank {rank}: {name}, two dimensions")
        if not torch.equal(flat[name], singles[name]):
            wrong.append(f"rank {rank}: {name}, one dimension")
    return wrong


@pytest.mark.parametrize("world_size", [exhaustive(1), 2, exhaustive(3)])
def test_the_form_of_the_input_does_not_change_the_output(world_size: int) -> None:
    pytest.importorskip("torchrec")
    for pooling in UNWEIGHTED:
        case = cross(world_size, optim.SGD(), torch.float32, steps=1, seed=103, poolings=(pooling,))
        assert run_ranks(world_size, every_form, case, POOLINGS[pooling][0]) == [[]] * world_size


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bags_of_one_length_may_be_two_dimensional(world_size: int) -> None:
    case = cross(world_size, optim.SGD(), torch.float32, steps=1, seed=104, poolings=tuple(UNWEIGHTED))
    assert run_ranks(world_size, dense_forms, case) == [[]] * world_size


def weight_gradients(rank: int, world_size: int, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
    emb = se.EmbeddingCollection([se.TableConfig("t", ROWS, 8, init=se.Normal())], plan={"t": placement})
    bags = make_bags(torch.Generator().manual_seed(rank), ROWS, 8, "sum", 2 + rank, 4, weighted=True)
    assert bags.weights is not None
    found = bags.weights.float().requires_grad_()
    (emb({"t": (bags.ids, bags.offsets, found)})["t"] * bags.slopes.float()).sum().backward()
    wanted = bags.weights.float().requires_grad_()
    rows = emb.rows("t", torch.arange(ROWS))
    answer = F.embedding_bag(bags.ids, rows, bags.offsets, mode="sum", per_sample_weights=wanted, include_last_offset=True)
    (answer * bags.slopes.float()).sum().backward()
    assert found.grad is not None
    assert wanted.grad is not None
    return found.grad, wanted.grad


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3])
def test_weights_of_ids_get_their_gradient(world_size: int) -> None:
    for layout, (columns, placement) in layouts(world_size).items():
        if columns > 8 or placement.kind == "table_row_wise":
            continue
        for found, wanted in run_ranks(world_size, weight_gradients, placement):
            # Strips are added one after the other, so the order of summation over columns may differ.
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, layout=layout: f"{layout}: {text}")
