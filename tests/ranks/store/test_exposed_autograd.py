"""Shards that are Parameters (`optimizer=None`), where torch treats them as such: on 1 and 2 ranks, against plain torch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.errors import ShardEmbedError, UnsupportedError
from tests.harness import run_ranks
from tests.ranks.beside import COLUMNS, F64, ITEMS, USERS, batches, part, seeded

WORLD_SIZES = (1, 2)
PLANS = {"rows": se.row_wise(), "table": se.table_wise(0), "copies": se.replicated()}
ASKED = ("grad", "inputs", "hook", "post", "twice")


class Pair(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, COLUMNS, dtype=F64, sparse=sparse)
        self.item = nn.EmbeddingBag(ITEMS, COLUMNS, mode="sum", dtype=F64, sparse=sparse)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return (self.user(user) * self.item(item)).tanh().mean(1)


def dense(grad: torch.Tensor | None) -> torch.Tensor | None:
    return grad.to_dense().clone() if grad is not None else None


def asked(model: Pair, user: torch.Tensor, item: torch.Tensor, how: str) -> list[torch.Tensor | None]:
    """Gradients of both weights (None: none), by one of torch's ways to have them. The loss is a sum, so that parts add up."""
    loss, weights = model(user, item).sum(), [model.user.weight, model.item.weight]
    if how == "grad":
        (grad,) = torch.autograd.grad(loss, weights[:1])
        assert all(weight.grad is None for weight in weights), ".grad has been touched"
        return [dense(grad), None]
    if how == "inputs":
        loss.backward(inputs=weights[1:])
    elif how == "twice":
        loss.backward(retain_graph=True)
        loss.backward()
    else:
        seen: list[torch.Tensor] = []
        for weight in weights:
            if how == "hook":
                weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
            else:
                weight.register_post_accumulate_grad_hook(lambda shard: seen.append(shard.grad))
        loss.backward()
        assert len(seen) == 2, f"{len(seen)} hooks were called"
    return [dense(weight.grad) for weight in weights]


def ours(rank: int, world_size: int, plan: str, sparse: bool, deterministic: bool) -> list[list[Any]]:
    found = []
    for how in ASKED:
        model = seeded(lambda: Pair(sparse))
        settings: dict[str, Any] = {"deterministic": deterministic, "gradient_reduction": "sum", "verbose": False}
        se.shard(model, plan=PLANS[plan], **settings)
        user, item, _ = part(batches(1)[0], rank, world_size)
        parts = [getattr(model, name).weight.shard for name in ("user", "item")]
        found.append([(shard.shard.rows, grad) for shard, grad in zip(parts, asked(model, user, item, how), strict=True)])
    return found


@pytest.mark.parametrize(("plan", "sparse", "fixed"), [("rows", False, False), ("table", True, False), ("copies", False, True)])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_autograd_gives_shards_their_gradients_as_torch_does(world_size: int, plan: str, sparse: bool, fixed: bool) -> None:
    answers = run_ranks(world_size, ours, plan, sparse, fixed)
    for number, how in enumerate(ASKED):
        user, item, _ = batches(1)[0]
        expected = asked(seeded(lambda: Pair(sparse)), user, item, how)
        for answer in answers:
            for (rows, grad), whole in zip(answer[number], expected, strict=True):
                assert (grad is None) == (whole is None), how
                if grad is not None and whole is not None:
                    torch.testing.assert_close(
                        grad, whole[list(rows)], rtol=1e-10, atol=1e-10, msg=f"{how}, {plan}: another gradient"
                    )


def only_looked_up(rank: int, world_size: int) -> list[bool]:
    """Which tables have a gradient after a lookup of one: the others have None, so that a torch optimizer leaves them alone."""
    model = seeded(Pair)
    se.shard(model, plan=se.row_wise(), verbose=False)
    model.user(torch.arange(3)).sum().backward()
    return [weight.grad is None for weight in (model.user.weight, model.item.weight)]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_table_that_was_not_looked_up_has_no_gradient(world_size: int) -> None:
    assert run_ranks(world_size, only_looked_up) == [[False, True]] * world_size


def second_order(rank: int, world_size: int, deterministic: bool) -> str:
    model = seeded(Pair)
    se.shard(model, plan=se.row_wise(), deterministic=deterministic, verbose=False)
    loss = model(*part(batches(1)[0], rank, world_size)[:2]).square().sum()
    (grad,) = torch.autograd.grad(loss, [model.user.weight], create_graph=True)
    try:
        grad.square().sum().backward()
    except UnsupportedError as error:
        return str(error)
    return "nothing was said"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_second_derivatives_are_refused(world_size: int) -> None:
    for deterministic in (False, True):
        for said in run_ranks(world_size, second_order, deterministic):
            assert said.startswith("second derivatives: the gradient of a sharded table was differentiated again"), said


def mixed(rank: int, world_size: int) -> list[bool]:
    """Gradients of a shard alone: a table with an optimizer of ours has nothing to step then."""
    model = seeded(Pair)
    optimizer = {"user": se.optim.SGD(lr=1.0), "item": None}
    inputs = lambda user, item: {"user": user, "item": item}  # noqa: E731
    se.shard(model, plan=se.row_wise(), optimizer=optimizer, inputs=inputs, verbose=False)
    before = model.user.rows("user", torch.arange(USERS))
    stepped = se.Optimizer(model)
    loss = model(*part(batches(1)[0], rank, world_size)[:2]).sum()
    loss.backward(inputs=[model.item.weight], retain_graph=True)
    stepped.step()
    still = torch.equal(before, model.user.rows("user", torch.arange(USERS)))
    loss.backward()
    stepped.step()
    return [still, not torch.equal(before, model.user.rows("user", torch.arange(USERS)))]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_tables_of_ours_learn_only_where_they_are_asked_for(world_size: int) -> None:
    assert run_ranks(world_size, mixed) == [[True, True]] * world_size


def drawn(rank: int, world_size: int, plan: str) -> list[str]:
    said = []
    model = seeded(Pair)
    se.shard(model, plan=PLANS[plan], verbose=False)
    for fill in (nn.init.normal_, nn.init.xavier_uniform_, nn.init.trunc_normal_):
        try:
            fill(model.user.weight)
            said.append("")
        except UnsupportedError as error:
            said.append(str(error))
    for draw in (lambda data: data.normal_(0, 0.02), nn.init.uniform_, nn.init.xavier_normal_):
        try:
            draw(model.user.weight.data)
            said.append("")
        except UnsupportedError as error:
            said.append(str(error))
    try:
        nn.Linear(COLUMNS, USERS).weight = model.user.weight
        said.append("")
    except UnsupportedError as error:
        said.append(str(error))
    return said


def test_what_a_part_of_a_table_cannot_stand_for_is_refused() -> None:
    """One rank has all of a table, and then torch's own number generators may fill it, and another layer may share it."""
    assert run_ranks(1, drawn, "rows") == [[""] * 7]
    for plan in PLANS:
        for said in run_ranks(2, drawn, plan):
            assert all("would fill this rank's part alone" in one for one in said[:6]), said
            assert said[6].startswith("the weight of table 'user' was to become 'weight' of a Linear"), said


def norms_of_weights(rank: int, world_size: int, plan: str) -> list[str]:
    weight, said = se.shard(seeded(Pair), plan=PLANS[plan], verbose=False).user.weight, []
    calls: list[Callable[[], torch.Tensor]] = [lambda: weight.norm(), lambda: weight.data.norm(2), lambda: torch.norm(weight.data)]
    for call in calls:
        try:
            said.append(f"{call():.6f}")
        except UnsupportedError as error:
            said.append(str(error))
    assert weight.norm(dim=1).shape == weight.data.norm(dim=1).shape == weight.shape[:1]
    return said


def test_a_norm_of_a_part_of_the_rows_is_refused() -> None:
    whole = [f"{seeded(Pair).user.weight.norm():.6f}"] * 3
    assert run_ranks(1, norms_of_weights, "rows") == [whole]
    assert run_ranks(2, norms_of_weights, "copies") == [whole, whole]
    assert run_ranks(2, norms_of_weights, "table")[0] == whole
    for said in run_ranks(2, norms_of_weights, "rows"):
        assert all(one.startswith("the weight of table 'user': the norm was asked of what is cut") for one in said), said


def tied(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model.decoder = nn.Linear(COLUMNS, USERS, bias=False, dtype=F64)
    model.decoder.weight = model.user.weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for user, item, _ in batches(3):
        (model.decoder(model.user(user)).square().mean() + model(user, item).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.decoder.weight.detach(), model.user(torch.arange(USERS))


def test_on_one_rank_an_output_layer_may_be_tied_to_a_table() -> None:
    for one, other in zip(tied(se.shard(seeded(Pair), verbose=False)), tied(seeded(Pair)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_memory_that_is_put_in_a_shards_place_is_copied_or_refused() -> None:
    model = se.shard(seeded(Pair), verbose=False)
    new = torch.randn(USERS, COLUMNS, dtype=F64)
    model.user.weight.data = new
    assert torch.equal(model.user(torch.arange(USERS)), new)
    nn.utils.vector_to_parameters(torch.zeros(USERS * COLUMNS + ITEMS * COLUMNS, dtype=F64), model.parameters())
    assert not model.user(torch.arange(USERS)).any()
    for wrong in (new[:5], new.float()):
        with pytest.raises(UnsupportedError, match=r"'user': .data is \[23, 4\] torch.float64 and stays so.*load_rows"):
            model.user.weight.data = wrong
    with pytest.raises(UnsupportedError, match="set_ would give it memory that no lookup reads"):
        model.user.weight.set_(new)
    assert not model.user(torch.arange(USERS)).any()


def averaged(model: Any) -> list[torch.Tensor]:
    """An average of weights as many programs have it: put in the weights' place and taken back without a copy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    average = {name: weight.data.clone() for name, weight in model.named_parameters()}
    found = []
    for user, item, _ in batches(3):
        model(user, item).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = {}
        for name, weight in model.named_parameters():
            average[name] = 0.5 * average[name] + 0.5 * weight.data
            kept[name] = weight.data
            weight.data = average[name]
        found.append(model.user(torch.arange(USERS)).detach())
        for name, weight in model.named_parameters():
            weight.data = kept[name]
        found.append(model.user(torch.arange(USERS)).detach())
    return found


def swapped(model: Any) -> list[torch.Tensor]:
    weight, other = model.user.weight, nn.Parameter(torch.zeros(USERS, COLUMNS, dtype=F64))
    weight.data, other.data = other.data, weight.data
    weight.data = weight.data + 1
    weight.data *= 3
    weight.data = weight.data.flatten().view(COLUMNS, USERS).t()  # its own memory in another order
    return [model.user(torch.arange(USERS)).detach(), other.detach()]


@pytest.mark.parametrize("program", [averaged, swapped])
def test_memory_that_a_shard_had_before_keeps_its_numbers(program: Callable[[Any], list[torch.Tensor]]) -> None:
    for one, other in zip(program(se.shard(seeded(Pair), verbose=False)), program(seeded(Pair)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def averaged_on(rank: int, world_size: int, plan: str) -> list[torch.Tensor]:
    return averaged(se.shard(seeded(Pair), plan=PLANS[plan], gradient_reduction="mean", verbose=False))


@pytest.mark.parametrize("plan", PLANS)
def test_an_average_by_hand_is_taken_back_on_every_rank(plan: str) -> None:
    expected = averaged(seeded(Pair))
    for found in run_ranks(2, averaged_on, plan):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_copy_of_a_shard_is_a_plain_parameter() -> None:
    weight = se.shard(seeded(Pair), verbose=False).user.weight
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    for one in (copy.deepcopy(weight), torch.load(file)):
        assert type(one) is nn.Parameter
        assert torch.equal(one, weight)
        one.requires_grad_(False)
        assert weight.requires_grad


def called_with_others(rank: int, world_size: int) -> str:
    """One rank calls with another weight: the others hear of it in the lookup."""
    model = seeded(Pair)
    se.shard(model, plan=se.row_wise(), verbose=False)
    shard = model.user.weight
    given = {"weight": torch.zeros_like(shard)} if rank == 1 else {}
    try:
        torch.func.functional_call(model.user, given, (torch.arange(3),))
    except ShardEmbedError as error:
        assert model.user.weight is shard
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


def test_a_call_with_other_weights_is_refused_on_all_ranks() -> None:
    for said in run_ranks(2, called_with_others):
        assert said.startswith("UnsupportedError: rank 1: a weight of table(s) ['user'] cannot be replaced"), said
