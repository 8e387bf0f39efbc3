"""optimizer=None: shards are Parameters, stepped by torch optimizers, against the unsharded model on the global batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.store.own_parameters import ShardParameter
from tests.harness import run_ranks
from tests.ranks.beside import State, Towers, agree, batches, error, fsdp, learn, part, parts, seeded, weights_of, whole_state
from tests.ranks.convert.test_compose import PLAN, STEPS


class Outer(nn.Module):
    """What is wrapped is not what was sharded."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.tied = body.user  # the same table under another name

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.body(user, item)


def fsdp1(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


# Nothing but FSDP2 is told which parameters are shards.
WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "DDP around a parent": lambda model: DistributedDataParallel(Outer(model)),
    "replicate": replicate,
    "FSDP1": fsdp1,
    "FSDP2": fsdp,
}

CUTS: dict[str, dict[str, se.Placement]] = {
    "cut": PLAN,
    "dealt and whole": {"user": se.row_wise(), "towers.item": se.table_wise(0)},
    "copies": {"user": se.replicated(), "towers.item": se.row_wise()},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.3, "momentum": 0.5},
    "Adam": {"lr": 0.05},
    "Adagrad": {"lr": 0.1},
    "SparseAdam": {"lr": 0.05},
}


def build(sparse: bool, frozen: bool = False) -> nn.Module:
    model = seeded(lambda: Towers(sparse=sparse))
    model.user.weight.requires_grad_(not frozen)
    return model


def train(model: nn.Module, wrapped: nn.Module, name: str, rank: int, world_size: int, clip: float | None) -> None:
    """One optimizer over all there is; SparseAdam takes sparse gradients only, so the dense part has its own."""
    tables = [p for n, p in model.named_parameters() if not n.startswith("head") and p.requires_grad]
    dense = [p for n, p in model.named_parameters() if n.startswith("head")]
    optimizers = [getattr(torch.optim, name)(tables, **OPTIMIZERS[name]), torch.optim.SGD(dense, lr=0.1)]

    def clipped(_: Any) -> None:
        if clip is not None and world_size > 1:
            se.clip_grad_norm_(model, clip)
        elif clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        assert all(p.grad is None or p.grad.is_sparse == (name == "SparseAdam") for p in tables), "gradients of the wrong kind"

    learn(wrapped, optimizers, parts(STEPS, rank, world_size), ready=clipped)


def trained(rank: int, world_size: int, cut: str, name: str, wrap: str, clip: float | None, frozen: bool) -> State:
    sparse = name == "SparseAdam"
    model = build(sparse, frozen)
    se.shard(model, plan=CUTS[cut], verbose=False)
    shards = [parameter for parameter in model.parameters() if isinstance(parameter, ShardParameter)]
    assert se.ignored(model) == set(shards), "ignored() names other parameters than the shards"
    wrapped = WRAPS[wrap](model)
    train(model, wrapped, name, rank, world_size, clip)
    whole = FullyShardedDataParallel.summon_full_params(wrapped) if wrap == "FSDP1" else nullcontext()
    with whole:
        return whole_state(model)


def check(cut: str, name: str, wrap: str = "DDP", clip: float | None = None, frozen: bool = False) -> None:
    plain = build(name == "SparseAdam", frozen)
    train(plain, plain, name, 0, 1, clip)
    agree(run_ranks(2, trained, cut, name, wrap, clip, frozen), weights_of(plain))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("cut", CUTS)
def test_torch_optimizers_step_shards_as_they_step_whole_tables(cut: str, name: str) -> None:
    check(cut, name)


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "DDP"])
def test_shards_are_not_touched_by_any_wrapper(wrap: str) -> None:
    check("cut", "Adam", wrap=wrap)


def test_frozen_shards_stay() -> None:
    check("copies", "SGD", frozen=True)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["SGD", "SparseAdam"])
def test_clipping_counts_every_shard_of_every_rank_once(cut: str, name: str) -> None:
    if name == "SGD":  # torch's own clipping takes no sparse gradients
        check(cut, name, clip=0.05)
        check(cut, name, wrap="FSDP2", clip=0.05)
    else:
        assert len(set(run_ranks(2, norm, cut))) == 1


def norm(rank: int, world_size: int, cut: str) -> float:
    """The norm of sparse gradients; it must be that of dense ones."""
    found = []
    for sparse in (False, True):
        model = build(sparse)
        se.shard(model, plan=CUTS[cut], verbose=False)
        wrapped = DistributedDataParallel(model)  # has to live until the backward
        error(wrapped, part(batches(1)[0], rank, world_size)).backward()
        found.append(float(se.clip_grad_norm_(model, 0.05)))
        assert found[-1] > 0.1, "nothing to clip"
        again = float(se.clip_grad_norm_(model, 1.0))
        assert abs(again - 0.05) < 1e-6, "the gradients were not scaled"
    assert abs(found[0] - found[1]) < 1e-12, f"the norm of sparse gradients is {found[1]}, not {found[0]}"
    return found[0]


def compiled(rank: int, world_size: int) -> State:
    """The step of the optimizer compiled, as torch's tutorials have it."""
    model = se.shard(build(sparse=False), plan=CUTS["cut"], verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    learn(DistributedDataParallel(model), [optimizer], parts(STEPS, rank, world_size))
    return whole_state(model)


def test_a_compiled_optimizer_steps_shards() -> None:
    plain = build(sparse=False)
    learn(plain, [torch.optim.SGD(plain.parameters(), lr=0.3)], batches(STEPS))
    agree(run_ranks(2, compiled), weights_of(plain))
