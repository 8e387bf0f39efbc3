"""A model with four tables, cut in four ways and stepped by four optimizers, beside the same model unsharded.

Both live in the rank's process: the plain one sees the batches of all ranks at once, and each of its tables is stepped by the
counterpart of its optimizer. Everything is in float64, so 1e-10 can be asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed import optim
from shardembed.modules.base import ShardedModule
from tests.held import pieces
from tests.oracle import LEARNERS
from tests.ranks.sharded import close

ROWS, COLUMNS, BATCH, BAG = 13, 6, 4, 3
NAMES = ("rows", "columns", "copies", "whole")
SETTINGS: dict[str, optim.TableOptimizer] = {
    "rows": optim.Adagrad(lr=0.3),
    "columns": optim.RowwiseAdagrad(lr=0.2),
    "copies": optim.Adam(lr=0.1),
    "whole": optim.SGD(lr=0.5),
}
DENSE_LR = 0.05
Batch = dict[str, torch.Tensor]
Hook = Callable[[torch.Tensor], torch.Tensor]


def plans(world_size: int) -> dict[str, se.Placement]:
    return {
        "rows": se.row_wise(),
        "columns": se.column_wise(),
        "copies": se.replicated(),
        "whole": se.table_wise(world_size - 1),
    }


class Model(nn.Module):
    """Pooled rows, and a layer over them where `dense` is asked for. `hooks` see the gradient of a table's output."""

    def __init__(self, dense: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.EmbeddingBag(ROWS, COLUMNS, mode="sum", dtype=dtype) for name in NAMES})
        self.head = nn.Linear(COLUMNS, 2, dtype=dtype) if dense else None
        self.hooks: dict[str, Hook] = {}

    def forward(self, ids: Batch) -> torch.Tensor:
        pooled = torch.zeros(())
        for number, (name, table) in enumerate(self.tables.items()):
            output = table(ids[name])
            if name in self.hooks:
                output.register_hook(self.hooks[name])
            pooled = pooled + (number + 1) * output
        return torch.tanh(pooled if self.head is None else self.head(pooled))


def loss_of(model: nn.Module, ids: Batch) -> torch.Tensor:
    return (model(ids) - 0.3).square().mean()


def batch_of(rank: int, number: int, size: int = BATCH) -> Batch:
    """A rank's ids. Row ROWS - 1 is in no batch; small rows repeat within bags, between them and between ranks."""
    draw = torch.Generator().manual_seed(1000 * number + rank)
    return {name: (torch.rand(size, BAG, generator=draw) ** 2 * (ROWS - 1)).long() for name in NAMES}


class Pair:
    """The model on the ranks, and the same model plain.

    Args:
        shared: one journey for all tables; else each has its own.
        ddp: wrap the model, as dense parameters need where there are several ranks.
    """

    def __init__(
        self,
        world_size: int,
        *,
        dense: bool = True,
        shared: bool = False,
        ddp: bool = True,
        dtype: torch.dtype = torch.float64,
        settings: Any = None,
        **options: Any,
    ) -> None:
        self.world_size = world_size
        self.settings: dict[str, optim.TableOptimizer] = {**SETTINGS, **(settings or {})}
        self.plain = Model(dense, dtype)
        model = copy.deepcopy(self.plain)
        self.model = self._converted(model, **options) if shared else self._rebuilt(model, **options)
        self.wrapped: nn.Module = DistributedDataParallel(model) if dense and ddp and world_size > 1 else model
        self.learners = {
            name: LEARNERS[type(one)](weight_of(self.plain, name), one)  # type: ignore[arg-type]
            for name, one in self.settings.items()
        }
        self.plain_dense = self.make_dense(self.plain)

    def _converted(self, model: Model, **options: Any) -> Model:
        return se.shard(
            model,
            optimizer={f"tables.{name}": one for name, one in self.settings.items()},
            plan={f"tables.{name}": placement for name, placement in plans(self.world_size).items()},
            inputs=lambda ids: {f"tables.{name}": ids[name] for name in NAMES},
            verbose=False,
            **options,
        )

    def _rebuilt(self, model: Model, **options: Any) -> Model:
        for name, placement in plans(self.world_size).items():
            rows = weight_of(self.plain, name).detach()
            settings: Any = {"mode": "sum", "optimizer": self.settings[name], "plan": placement, **options}
            model.tables[name] = se.EmbeddingBag.from_pretrained(rows, freeze=False, feature=f"tables.{name}", **settings)
        return model

    def make_dense(self, model: nn.Module) -> torch.optim.Optimizer | None:
        head = model.head
        return None if head is None else torch.optim.Adam(head.parameters(), lr=DENSE_LR)  # type: ignore[union-attr, arg-type]

    def optimizer(self, **options: Any) -> se.Optimizer:
        return se.Optimizer(self.wrapped, self.make_dense(self.model), **options)

    def no_sync(self, wanted: bool) -> Any:
        return self.wrapped.no_sync() if wanted and isinstance(self.wrapped, DistributedDataParallel) else nullcontext()

    def backward_plain(self, number: int, weight: float = 1.0) -> None:
        """Accumulate the gradient of the mean over all ranks' batches."""
        losses = [loss_of(self.plain, batch_of(rank, number)) for rank in range(self.world_size)]
        (torch.stack(losses).mean() * weight).backward()

    def step_plain(self, numbers: Iterable[int], rates: dict[str, float] | None = None) -> None:
        """Step on the gradients that wait, at the given learning rates ("dense" among them); `numbers` are the batches they
        are of.
        """
        numbers = list(numbers)
        for name, learner in self.learners.items():
            if rates is not None:
                set_rate(learner, rates[name])
            weight = weight_of(self.plain, name)
            grad = weight.grad
            assert grad is not None
            ids = torch.cat([batch_of(rank, n)[name].view(-1) for rank in range(self.world_size) for n in numbers])
            learner.step(grad, torch.bincount(ids, minlength=ROWS) > 0)
            weight.grad = None
        if self.plain_dense is not None:
            if rates is not None:
                for group in self.plain_dense.param_groups:
                    group["lr"] = rates["dense"]
            self.plain_dense.step()
        self.plain.zero_grad()

    def rows(self, name: str) -> torch.Tensor:
        """A whole table as it is on the ranks. Collective."""
        return self.model.tables[name].rows(f"tables.{name}", torch.arange(ROWS))  # type: ignore[operator, union-attr]

    def compare(self, what: str) -> None:
        """The two models are the same. Collective."""
        for name in NAMES:
            close(self.rows(name), weight_of(self.plain, name), None, f"{what}: weights of {name}")
        if self.model.head is not None and self.plain.head is not None:
            close(self.model.head.weight, self.plain.head.weight, None, f"{what}: dense weights")


def set_rate(learner: Any, rate: float) -> None:
    if hasattr(learner, "optimizer"):
        learner.optimizer.param_groups[0]["lr"] = rate
    else:
        learner.settings = replace(learner.settings, lr=rate)


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """The whole table of a plain model."""
    weight = model.get_submodule(f"tables.{name}").weight
    assert isinstance(weight, torch.Tensor)
    return weight


def held(model: nn.Module) -> list[torch.Tensor]:
    """Copies of all weights and all state this rank holds."""
    found = [parameter.detach().clone() for parameter in model.parameters()]
    for module in model.modules():
        found += [piece.values for piece in pieces(module)] if isinstance(module, ShardedModule) else []
    return found


def unchanged(before: list[torch.Tensor], after: list[torch.Tensor], what: str) -> None:
    assert len(before) == len(after), what
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)), f"{what}: something changed"
