"""Micro-batches add up to the large batch; update="backward" steps at once, by the same numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.errors import MissedStepWarning, StepError
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.optimizing import NAMES, SETTINGS, Pair, batch_of, loss_of

MICRO = 3


def accumulate(rank: int, world_size: int, shared: bool, settings: dict[str, optim.TableOptimizer]) -> None:
    pair = Pair(world_size, shared=shared, settings=settings)
    opt = pair.optimizer(micro_batches=MICRO)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissedStepWarning)
        for step in range(2):
            numbers = range(step * MICRO, (step + 1) * MICRO)
            for number in numbers:
                with pair.no_sync(number != numbers[-1]):
                    (loss_of(pair.wrapped, batch_of(rank, number)) / MICRO).backward()
                pair.backward_plain(number, 1 / MICRO)
            opt.step()
            opt.zero_grad()
            pair.step_plain(numbers)
    pair.compare("micro-batches")


@pytest.mark.parametrize("world_size", [1, 2, exhaustive(3)])
def test_micro_batches_are_one_large_batch(world_size: int) -> None:
    turned = dict(zip(NAMES, [SETTINGS[name] for name in ("columns", "copies", "columns", "rows")], strict=True))
    for shared, settings in ((False, SETTINGS), (True, turned)):
        run_ranks(world_size, accumulate, shared, settings)


def one_batch(rank: int, world_size: int, parts: int) -> list[torch.Tensor]:
    """A batch in one piece or in several, each a share of the mean."""
    pair = Pair(world_size)
    opt = pair.optimizer(micro_batches=parts)
    whole = batch_of(rank, 0, 8)
    for part in range(parts):
        rows = slice(part * 8 // parts, (part + 1) * 8 // parts)
        with pair.no_sync(part < parts - 1):
            (loss_of(pair.wrapped, {name: ids[rows] for name, ids in whole.items()}) / parts).backward()
    opt.step()
    return [pair.rows(name) for name in NAMES]


def test_a_batch_in_pieces_is_the_batch() -> None:
    whole, pieces = run_ranks(2, one_batch, 1), run_ranks(2, one_batch, 4)
    for here, there in zip(whole[0], pieces[1], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-10)


def forget(rank: int, world_size: int) -> list[list[str]]:
    """Texts of the warnings at each of some backward passes."""
    pair = Pair(world_size, shared=True, dense=False)
    heard = []
    opt = pair.optimizer(micro_batches=2)
    for number in range(5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss_of(pair.wrapped, batch_of(rank, number)).backward()
        heard.append([str(one.message) for one in caught if one.category is MissedStepWarning])
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissedStepWarning)
        for _ in range(2):
            loss_of(pair.wrapped, batch_of(rank, 0)).backward()
        opt.step()
        loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    return heard


def test_a_forgotten_step_is_warned_of_once() -> None:
    for heard in run_ranks(2, forget):
        assert [len(texts) for texts in heard] == [0, 0, 1, 0, 0]
        assert "3 backward passes" in heard[2][0]
        assert "micro_batches" in heard[2][0]


def siamese(rank: int, world_size: int, update: str) -> torch.Tensor | str:
    """One table looked up twice in a forward: that is one backward pass."""
    table = se.EmbeddingBag(9, 4, plan=se.row_wise(), optimizer=optim.Adagrad(lr=0.3), dtype=torch.float64, update=update)  # type: ignore[arg-type]
    opt = se.Optimizer(table)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissedStepWarning)
        for number in range(2):
            ids = [torch.tensor([[rank, 3, number]]), torch.tensor([[3, 3, rank + 1]])]
            loss = (table(ids[0]) * table(ids[1])).sum()
            try:
                loss.backward()
            except StepError as error:
                return str(error)
            opt.step()
    return table.rows("embedding", torch.arange(9))


def test_a_table_looked_up_twice_in_a_forward_takes_one_step() -> None:
    weight = torch.nn.Parameter(run_ranks(1, start)[0])
    plain = torch.optim.Adagrad([weight], lr=0.3)
    for number in range(2):
        losses = []
        for rank in range(2):
            one, other = weight[[rank, 3, number]].mean(0), weight[[3, 3, rank + 1]].mean(0)
            losses.append((one * other).sum())
        torch.stack(losses).mean().backward()
        plain.step()
        plain.zero_grad()
    for found in run_ranks(2, siamese, "step"):
        torch.testing.assert_close(found, weight.detach(), rtol=1e-10, atol=1e-10)


def test_with_update_backward_a_second_lookup_is_refused() -> None:
    for text in run_ranks(2, siamese, "backward"):
        assert "looked up twice in a forward" in text
        assert "update='step'" in text


def start(rank: int, world_size: int) -> torch.Tensor:
    return se.EmbeddingBag(9, 4, dtype=torch.float64).rows("embedding", torch.arange(9))


def at_once(rank: int, world_size: int, shared: bool) -> None:
    """Every backward is a step of the tables; the scheduler's rates count, also before Optimizer.step is called."""
    pair = Pair(world_size, shared=shared, update="backward")
    opt = pair.optimizer()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.6)
    for number in range(4):
        rates = dict(zip(("dense", *NAMES), [group["lr"] for group in opt.param_groups], strict=True))
        loss_of(pair.wrapped, batch_of(rank, number)).backward()
        before = [pair.rows(name) for name in NAMES]
        opt.step()
        opt.zero_grad()
        for name, rows in zip(NAMES, before, strict=True):
            assert torch.equal(rows, pair.rows(name)), f"step moved {name} again"
        scheduler.step()
        pair.backward_plain(number)
        pair.step_plain([number], rates)
        pair.compare(f"update='backward', step {number}")
    assert rates["rows"] == pytest.approx(0.3 * 0.6**3)


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3])
def test_update_backward_makes_the_same_steps(world_size: int) -> None:
    for shared in (False, True):
        run_ranks(world_size, at_once, shared)


def refuse(rank: int, world_size: int, dense: bool) -> None:
    pair = Pair(world_size, dense=dense, update="backward")
    with pytest.raises(se.errors.ConfigError, match="too late for update='backward'"):
        pair.optimizer(on_nonfinite="skip")
    opt = pair.optimizer()
    with pytest.raises(StepError, match="clipping needs update='step'"):
        se.clip_grad_norm_(pair.wrapped, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(2):
        scaler.scale(loss_of(pair.wrapped, batch_of(rank, 0))).backward()
        with pytest.raises(StepError, match="use update='step' with a GradScaler"):
            scaler.step(opt)


@pytest.mark.parametrize("dense", [True, False])
def test_update_backward_refuses_what_comes_too_late(dense: bool) -> None:
    run_ranks(2, refuse, dense)


def two_losses(rank: int, world_size: int) -> torch.Tensor:
    """One forward below two losses, each with a step of its own."""
    emb = se.Embedding(13, 3, optimizer=optim.SGD(lr=0.5), plan=se.row_wise(), dtype=torch.float64)
    opt = se.Optimizer(emb)
    before = emb.rows("embedding", torch.arange(13))
    output = emb(torch.arange(13))
    output.sum().backward(retain_graph=True)
    opt.step()
    opt.zero_grad()
    (2 * output.sum()).backward()
    opt.step()
    return before - emb.rows("embedding", torch.arange(13))


def test_the_second_loss_of_a_forward_gets_its_step_too() -> None:
    for moved in run_ranks(2, two_losses):
        torch.testing.assert_close(moved, torch.full((13, 3), 1.5, dtype=torch.float64), rtol=0, atol=1e-10)
