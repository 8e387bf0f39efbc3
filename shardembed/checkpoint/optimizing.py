"""The optimizer in a checkpoint: param groups and counters as small state, state tensors by the key of their weight.

The tables' own state lies in the slabs and is no concern of this module; a torch optimizer's state is, be it over dense
parameters or over the shards that `optimizer=None` exposes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shardembed.checkpoint.codec import decode, encode
from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.inventory import Inventory, Item, Region, dense_item, local
from shardembed.comm.comm import Comm
from shardembed.errors import CheckpointError
from shardembed.modules.base import ShardedModule
from shardembed.optimizer import Optimizer
from shardembed.store.own_parameters import ShardParameter
from shardembed.store.wrappers import is_distributed

OURS = ("params", "optimizer", "tables")  # of a param group, what is no setting
# The state that torch's fused kernels walk through without comparing its size: they read and write past the end of a shorter one.
FUSED_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
STATE_BYTES, SPARE_BYTES = 16, 64 << 20  # that state may take: for each byte of the optimizer's own parameters, and beside that


@dataclass(frozen=True)
class Owner:
    """Whose state a torch optimizer keeps under a parameter.

    Attributes:
        key: of the weight that the parameter is, or is a part of.
        parameter: as the optimizer has it.
    """

    key: str
    parameter: nn.Parameter

    @property
    def shard(self) -> ShardParameter | None:
        return self.parameter if isinstance(self.parameter, ShardParameter) else None

    def is_cut(self, tensor: torch.Tensor) -> bool:
        """Part of a tensor as large as the table."""
        return self.shard is not None and tensor.shape == self.parameter.shape


def dense_of(optimizer: torch.optim.Optimizer | None) -> torch.optim.Optimizer | None:
    return optimizer.dense if isinstance(optimizer, Optimizer) else optimizer


def owners(model: nn.Module, held: Inventory, dense: torch.optim.Optimizer) -> list[list[Owner]]:
    """Of each parameter of each group, whose it is.

    Raises:
        CheckpointError: the optimizer holds parameters that are not the model's.
    """
    names = {id(parameter): key for key, parameter in held.parameters.items()}
    tables = {(id(table.journey), table.name): table.key for table in held.tables.values()}
    for module in model.modules():
        if isinstance(module, ShardedModule):
            for parameter in module._parameters.values():
                if isinstance(parameter, ShardParameter):
                    names[id(parameter)] = tables[id(module.journey), parameter.shard.table]
    strange = sum(id(parameter) not in names for group in dense.param_groups for parameter in group["params"])
    if strange:
        raise CheckpointError(
            f"the optimizer holds {strange} parameter(s) that the model does not have, so they have no name in a checkpoint; pass "
            "the module that has them all"
        )
    return [[Owner(names[id(parameter)], parameter) for parameter in group["params"]] for group in dense.param_groups]


def items_of(states: Iterable[tuple[Owner, str, Any]], held: Inventory, comm: Comm) -> dict[str, Item]:
    """State tensors of a torch optimizer, by key."""
    items: dict[str, Item] = {}
    for owner, name, value in states:
        if not isinstance(value, torch.Tensor):
            continue
        key = f"{owner.key}.{name}"
        if owner.is_cut(value):
            whole = held.items[owner.key]
            before = items[key].regions if key in items else ()
            items[key] = Item(key, "table_state", owner.key, whole.shape, value.dtype, (*before, _cut(owner, value)))
        elif owner.shard is None:
            items[key] = dense_item(key, "dense_state", owner.key, value, comm.rank, tuple(range(comm.world_size)))
    return items


def _cut(owner: Owner, value: torch.Tensor) -> Region:
    assert owner.shard is not None
    if value.layout != torch.strided:
        raise CheckpointError(f"{owner.key}: sparse optimizer state is not written")
    shard = owner.shard.shard.shard
    return Region(shard.rows, shard.columns, value.detach(), shard.ranks)


def scalars(owned: list[list[Owner]], dense: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """What is no tensor of the weight's (step counters, say), as JSON by key and name."""
    found: dict[str, dict[str, Any]] = {}
    for owner, name, value in states(owned, dense):
        if not isinstance(value, torch.Tensor) or (owner.shard is not None and not owner.is_cut(value)):
            found.setdefault(owner.key, {})[name] = encode(value, f"optimizer state {name!r} of {owner.key!r}")
    return found


def states(owned: list[list[Owner]], dense: torch.optim.Optimizer) -> Iterator[tuple[Owner, str, Any]]:
    """All that a torch optimizer keeps, with whose it is."""
    for group in owned:
        for owner in group:
            for name, value in dense.state.get(owner.parameter, {}).items():
                yield owner, name, value


def describe(optimizer: torch.optim.Optimizer | None, owned: list[list[Owner]], held: Inventory) -> dict[str, Any]:
    """Names and settings of an optimizer and of the tables' own."""
    dense = dense_of(optimizer)
    groups = [
        {"of": sorted({owner.key for owner in group}), "settings": _settings(settings)}
        for group, settings in zip(owned, dense.param_groups if dense is not None else [], strict=True)
    ]
    tables = {
        key: {"optimizer": type(table.slabs[0].spec.optimizer).__name__, "settings": _settings(_group_of(optimizer, table) or {})}
        for key, table in held.tables.items()
    }
    skipped = optimizer.skipped if isinstance(optimizer, Optimizer) else 0
    return {"class": type(dense).__name__ if dense is not None else None, "groups": groups, "tables": tables, "skipped": skipped}


def _group_of(optimizer: torch.optim.Optimizer | None, table: Any) -> dict[str, Any] | None:
    groups = optimizer._groups if isinstance(optimizer, Optimizer) else {}
    return groups.get(table.slabs[0].spec.optimizer)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: encode(value, f"param group setting {name!r}") for name, value in group.items() if name not in OURS}


def _decoded(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: decode(value, f"param group setting {name!r}") for name, value in settings.items() if name not in OURS}


def differences(
    saved: dict[str, Any], optimizer: torch.optim.Optimizer | None, owned: list[list[Owner]], held: Inventory, fresh: set[str]
) -> list[str]:
    """Why the saved groups and settings do not fit, a line each. Weights in `fresh` are not to be in the checkpoint."""
    lines: list[str] = []
    dense = dense_of(optimizer)
    name = type(dense).__name__ if dense is not None else None
    if saved["class"] is not None and name is None:
        lines.append(
            f"the checkpoint has the state of a {saved['class']} over dense parameters; pass optimizer=, or weights_only=True"
        )
    elif saved["class"] is None and name is not None:
        lines.append(f"the checkpoint was saved without the dense optimizer ({name})")
    elif saved["class"] != name:
        lines.append(f"the dense optimizer is {name}, the checkpoint's was {saved['class']}")
    elif name is not None:
        now = [sorted({owner.key for owner in group} - fresh) for group in owned]
        then = [group["of"] for group in saved["groups"]]
        if now != then:
            lines.append(f"the dense optimizer's param groups are of {_short(now)}, the checkpoint's of {_short(then)}")
    for key, table in held.tables.items():
        kind = type(table.slabs[0].spec.optimizer).__name__
        before = saved["tables"].get(key, {"optimizer": kind})["optimizer"]
        if before != kind:
            lines.append(f"table {key!r} has the optimizer {kind}, in the checkpoint {before}")
    return lines


def _short(groups: list[list[str]]) -> str:
    return "; ".join(", ".join(group[:6]) + (f" and {len(group) - 6} more" if len(group) > 6 else "") for group in groups)[:500]


@dataclass(frozen=True)
class Saved:
    """A tensor of state that a checkpoint says it has of a parameter, which is yet to be made.

    Attributes:
        owner: whose state it is.
        group: the param group of that.
        name: of the state.
        entry: that has its values.
        weight: the entry of the parameter.
    """

    owner: Owner
    group: Mapping[str, Any]
    name: str
    entry: Entry
    weight: Entry

    def make(self) -> tuple[Owner, str, torch.Tensor]:
        return self.owner, self.name, target(self.owner, self.group, self.name, self.entry.shape, self.entry.dtype)


def misfits(saved: Iterable[Saved], dense: torch.optim.Optimizer) -> list[str]:
    """Why state would not fit its parameters, a line each; looked at before any memory is asked for."""
    saved, asked = list(saved), 0
    lines = []
    for one in saved:
        parameter, entry = one.owner.parameter, one.entry
        if one.owner.shard is not None or (is_distributed(parameter) and entry.shape == tuple(parameter.shape)):
            asked += local(parameter.detach()).numel() * entry.dtype.itemsize
            continue
        asked += entry.nbytes
        if one.weight.shape == tuple(parameter.shape):  # else the weight is a difference already
            lines += _misfit(one.owner, one.name, entry.shape, dense)
    held = sum(local(parameter.detach()).nbytes for group in dense.param_groups for parameter in group["params"])
    if asked > SPARE_BYTES + STATE_BYTES * held:
        largest = max(saved, key=lambda one: one.entry.nbytes).entry
        lines.append(
            f"the state of the dense optimizer takes {asked:,} bytes, which is no state of parameters of {held:,} bytes "
            f"(the largest is {largest.key!r:.200} {list(largest.shape)})"
        )
    return lines


def misfit_scalars(scalars: Mapping[str, Mapping[str, Any]], owned: list[list[Owner]], dense: torch.optim.Optimizer) -> list[str]:
    """As `misfits`, for state that is no tensor of a checkpoint's files."""
    lines = []
    for owner in (owner for group in owned for owner in group):
        for name, value in scalars.get(owner.key, {}).items():
            found = decode(value, f"{owner.key}.{name}")
            lines += _misfit(owner, name, tuple(found.shape), dense) if isinstance(found, torch.Tensor) else []
    return lines


def _misfit(owner: Owner, name: str, shape: tuple[int, ...], dense: torch.optim.Optimizer) -> list[str]:
    if "fused" not in dense.defaults:
        return []
    wanted = tuple(owner.parameter.shape) if name in FUSED_STATE else () if name == "step" else shape
    if shape == wanted:
        return []
    return [f"optimizer state {name!r} of {owner.key!r} is {list(shape)} in the checkpoint, its parameter needs {list(wanted)}"]


def target(owner: Owner, group: Mapping[str, Any], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor for a saved state of this shape, where torch would have made it."""
    parameter = owner.parameter
    if owner.shard is not None:
        return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
    if is_distributed(parameter) and shape == tuple(parameter.shape):
        from torch.distributed.tensor import DTensor

        part = torch.zeros_like(local(parameter.detach()), dtype=dtype)
        return DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride(), run_check=False
        )
    # Step counters stay on the CPU, unless torch's own kernels count (torch.optim.Optimizer.load_state_dict).
    on_device = shape != () or group.get("capturable") or group.get("fused")
    return torch.zeros(shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def restore_groups(saved: dict[str, Any], optimizer: torch.optim.Optimizer, held: Inventory) -> None:
    """Give every group the settings it was saved with.

    Raises:
        CheckpointError: tables of one group were saved with different settings.
    """
    dense = dense_of(optimizer)
    for group, before in zip(dense.param_groups if dense is not None else [], saved["groups"], strict=False):
        group.update(_decoded(before["settings"]))
    if not isinstance(optimizer, Optimizer):
        return
    optimizer.skipped = int(saved["skipped"])
    for settings, group in optimizer._groups.items():
        keys = [key for key, table in held.tables.items() if table.slabs[0].spec.optimizer == settings and key in saved["tables"]]
        found = [saved["tables"][key]["settings"] for key in keys]
        if any(one != found[0] for one in found):
            raise CheckpointError(
                f"tables {', '.join(keys)} share a param group now, but were saved with different settings: {found!s:.500}"
            )
        if found:
            group.update(_decoded(found[0]))
