"""What a save writes, as it is at one moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shardembed.checkpoint import chance, optimizing
from shardembed.checkpoint.codec import encode
from shardembed.checkpoint.inventory import Inventory, Item, unwrapped
from shardembed.checkpoint.sharing import Saved, parts_of
from shardembed.checkpoint.staging import Staging
from shardembed.comm.comm import Comm
from shardembed.config.scalars import within
from shardembed.errors import CheckpointError, UnsupportedError
from shardembed.modules.base import ShardedModule


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint.

    Attributes:
        step: of training.
        items: all tensors of the model, with what of them lies here.
        parts: those that this rank writes.
        small: small state that rank 0 writes.
        scalars: small state of this rank's optimizer, by key and name.
        random: the random state of this rank.
        plans: of the model's collections, as JSON.
        buffers: keys of dense tensors that are no parameters: a mask may well be -inf.
    """

    step: int
    items: dict[str, Item]
    parts: list[Saved]
    small: dict[str, Any]
    scalars: dict[str, dict[str, Any]]
    random: Any
    plans: list[dict[str, Any]]
    buffers: frozenset[str]

    def copied(self) -> Snapshot:
        """The same, in host memory of its own: training may go on."""
        staging = Staging()
        return replace(self, parts=[_copied(part, staging) for part in self.parts])


def _copied(part: Saved, staging: Staging) -> Saved:
    data, listed = part.data, part.listed
    if listed is None:
        return replace(part, data=staging.copy(len(data), lambda first, stop: data[first:stop]))
    copied = staging.copy(len(listed), lambda first, stop: data[listed[first:stop].to(data.device)])
    return replace(part, data=copied, listed=torch.arange(len(listed)))


@dataclass(frozen=True)
class Job:
    """What is saved or loaded in one call.

    Attributes:
        model: whose tensors these are.
        optimizer: whose state goes along; None: none.
        scheduler: what has `state_dict` and `load_state_dict`; None: none.
        extra: by name, what else has these two.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    extra: Mapping[str, Any]

    @staticmethod
    def of(model: nn.Module, optimizer: Any, scheduler: Any, extra: Mapping[str, Any] | None) -> Job:
        """Raises CheckpointError where something cannot be saved or loaded at all."""
        job = Job(unwrapped(model), optimizer, scheduler, dict(extra or {}))
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise CheckpointError(f"optimizer must be an se.Optimizer or a torch optimizer, not {type(optimizer).__name__}")
        for name, one in job.stateful().items():
            if not (hasattr(one, "state_dict") and hasattr(one, "load_state_dict")):
                raise CheckpointError(f"{name} must have state_dict() and load_state_dict(), which {type(one).__name__} has not")
        return job

    def stateful(self) -> dict[str, Any]:
        """The scheduler and the extras, by what messages call them."""
        found = {f"extra[{name!r}]": one for name, one in self.extra.items()}
        return found if self.scheduler is None else {"scheduler": self.scheduler, **found}

    def comm(self) -> Comm:
        """The ranks that hold the model, to talk to beside training. Collective when it is called for the first time."""
        comms = {
            id(module.journey.comm): module.journey.comm for module in self.model.modules() if isinstance(module, ShardedModule)
        }
        if len(comms) > 1:
            raise UnsupportedError("the model's tables lie on several process groups; save the parts of each group by themselves")
        return (next(iter(comms.values()), None) or Comm.of()).side()

    def snapshot(self, held: Inventory, comm: Comm, step: int, progress: Any, incremental: bool) -> Snapshot:
        """What this rank saves: views of tensors, and small state."""
        waiting = [table.name for table in held.tables.values() if table.journey.pending.waiting]
        if waiting:
            raise CheckpointError(
                f"gradients of table(s) {', '.join(map(repr, waiting[:5]))} wait for Optimizer.step(), and a checkpoint does not "
                "hold gradients; save after the step"
            )
        items, owned, scalars = dict(held.items), [], {}
        dense = optimizing.dense_of(self.optimizer)
        if dense is not None:
            owned = optimizing.owners(self.model, held, dense)
            items.update(optimizing.items_of(optimizing.states(owned, dense), held, comm))
            scalars = optimizing.scalars(owned, dense)
        small = {
            "progress": encode(progress, "progress"),
            "optimizer": optimizing.describe(self.optimizer, owned, held),
            "has_optimizer": self.optimizer is not None,
            "steps": {key: table.journey.pending.steps_of(table.name) for key, table in held.tables.items()},
            "stateful": {name: encode(one.state_dict(), name) for name, one in self.stateful().items()},
            "model": {key: encode(value, key) for key, value in held.plain.items()},
        }
        journeys = {id(table.journey): table.journey for table in held.tables.values()}
        plans = [journey.plan.to_json() for journey in journeys.values()]
        parts = parts_of(items.values(), comm.rank, incremental)
        buffers = frozenset(key for key, item in items.items() if item.kind == "dense" and key not in held.parameters)
        return Snapshot(step, items, parts, small, scalars, chance.capture(), plans, buffers)


def step_of(held: Inventory, step: int | None) -> int:
    """The step a checkpoint is named after: optimizer steps taken, unless the caller counts.

    Raises:
        CheckpointError: there is nothing that counts, or the number cannot be a step.
    """
    if step is None:
        if not held.tables:
            raise CheckpointError("the model has no sharded tables that count steps; pass step=")
        step = max(table.journey.steps for table in held.tables.values())
    number = within(step, 0, 10**10 - 1)
    if number is None:
        raise CheckpointError(f"step must be an integer from 0 to 9,999,999,999, not {step!r}")
    return number
