"""torch's own tools around the shards of `optimizer=None`: each does what it does to whole tables, or is refused on all ranks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.errors import CheckpointError, ConfigError, StepError, UnsupportedError
from shardembed.store.guarded import ShardGradient
from tests.harness import run_ranks
from tests.ranks.beside import State, Towers, agree, batches, error, fsdp, part, parts, seeded, weights_of, whole_state
from tests.ranks.convert.test_compose_own_optimizer import CUTS, WRAPS

ON_ONE = {"user": se.table_wise(0), "towers.item": se.table_wise(0)}  # rank 1 has no rows at all


def sharded(plan: Any = "auto", **settings: Any) -> nn.Module:
    return se.shard(seeded(Towers), plan=plan, verbose=False, **settings)


def with_gradients(plan: Any, rank: int, world_size: int) -> nn.Module:
    """A sharded model after a backward over the global batch."""
    model = sharded(plan)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    error(wrapped, part(batches(1)[0], rank, world_size)).backward()
    return model


def plain_with_gradients() -> nn.Module:
    model = seeded(Towers)
    error(model, batches(1)[0]).backward()
    return model


def fully_sharded(rank: int, world_size: int) -> None:
    """Refused, by name, before a row has changed."""
    model = sharded(CUTS["cut"])
    before = [local.weights.clone() for local in model.user.local_shards()]
    with pytest.raises(UnsupportedError, match=r"'user'.*ignored_params=se.ignored\(module\)"):
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    for old, local in zip(before, model.user.local_shards(), strict=True):
        assert torch.equal(old, local.weights), "fully_shard has changed rows"


def nothing_dense(rank: int, world_size: int) -> None:
    model = nn.Sequential(se.Embedding(8, 2, optimizer=None))
    with pytest.raises(ConfigError, match="nothing to do here: beside the shards of"):
        DistributedDataParallel(model)


def test_wrappers_that_cannot_serve_say_so() -> None:
    run_ranks(2, fully_sharded)
    run_ranks(2, nothing_dense)


def norms(rank: int, world_size: int, plan: Any) -> None:
    model = with_gradients(plan, rank, world_size)
    grads = [parameter.grad for parameter in model.parameters()]
    calls: list[Callable[[], Any]] = [
        lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
        lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True),
        lambda: nn.utils.get_total_norm(grads, norm_type=torch.inf),
        lambda: sum(grad.data.norm(2) ** 2 for grad in grads),  # by hand
        lambda: [torch.norm(grad) for grad in grads],
        lambda: [torch.linalg.norm(grad.detach()) for grad in grads],
    ]
    for call in calls:
        with pytest.raises(StepError, match=r"of table '(user|towers.item)'.*Use se.clip_grad_norm_\(model, max_norm\)"):
            call()
    for grad in grads:
        if type(grad) is not torch.Tensor:
            with pytest.raises(StepError, match="a collective was called"):
                dist.all_reduce(grad)
    found = se.clip_grad_norm_(model, torch.inf)
    expected = nn.utils.get_total_norm([parameter.grad for parameter in plain_with_gradients().parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("plan", [CUTS["cut"], CUTS["copies"], ON_ONE], ids=["cut", "copies", "on one"])
def test_a_norm_of_one_ranks_rows_is_refused_on_all_ranks(plan: Any) -> None:
    run_ranks(2, norms, plan)


@pytest.mark.parametrize("sparse", [False, True])
def test_copies_of_a_shards_gradient_are_ordinary_tensors(sparse: bool) -> None:
    plain = torch.eye(3).to_sparse() if sparse else torch.eye(3)
    gradient = ShardGradient.of(plain, "user", se.Comm.of())
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    copies = [copy.deepcopy(gradient), pickle.loads(pickle.dumps(gradient)), torch.load(file), gradient.clone(), 1.0 * gradient]
    for one in copies:
        assert type(one) is torch.Tensor
        torch.testing.assert_close(one, plain)


def clipped_by_torch(rank: int, world_size: int, plan: Any, by: str) -> State:
    model = with_gradients(plan, rank, world_size)
    clip_by_torch(model, by)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return whole_state(model)


def clip_by_torch(model: nn.Module, by: str) -> None:
    if by == "value":
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
    elif by == "value, foreach":
        nn.utils.clip_grad_value_(model.parameters(), 0.01, foreach=True)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)


EVERYWHERE = {"user": se.replicated(), "towers.item": se.replicated()}


@pytest.mark.parametrize(
    ("world_size", "plan", "by"),
    [(2, CUTS["cut"], "value"), (2, ON_ONE, "value, foreach"), (2, EVERYWHERE, "norm"), (1, CUTS["cut"], "norm")],
)
def test_clipping_of_torchs_that_is_right_is_let_through(world_size: int, plan: Any, by: str) -> None:
    plain = plain_with_gradients()
    unclipped = [parameter.grad.clone() for parameter in plain.parameters()]
    clip_by_torch(plain, by)
    assert not all(torch.equal(old, new.grad) for old, new in zip(unclipped, plain.parameters(), strict=True)), "nothing clipped"
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    agree(run_ranks(world_size, clipped_by_torch, plan, by), weights_of(plain))


REFUSED: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adafactor": torch.optim.Adafactor,
    "Muon": torch.optim.Muon,
    "LBFGS": torch.optim.LBFGS,
    "ZeroRedundancyOptimizer": lambda parameters: ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.1),
}


def step_with(rank: int, world_size: int, names: list[str], plan: Any, refused: bool) -> None:
    for name in names:
        model = with_gradients(plan, rank, world_size)
        before = [local.weights.clone() for local in model.user.local_shards()]
        optimizer = REFUSED[name]([*model.user.parameters(), *model.towers.parameters()])
        if refused:
            with pytest.raises(UnsupportedError, match=f"^{name} .*'towers.item', 'user'"):
                optimizer.step(lambda: torch.zeros(()))
        else:
            optimizer.step(lambda: torch.zeros(()))
        for old, local in zip(before, model.user.local_shards(), strict=True):
            assert torch.equal(old, local.weights) == refused, f"{name} has changed rows, or none"


def test_optimizers_that_need_more_than_a_shard_are_refused_before_they_step() -> None:
    run_ranks(2, step_with, list(REFUSED), CUTS["dealt and whole"] | {"towers.item": se.column_wise()}, True)
    run_ranks(2, step_with, ["LBFGS", "ZeroRedundancyOptimizer"], ON_ONE, True)
    run_ranks(1, step_with, ["Adafactor", "Muon"], CUTS["cut"], False)


def factored(rank: int, world_size: int) -> State:
    model = with_gradients(ON_ONE, rank, world_size)
    torch.optim.Adafactor(model.parameters(), lr=0.1).step()
    return whole_state(model)


def test_an_optimizer_of_whole_matrices_steps_whole_tables() -> None:
    plain = plain_with_gradients()
    torch.optim.Adafactor(plain.parameters(), lr=0.1).step()
    agree(run_ranks(2, factored), weights_of(plain))


def stands_for(rank: int, world_size: int) -> None:
    """What stands in se.Optimizer for the tables' gradients is not their gradient."""
    model = sharded(CUTS["cut"], optimizer=se.optim.SGD())
    optimizer = se.Optimizer(model, dense=torch.optim.SGD(model.parameters(), lr=0.1))
    user, item, _ = batches(1)[0]
    model(user, item).sum().backward()
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for clip, problem in (
        (lambda: nn.utils.clip_grad_norm_(held, 0.1), r"the norm was asked of what stands in se.Optimizer"),
        (lambda: nn.utils.clip_grad_value_(held, 0.1), "clipping by value met what stands in se.Optimizer"),
        (lambda: nn.utils.clip_grad_value_(held, 0.1, foreach=True), "clipping by value met what stands in se.Optimizer"),
    ):
        with pytest.raises(StepError, match=problem):
            clip()


def test_what_stands_for_gradients_is_not_clipped() -> None:
    for world_size in (1, 2):
        run_ranks(world_size, stands_for)


def clipped_beside_fsdp(rank: int, world_size: int, optimizer: se.optim.TableOptimizer | None, norm_type: float) -> list[float]:
    """The norm, and again when all has been scaled by it."""
    model = sharded(CUTS["copies"], optimizer=optimizer)
    wrapped = fsdp(model)
    error(wrapped, part(batches(1)[0], rank, world_size)).backward()
    return [float(se.clip_grad_norm_(model, limit, norm_type)) for limit in (0.05, torch.inf)]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, torch.inf])
@pytest.mark.parametrize("optimizer", [None, se.optim.SGD()], ids=["own", "ours"])
def test_clipping_counts_what_fully_shard_has_cut(optimizer: se.optim.TableOptimizer | None, norm_type: float) -> None:
    plain = plain_with_gradients()
    norm = float(nn.utils.clip_grad_norm_(plain.parameters(), 0.05, norm_type))
    assert norm > 0.1, "nothing to clip"
    for found in run_ranks(2, clipped_beside_fsdp, optimizer, norm_type):
        assert found == pytest.approx([norm, 0.05], rel=1e-5), "1e-6 is added to a norm"


Optimizers = Callable[[nn.Module], list[torch.optim.Optimizer]]


def tables_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if not name.startswith("head")]


SCALED: dict[str, Optimizers] = {
    "one for all": lambda model: [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)],
    "one each": lambda model: [torch.optim.Adagrad(tables_of(model)), torch.optim.SGD(model.head.parameters(), lr=0.1)],
    "fused": lambda model: [torch.optim.Adam(model.parameters(), fused=True)],
    "sparse": lambda model: [torch.optim.SparseAdam(tables_of(model)), torch.optim.SGD(model.head.parameters(), lr=0.1)],
}


def scaled(model: nn.Module, wrapped: nn.Module, name: str, rank: int, world_size: int) -> list[float]:
    """Train with a scaler; at the second step the gradient of the last sample's user is inf. The scales."""
    optimizers, scaler = SCALED[name](model), torch.amp.GradScaler("cpu", init_scale=64.0)
    scales: list[float] = []

    def overflow(grad: torch.Tensor) -> torch.Tensor:
        return grad.index_fill(0, torch.tensor(len(grad) - 1), torch.inf) if len(scales) == 1 and rank == world_size - 1 else grad

    def watch(_module: nn.Module, _arguments: Any, output: torch.Tensor) -> None:
        output.register_hook(overflow)

    model.user.register_forward_hook(watch)
    for batch in parts(3, rank, world_size):
        scaler.scale(error(wrapped, batch)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def scaled_on_ranks(rank: int, world_size: int, name: str, plan: Any, wrap: str) -> tuple[list[float], State]:
    model = se.shard(seeded(lambda: Towers(sparse=name == "sparse")), plan=plan, verbose=False)
    wrapped = WRAPS[wrap](model) if world_size > 1 else model
    return scaled(model, wrapped, name, rank, world_size), whole_state(model)


@pytest.mark.parametrize("plan", [CUTS["cut"], CUTS["copies"], ON_ONE], ids=["cut", "copies", "on one"])
@pytest.mark.parametrize("name", SCALED)
def test_a_scaler_finds_on_every_rank_what_it_finds_on_any(name: str, plan: Any) -> None:
    plain = seeded(lambda: Towers(sparse=name == "sparse"))
    scales = scaled(plain, plain, name, 0, 1)
    assert scales == [64.0, 32.0, 32.0], "nothing has overflown"
    for world_size, wrap in [(1, "DDP"), (2, "DDP"), *([(2, "FSDP2")] if name == "one for all" else [])]:
        found = run_ranks(world_size, scaled_on_ranks, name, plan, wrap)
        assert [mine for mine, _ in found] == [scales] * world_size
        agree([state for _, state in found], weights_of(plain), tolerance=1e-9)


ASKS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "get_state_dict": state_dict.get_state_dict,
    "get_optimizer_state_dict": state_dict.get_optimizer_state_dict,
    "flattened": lambda model, optimizer: state_dict.get_optimizer_state_dict(
        model, optimizer, options=state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
    ),
    "set_state_dict": lambda model, optimizer: state_dict.set_state_dict(
        model, optimizer, model_state_dict=state_dict.get_model_state_dict(model), optim_state_dict=plain_state()
    ),
    "set_optimizer_state_dict": lambda model, optimizer: state_dict.set_optimizer_state_dict(model, optimizer, plain_state()),
}


def plain_state() -> Any:
    plain = plain_with_gradients()
    optimizer = torch.optim.Adam(plain.parameters())
    optimizer.step()
    return state_dict.get_optimizer_state_dict(plain, optimizer)


def asked_for_state(rank: int, world_size: int, ours: bool, stepped: bool) -> None:
    model = sharded(ON_ONE, optimizer=se.optim.Adagrad() if ours else None)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters())
    optimizer = se.Optimizer(model, dense=optimizer) if ours else optimizer
    if stepped:
        model(*batches(1)[0][:2]).sum().backward()
        optimizer.step()
    for ask in ASKS.values():
        with pytest.raises(CheckpointError, match=r"asks for the state of (se.Optimizer|Adam).*se.save_checkpoint\(folder"):
            ask(model, optimizer)
    weights = state_dict.get_model_state_dict(model)
    assert list(weights) == list(Towers().state_dict())
    state_dict.set_model_state_dict(model, weights)
    own = optimizer.state_dict()  # for who keeps it by rank
    optimizer.load_state_dict(own)


def test_torchs_checkpoints_of_an_optimizer_are_refused_where_it_steps_tables() -> None:
    for stepped in (False, True):
        run_ranks(1, asked_for_state, True, stepped)
        run_ranks(2, asked_for_state, True, stepped)
        run_ranks(2, asked_for_state, False, stepped)


def test_torchs_checkpoints_of_an_optimizer_serve_where_one_rank_has_all() -> None:
    model = with_gradients(CUTS["copies"], 0, 1)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    found, expected = state_dict.get_optimizer_state_dict(model, optimizer), plain_state()
    for name in ("user.weight", "towers.item.weight"):
        torch.testing.assert_close(found["state"][name]["exp_avg"], expected["state"][name]["exp_avg"])
    state_dict.set_optimizer_state_dict(model, optimizer, expected)
