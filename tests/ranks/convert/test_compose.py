"""Sharded models in other people's training code: each against the unsharded model on the global batch, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import shardembed as se
from shardembed.errors import CollectiveError, ConfigError, UnsupportedError
from tests.harness import run_ranks
from tests.ranks.models import F64, Towers, batches, differences, part, seeded, weights_of

PLAN = {"user": se.row_wise(), "towers.item": se.column_wise()}
STEPS = 3
State = dict[str, torch.Tensor]
Wrap = Callable[[nn.Module], nn.Module]


class Parent(nn.Module):
    """A model inside another one, which is what gets wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Towers()
        self.bias = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.body(user, item) + self.bias


class Recomputed(Towers):
    """Tables and tower run again in the backward instead of being kept."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.start = nn.Parameter(torch.zeros(1, dtype=F64))  # reentrant checkpoints need an input that requires grad

    def looked_up(self, user: torch.Tensor, item: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.user(user).tanh(), self.towers["item"](item)], 1) + start

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.looked_up, user, item, self.start, use_reentrant=self.reentrant))


class TwoTables(Recomputed):
    """A checkpoint of its own for each table."""

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        def first(start: torch.Tensor) -> torch.Tensor:
            return self.user(user).tanh() + start

        def second(start: torch.Tensor) -> torch.Tensor:
            return self.towers["item"](item).tanh() + start

        parts = [checkpoint(one, self.start, use_reentrant=self.reentrant) for one in (first, second)]
        return self.head(torch.cat(parts, 1))


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def fsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (se.world_size(),))
    fully_shard(model.head[0], mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=se.ignored(model))


def compiled(model: nn.Module) -> nn.Module:
    model.head.compile(backend="aot_eager")
    return DistributedDataParallel(model)


def compiled_whole(model: nn.Module) -> nn.Module:
    return torch.compile(DistributedDataParallel(model), backend="eager")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "towers": Towers,
    "parent": Parent,
    "recomputed": lambda: Recomputed(False),
    "recomputed, reentrant": lambda: Recomputed(True),
    "two recomputed": lambda: TwoTables(False),
    "two recomputed, reentrant": lambda: TwoTables(True),
}
WRAPS: dict[str, Wrap] = {
    "DDP": DistributedDataParallel,
    "FSDP2": fsdp,
    "compiled": compiled,
    "compiled whole": compiled_whole,
}


def plan_for(model: nn.Module) -> dict[str, se.Placement]:
    return {f"body.{name}": cut for name, cut in PLAN.items()} if isinstance(model, Parent) else PLAN


def inputs_for(model: nn.Module) -> Callable[..., dict[str, Any]]:
    prefix = "body." if isinstance(model, Parent) else ""
    return lambda user, item: {f"{prefix}user": user, f"{prefix}towers.item": item}


def expected(build: Callable[[], nn.Module], table: str = "SGD", clip: float | None = None) -> State:
    """The plain model's weights after training on the global batches."""
    model = seeded(build)
    names = [name for name, _ in model.named_parameters() if "user" in name or "item" in name]
    tables = [parameter for name, parameter in model.named_parameters() if name in names]
    dense = [parameter for name, parameter in model.named_parameters() if name not in names]
    optimizers = [getattr(torch.optim, table)(tables, lr=0.3), torch.optim.SGD(dense, lr=0.1)]
    for user, item, label in batches(STEPS):
        model.zero_grad()
        nn.functional.mse_loss(model(user, item), label).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
    return weights_of(model)


def whole_state(model: nn.Module) -> State:
    """The unsharded weights of a model that was sharded, and perhaps wrapped."""
    se.unshard(model)
    return {n: v.full_tensor() if isinstance(v, DTensor) else v.detach().clone() for n, v in model.state_dict().items()}


def trained(rank: int, world_size: int, model_name: str, wrap: str, announced: bool) -> State:
    model = seeded(MODELS[model_name], seed=rank)
    se.shard(
        model,
        optimizer=se.optim.SGD(lr=0.3),
        plan=plan_for(model),
        inputs=inputs_for(model) if announced else None,
        verbose=False,
    )
    for parameter in model.parameters():  # dense parameters are DDP's to spread; FSDP2 expects them alike
        torch.distributed.broadcast(parameter.data, 0)
    wrapped = WRAPS[wrap](model)
    optimizer = se.Optimizer(model, dense=torch.optim.SGD(model.parameters(), lr=0.1))
    for batch in batches(STEPS):
        user, item, label = part(batch, rank, world_size)
        nn.functional.mse_loss(wrapped(user, item), label).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_state(model)


@pytest.mark.parametrize("announced", [False, True], ids=["own calls", "inputs="])
@pytest.mark.parametrize(
    ("model", "wrap"),
    [
        ("towers", "DDP"),
        ("parent", "DDP"),
        ("towers", "FSDP2"),
        ("recomputed", "DDP"),
        ("recomputed, reentrant", "DDP"),
        ("two recomputed", "DDP"),
        ("two recomputed, reentrant", "DDP"),
        ("towers", "compiled"),
        ("towers", "compiled whole"),
    ],
)
def test_a_sharded_model_learns_what_the_plain_one_does(model: str, wrap: str, announced: bool) -> None:
    truth = expected(MODELS[model])
    for found in run_ranks(2, trained_without_warnings, model, wrap, announced):
        assert differences(found, truth) == []


def trained_without_warnings(rank: int, world_size: int, *args: Any) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        # Of torch itself, about itself.
        warnings.filterwarnings("ignore", module=r"torch\.")
        return trained(rank, world_size, *args)


class Pair(nn.Module):
    """Two tables of one size, so that their messages cannot be told apart by size."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Embedding(6, 2, dtype=F64)
        self.other = nn.Embedding(6, 2, dtype=F64)

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        return [self.one(ids), self.other(ids)]


def unused(rank: int, world_size: int, used: list[list[int]], announced: bool, group: Any = None) -> State:
    """Two steps in which rank r's loss is made of the outputs `used[r]` only."""
    model = seeded(Pair)
    inputs = (lambda ids: {"one": ids, "other": ids}) if announced else None
    how: dict[str, Any] = {"plan": se.row_wise(), "inputs": inputs, "gradient_reduction": "sum", "process_group": group}
    se.shard(model, optimizer=se.optim.SGD(lr=1.0), verbose=False, **how)
    optimizer = se.Optimizer(model)
    for _ in range(2):
        outputs = model(torch.arange(6))
        sum(outputs[number].sum() * (1 + rank) for number in used[rank]).backward()
        optimizer.step()
    return whole_state(model)


@pytest.mark.parametrize(("used", "announced"), [([[1], [0]], True), ([[0, 1], [0]], True), ([[1], [1]], False)])
def test_a_loss_may_leave_out_outputs_that_are_looked_up_together(used: list[list[int]], announced: bool) -> None:
    before = weights_of(seeded(Pair))
    truth = {
        name: before[name] - 2 * sum(1 + rank for rank, numbers in enumerate(used) if number in numbers)
        for number, name in enumerate(before)
    }
    for found in run_ranks(2, unused, used, announced):
        assert differences(found, truth) == []


def impatient(rank: int, world_size: int, used: list[list[int]]) -> str:
    """As `unused`, on groups of its own, which end broken."""
    group = dist.new_group(list(range(world_size)))
    se.Comm.of(group, timeout=2.0)
    with pytest.raises(CollectiveError) as caught:
        unused(rank, world_size, used, False, group)
    return str(caught.value)


def test_losses_of_different_lookups_are_an_error_on_all_ranks() -> None:
    """Their gradients have one size, so on one process group they would end in the wrong table."""
    for text in run_ranks(2, impatient, [[0], [1]]):
        assert "let every loss use all of them (add 0 * output.sum() where one does not matter)" in text, text
        assert "of forward call 1)" in text, text
        assert "of forward call 2)" in text, text


def test_a_rank_that_skips_a_backward_ends_in_a_report_and_not_in_a_hang() -> None:
    first, second = run_ranks(2, impatient, [[0, 1], [0]])
    assert "Rank 0 stood in stage 'backward: send gradients' (all_to_all, of forward call 2)" in second
    assert "Rank 1 stood in stage 'backward: send gradients' (all_to_all, of forward call 1)" in first


def amp(rank: int, world_size: int, announced: bool) -> tuple[State, list[float]]:
    """bfloat16 autocast and a GradScaler whose scale overflows at first."""
    model = seeded(lambda: Towers(dtype=torch.float32))
    inputs = inputs_for(model) if announced else None
    se.shard(model, optimizer=se.optim.SGD(lr=0.3), plan=PLAN, inputs=inputs, verbose=False)
    wrapped = DistributedDataParallel(model)
    optimizer = se.Optimizer(model, dense=torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    scales = []
    for batch in batches(STEPS):
        optimizer.zero_grad()
        user, item, label = part(batch, rank, world_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = wrapped(user, item)
            assert output.dtype == torch.bfloat16, "autocast did nothing"
            assert model.user(user).dtype == torch.float32, "autocast changed a table"
            loss = 64 * nn.functional.mse_loss(output.float(), label.float())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        se.clip_grad_norm_(model, 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return whole_state(model), scales


def plain_amp() -> State:
    model = seeded(lambda: Towers(dtype=torch.float32))
    tables = [model.user.weight, model.towers["item"].weight]
    groups = [{"params": tables, "lr": 0.3}, {"params": list(model.head.parameters()), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    for user, item, label in batches(STEPS)[1:]:  # the first step overflows
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = 64 * nn.functional.mse_loss(model(user, item).float(), label.float())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("announced", [False, True], ids=["own calls", "inputs="])
def test_autocast_and_a_grad_scaler_change_nothing_about_tables(announced: bool) -> None:
    truth = plain_amp()
    for found, scales in run_ranks(2, amp, announced):
        assert scales == [2.0**7] * STEPS, "one step overflows, on all ranks"
        # Batches of half the size round to bfloat16 in another way.
        assert differences(found, truth, tolerance=4e-3) == []


def look(rank: int, world_size: int) -> None:
    """Evaluation between training steps keeps nothing and changes nothing."""
    model = se.shard(seeded(Towers), optimizer=se.optim.SGD(), plan=PLAN, inputs=inputs_for(Towers()), verbose=False)
    optimizer, (user, item, _) = se.Optimizer(model), batches(1)[0]
    expected_output = seeded(Towers)(user, item)
    modes: list[Any] = [torch.no_grad, torch.inference_mode]
    for mode in modes:
        model.eval()
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                output = model(user, item)
                torch.testing.assert_close(output, expected_output, rtol=1e-12, atol=1e-12)
                assert not output.requires_grad, f"an output requires grad in {mode.__name__}"
        journey = model.user.journey
        assert not journey.pending.waiting, "gradients wait after an evaluation"
        assert all(slab.waiting() is None for slab in journey.slabs), "a slab keeps gradients after an evaluation"
        model.train()
        model(user, item).sum().backward()
        assert journey.pending.waiting, "a training step after an evaluation has no gradients"
        optimizer.zero_grad()


def test_evaluation_keeps_nothing() -> None:
    run_ranks(2, look)


def two_journeys(rank: int, world_size: int) -> State:
    """Two sharded models in one, made one after the other; the parent's other tables stay plain."""
    model = nn.Module()
    model.left, model.right = seeded(Towers, 1), seeded(Towers, 2)
    for side in (model.left, model.right):
        se.shard(side, optimizer=se.optim.SGD(lr=0.3), plan=PLAN, verbose=False)
    assert model.left.user.journey is not model.right.user.journey, "one journey"
    optimizer = se.Optimizer(model)
    for batch in batches(STEPS):
        user, item, label = part(batch, rank, world_size)
        nn.functional.mse_loss(model.left(user, item) - model.right(user, item), label).backward()
        se.clip_grad_norm_(model.left.towers, 1e9)
        optimizer.step()
    return whole_state(model)


def test_two_collections_in_one_model_keep_apart() -> None:
    model = nn.Module()
    model.left, model.right = seeded(Towers, 1), seeded(Towers, 2)
    tables = [side.user.weight for side in (model.left, model.right)]
    tables += [side.towers["item"].weight for side in (model.left, model.right)]
    optimizer = torch.optim.SGD(tables, lr=0.3)
    for user, item, label in batches(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model.left(user, item) - model.right(user, item), label).backward()
        optimizer.step()
    for found in run_ranks(2, two_journeys):
        assert differences(found, weights_of(model)) == []


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.float, lambda model: model.to(torch.bfloat16)])
def test_a_change_of_dtype_is_refused_with_the_way_out(change: Wrap) -> None:
    model = se.shard(Towers(), optimizer=se.optim.SGD(), verbose=False)
    with pytest.raises(UnsupportedError, match=r"'user' stays torch.float64.*before shard\(\).*dtype=torch"):
        change(model)


def test_what_changes_nothing_is_let_through() -> None:
    model = se.shard(Towers(), optimizer=se.optim.SGD(), verbose=False)
    assert model.to("cpu").double().cpu() is model
    with pytest.raises(UnsupportedError, match=r"'user' lies on cpu and does not move to cuda:0: pass device="):
        model.user._apply(lambda tensor: Elsewhere())


class Elsewhere:
    """What a tensor on a GPU says of itself."""

    dtype, device = F64, torch.device("cuda:0")


def wrapped_already(rank: int, world_size: int) -> None:
    wraps: list[tuple[str, Wrap]] = [("DistributedDataParallel", DistributedDataParallel), ("fully_shard", fully_shard)]
    for name, wrap in wraps:
        with pytest.raises(ConfigError, match=f"the model is wrapped by {name}.*comes first"):
            se.shard(wrap(Towers()), verbose=False)


def test_a_wrapped_model_is_refused() -> None:
    run_ranks(2, wrapped_already)


def test_a_forgotten_step_warns_and_names_the_tables() -> None:
    model = se.shard(Towers(), optimizer=se.optim.SGD(), verbose=False)
    user, item, _ = batches(1)[0]
    model(user, item).sum().backward()
    with pytest.warns(se.errors.MissedStepWarning, match=r"'user', 'towers.item'.*2 backward passes are waiting.*micro_batches="):
        model(user, item).sum().backward()


def test_two_losses_of_one_forward_are_one_pass() -> None:
    model = se.shard(Towers(), optimizer=se.optim.SGD(), inputs=inputs_for(Towers()), verbose=False)
    user, item, _ = batches(1)[0]
    output = model(user, item)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
