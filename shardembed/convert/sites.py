"""Where a plain model holds its tables: which modules, under which paths, and which of them share weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from shardembed.errors import ConfigError
from shardembed.modules.base import ShardedModule
from shardembed.tables import Constant, Normal, Pooling, TableConfig

Plain = nn.Embedding | nn.EmbeddingBag


@dataclass(frozen=True)
class Site:
    """One plain module, and all the paths that lead to it; the first one names its feature."""

    module: Plain
    paths: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.paths[0]

    @property
    def pooling(self) -> Pooling:
        return cast(Pooling, self.module.mode) if isinstance(self.module, nn.EmbeddingBag) else None


@dataclass(frozen=True)
class PlainTable:
    """One weight and the modules that look it up; the first one's path is the table's name."""

    sites: list[Site]

    @property
    def weight(self) -> torch.Tensor:
        return self.sites[0].module.weight

    @property
    def name(self) -> str:
        return self.sites[0].name

    def config(self) -> TableConfig:
        """The same table for a collection. Rows that exist are copied in later, so they are not drawn first."""
        module = self.sites[0].module
        return TableConfig(
            self.name,
            module.num_embeddings,
            module.embedding_dim,
            feature_names=[site.name for site in self.sites],
            pooling={site.name: site.pooling for site in self.sites},
            dtype=self.weight.dtype,
            # On the meta device there are no rows to copy: torch's own start, drawn where the shards lie.
            init=Normal() if self.weight.is_meta else Constant(0.0),
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            frozen=not self.weight.requires_grad,
            sparse=module.sparse,
            rounding="nearest",
        )


def find_tables(model: nn.Module, skip: Sequence[str]) -> list[PlainTable]:
    """The tables of a model, in the order of its modules.

    Raises:
        ConfigError: there is none, the model is sharded or wrapped already or is itself a table, a table is more than torch's own
            module, `skip` names nothing, or a weight is shared with a module that is no table or has other settings.
    """
    _check_skip(model, skip)
    sites: dict[int, Site] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DistributedDataParallel | FSDPModule):
            wrapper = "DistributedDataParallel" if isinstance(module, DistributedDataParallel) else "fully_shard"
            raise ConfigError(f"{path or 'the model'} is wrapped by {wrapper}, which holds its tables already; shard() comes first")
        if isinstance(module, ShardedModule):
            raise ConfigError(f"{path or 'the model'} is sharded already; shard a model once, before wrapping it")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and not any(fnmatchcase(path, pattern) for pattern in skip):
            if not path:
                raise ConfigError("the model is itself a table; build se.Embedding or se.EmbeddingBag instead of converting it")
            _check_plain(path, module)
            sites.setdefault(id(module), Site(module)).paths.append(path)
    if not sites:
        raise ConfigError("the model has no nn.Embedding or nn.EmbeddingBag to shard")
    tables: dict[int, PlainTable] = {}
    for site in sites.values():
        tables.setdefault(id(site.module.weight), PlainTable([])).sites.append(site)
    _check_alone(model, list(tables.values()))
    for table in tables.values():
        for site in table.sites[1:]:
            _check_alike(table.sites[0], site)
    return list(tables.values())


def _check_skip(model: nn.Module, skip: Sequence[str]) -> None:
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Plain)]
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ConfigError(f"skip= names {pattern!r}, which matches no table; the tables are {paths}")


def _check_plain(path: str, module: Plain) -> None:
    """What a subclass, a parametrization or a hook adds would be lost."""
    torch_own = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    if type(module).forward is not torch_own.forward or "weight" not in module._parameters:
        raise ConfigError(
            f"{path} is a {type(module).__name__}, which does more than {torch_own.__name__}; replace it by a plain one, or keep "
            f"it as it is with skip=[{path!r}]"
        )
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise ConfigError(
            f"{path} has hooks, which would be lost with the module; register them after shard(), or keep it with skip=[{path!r}]"
        )


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_alone(model: nn.Module, tables: list[PlainTable]) -> None:
    """A weight that something else reads too, such as an output layer tied to its table, cannot leave it."""
    owners = {f"{path}.weight": table for table in tables for site in table.sites for path in site.paths}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for table in tables:
            if parameter is table.weight and name not in owners:
                raise ConfigError(
                    f"{table.name}: its weight is also {name!r}, which is no table and needs all of it on every rank; untie the "
                    f"two, or keep this table as it is with skip=[{table.name!r}]"
                )


SHARED = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def _check_alike(one: Site, other: Site) -> None:
    for setting in SHARED:
        mine, theirs = getattr(one.module, setting), getattr(other.module, setting)
        if mine != theirs:
            raise ConfigError(
                f"{other.name} shares its weight with {one.name}, but has {setting}={theirs!r} instead of {mine!r}; give both the "
                f"same, or keep them as they are with skip=[{one.name!r}, {other.name!r}]"
            )


def swap(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
