"""Ranks that were given different things when a collection is built, and ranks whose batches differ in size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed import errors
from tests.harness import run_ranks

TABLES = [se.TableConfig("item", 40, 4), se.TableConfig("user", 30, 6, pooling=None)]
CUT = {"item": se.row_wise(), "user": se.row_wise()}


def build(tables: Any = TABLES, plan: Any = CUT, **settings: Any) -> se.EmbeddingCollection:
    return se.EmbeddingCollection(tables, plan=plan, **{"optimizer": se.optim.Adagrad(), **settings})


# What the last rank builds, and what the message must say of rank 0 and of the last.
DIFFERENT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "rows": (lambda: build([se.TableConfig("item", 41, 4), TABLES[1]]), "table 'item': 40 x 4", "table 'item': 41 x 4"),
    "columns": (lambda: build([TABLES[0], se.TableConfig("user", 30, 7)]), "table 'user': 30 x 6", "table 'user': 30 x 7"),
    "name": (lambda: build([se.TableConfig("itm", 40, 4), TABLES[1]], se.row_wise()), "['item', 'user']", "['itm', 'user']"),
    "dtype": (lambda: build([se.TableConfig("item", 40, 4, dtype=torch.bfloat16), TABLES[1]]), "torch.float32", "torch.bfloat16"),
    "row policy": (lambda: build([se.TableConfig("item", 40, 4, max_norm=1.0), TABLES[1]]), "table 'item'", "max_norm=1.0"),
    "padding": (lambda: build([se.TableConfig("item", 40, 4, padding_idx=0), TABLES[1]]), "table 'item'", "padding_idx=0"),
    "order": (lambda: build(TABLES[::-1]), "['item', 'user']", "['user', 'item']"),
    "one table more": (lambda: build([*TABLES, se.TableConfig("more", 5, 5)]), "['item', 'user']", "['item', 'user', 'more']"),
    "feature": (lambda: build([se.TableConfig("item", 40, 4, ["seen"]), TABLES[1]]), "('item',)", "('seen',)"),
    "pooling": (lambda: build([TABLES[0], se.TableConfig("user", 30, 6, pooling="max")]), "pooling=None", "pooling='max'"),
    "init": (lambda: build([se.TableConfig("item", 40, 4, init=se.Constant(1.0)), TABLES[1]]), "table 'item'", "Constant"),
    "plan": (lambda: build(plan={**CUT, "user": se.table_wise(0)}), "table 'user': row_wise", "table 'user': table_wise"),
    "packing": (lambda: build(plan={**CUT, "item": se.row_wise(packing="bag")}), "unique", "bag"),
    "optimizer": (lambda: build(optimizer=se.optim.Adam()), "table 'item': Adagrad", "table 'item': Adam"),
    "setting of an optimizer": (lambda: build(optimizer=se.optim.Adagrad(lr=0.5)), "Adagrad(", "lr=0.5"),
    "wire dtype": (lambda: build(wire_dtype=torch.bfloat16), "wire_dtype=None", "wire_dtype=torch.bfloat16"),
    "seed": (lambda: build(seed=1), "seed=0", "seed=1"),
    "reduction": (lambda: build(gradient_reduction="sum"), "reduction='mean'", "reduction='sum'"),
    "update": (lambda: build(update="backward"), "update='step'", "update='backward'"),
    "a plan that does not fit": (
        lambda: build(plan={"itm": se.row_wise()}),
        "['item', 'user']",
        "PlanError: the plan names ['itm']",
    ),
    "an optimizer that fits no table": (
        lambda: build(optimizer={"itm": se.optim.SGD(), "*": se.optim.SGD()}),
        "['item', 'user']",
        "ConfigError: an optimizer is given for 'itm'",
    ),
    "a policy that copies cannot have": (
        lambda: build([se.TableConfig("item", 40, 4, max_norm=1.0), TABLES[1]], se.replicated()),
        "['item', 'user']",
        "PlanError: table 'item': max_norm on a replicated table",
    ),
    "deterministic": (lambda: build(deterministic=True), "deterministic=False", "deterministic=True"),
}


def disagree(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """Each case's error, and the shape of what a collection that all agree on still gives afterwards."""
    heard = {}
    for name, (other, _, _) in DIFFERENT.items():
        try:
            other() if rank == world_size - 1 else build()
            heard[name] = "none", ""
        except errors.ShardEmbedError as error:
            heard[name] = type(error).__name__, str(error)
    rows = build().rows("user", torch.arange(3 + rank))
    assert rows.shape == (3 + rank, 6)
    return heard


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_build_different_collections_hear_what_each_has(world_size: int) -> None:
    found = run_ranks(world_size, disagree)
    last = world_size - 1
    for name, (_, here, there) in DIFFERENT.items():
        error, text = found[0][name]
        assert error == "DisagreementError", f"{name}: {error} {text}"
        assert all(other[name] == found[0][name] for other in found), f"{name}: not all ranks hear the same"
        assert "ranks disagree on tables, plan, optimizers and settings: rank 0 has " in text, text
        ours, theirs = text.split("; ")[0], text.split(f"; rank {last} has ")[1]
        assert here in ours, text
        assert there in theirs, text


def sizes(rank: int, world_size: int, plan: Any, seed: int) -> dict[str, Any]:
    """Train on batches of which some ranks' are empty; whole tables in the end."""
    emb = build(plan=plan)
    optimizer = se.Optimizer(emb, on_nonfinite="raise")
    shapes = []
    for step in range(4):
        outputs = emb(batch_of(rank, world_size, step))
        shapes.append({name: tuple(output.shape) for name, output in outputs.items()})
        torch.stack([output.sum() for output in outputs.values()]).sum().backward()
        se.clip_grad_norm_(emb, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    every = {table.name: emb.rows(table.name, torch.arange(table.num_embeddings)) for table in emb.tables}
    return {"shapes": shapes, "tables": every}


def batch_of(rank: int, world_size: int, step: int) -> dict[str, Any]:
    """Step s leaves rank s without a batch; the last leaves all. Rank r else has r + 1 samples."""
    size = 0 if step in (rank, 3) else rank + 1
    drawn = torch.Generator().manual_seed(10 * step + rank)
    return {"item": torch.randint(0, 40, (size, 2), generator=drawn), "user": torch.randint(0, 30, (size,), generator=drawn)}


@pytest.mark.parametrize("plan", [se.row_wise(), se.row_wise(packing="bag"), se.column_wise(), se.replicated()])
def test_ranks_with_empty_and_with_unequal_batches_train_together(plan: Any) -> None:
    found = run_ranks(3, sizes, plan, 0)
    whole = run_ranks(1, sizes_of_all)[0]
    for rank, run in enumerate(found):
        expected = [0 if step in (rank, 3) else rank + 1 for step in range(4)]
        assert run["shapes"] == [{"item": (size, 4), "user": (size, 6)} for size in expected]
        for name, table in run["tables"].items():
            torch.testing.assert_close(table, whole[name], rtol=1e-5, atol=1e-6)


def sizes_of_all(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The same training in one process, on the batch of all three ranks; the mean over ranks is a factor of the loss."""
    emb = build(plan=se.table_wise(0))
    optimizer = se.Optimizer(emb)
    for step in range(4):
        parts = [batch_of(other, 3, step) for other in range(3)]
        outputs = emb({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        (torch.stack([output.sum() for output in outputs.values()]).sum() / 3).backward()
        se.clip_grad_norm_(emb, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {table.name: emb.rows(table.name, torch.arange(table.num_embeddings)) for table in emb.tables}
