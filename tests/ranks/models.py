"""Plain models as people write them, to be sharded by the tests; and a loss over the global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

F64 = torch.float64
USERS, ITEMS, COLUMNS = 23, 17, 4


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


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a plain model's weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10) -> list[str]:
    """What differs between two state dicts; nothing when they agree."""
    return list(_differences(found, expected, tolerance))


def _differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> Iterator[str]:
    if set(found) != set(expected):
        yield f"keys {sorted(found)} instead of {sorted(expected)}"
    for name in set(found) & set(expected):
        one, other = found[name].detach().double(), expected[name].detach().double()
        if one.shape != other.shape:
            yield f"{name} has shape {tuple(one.shape)} instead of {tuple(other.shape)}"
        elif not torch.allclose(one, other, rtol=tolerance, atol=tolerance):
            yield f"{name} differs by {float((one - other).abs().max()):.3g}"
