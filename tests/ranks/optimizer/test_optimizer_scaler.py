"""torch.amp.GradScaler over se.Optimizer: with a dense part, as the only optimizer, and when one rank overflows."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.errors import StepError
from tests.amount import exhaustive, sampled
from tests.harness import run_ranks
from tests.ranks.optimizing import NAMES, Pair, batch_of, held, loss_of, near, unchanged, weight_of

SCALE = 1024.0


def scaled(rank: int, world_size: int, shared: bool, dense: bool, order: str) -> None:
    """Scaled training against unscaled; `order` says what is done between backward and step."""
    pair = Pair(world_size, shared=shared, dense=dense)
    opt = pair.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    scales = []
    for number in range(4):
        scales.append(scaler.get_scale())
        scaler.scale(loss_of(pair.wrapped, batch_of(rank, number))).backward()
        pair.backward_plain(number)
        if order != "step":
            scaler.unscale_(opt)
        if order == "unscale, clip, step":
            norm = se.clip_grad_norm_(pair.wrapped, 0.05)
            near(norm, torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.05), "norm")
            assert norm > 0.05, "nothing was clipped"
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        pair.step_plain([number])
    pair.compare(order)
    assert scales == [SCALE, SCALE, 2 * SCALE, 2 * SCALE]


@pytest.mark.parametrize(("world_size", "order"), sampled(product([1, 2, 3], ["step", "unscale, step", "unscale, clip, step"])))
def test_scaled_training_is_unscaled_training(world_size: int, order: str) -> None:
    for shared, dense in ((False, True), (True, False)):
        run_ranks(world_size, scaled, shared, dense, order)


def overflow(rank: int, world_size: int, dense: bool, order: str, where: str) -> None:
    """At step 1 one rank's gradient is inf: no rank steps, every scale falls, and training goes on as if it had not been."""
    pair = Pair(world_size, dense=dense)
    opt = pair.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for number in range(3):
        ill = number == 1
        if ill and rank == world_size - 1:
            pair.model.hooks[where] = lambda grad: grad / 0.0
        scaler.scale(loss_of(pair.wrapped, batch_of(rank, number))).backward()
        before = held(pair.model)
        if order != "step":
            scaler.unscale_(opt)
        if order == "unscale, clip, step":
            norm = se.clip_grad_norm_(pair.wrapped, 0.5)
            assert bool(torch.isfinite(norm)) == (not ill)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        pair.model.hooks.clear()
        if ill:
            unchanged(before, held(pair.model), f"{order}, inf in {where}")
        else:
            pair.backward_plain(number)
            if order == "unscale, clip, step":
                torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), 0.5)
            pair.step_plain([number])
        assert scaler.get_scale() == (SCALE if number == 0 else SCALE / 2)
    pair.compare(f"{order}, after a step was skipped")


@pytest.mark.parametrize("order", ["step", exhaustive("unscale, step"), "unscale, clip, step"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(order: str) -> None:
    for dense, where in ((True, "rows"), (False, "copies"), (False, "columns")):
        run_ranks(2, overflow, dense, order, where)
    run_ranks(3, overflow, True, order, "whole")


def clip_first(rank: int, world_size: int) -> None:
    """Clipping an infinite norm scales by 0, which must not hide from the scaler what was not finite."""
    pair = Pair(world_size, dense=False)
    opt = pair.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    if rank == 0:
        pair.model.hooks["rows"] = lambda grad: torch.full_like(grad, torch.inf)
    before = held(pair.model)
    scaler.scale(loss_of(pair.wrapped, batch_of(rank, 0))).backward()
    assert se.clip_grad_norm_(pair.wrapped, 1.0) == torch.inf
    scaler.step(opt)
    scaler.update()
    unchanged(before, held(pair.model), "clipped, then scaled")
    assert scaler.get_scale() == SCALE / 2


def test_clipping_does_not_hide_an_overflow_from_the_scaler() -> None:
    run_ranks(2, clip_first)


def go_on(rank: int, world_size: int, after: str) -> str:
    """A backward on top of gradients that were unscaled, or found not finite, would add up what does not belong together."""
    pair = Pair(world_size, dense=False)
    opt = pair.optimizer(micro_batches=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    if rank == 0 and after == "a skipped step":
        pair.model.hooks["rows"] = lambda grad: grad * torch.nan
    scaler.scale(loss_of(pair.wrapped, batch_of(rank, 0))).backward()
    if after == "unscale_":
        scaler.unscale_(opt)
    else:
        scaler.step(opt)
        scaler.update()
    try:
        scaler.scale(loss_of(pair.wrapped, batch_of(rank, 1))).backward()
    except StepError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("after", ["unscale_", "a skipped step"])
def test_a_backward_on_top_of_unscaled_gradients_is_refused(after: str) -> None:
    for text in run_ranks(2, go_on, after):
        assert "had been unscaled or found not finite" in text


def look_early(rank: int, world_size: int) -> None:
    """Looking at what stands for the tables' gradients changes nothing, and what comes later is looked at too."""
    pair = Pair(world_size, dense=False)
    opt = pair.optimizer(micro_batches=2)
    stands = [p for group in opt.param_groups for p in group["params"]]
    assert [p.grad for p in stands] == [None] * len(NAMES)
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    assert [float(p.grad) for p in stands] == [1.0] * len(NAMES)
    if rank == 1:
        pair.model.hooks["columns"] = lambda grad: grad * torch.nan
    loss_of(pair.wrapped, batch_of(rank, 1)).backward()
    assert [bool(p.grad.isnan()) for p in stands] == [name == "columns" for name in NAMES]
    opt.zero_grad()
    assert [p.grad for p in stands] == [None] * len(NAMES)


def test_an_early_look_at_gradients_does_no_harm() -> None:
    run_ranks(2, look_early)


def autocast(rank: int, world_size: int) -> None:
    """bfloat16 autocast around both models, in float32: the layer over the tables rounds alike, the tables stay out of it."""
    pair = Pair(world_size, shared=True, dtype=torch.float32, settings=dict.fromkeys(NAMES, optim.SGD(lr=0.5)))
    opt = pair.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    ids = [batch_of(r, 0) for r in range(world_size)]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = pair.wrapped(ids[rank]), [pair.plain(one) for one in ids]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected[rank])
    scaler.scale((found.float() - 0.3).square().mean()).backward()
    scaler.step(opt)
    losses = [(one.float() - 0.3).square().mean() for one in expected]
    torch.stack(losses).mean().backward()
    before = {name: weight_of(pair.plain, name).detach().clone() for name in NAMES}
    pair.step_plain([0])
    for name in NAMES:
        wanted = weight_of(pair.plain, name).detach()
        # A unit of bfloat16 of the path: the gradients of the layer are rounded to it before they are added up.
        bound = float((wanted - before[name]).abs().max()) * 2**-7
        torch.testing.assert_close(pair.rows(name), wanted, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")
        assert bound > 1e-6, "nothing moved"


def test_autocast_around_the_model() -> None:
    run_ranks(2, autocast)
