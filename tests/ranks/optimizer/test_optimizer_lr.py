"""Learning rates: schedulers and edits by hand do to se.Optimizer what they do to a plain optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from shardembed import optim
from tests.harness import run_ranks
from tests.ranks.optimizing import DENSE_LR, NAMES, SETTINGS, Pair, batch_of, held, loss_of, unchanged

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, [lambda n, k=k: 1 / (1 + n * k) for k in range(len(opt.param_groups))]),
    "warm-up from 0": lambda opt: lr_scheduler.LambdaLR(opt, lambda n: n / 4),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, [0.1 * (k + 1) for k in range(len(opt.param_groups))], total_steps=8, cycle_momentum=False
    ),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4, eta_min=0.01),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.3),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.7)], [2]
    ),
}


def twin() -> torch.optim.Optimizer:
    """A plain optimizer with a group for the dense part and one a table."""
    rates = [DENSE_LR, *(SETTINGS[name].lr for name in NAMES)]
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def schedule(rank: int, world_size: int, names: list[str]) -> None:
    for name in names:
        pair = Pair(world_size, shared=name == "StepLR")
        opt, plain = pair.optimizer(), twin()
        scheduler, plain_scheduler = SCHEDULERS[name](opt), SCHEDULERS[name](plain)
        seen = []
        for number in range(5):
            rates = [group["lr"] for group in opt.param_groups]
            assert rates == [group["lr"] for group in plain.param_groups], f"{name}, step {number}"
            seen.append(tuple(rates))
            loss_of(pair.wrapped, batch_of(rank, number)).backward()
            opt.step()
            opt.zero_grad()
            plain.step()
            pair.backward_plain(number)
            pair.step_plain([number], dict(zip(("dense", *NAMES), rates, strict=True)))
            metric = [1.0] if name == "ReduceLROnPlateau" else []
            scheduler.step(*metric)
            plain_scheduler.step(*metric)
        assert len(set(seen)) > 2, f"{name} changed nothing"
        pair.compare(name)


@pytest.mark.parametrize(
    ("world_size", "names"), [(1, list(SCHEDULERS)), (2, ["LambdaLR", "StepLR", "ReduceLROnPlateau"]), (3, ["OneCycleLR"])]
)
def test_schedulers_change_every_rate_as_on_a_plain_optimizer(world_size: int, names: list[str]) -> None:
    run_ranks(world_size, schedule, names)


def edit(rank: int, world_size: int) -> None:
    pair = Pair(world_size)
    opt = pair.optimizer()
    rates = dict(zip(("dense", *NAMES), (0.02, 0.7, torch.tensor(0.1), 0.4, 0.3), strict=True))
    for group, rate in zip(opt.param_groups, rates.values(), strict=True):
        group["lr"] = rate
    loss_of(pair.wrapped, batch_of(rank, 0)).backward()
    opt.step()
    pair.backward_plain(0)
    pair.step_plain([0], {name: float(rate) for name, rate in rates.items()})
    pair.compare("after editing param_groups")


def test_edits_of_param_groups_take_effect() -> None:
    run_ranks(2, edit)


def stand_still(rank: int, world_size: int, settings: optim.TableOptimizer) -> None:
    """With a rate of 0 no formula but AdamW's moves a row, and that one only by its rate too; state may go on."""
    pair = Pair(world_size, dense=False, settings=dict.fromkeys(NAMES, settings))
    opt = pair.optimizer()
    before = [pair.rows(name) for name in NAMES]
    for number, rate in enumerate((0.0, 0.0, 0.1)):
        opt.param_groups[0]["lr"] = rate
        loss_of(pair.wrapped, batch_of(rank, number)).backward()
        opt.step()
        after = [pair.rows(name) for name in NAMES]
        if rate == 0.0:
            unchanged(before, after, f"{settings} at rate 0")
    for name, old, new in zip(NAMES, before, after, strict=True):
        touched = torch.cat([batch_of(r, 2)[name].view(-1) for r in range(world_size)]).unique()
        assert (old[touched] != new[touched]).any(1).all(), f"{settings}: a row of {name} did not move at rate 0.1"
        assert torch.isfinite(new).all(), f"{settings}: {name}"
        untouched = torch.ones(len(old), dtype=torch.bool)
        untouched[touched] = False
        assert torch.equal(old[untouched], new[untouched]), f"{settings}: an untouched row of {name} moved"


@pytest.mark.parametrize("name", optim.NAMES)
def test_a_rate_of_0_moves_nothing(name: str) -> None:
    run_ranks(2, stand_still, getattr(optim, name)(lr=0.2))


def share_groups(rank: int, world_size: int) -> None:
    alike = optim.SGD(lr=0.5)
    pair = Pair(world_size, settings={"rows": alike, "columns": alike})
    groups = pair.optimizer().param_groups
    assert [(group["lr"], group.get("optimizer"), group.get("tables")) for group in groups] == [
        (DENSE_LR, None, None),
        (0.5, "SGD", ["tables.columns", "tables.rows", "tables.whole"]),
        (0.1, "Adam", ["tables.copies"]),
    ]
    assert len(held(pair.model)) > 0


def test_tables_with_equal_settings_share_a_group() -> None:
    for world_size in (1, 2):
        run_ranks(world_size, share_groups)


def test_cycling_momentum_is_refused_as_on_an_optimizer_without() -> None:
    opt = Pair(1).optimizer()
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5)
