"""se.Optimizer as a torch optimizer: zero_grad, closures, state dicts, what it shows of itself, and what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed import optim
from shardembed.errors import ConfigError, PickleError, StepError
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.optimizing import NAMES, Pair, batch_of, held, loss_of, unchanged, weight_of


def train(pair: Pair, opt: se.Optimizer, rank: int, numbers: range) -> None:
    for number in numbers:
        loss_of(pair.wrapped, batch_of(rank, number)).backward()
        opt.step()
        opt.zero_grad()
        pair.backward_plain(number)
        pair.step_plain([number])


def drop(rank: int, world_size: int, shared: bool) -> None:
    pair = Pair(world_size, shared=shared)
    opt = pair.optimizer()
    train(pair, opt, rank, range(1))
    before = held(pair.model.tables)  # a dense Adam moves on gradients of zero, as it should
    for set_to_none in (True, False):
        loss_of(pair.wrapped, batch_of(rank, 7)).backward()
        opt.zero_grad(set_to_none=set_to_none)
        for parameter in pair.model.parameters():
            assert (parameter.grad is None) == set_to_none
            assert parameter.grad is None or not parameter.grad.any()
    opt.step()
    unchanged(before, held(pair.model.tables), "a step after zero_grad")


@pytest.mark.parametrize("shared", [False, True], ids=["a journey a table", "one journey"])
def test_zero_grad_drops_what_waits(shared: bool) -> None:
    run_ranks(2, drop, shared)


def learn(rank: int, world_size: int, shared: bool, dense: bool, closure: bool) -> None:
    pair = Pair(world_size, shared=shared, dense=dense)
    opt = pair.optimizer()
    for number in range(3):

        def evaluate(number: int = number) -> torch.Tensor:
            opt.zero_grad()
            loss = loss_of(pair.wrapped, batch_of(rank, number))
            loss.backward()
            return loss

        if closure:
            found = opt.step(evaluate)
            assert isinstance(found, torch.Tensor)
            assert found.requires_grad
        else:
            evaluate()
            assert opt.step() is None
        pair.backward_plain(number)
        pair.step_plain([number])
    pair.compare("after 3 steps")


@pytest.mark.parametrize("world_size", [1, 2, exhaustive(3)])
def test_tables_and_dense_part_learn_together(world_size: int) -> None:
    for shared, dense, closure in ((False, True, False), (True, True, True), (False, False, True), (True, False, False)):
        run_ranks(world_size, learn, shared, dense, closure)


def resume(rank: int, world_size: int) -> None:
    """Groups and dense state come back with a state dict; rows and their state are in the model, here moved by hand."""
    first, second = Pair(world_size), Pair(world_size, shared=True)
    opt = first.optimizer()
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.7)
    for number in range(3):
        train(first, opt, rank, range(number, number + 1))
        scheduler.step()
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "scheduler": scheduler.state_dict(), "head": first.model.head.state_dict()}, file)  # type: ignore[union-attr]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = second.optimizer()
    other_scheduler = torch.optim.lr_scheduler.StepLR(other, 1, gamma=0.7)
    other.load_state_dict(saved["opt"])
    other_scheduler.load_state_dict(saved["scheduler"])
    second.model.head.load_state_dict(saved["head"])  # type: ignore[union-attr]
    move(first, second)
    for number in range(3, 5):
        for pair, one, rates in ((first, opt, scheduler), (second, other, other_scheduler)):
            loss_of(pair.wrapped, batch_of(rank, number)).backward()
            one.step()
            one.zero_grad()
            rates.step()
    assert [group["lr"] for group in opt.param_groups] == [group["lr"] for group in other.param_groups]
    assert opt.param_groups[1]["lr"] == pytest.approx(0.3 * 0.7**5)
    for name in NAMES:
        assert torch.equal(first.rows(name), second.rows(name)), name
    assert torch.equal(first.model.head.weight, second.model.head.weight)  # type: ignore[union-attr]


def move(source: Pair, target: Pair) -> None:
    """Shards and their state; what a checkpoint does."""
    for name in NAMES:
        one, other = source.model.tables[name], target.model.tables[name]
        assert isinstance(one, se.modules.base.ShardedModule)
        assert isinstance(other, se.modules.base.ShardedModule)
        other.journey.restore_steps({name: one.journey.steps})
        for here, there in zip(one.local_shards(), other.local_shards(), strict=True):
            there.weights.copy_(here.weights)
            for key in here.state:
                there.state[key].copy_(here.state[key])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_from_a_state_dict(world_size: int) -> None:
    run_ranks(world_size, resume)


def test_a_state_dict_of_other_groups_is_refused_before_anything_is_loaded() -> None:
    opt = Pair(1).optimizer()
    lr = [group["lr"] for group in opt.param_groups]
    for other in (
        Pair(1, dense=False).optimizer(),
        Pair(1, settings={"rows": optim.Adam(lr=9.0)}).optimizer(),
        Pair(1, settings={"rows": optim.SGD(lr=0.5)}).optimizer(),
    ):
        with pytest.raises(ConfigError, match="the state has param groups of"):
            opt.load_state_dict(other.state_dict())
        assert [group["lr"] for group in opt.param_groups] == lr


def test_loading_into_the_dense_optimizer_alone_is_seen() -> None:
    pair = Pair(1)
    dense = pair.make_dense(pair.model)
    assert dense is not None
    opt = se.Optimizer(pair.model, dense)
    saved = dense.state_dict()
    saved["param_groups"][0]["lr"] = 0.125
    dense.load_state_dict(saved)
    assert opt.param_groups[0]["lr"] == 0.125
    opt.param_groups[0]["lr"] = 0.25
    assert dense.param_groups[0]["lr"] == 0.25
    assert opt.state is dense.state


def test_what_it_shows_of_itself() -> None:
    pair = Pair(1)
    text = repr(se.Optimizer(pair.model, torch.optim.SGD(pair.model.head.parameters(), lr=0.05)))  # type: ignore[union-attr]
    assert text.startswith("Optimizer (\nParameter Group 0\n    dampening: 0\n")
    assert "Parameter Group 1\n    lr: 0.3\n    optimizer: Adagrad\n    tables: ['tables.rows']\n" in text
    assert "Parameter Group 4\n    lr: 0.5\n    optimizer: SGD\n    tables: ['tables.whole']\n)" in text


def test_it_is_not_copied_or_pickled() -> None:
    opt = Pair(1).optimizer()
    for attempt in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(PickleError, match="save its state_dict"):
            attempt(opt)


def test_groups_are_fixed() -> None:
    pair = Pair(1)
    dense = pair.make_dense(pair.model)
    assert dense is not None
    opt = se.Optimizer(pair.model, dense)
    with pytest.raises(ConfigError, match="add parameter groups to the dense optimizer before"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ConfigError, match="change the groups' settings in place"):
        opt.param_groups = []
    with pytest.raises(ConfigError, match="use load_state_dict"):
        opt.state = {}
    assert len(opt.param_groups) == 5
    dense.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(StepError, match="has 2 param groups, 1 when"):
        opt.step()


def test_the_gradient_of_tables_cannot_be_assigned() -> None:
    waiting = Pair(1).optimizer().param_groups[1]["params"][0]
    assert waiting.grad is None
    with pytest.raises(StepError, match="they come from backward"):
        waiting.grad = torch.ones(1)


def misuse(**options: Any) -> None:
    pair = Pair(1)
    se.Optimizer(pair.model, **options)


def test_settings_that_do_not_fit_are_refused() -> None:
    plain = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 2))
    early = torch.optim.SGD(plain.parameters(), lr=0.1)
    model = se.shard(plain)
    with pytest.raises(ConfigError, match=r"1 parameter\(s\) that are not the model's, the first of shape \(5, 2\).*build"):
        se.Optimizer(model, early)
    with pytest.raises(ConfigError, match="dense must be a torch optimizer"):
        misuse(dense=list(plain.parameters()))
    with pytest.raises(ConfigError, match="on_nonfinite must be"):
        misuse(on_nonfinite="ignore")
    with pytest.raises(ConfigError, match="micro_batches must be at least 1"):
        misuse(micro_batches=0)
    with pytest.raises(ConfigError, match="nothing to optimize"):
        se.Optimizer(nn.Linear(2, 2))


def test_a_model_without_tables_is_stepped_by_the_dense_optimizer_alone() -> None:
    model = nn.Linear(3, 1)
    other = copy.deepcopy(model)
    for one, opt in (
        (model, se.Optimizer(model, torch.optim.AdamW(model.parameters()), on_nonfinite="raise")),
        (other, torch.optim.AdamW(other.parameters())),
    ):
        one(torch.ones(2, 3)).square().sum().backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(model.weight, other.weight)


def test_the_last_of_several_optimizers_steps_the_tables() -> None:
    pair = Pair(1)
    first, second = pair.optimizer(), pair.optimizer()
    second.param_groups[1]["lr"] = 0.0
    before = pair.rows("rows")
    loss_of(pair.model, batch_of(0, 0)).backward()
    with pytest.raises(StepError, match=r"another se\.Optimizer has been made"):
        first.step()
    second.step()
    assert torch.equal(pair.rows("rows"), before)
    assert not torch.equal(pair.rows("whole"), weight_of(pair.plain, "whole"))


def hooked(rank: int, world_size: int) -> list[str]:
    pair = Pair(world_size, dense=False)
    opt = pair.optimizer()
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    opt.step()
    return seen


def test_step_hooks_run() -> None:
    assert run_ranks(2, hooked) == [["before", "after"]] * 2
