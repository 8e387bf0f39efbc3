"""on_nonfinite: all ranks raise, skip or zero alike when one rank's gradient is inf or nan, of whatever table or the dense part."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.errors import NonFiniteGradientError
from tests.amount import exhaustive, sampled
from tests.harness import run_ranks
from tests.ranks.optimizing import NAMES, Pair, batch_of, held, loss_of, near, unchanged, weight_of

PLACES = (*NAMES, "dense")
SGD = dict.fromkeys(NAMES, optim.SGD(lr=0.5))


def spoil(pair: Pair, where: str, value: float) -> Callable[[], None]:
    """Make the gradient of a table's output, or of the dense part, hold `value` in its first column; returns how to stop."""
    if where != "dense":
        pair.model.hooks[where] = lambda grad: grad.index_fill(1, torch.tensor(0), value)
        return pair.model.hooks.clear
    head = pair.model.head
    assert head is not None
    return head.weight.register_hook(lambda grad: grad.index_fill(1, torch.tensor(0), value)).remove


def refuse(rank: int, world_size: int, policy: str, shared: bool, ddp: bool) -> list[str]:
    """Three steps, of which the middle one is spoilt on one rank; for every place in turn. Returns the errors' texts."""
    texts = []
    for turn, where in enumerate(PLACES):
        pair = Pair(world_size, shared=shared, ddp=ddp)
        opt = pair.optimizer(on_nonfinite=policy)
        # Not DDP: each rank has dense gradients of its own, and the policy must bring them to agree.
        for number in range(3):
            stop = spoil(pair, where, (torch.nan, torch.inf)[turn % 2]) if number == 1 and rank == turn % world_size else None
            loss_of(pair.wrapped, batch_of(rank, number)).backward()
            if stop:
                stop()
            before = held(pair.model)
            if number == 1 and policy == "raise":
                with pytest.raises(NonFiniteGradientError) as caught:
                    opt.step()
                texts.append(str(caught.value))
            else:
                opt.step()
            opt.zero_grad()
            if number == 1:
                unchanged(before, held(pair.model), f"{policy}: {where}")
            else:
                pair.backward_plain(number)
                pair.step_plain([number])
        if ddp:
            pair.compare(f"{policy}: {where}, one step later")
        assert opt.skipped == (policy == "skip")
    return texts


@pytest.mark.parametrize(("world_size", "policy"), sampled(product([2, 1, 3], ["raise", "skip"])))
def test_a_spoilt_step_changes_nothing_on_any_rank(world_size: int, policy: str) -> None:
    for shared, ddp in ((False, True), (True, False)):
        found = run_ranks(world_size, refuse, policy, shared, ddp)
        assert found == [found[0]] * world_size
        if policy == "skip":
            continue
        for where, text in zip(PLACES, found[0], strict=True):
            assert text.startswith("step 2: a gradient is inf or nan on some rank: ")
            assert ("the dense parameters" in text) == (where == "dense")
            for name in NAMES:
                assert (f"table(s) 'tables.{name}'." in text) == (name == where), text


def zero(rank: int, world_size: int, where: str, value: float) -> None:
    """The elements of the summed gradient that are not finite count as zero, as if torch.nan_to_num had been at the gradients of
    the unsharded model.
    """
    pair = Pair(world_size, settings=SGD)
    opt = pair.optimizer(on_nonfinite="zero")
    # Only one rank: rows that other ranks name too have finite contributions, which the sum loses.
    stop = spoil(pair, where, value) if rank == 0 else None
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    if stop:
        stop()
    opt.step()
    pair.backward_plain(0)
    spoilt = pair.plain.get_parameter("head.weight") if where == "dense" else weight_of(pair.plain, where)
    assert spoilt.grad is not None
    rows = torch.arange(len(spoilt)) if where == "dense" else batch_of(0, 0)[where].unique()
    spoilt.grad[rows, 0] = 0.0
    pair.step_plain([0])
    pair.compare(f"zero: {where} {value}")
    assert opt.skipped == 0


@pytest.mark.parametrize("world_size", [1, 2, exhaustive(3)])
def test_zero_acts_on_the_summed_gradient(world_size: int) -> None:
    for where, value in (("rows", torch.nan), ("columns", -torch.inf), ("copies", torch.nan), ("dense", torch.inf)):
        run_ranks(world_size, zero, where, value)


def clipped(rank: int, world_size: int, policy: str, value: float) -> None:
    """Clipping multiplies everything by the same nan, or by 0: the policy sees it, and with "zero" nothing moves."""
    pair = Pair(world_size, settings=SGD)
    opt = pair.optimizer(on_nonfinite=policy)
    stop = spoil(pair, "copies", value) if rank == world_size - 1 else None
    before = held(pair.model)
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    if stop:
        stop()
    assert not torch.isfinite(se.clip_grad_norm_(pair.wrapped, 1.0))
    opt.step()
    unchanged(before[2:], held(pair.model)[2:], f"{policy} after clipping a norm of {value}")
    for name in NAMES:
        near(pair.rows(name), weight_of(pair.plain, name), name)


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_a_norm_that_is_not_finite_moves_no_row(policy: str) -> None:
    for value in (torch.nan, torch.inf):
        run_ranks(2, clipped, policy, value)


def foreign(rank: int, world_size: int) -> None:
    """A parameter that another optimizer steps is clipped with the rest: its nan reaches the tables through the norm."""
    pair = Pair(world_size, settings=SGD)
    opt: Any = se.Optimizer(pair.wrapped, on_nonfinite="raise")
    stop = spoil(pair, "dense", torch.nan)
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    stop()
    se.clip_grad_norm_(pair.wrapped, 1.0)
    with pytest.raises(NonFiniteGradientError, match="the factor they were clipped by"):
        opt.step()


def test_a_norm_spoilt_by_another_optimizers_parameters_is_seen() -> None:
    run_ranks(2, foreign)


def nobody(rank: int, world_size: int) -> None:
    """Without a policy nobody looks: nan goes through, as in torch."""
    pair = Pair(world_size, settings=SGD, dense=False)
    opt = pair.optimizer()
    if rank == 0:
        spoil(pair, "rows", torch.nan)
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    opt.step()
    assert pair.rows("rows")[:, 0].isnan().any()
    assert not pair.rows("rows")[:, 1:].isnan().any()


def test_without_a_policy_nan_goes_through() -> None:
    run_ranks(2, nobody)


def name_tables(rank: int, world_size: int, packing: str, policy: str) -> tuple[str, ...]:
    """Tables of one slab, of which one rank's gradient spoils the second; the calls that the step makes are counted."""
    tables = [se.TableConfig(name, 20, 4, pooling="sum") for name in "abc"]
    emb = se.EmbeddingCollection(tables, optimizer=optim.SGD(lr=0.5), plan={name: se.row_wise(packing=packing) for name in "abc"})
    opt = se.Optimizer(emb, on_nonfinite=policy)
    outputs = emb({name: torch.tensor([[0, 19, 7], [3, 4, 19]]) for name in "abc"})
    if rank == world_size - 1:
        outputs["b"].register_hook(lambda grad: grad.index_fill(1, torch.tensor(2), torch.nan))
    torch.stack(list(outputs.values())).sum().backward()
    se.Comm.of().tally.clear()
    if policy == "skip":
        opt.step()
        where = opt.skipped_for
    else:
        with pytest.raises(NonFiniteGradientError) as caught:
            opt.step()
        where = caught.value.places
    assert se.Comm.of().tally.operations().get("all_reduce", 0) == (2 if world_size > 1 else 0)
    return where


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("packing", "policy"), [("unique", "raise"), ("bag", "skip")])
def test_of_tables_that_lie_together_those_that_are_meant_are_named(world_size: int, packing: str, policy: str) -> None:
    assert run_ranks(world_size, name_tables, packing, policy) == [("table(s) 'b'",)] * world_size
