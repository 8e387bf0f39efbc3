"""A model of dynamic tables that is trained, saved and loaded on any number of ranks: each rule of who comes and who goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import shardembed as se

COLUMNS, BATCH, IDS, KNOWN = 6, 60, 4, 700  # samples of all ranks together, ids a sample, ids that there are
TABLES: dict[str, tuple[int | None, se.Dynamic]] = {
    "lru": (400, se.Dynamic(se.LRU())),
    "lfu": (300, se.Dynamic(se.LFU(halve_every=3))),
    "ttl": (300, se.Dynamic(se.TTL(2))),
    "counted": (260, se.Dynamic(se.LRU(), se.MinCount(2))),
    "famous": (130, se.Dynamic(se.LFU(), se.MinCount(2))),
    "drawn": (None, se.Dynamic(se.TTL(3), se.Probability(0.5))),
    "waiting": (None, se.Dynamic(se.TTL(2), se.MinCount(2))),
    "grows": (None, se.Dynamic()),
    "full": (200, se.Dynamic(admission=se.MinCount(2))),
}
LAYOUTS = ("row", "dealt", "column", "grid", "whole")


def placement(layout: str, world_size: int) -> se.Placement:
    made = {
        "row": se.row_wise(strided=False),
        "dealt": se.row_wise(),
        "column": se.column_wise(),
        "grid": se.grid(strips=2),
        "whole": se.table_wise(rank=world_size - 1),
    }
    return made[layout]


class Model(nn.Module):
    """A table a rule, pooled and summed. `turn` gives each table another layout."""

    def __init__(
        self, world_size: int, turn: int = 0, optimizer: str = "Adam", tables: Any = None, deterministic: bool = True, **more: Any
    ) -> None:
        super().__init__()
        chosen = TABLES if tables is None else tables
        configs = [
            se.TableConfig(name, rows, COLUMNS, dtype=torch.float64, dynamic=dynamic, **more)
            for name, (rows, dynamic) in chosen.items()
        ]
        plan = {name: placement(LAYOUTS[(number + turn) % len(LAYOUTS)], world_size) for number, name in enumerate(chosen)}
        made = {"Adam": se.optim.Adam(lr=0.05), "RowwiseAdagrad": se.optim.RowwiseAdagrad(lr=0.1), "SGD": se.optim.SGD(lr=0.1)}
        self.tables = se.EmbeddingCollection(
            configs,
            optimizer=made[optimizer],
            plan=plan,
            seed=3,
            deterministic=deterministic,
            gradient_reduction="sum",
        )
        self.shift = nn.Parameter(torch.linspace(-1, 1, COLUMNS, dtype=torch.float64))

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        pooled: Any = sum(self.tables(batch).values())
        # Gradients of each sample by itself: a product of matrices would round by how many samples a rank has.
        return (pooled * (pooled.detach() - 1 + self.shift.detach())).sum() + self.shift.sum()


@dataclass
class Trained:
    """A model with what trains it."""

    model: Model
    optimizer: se.Optimizer

    def save(self, folder: Any, **more: Any) -> Any:
        return se.save_checkpoint(folder, self.model, optimizer=self.optimizer, **more)

    def load(self, folder: Any, **more: Any) -> Any:
        return se.load_checkpoint(folder, self.model, optimizer=self.optimizer, **more)


def built(world_size: int, turn: int = 0, **more: Any) -> Trained:
    model = Model(world_size, turn, **more)
    return Trained(model, se.Optimizer(model))


def train(job: Trained, rank: int, world_size: int, steps: range) -> None:
    """Train the tables on the global batches of these steps."""
    for step in steps:
        job.model(batch_of(job.model, step, rank, world_size)).backward()
        job.optimizer.step()


def batch_of(model: Model, step: int, rank: int, world_size: int) -> dict[str, Any]:
    """This rank's share of a step's global batch, which depends on the step alone: some ids come often, most seldom."""
    rng, share = np.random.default_rng(step), BATCH // world_size
    batch = {}
    for table in model.tables.tables:
        numbers = (rng.random((BATCH, IDS)) ** 2 * KNOWN).astype(np.int64)
        batch[table.name] = ids_of(torch.from_numpy(numbers))[rank * share : (rank + 1) * share]
    return batch


def ids_of(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 on as ids of all sizes and both signs, each its own; the two extremes are among them."""
    ids = numbers * 0x9E3779B97F4A7C1  # odd, so that none are alike
    return torch.where(numbers == 1, -(2**63), torch.where(numbers == 2, 2**63 - 1, ids))


Held = dict[str, dict[str, dict[int, Any]]]  # table -> what -> id -> value


def contents(job: Trained) -> Held:
    """All that this rank holds of dynamic tables: rows and state by column, counts, last steps, candidates."""
    held: Held = {}
    for slab in job.model.tables.journey.slabs:
        keys, lane = slab.dynamic, slab.spec.lanes[0]
        assert keys is not None
        found = held.setdefault(slab.table_of(lane), {})
        places = keys.census.living(keys.steps)
        ids = keys.census.ids_S[places].tolist()
        tensors = {"": slab.weights, **slab.state}
        for name, tensor in tensors.items():
            where = "" if tensor.dim() == 1 else f"@{lane.columns.start}"
            found[f"row{name}{where}"] = dict(zip(ids, tensor[places].clone(), strict=True))
        censuses = {"row": keys.census} | ({} if keys.candidates is None else {"candidate": keys.candidates})
        for kind, census in censuses.items():
            places = census.living(keys.steps)
            ids = census.ids_S[places].tolist()
            found[f"{kind} last"] = dict(zip(ids, census.lasts_S[places].tolist(), strict=True))
            if census.policy.counts:
                found[f"{kind} count"] = dict(zip(ids, census.counts_S[places].tolist(), strict=True))
    return held


def whole(runs: list[Held]) -> Held:
    """What ranks hold together; rows of several strips are put together."""
    found: Held = {}
    for table, what, values in ((table, what, values) for run in runs for table, held in run.items() for what, values in held.items()):
        merged = found.setdefault(table, {}).setdefault(what, {})
        for id_, value in values.items():
            assert id_ not in merged or not isinstance(value, torch.Tensor) or torch.equal(merged[id_], value), (table, what, id_)
            merged[id_] = value
    for held in found.values():
        strips: dict[str, list[tuple[int, dict[int, Any]]]] = {}
        for what in [what for what in held if "@" in what]:
            name, start = what.split("@")
            strips.setdefault(name, []).append((int(start), held.pop(what)))
        for name, parts in strips.items():
            parts.sort(key=lambda part: part[0])
            assert all(part.keys() == parts[0][1].keys() for _, part in parts), f"{name}: strips have other ids"
            held[name] = {id_: torch.cat([part[id_] for _, part in parts]) for id_ in parts[0][1]}
    return found


def equal(found: list[Held], expected: list[Held]) -> None:
    """The same ids with the same rows, state, counts and last steps, to the bit, whoever holds them."""
    one, other = whole(found), whole(expected)
    assert one.keys() == other.keys()
    for table in one:
        assert one[table].keys() == other[table].keys(), table
        for what in one[table]:
            here, there = one[table][what], other[table][what]
            assert here.keys() == there.keys(), f"{table}: {what}: other ids"
            for id_ in here:
                assert bool(torch.as_tensor(here[id_] == there[id_]).all()), f"{table}: {what} of id {id_}"
