"""Freezing and thawing tables after they were sharded, as torch does, on 1 and 2 ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.errors import DisagreementError, StillLearningWarning, UnsupportedError
from shardembed.journey.freezing import Frozen
from tests.harness import run_ranks
from tests.ranks.models import COLUMNS, F64, ITEMS, USERS, Towers, batches, part, seeded

WORLD_SIZES = (1, 2)
PLANS: dict[str, Callable[[int], Any]] = {
    "rows": lambda last: se.row_wise(),
    "bags": lambda last: se.row_wise(packing="bag"),
    "columns": lambda last: se.column_wise(ranks=[0, last]),
    "table": lambda last: se.table_wise(0),
    "copies": lambda last: se.replicated(),
}


class Twins(nn.Module):
    """Two tables that lie in one slab, one with weights of its bags that learn, and a dense part."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, COLUMNS, dtype=F64)
        self.item = nn.EmbeddingBag(ITEMS, COLUMNS, mode="sum", dtype=F64)
        self.scale = nn.Parameter(torch.ones(3, dtype=F64))
        self.head = nn.Linear(COLUMNS, 1, dtype=F64)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        weights = self.scale.expand(item.shape)
        return self.head(self.user(user) * self.item(item, per_sample_weights=weights.contiguous()))


def module(model: Twins, name: str, still: bool) -> None:
    getattr(model, name).requires_grad_(not still)


def weight(model: Twins, name: str, still: bool) -> None:
    getattr(model, name).weight.requires_grad = not still


def weight_call(model: Twins, name: str, still: bool) -> None:
    getattr(model, name).weight.requires_grad_(not still)


WAYS = {"module": module, "weight": weight, "weight_": weight_call}
STEPS: list[tuple[bool, bool]] = [(False, False), (True, False), (False, True), (True, True), (False, False), (False, False)]
Change = Callable[[Any, str, bool], None]


class Plain:
    """The unsharded model over the global batch; SparseAdam counts no step of a weight without a gradient."""

    def __init__(self, sparse: bool) -> None:
        self.model = seeded(Twins)
        self.model.user.sparse = self.model.item.sparse = sparse
        tables = [self.model.user.weight, self.model.item.weight]
        self.dense = torch.optim.SGD([self.model.scale, *self.model.head.parameters()], lr=0.1)
        self.tables = torch.optim.SparseAdam(tables, lr=0.1) if sparse else torch.optim.Adam(tables, lr=0.1)

    def run(self, change: Change, where: str) -> list[torch.Tensor]:
        losses = []
        for batch, still in zip(batches(len(STEPS)), STEPS, strict=True):
            losses.append(step(self.model, batch, still, change, where))
            for optimizer in (self.dense, self.tables):
                optimizer.step()
                optimizer.zero_grad()
        return [*losses, self.model.user.weight.detach(), self.model.item.weight.detach(), self.model.scale.detach()]


def step(model: Any, batch: Any, still: tuple[bool, bool], change: Change, where: str) -> torch.Tensor:
    """Forward and backward, with tables frozen before, between the two or after them."""

    def freeze() -> None:
        for name, frozen in zip(("user", "item"), still, strict=True):
            change(model, name, frozen)

    if where == "before":
        freeze()
    user, item, label = batch
    loss = nn.functional.mse_loss(model(user, item), label)
    if where == "between":
        freeze()
    loss.backward()
    if where == "after":
        freeze()
    return loss.detach()


def trained(rank: int, world_size: int, plan: str, own: bool, deterministic: bool, way: str, where: str) -> list[torch.Tensor]:
    model = seeded(Twins)
    optimizer = se.optim.Adam(lr=0.1) if own else None
    se.shard(model, plan=PLANS[plan](world_size - 1), optimizer=optimizer, deterministic=deterministic, verbose=False)
    shards = [parameter for table in (model.user, model.item) for parameter in table.parameters()]
    dense = torch.optim.SGD([model.scale, *model.head.parameters()], lr=0.1)
    stepped = se.Optimizer(model, dense=dense) if own else dense
    tables = None if own else torch.optim.Adam(shards, lr=0.1)
    losses = []
    for batch, still in zip(batches(len(STEPS)), STEPS, strict=True):
        loss = step(model, part(batch, rank, world_size), still, WAYS[way], where)
        for parameter in [model.scale, *model.head.parameters()] if world_size > 1 else []:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size
        if world_size > 1:
            torch.distributed.all_reduce(loss)
            loss /= world_size
        losses.append(loss)
        for one in (stepped, tables) if tables else (stepped,):
            one.step()
            one.zero_grad()
    rows = [model.user.rows("user", torch.arange(USERS)), model.item.rows("item", torch.arange(ITEMS))]
    return [*losses, *rows, model.scale.detach()]


def all_trained(rank: int, world_size: int, cases: list[Any]) -> list[list[torch.Tensor]]:
    return [trained(rank, world_size, *case) for case in cases]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("own", [True, False])
def test_frozen_tables_do_and_count_what_they_do_in_torch(world_size: int, own: bool) -> None:
    cases = [(plan, own, False, way, "before") for plan, way in zip(PLANS, [*WAYS, *WAYS], strict=False)]
    cases += [("rows", own, True, "module", "before"), ("copies", own, True, "weight", "between")]
    cases += [("rows", own, False, "module", where) for where in ("between", "after")]
    for number, found in enumerate(zip(*run_ranks(world_size, all_trained, cases), strict=True)):
        where = cases[number][-1]
        expected = Plain(sparse=own).run(module, where)
        for rank, result in enumerate(found):
            for one, other in zip(result, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=f"rank {rank}, {cases[number]}")


def freezes_alone(rank: int, world_size: int, own: bool) -> str:
    model = seeded(Twins)
    se.shard(model, plan=se.row_wise(), optimizer=se.optim.SGD(lr=0.1) if own else None, verbose=False)
    if rank == 1:
        model.item.requires_grad_(False)
    try:
        model.user(torch.arange(3))
    except DisagreementError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("own", [True, False])
def test_a_rank_that_freezes_alone_is_found_out(own: bool) -> None:
    said = run_ranks(2, freezes_alone, own)
    assert said[0] == said[1]
    assert "rank 0 makes a forward in training mode of collection" in said[0]
    assert "), with none of these frozen since; rank 1 makes" in said[0], said[0]
    assert "with table number 1 of these frozen since they were made. Freeze and thaw tables" in said[0], said[0]


def test_a_fingerprint_tells_tables_apart() -> None:
    """What ranks compare: another number for other tables, in 63 bits, however many tables there are."""
    tables = [se.TableConfig(f"t{number}", 2, 2, frozen=number == 3) for number in range(100)]
    made = Frozen.of(tables, ())
    sets = [{0}, {1}, {0, 1}, {61}, {62}, {63}, {0, 63}, {99}, set(range(100))]
    found = [made.changed(frozenset(numbers), True).fingerprint for numbers in sets]
    assert made.fingerprint == 0
    assert made.changed(frozenset({3}), True).fingerprint == 0
    assert len({*found, 0}) == len(sets) + 1
    assert max(found) < 2**63


def all_frozen(rank: int, world_size: int, own: bool) -> tuple[bool, bool, bool]:
    """The whole model, then one table of it again."""
    model = seeded(Twins)
    se.shard(model, plan=se.row_wise(), optimizer=se.optim.SGD(lr=0.1) if own else None, verbose=False)
    model.requires_grad_(False)
    user, item, _ = part(batches(1)[0], rank, world_size)
    nothing = model(user, item).requires_grad
    model.user.requires_grad_(True)
    return nothing, model(user, item).requires_grad, bool(model.item.weight.requires_grad)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("own", [True, False])
def test_freezing_a_model_freezes_its_tables(world_size: int, own: bool) -> None:
    assert run_ranks(world_size, all_frozen, own) == [(False, True, False)] * world_size


@pytest.mark.parametrize("own", [True, False])
def test_a_table_that_was_made_frozen_cannot_learn(own: bool) -> None:
    model = seeded(Twins)
    model.user.weight.requires_grad = False
    se.shard(model, plan=se.row_wise(), optimizer=se.optim.SGD(lr=0.1) if own else None, verbose=False)
    thaws: list[Callable[[], object]] = [
        lambda: model.requires_grad_(True),
        lambda: model.user.requires_grad_(True),
        lambda: model.user.weight.requires_grad_(True),
        lambda: setattr(model.user.weight, "requires_grad", True),
        lambda: model.user.freeze("user", False),
    ]
    model.head.requires_grad_(False)
    for thaw in thaws:
        with pytest.raises(UnsupportedError, match=r"'user' was frozen when it was made.*before shard\(\)"):
            thaw()
    assert not any(parameter.requires_grad for parameter in model.head.parameters()), "the model was thawed in part"
    model.requires_grad_(False)
    assert not se.unshard(model).item.weight.requires_grad, "unshard() has thawed a table"


def in_a_loop(model: Twins) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False


@pytest.mark.parametrize("own", [True, False])
def test_a_loop_over_parameters_freezes_tables_or_says_that_it_does_not(own: bool) -> None:
    """It meets the tables where they are Parameters."""
    model = se.shard(seeded(Twins), optimizer=se.optim.SGD(lr=0.1) if own else None, verbose=False)
    user, item, _ = batches(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(user, item)
        model.scale.requires_grad_(False)
        model(user, item)
        in_a_loop(model)
        if not own:
            assert not model(user, item).requires_grad
            return
        with torch.no_grad():
            model(user, item)
    with pytest.warns(StillLearningWarning, match=r"\['user', 'item'\] learn on.*model.requires_grad_\(False\)"):
        assert model(user, item).requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(user, item)
        model = se.shard(seeded(Twins), optimizer=se.optim.SGD(lr=0.1), verbose=False)
        model.requires_grad_(False)
        model.user.requires_grad_(True)
        model(user, item)


def in_a_prefetched_loop(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    """Frozen and thawed while ids are ahead; beside the same in a plain loop."""
    found = []
    for ahead in (False, True):
        model = seeded(Towers)
        settings: dict[str, Any] = {"plan": se.row_wise(), "inputs": looked_up, "verbose": False}
        se.shard(model, optimizer=se.optim.Adam(lr=0.1), **settings)
        optimizer = se.Optimizer(model)
        data = [part(batch, rank, world_size)[:2] for batch in batches(8)]
        changes = {2: (model.user, False), 4: (model, False), 5: (model, True), 6: (model.towers, False)}
        for number, batch in enumerate(se.prefetched(data, model, depth=2, arguments=tuple) if ahead else se.synced(data)):
            if number in changes:
                changed, learns = changes[number]
                changed.requires_grad_(learns)
            loss = model(*batch).square().mean()
            if loss.requires_grad:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        items = model.towers["item"].rows("towers.item", torch.arange(ITEMS))
        found.append([model.user.rows("user", torch.arange(USERS)), items])
    return found


def looked_up(user: torch.Tensor, item: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"user": user, "towers.item": item}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_tables_are_frozen_in_a_prefetched_loop_as_in_a_plain_one(world_size: int) -> None:
    for plain, ahead in run_ranks(world_size, in_a_prefetched_loop):
        assert all(torch.equal(one, other) for one, other in zip(plain, ahead, strict=True))


def one_of_a_collection(rank: int, world_size: int, update: Any) -> list[bool]:
    tables = [se.TableConfig("a", 10, 4), se.TableConfig("b", 10, 4)]
    emb = se.EmbeddingCollection(tables, optimizer=se.optim.SGD(lr=1.0), update=update)
    optimizer = se.Optimizer(emb)
    emb.freeze("a")
    before = {name: emb.rows(name, torch.arange(10)) for name in "ab"}
    out = emb({name: torch.tensor([[1, 2]]) for name in "ab"})
    (out["a"] * out["b"]).sum().backward()
    optimizer.step()
    moved = [not torch.equal(emb.rows(name, torch.arange(10)), rows) for name, rows in before.items()]
    return [out["a"].requires_grad, out["b"].requires_grad, *moved]


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_collection_freezes_one_table(world_size: int, update: str) -> None:
    assert run_ranks(world_size, one_of_a_collection, update) == [[False, True, False, True]] * world_size


def saved_and_restored(rank: int, world_size: int, folder: str) -> list[torch.Tensor]:
    """Rows after a restart, and after going on: Adam has counted fewer steps of a table that was frozen."""
    results = []
    for restart in (False, True):
        model = seeded(Twins)
        se.shard(model, plan=se.row_wise(), optimizer=se.optim.Adam(lr=0.1), verbose=False)
        optimizer = se.Optimizer(model)
        for number, (user, item, label) in enumerate(batches(5)):
            if number == 3:
                model.user.requires_grad_(True)
                if restart:
                    se.load_checkpoint(folder, model, optimizer=optimizer)
                else:
                    se.save_checkpoint(folder, model, optimizer=optimizer)
            if number < 3 and restart:
                continue
            if number == 1:
                model.user.requires_grad_(False)
            nn.functional.mse_loss(model(user, item), label).backward()
            optimizer.step()
            model.zero_grad()
        results += [model.user.rows("user", torch.arange(USERS)), model.item.rows("item", torch.arange(ITEMS))]
    return results


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_steps_in_which_a_table_was_frozen_are_remembered(world_size: int, tmp_path: Any) -> None:
    for user, item, user_again, item_again in run_ranks(world_size, saved_and_restored, str(tmp_path / "saved")):
        assert torch.equal(user, user_again)
        assert torch.equal(item, item_again)


def dropped(rank: int, world_size: int, table: str) -> list[torch.Tensor]:
    """Two backwards, with the gradients of one table, or of all, dropped in between by nn.Module's own call."""
    model = seeded(Twins)
    se.shard(model, plan=se.row_wise(), optimizer=se.optim.SGD(lr=0.1), gradient_reduction="sum", verbose=False)
    optimizer = se.Optimizer(model, micro_batches=2)
    for number, batch in enumerate(batches(2)):
        user, item, label = part(batch, rank, world_size)
        nn.functional.mse_loss(model(user, item), label, reduction="sum").backward()
        if number == 0:
            (model.get_submodule(table)).zero_grad()
    optimizer.step()
    return [model.user.rows("user", torch.arange(USERS)), model.item.rows("item", torch.arange(ITEMS))]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("table", ["user", ""])
def test_zero_grad_of_a_module_drops_what_waits_for_its_tables(world_size: int, table: str) -> None:
    plain = seeded(Twins)
    optimizer = torch.optim.SGD([plain.user.weight, plain.item.weight], lr=0.1)
    for number, (user, item, label) in enumerate(batches(2)):
        nn.functional.mse_loss(plain(user, item), label, reduction="sum").backward()
        if number == 0:
            plain.get_submodule(table).zero_grad()
    optimizer.step()
    for user, item in run_ranks(world_size, dropped, table):
        torch.testing.assert_close(user, plain.user.weight.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(item, plain.item.weight.detach(), rtol=1e-10, atol=1e-10)
