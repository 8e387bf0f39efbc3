"""A model that is trained, saved and loaded on any number of ranks: tables under every layout, a dense part, a schedule."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.errors import CheckpointError
from tests.held import Piece, copied, pieces, whole

ROWS, COLUMNS, BATCH = 37, 6, 24  # of the largest table; samples of all ranks together
LAYOUTS = ("row", "dealt", "column", "grid", "copied", "whole", "uneven")
OPTIMIZERS = {
    "SGD": se.optim.SGD(lr=0.1),
    "RowwiseAdagrad": se.optim.RowwiseAdagrad(lr=0.1),
    "Adam": se.optim.Adam(lr=0.05),
}


def placement(layout: str, rows: int, world_size: int) -> se.Placement:
    """A layout for a table, as far as the ranks go."""
    bounds = [1 + rows * rank // (2 * world_size) for rank in range(1, world_size)]
    made = {
        "row": se.row_wise(strided=False),
        "dealt": se.row_wise(),
        "column": se.column_wise(),
        "grid": se.grid(strips=2),
        "copied": se.replicated(),
        "whole": se.table_wise(rank=world_size - 1),
        "uneven": se.row_wise(bounds=bounds),
    }
    return made[layout]


class Model(nn.Module):
    """One table a layout, pooled and summed into a linear head. `turn` gives each table another layout."""

    def __init__(
        self,
        world_size: int,
        optimizer: str | None,
        turn: int,
        dtype: torch.dtype = torch.float64,
        layouts: tuple[str, ...] = LAYOUTS,
        rows: int = ROWS,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        sizes = {f"t{number}": rows - number for number in range(len(layouts))}
        tables = [se.TableConfig(name, size, COLUMNS, dtype=dtype) for name, size in sizes.items()]
        plan = {
            name: placement(layouts[(number + turn) % len(layouts)], size, world_size)
            for number, (name, size) in enumerate(sizes.items())
        }
        self.tables = se.EmbeddingCollection(
            tables, optimizer=OPTIMIZERS[optimizer] if optimizer else None, plan=plan, seed=3, deterministic=deterministic
        )
        torch.manual_seed(5)
        self.head = nn.Linear(COLUMNS, 1, dtype=dtype)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        pooled = self.tables(batch)
        self.seen += 1
        return (self.head(sum(pooled.values())) - 1).square().mean()


@dataclass
class Trained:
    """A model with all that trains it."""

    model: Model
    wrapped: nn.Module
    optimizer: se.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def save(self, folder: str, **more: Any) -> Any:
        return se.save_checkpoint(folder, self.wrapped, optimizer=self.optimizer, scheduler=self.scheduler, **more)

    def load(self, folder: str, **more: Any) -> Any:
        return se.load_checkpoint(folder, self.wrapped, optimizer=self.optimizer, scheduler=self.scheduler, **more)


def built(world_size: int, optimizer: str, turn: int, **more: Any) -> Trained:
    model = Model(world_size, optimizer, turn, **more)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world_size > 1 else model
    dense = torch.optim.AdamW(model.parameters(), lr=1e-2)
    whole = se.Optimizer(model, dense)
    return Trained(model, wrapped, whole, torch.optim.lr_scheduler.ExponentialLR(whole, gamma=0.9))


def train(job: Trained, rank: int, world_size: int, steps: range) -> list[float]:
    """Train on the global batches of these steps; returns the losses over all ranks."""
    comm = se.Comm.of()
    losses = []
    for step in steps:
        loss = job.wrapped(batch_of(job.model, step, rank, world_size))
        loss.backward()
        job.optimizer.step()
        job.optimizer.zero_grad()
        job.scheduler.step()
        total = comm.all_reduce("test: mean loss", loss.detach().to(torch.float64).clone())
        losses.append(float(total) / world_size)
    return losses


def batch_of(model: Model, step: int, rank: int, world_size: int) -> dict[str, Any]:
    """This rank's share of a step's global batch, which depends on the step alone."""
    rng = np.random.default_rng(step)
    share = BATCH // world_size
    batch = {}
    for table in model.tables.tables:
        ids = torch.from_numpy(rng.integers(table.num_embeddings, size=(BATCH, 3)))
        batch[table.name] = ids[rank * share : (rank + 1) * share]
    return batch


def contents(job: Trained) -> list[Piece]:
    """All that lies here: tables and dense parameters with their optimizer state, and the buffer."""
    found = [*pieces(job.model.tables), copied("seen", job.model.seen)]
    for name, parameter in job.model.head.named_parameters():
        found.append(copied(f"head.{name}", parameter))
        found += [copied(f"head.{name}.{key}", torch.as_tensor(value)) for key, value in job.optimizer.state[parameter].items()]
    return found


def equal(found: list[list[Piece]], expected: list[list[Piece]]) -> None:
    """What ranks hold makes the same tensors, whatever the ranks."""
    one, other = whole(found), whole(expected)
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no CheckpointError")


def loaded(world_size: int, folder: str, **more: Any) -> tuple[Any, list[Piece]]:
    job = built(world_size, "Adam", turn=2)
    restored = job.load(folder, **more)
    return restored, contents(job)


def load_alone(folder: Path, **more: Any) -> tuple[Any, list[list[Piece]]]:
    restored, held = loaded(1, str(folder), **more)
    return restored, [held]


@contextmanager
def small_files(here: bool) -> Iterator[None]:
    """Files of this process may not grow beyond 4 KiB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if here else soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
