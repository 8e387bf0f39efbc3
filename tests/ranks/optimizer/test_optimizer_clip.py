"""se.clip_grad_norm_ is torch.nn.utils.clip_grad_norm_ over the unsharded model and the batch of all ranks."""

from __future__ import annotations

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.errors import ConfigError, NonFiniteGradientError, StepError
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.optimizing import NAMES, Pair, batch_of, held, loss_of, near, unchanged, weight_of

SGD = dict.fromkeys(NAMES, optim.SGD(lr=0.5))


def clip(rank: int, world_size: int, shared: bool, dense: bool, limits: list[float], norm_type: float = 2.0) -> None:
    pair = Pair(world_size, shared=shared, dense=dense)
    opt = pair.optimizer(micro_batches=2)
    for step in range(2):
        numbers = (2 * step, 2 * step + 1)
        for number in numbers:
            with pair.no_sync(number == numbers[0]):
                loss_of(pair.wrapped, batch_of(rank, number)).backward()
            pair.backward_plain(number)
        for limit in limits:
            norm = se.clip_grad_norm_(pair.wrapped, limit, norm_type)
            near(norm, torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), limit, norm_type), f"norm, limit {limit}")
            assert norm.shape == ()
        opt.step()
        opt.zero_grad()
        pair.step_plain(numbers)
    pair.compare(f"clipped to {limits}")


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3])
def test_norm_and_weights_are_those_of_the_unsharded_model(world_size: int) -> None:
    for shared, dense in ((False, True), (True, False)):
        run_ranks(world_size, clip, shared, dense, [0.1])
    run_ranks(world_size, clip, True, True, [0.2, 0.2, 0.01])  # again: the norm is now what the first call left
    run_ranks(world_size, clip, True, True, [torch.inf, 1e6])
    for norm_type in (1, 2.5, torch.inf):
        run_ranks(world_size, clip, True, True, [0.1, 0.05], norm_type)


@pytest.mark.parametrize("norm_type", [0, -torch.inf, torch.nan])
def test_a_norm_that_is_none_is_refused(norm_type: float) -> None:
    with pytest.raises(ConfigError, match=f"norm_type must be above 0, or inf, not {norm_type}"):
        se.clip_grad_norm_(torch.nn.Linear(2, 2), 1.0, norm_type)


def small_steps(rank: int, world_size: int) -> None:
    """SGD alone shows the clipped gradient itself; an adaptive step would forgive a factor."""
    pair = Pair(world_size, settings=SGD, dense=False)
    opt = pair.optimizer()
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    pair.backward_plain(0)
    before = [pair.rows(name) for name in NAMES]
    se.clip_grad_norm_(pair.wrapped, 0.01)
    opt.step()
    path = torch.cat([(pair.rows(name) - old).view(-1) for name, old in zip(NAMES, before, strict=True)]) / 0.5
    torch.testing.assert_close(path.norm(), torch.tensor(0.01, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_clipped_step_is_as_long_as_asked_for() -> None:
    run_ranks(2, small_steps)


def nothing(rank: int, world_size: int) -> None:
    """No backward yet, and gradients of zero."""
    pair = Pair(world_size, settings=SGD)
    opt = pair.optimizer()
    before = held(pair.model.tables)
    assert se.clip_grad_norm_(pair.wrapped, 1.0) == 0.0
    opt.step()
    (loss_of(pair.wrapped, batch_of(rank, 0)) * 0.0).backward()
    assert se.clip_grad_norm_(pair.wrapped, 1.0, error_if_nonfinite=True) == 0.0
    opt.step()
    unchanged(before, held(pair.model.tables), "gradients of zero")
    assert se.clip_grad_norm_(torch.nn.Linear(2, 2), 1.0) == 0.0


def test_nothing_to_clip_is_a_norm_of_0() -> None:
    for world_size in (1, 2):
        run_ranks(world_size, nothing)


def ill(rank: int, world_size: int, value: float, norm_type: float) -> None:
    """One rank's gradient of one element is not finite: with `error_if_nonfinite` all ranks raise and nothing has changed;
    without, all is scaled as torch does it.
    """
    pair = Pair(world_size, settings=SGD, dense=False)
    opt = pair.optimizer()
    numbers = [0]
    if rank == 0:
        pair.model.hooks["rows"] = lambda grad: grad.index_fill(1, torch.tensor(2), value)
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    with pytest.raises(NonFiniteGradientError, match=f"the gradient norm is {value}"):
        se.clip_grad_norm_(pair.wrapped, 1.0, norm_type, error_if_nonfinite=True)
    pair.backward_plain(0)
    weight = weight_of(pair.plain, "rows")
    assert weight.grad is not None
    weight.grad[batch_of(0, 0)["rows"].unique(), 2] = value
    norm = se.clip_grad_norm_(pair.wrapped, 1.0, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(pair.plain.parameters(), 1.0, norm_type)
    torch.testing.assert_close(norm, expected, equal_nan=True)
    opt.step()
    pair.step_plain(numbers)
    for name in NAMES:
        table = weight_of(pair.plain, name)
        touched = torch.cat([batch_of(r, 0)[name].view(-1) for r in range(world_size)]).unique()
        found = pair.rows(name)
        torch.testing.assert_close(found[touched], table.detach()[touched], equal_nan=True, rtol=1e-10, atol=1e-10)
        assert torch.isfinite(found).sum() >= found.numel() - touched.numel() * found.shape[1], f"untouched rows of {name}"


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("norm_type", [2.0, torch.inf])
def test_gradients_that_are_not_finite(value: float, norm_type: float) -> None:
    for world_size in (1, 2):
        run_ranks(world_size, ill, value, norm_type)


def too_early(rank: int, world_size: int) -> None:
    pair = Pair(world_size, shared=True, dense=False)
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    se.clip_grad_norm_(pair.wrapped, 1.0)
    with pytest.raises(StepError, match="clip after the last backward"):
        loss_of(pair.wrapped, batch_of(rank, 1)).backward()


def test_a_backward_after_clipping_is_refused() -> None:
    run_ranks(2, too_early)
