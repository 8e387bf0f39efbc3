"""Deterministic mode: after ten steps the tables are the same bits for every plan, packing and number of ranks."""

from __future__ import annotations

import hashlib
from itertools import product
from typing import Any, Literal

import pytest
import torch

import shardembed as se
from shardembed.tables.pooling import POOLINGS as KINDS
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.sharded import written

SAMPLES, LONGEST, STEPS = 8, 7, 10
ROWS, COLUMNS = 23, 12
PLANS: dict[str, Any] = {
    "table_wise": se.table_wise(0),
    "table_wise bag": se.table_wise(0, packing="bag"),
    "row_wise": se.row_wise(),
    "row_wise bag": se.row_wise(packing="bag"),
    "blocks": se.row_wise(strided=False, packing="bag"),
    "column_wise": se.column_wise(),
    "grid": se.grid(3),
    "replicated": se.replicated(),
}
OPTIMIZERS = {
    "SGD": se.optim.SGD(lr=0.1),
    "RowwiseAdagrad": se.optim.RowwiseAdagrad(lr=0.1),
    "Adam": se.optim.Adam(lr=0.1),
    "FTRL": se.optim.FTRL(lr=0.1),
    "RowwiseAdam": se.optim.RowwiseAdam(lr=0.1),
}
POOLINGS = {f"by {name}": name for name in KINDS} | {f"weighted {name}": name for name, kind in KINDS.items() if kind.takes_weights}
WEIGHTED = [name for name in POOLINGS if name.startswith("weighted ")]

OfSamples = dict[str, list[torch.Tensor]]


def tables(dtype: torch.dtype) -> list[se.TableConfig]:
    features: dict[str, Any] = {"feature_names": list(POOLINGS), "pooling": POOLINGS}
    return [
        se.TableConfig("t", ROWS, COLUMNS, **features, padding_idx=3, dtype=dtype),
        se.TableConfig("u", 11, 5, dtype=dtype),
        se.TableConfig("v", 11, 7, pooling="mean", max_norm=1.5, scale_grad_by_freq=True, dtype=dtype),
    ]


def global_batch(step: int) -> tuple[OfSamples, OfSamples, OfSamples]:
    """Of every sample: ids and slopes (the gradients of its outputs) by feature, and weights where there are some."""
    seed = torch.Generator().manual_seed(step)
    ids: OfSamples = {}
    slopes: OfSamples = {}
    for name, rows, columns in [*((name, ROWS, COLUMNS) for name in POOLINGS), ("u", 11, 5), ("v", 11, 7)]:
        lengths = torch.randint(0, LONGEST, (SAMPLES,), generator=seed).tolist()
        ids[name] = [torch.randint(0, rows, (length,), generator=seed) // 2 for length in lengths]
        outputs = lengths if POOLINGS.get(name, "sum") is None else [1] * SAMPLES
        # Sizes that differ by orders of magnitude: their float sums do depend on the order.
        slopes[name] = [torch.randn(n, columns, generator=seed) * 10.0 ** float(torch.randn(1, generator=seed)) for n in outputs]
    return ids, slopes, {name: [torch.randn(len(part), generator=seed) for part in ids[name]] for name in WEIGHTED}


def hashes(
    rank: int, world_size: int, plan: se.Placement, optimizer: Any, dtype: torch.dtype, reduction: str, deterministic: bool = True
) -> dict[str, str]:
    """A hash of each table and of its optimizer state after training with given gradients, each step in two micro-batches."""
    chosen: Literal["mean", "sum"] = "mean" if reduction == "mean" else "sum"
    of_v = se.column_wise() if plan.kind == "replicated" else plan  # copies cannot have max_norm
    emb = se.EmbeddingCollection(
        tables(dtype),
        optimizer=optimizer,
        plan={"t": plan, "u": plan, "v": of_v},
        deterministic=deterministic,
        gradient_reduction=chosen,
    )
    opt = se.Optimizer(emb, micro_batches=2)
    for step in range(STEPS):
        for half in range(2):
            ids, slopes, weights = global_batch(2 * step + half)
            mine = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
            batch: dict[str, Any] = {}
            for name, bags in ids.items():
                offsets = torch.tensor([0, *(len(bag) for bag in bags[mine])]).cumsum(0)
                batch[name] = (torch.cat(bags[mine]), offsets)
            for name in WEIGHTED:
                batch[name] = (*batch[name], torch.cat(weights[name][mine]))
            outputs = written(emb(batch), step)
            loss = torch.stack([(outputs[name].float() * torch.cat(slopes[name][mine])).sum() for name in outputs]).sum()
            (loss * (world_size if chosen == "mean" else 1)).backward()
        opt.step()
    return digests(emb)


def digests(emb: se.EmbeddingCollection) -> dict[str, str]:
    found = {}
    for table in emb.tables:
        rows = emb.rows(table.name, torch.arange(table.num_embeddings))
        found[table.name] = hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


EVERYWHERE = list(product((1, 2, 4), PLANS))
ONCE = list(zip((1, 2, 4, 2, 4, 2, 4, 2), PLANS, strict=True))


@pytest.mark.parametrize("where", [ONCE, exhaustive(EVERYWHERE)], ids=["once", "everywhere"])
def test_every_plan_and_world_size_ends_with_the_same_bits(where: list[tuple[int, str]]) -> None:
    found = {}
    for world_size, name in where:
        for rank, answer in enumerate(
            run_ranks(world_size, hashes, PLANS[name], OPTIMIZERS["RowwiseAdagrad"], torch.float32, "sum")
        ):
            found[world_size, name, rank] = answer
    assert len({tuple(sorted(answer.items())) for answer in found.values()}) == 1, found


@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        exhaustive(torch.bfloat16, "SGD"),
        (torch.bfloat16, "Adam"),
        exhaustive(torch.float64, "RowwiseAdagrad"),
        exhaustive(torch.float32, "Adam"),
        exhaustive(torch.float32, "FTRL"),
        exhaustive(torch.float32, "RowwiseAdam"),
    ],
)
def test_so_do_other_dtypes_and_means_over_ranks(dtype: torch.dtype, optimizer: str) -> None:
    found = {}
    for world_size, name in [(1, "table_wise"), (2, "column_wise"), (2, "row_wise bag"), (4, "replicated"), (4, "grid")]:
        found[world_size, name] = run_ranks(world_size, hashes, PLANS[name], OPTIMIZERS[optimizer], dtype, "mean")[-1]
    assert len({tuple(sorted(answer.items())) for answer in found.values()}) == 1, found


def test_without_it_they_differ() -> None:
    found = {}
    for name in ("table_wise", "column_wise", "row_wise bag", "replicated"):
        answers = run_ranks(2, hashes, PLANS[name], OPTIMIZERS["RowwiseAdagrad"], torch.float32, "sum", False)
        found[name] = tuple(sorted(answers[0].items()))
    assert len(set(found.values())) > 1, "the numbers of this file are too tame to show anything"


def both_modes(rank: int, world_size: int, plan: se.Placement) -> list[torch.Tensor]:
    """Weights after one step, deterministic and not."""
    after = []
    for deterministic in (True, False):
        emb = se.EmbeddingCollection(
            [se.TableConfig("t", ROWS, COLUMNS, dtype=torch.float64)],
            optimizer=se.optim.SGD(lr=0.1),
            plan={"t": plan},
            deterministic=deterministic,
        )
        ids, slopes, _ = global_batch(5)
        mine = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
        offsets = torch.tensor([0, *(len(bag) for bag in ids["by sum"][mine])]).cumsum(0)
        out = emb({"t": (torch.cat(ids["by sum"][mine]), offsets)})["t"]
        (out * torch.cat(slopes["by sum"][mine])).sum().backward()
        se.Optimizer(emb).step()
        after.append(emb.rows("t", torch.arange(ROWS)))
    return after


def test_the_numbers_are_those_of_the_ordinary_mode() -> None:
    for name in ("row_wise", "column_wise", "row_wise bag"):
        for deterministic, ordinary in run_ranks(2, both_modes, PLANS[name]):
            torch.testing.assert_close(deterministic, ordinary, rtol=0, atol=1e-10)


def not_finite(rank: int, world_size: int) -> tuple[bool, bool]:
    emb = se.EmbeddingCollection(tables(torch.float32), optimizer=se.optim.SGD(), plan=se.row_wise(), deterministic=True)
    before = digests(emb)
    batch = {name: torch.tensor([[rank + 1, 5]]) for name in [*POOLINGS, "u", "v"]}
    outputs = emb(batch)
    slope = torch.inf if rank == 0 else 1.0
    torch.stack([output.sum() * slope for output in outputs.values()]).sum().backward()
    opt = se.Optimizer(emb, on_nonfinite="skip")
    opt.step()
    return opt.skipped == 1, digests(emb) == before


def test_a_gradient_that_is_not_finite_is_seen_by_all_ranks() -> None:
    assert run_ranks(2, not_finite) == [(True, True)] * 2


def weights_on_one_rank(rank: int, world_size: int) -> torch.Tensor | None:
    """The gradient of weights that only one rank has, below a table that does not learn: no other rank has a backward."""
    emb = se.EmbeddingCollection([se.TableConfig("t", ROWS, COLUMNS)], optimizer=se.optim.SGD(), deterministic=True)
    emb.freeze("t")
    weights = torch.ones(3, requires_grad=True) if rank == 0 else None
    ids, offsets = torch.arange(3), torch.tensor([0, 3])
    out = emb({"t": (ids, offsets) if weights is None else (ids, offsets, weights)})["t"]
    if weights is not None:
        out.sum().backward()
    emb({"t": (ids, offsets)})  # and they go on together
    return None if weights is None else weights.grad


def test_where_nothing_learns_weights_of_one_rank_have_their_gradient() -> None:
    found, nothing = run_ranks(2, weights_on_one_rank, timeout=60)
    assert found.shape == (3,)
    assert found.all()
    assert nothing is None
