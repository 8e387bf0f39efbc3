"""Narrow tables under training: the same bits for every plan, packing and number of ranks, and no update lost on average."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.tables.placement import PACKINGS, Cluster
from shardembed.tables.plan import resolve
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.cases import layouts
from tests.ranks.sharded import Piece, _assemble, pieces

ROWS, COLUMNS, STEPS = 23, 8, 3
DTYPES = (torch.bfloat16, torch.float16)
OPTIMIZERS: dict[str, Any] = {"SGD*": se.optim.SGD(lr=0.3), "Adagrad*": se.optim.Adagrad(lr=0.1)}


def train(rank: int, world_size: int, plans: dict[str, se.Plan], rounding: Any) -> dict[str, list[Piece]]:
    """One collection a plan. No id comes twice in a step, so that every gradient is a single number, whoever asks."""
    found: dict[str, list[Piece]] = {}
    for name, plan in plans.items():
        emb = se.EmbeddingCollection(tables(rounding), plan=plan, optimizer=OPTIMIZERS, gradient_reduction="sum", seed=5)
        learner = se.Optimizer(emb)
        numbers = torch.Generator().manual_seed(3)
        for _ in range(STEPS):
            ids = torch.randperm(ROWS, generator=numbers)[:17].tensor_split(world_size)[rank].view(-1, 1)
            slopes = torch.randint(-8, 9, (ROWS, COLUMNS), generator=numbers) / 8  # every dtype here holds them
            outputs = emb({feature.name: ids for feature in emb.features}).values()
            torch.stack([(output.float() * slopes[ids.squeeze(1)]).sum() for output in outputs]).sum().backward()
            learner.step()
        for local in emb.local_shards():
            assert all(state.dtype == torch.float32 for state in local.state.values()), "state is kept in float32"
        found[name] = pieces(emb)
    return found


def tables(rounding: Any) -> list[se.TableConfig]:
    names = [(f"{optimizer}{dtype}", dtype) for optimizer in ("SGD", "Adagrad") for dtype in DTYPES]
    return [se.TableConfig(name, ROWS, COLUMNS, dtype=dtype, init=se.Normal(), rounding=rounding) for name, dtype in names]


def cut(world_size: int, placements: dict[str, se.Placement], rounding: Any = None) -> dict[str, se.Plan]:
    cluster = Cluster(world_size, min(2, world_size))
    return {name: resolve(tables(rounding), placement, cluster) for name, placement in placements.items()}


def weights(runs: list[dict[str, list[Piece]]], plan: str) -> dict[str, torch.Tensor]:
    """Whole tables by name."""
    found = {}
    for table in tables(None):
        parts = [(piece.shard, piece.weights) for run in runs for piece in run[plan] if piece.table == table.name]
        found[table.name] = _assemble(parts, (ROWS, COLUMNS), f"{table.name} with {plan}")
    return found


@pytest.fixture(scope="module")
def learned() -> dict[str, torch.Tensor]:
    """What one rank makes of the tables."""
    return weights(run_ranks(1, train, cut(1, {"one": se.table_wise(0)}), None), "one")


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3, exhaustive(4)])
def test_rounding_gives_the_same_bits_on_every_plan(world_size: int, learned: dict[str, torch.Tensor]) -> None:
    placements = {}
    for number, (name, (_, placement)) in enumerate(layouts(world_size).items()):
        packing = PACKINGS[(number + world_size) % 2]
        placements[f"{name}, {packing}"] = replace(placement, packing=packing)
    runs = run_ranks(world_size, train, cut(world_size, placements), None)
    for plan in placements:
        for name, values in weights(runs, plan).items():
            assert torch.equal(values, learned[name]), f"{name} with {plan}"


def test_collections_round_at_random_unless_told_otherwise(learned: dict[str, torch.Tensor]) -> None:
    for rounding, alike in (("stochastic", True), ("nearest", False)):
        runs = run_ranks(2, train, cut(2, {"rows": se.row_wise()}, rounding), rounding)
        for name, values in weights(runs, "rows").items():
            assert torch.equal(values, learned[name]) == alike


def creep(rank: int, world_size: int, rounding: str | None) -> torch.Tensor:
    """Rows of ones after 64 updates, each a sixteenth of what bfloat16 can tell apart there."""
    settings: dict[str, Any] = {} if rounding is None else {"rounding": rounding}
    start = torch.ones(100, 16, dtype=torch.bfloat16)
    emb = se.Embedding.from_pretrained(
        start, freeze=False, optimizer=se.optim.SGD(lr=2.0**-11), plan=se.row_wise(), gradient_reduction="sum", **settings
    )
    learner = se.Optimizer(emb)
    for _ in range(64):
        ids = torch.arange(100).tensor_split(world_size)[rank]
        (-emb(ids).float()).sum().backward()
        learner.step()
    return emb.rows("embedding", torch.arange(100))


def test_small_updates_of_narrow_tables_add_up_on_average() -> None:
    """Rounded to the nearest, as a drop-in does by default like torch, none of them ever arrives."""
    arrived = run_ranks(2, creep, "stochastic")[0].double()
    assert abs(float(arrived.mean()) - (1 + 64 * 2.0**-11)) < 0.002
    for rounding in (None, "nearest"):
        assert torch.equal(run_ranks(2, creep, rounding)[0], torch.ones(100, 16, dtype=torch.bfloat16))
