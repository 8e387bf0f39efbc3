"""A model of a user's beside its sharded self: both learn in the same loop and must end with the same weights.

The plain model learns the global batches in one process; the sharded one learns a rank's part of each, wrapped in whatever is
tried. `learn` is the loop of both, `agree` compares. All in float64, so that 1e-10 can be asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardembed as se

F64 = torch.float64
USERS, ITEMS, COLUMNS = 23, 17, 4
State = dict[str, torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Towers(nn.Module):
    """A table of users looked up by id, a table of items by bag, and a dense part."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        settings.setdefault("dtype", F64)
        self.user = nn.Embedding(USERS, COLUMNS, **settings)
        self.towers = nn.ModuleDict({"item": nn.EmbeddingBag(ITEMS, COLUMNS + 2, mode="sum", **settings)})
        self.head = nn.Sequential(nn.Linear(2 * COLUMNS + 2, 5), nn.Tanh(), nn.Linear(5, 1)).to(settings["dtype"])

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.user(user), self.towers["item"](item)], 1))


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def fsdp(model: nn.Module) -> nn.Module:
    """`Towers`, its dense part cut by FSDP2."""
    mesh = init_device_mesh("cpu", (se.world_size(),))
    fully_shard(model.head[0], mesh=mesh)
    return fully_shard(model, mesh=mesh, ignored_params=se.ignored(model))


def batches(steps: int, size: int = 12, seed: int = 3) -> list[Batch]:
    """Global batches: users, bags of items, labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, USERS, (size,), generator=generator),
            torch.randint(0, ITEMS, (size, 3), generator=generator),
            torch.randn(size, 1, generator=generator, dtype=F64),
        )
        for _ in range(steps)
    ]


def part(batch: Batch, rank: int, world_size: int) -> Batch:
    """A rank's even share of a global batch, so that the mean over ranks is the mean of the batch."""
    user, item, label = (tensor.tensor_split(world_size)[rank] for tensor in batch)
    return user, item, label


def parts(steps: int, rank: int, world_size: int) -> list[Batch]:
    """A rank's shares of `batches(steps)`."""
    return [part(batch, rank, world_size) for batch in batches(steps)]


def error(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The mean squared error over a batch."""
    user, item, label = batch
    return nn.functional.mse_loss(model(user, item), label)


def learn(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    data: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor] = error,
    ready: Callable[[Any], object] = lambda batch: None,
) -> list[torch.Tensor]:
    """A training loop as people write it; returns the losses. ready: called with the batch, when its gradients are there."""
    losses = []
    for batch in data:
        found = loss(model, batch)
        found.backward()
        ready(batch)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.append(found.detach())
    return losses


def weights_of(model: nn.Module) -> State:
    """Copies of a plain model's weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def whole_state(model: nn.Module) -> State:
    """The unsharded weights of a model that was sharded, and perhaps wrapped."""
    se.unshard(model)
    return {n: v.full_tensor() if isinstance(v, DTensor) else v.detach().clone() for n, v in model.state_dict().items()}


def agree(found: Iterable[State], expected: State, tolerance: float = 1e-10) -> None:
    """What every rank ended with is what the plain model did."""
    for rank, state in enumerate(found):
        wrong = list(_differences(state, expected, tolerance))
        assert not wrong, f"rank {rank}: {wrong}"


def _differences(found: State, expected: State, tolerance: float) -> Iterator[str]:
    if list(found) != list(expected):
        yield f"keys {list(found)} instead of {list(expected)}"
    for name in set(found) & set(expected):
        one, other = found[name].detach().double(), expected[name].detach().double()
        if one.shape != other.shape:
            yield f"{name} has shape {tuple(one.shape)} instead of {tuple(other.shape)}"
        elif not torch.allclose(one, other, rtol=tolerance, atol=tolerance):
            yield f"{name} differs by {float((one - other).abs().max()):.3g}"
