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

ROWS, COLUMNS, BATCH = 37, 6, 24  # of the largest table; samples of all ranks together
LAYOUTS = ("row", "strided", "column", "grid", "copied", "whole", "uneven")
OPTIMIZERS = {
    "SGD": se.optim.SGD(lr=0.1),
    "RowwiseAdagrad": se.optim.RowwiseAdagrad(lr=0.1),
    "Adam": se.optim.Adam(lr=0.05),
}


def placement(layout: str, rows: int, world_size: int) -> se.Placement:
    """A layout for a table, as far as the ranks go."""
    bounds = [1 + rows * rank // (2 * world_size) for rank in range(1, world_size)]
    made = {
        "row": se.row_wise(),
        "strided": se.row_wise(strided=True),
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


def contents(job: Trained) -> dict[str, list[tuple[range, range, np.ndarray]]]:
    """All tensors that lie here, in pieces, by their key: (rows, columns, values)."""
    found: dict[str, list[tuple[range, range, np.ndarray]]] = {}
    for local in job.model.tables.local_shards():
        shard = local.shard
        key = f"tables.{local.table}.weight"
        found.setdefault(key, []).append((shard.rows, shard.columns, local.weights.clone().numpy()))
        for name, state in local.state.items():
            columns, values = (shard.columns, state) if state.dim() == 2 else (range(1), state.unsqueeze(1))
            found.setdefault(f"{key}.{name}", []).append((shard.rows, columns, values.clone().numpy()))
    for name, parameter in job.model.head.named_parameters():
        found[f"head.{name}"] = [_whole(parameter.detach())]
        for state, value in job.optimizer.state[parameter].items():
            found[f"head.{name}.{state}"] = [_whole(torch.as_tensor(value))]
    found["seen"] = [_whole(job.model.seen)]
    return found


def _whole(tensor: torch.Tensor) -> tuple[range, range, np.ndarray]:
    values = tensor.clone().numpy().reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    return range(values.shape[0]), range(values.shape[1]), values


def assembled(of_ranks: list[dict[str, list[tuple[range, range, np.ndarray]]]]) -> dict[str, np.ndarray]:
    """Whole tensors, from what all ranks hold. Copies must be equal."""
    whole: dict[str, np.ndarray] = {}
    for key in sorted({key for held in of_ranks for key in held}):
        pieces = [piece for held in of_ranks for piece in held.get(key, [])]
        shape = max(rows[-1] for rows, _, _ in pieces if rows) + 1, max(columns.stop for _, columns, _ in pieces)
        values = np.zeros(shape, pieces[0][2].dtype)
        known = np.zeros(shape, bool)
        for rows, columns, piece in pieces:
            place = np.ix_(np.array(rows), np.array(columns))
            assert not known[place].any() or np.array_equal(values[place], piece), f"copies of {key} differ"
            values[place], known[place] = piece, True
        assert known.all(), f"{key} is not whole"
        whole[key] = values
    return whole


Held = dict[str, list[tuple[range, range, np.ndarray]]]


def equal(found: list[Held], expected: list[Held]) -> None:
    one, other = assembled(found), assembled(expected)
    assert one.keys() == other.keys()
    for key in one:
        assert np.array_equal(one[key], other[key]), key


def raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    raise AssertionError("no CheckpointError")


def loaded(world_size: int, folder: str, **more: Any) -> tuple[Any, Held]:
    job = built(world_size, "Adam", turn=2)
    restored = job.load(folder, **more)
    return restored, contents(job)


def load_alone(folder: Path, **more: Any) -> tuple[Any, list[Held]]:
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
