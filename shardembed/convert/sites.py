"""Where a model holds its tables: modules that look them up (sites), each site's uses of weights, and tables: one weight and all
its uses. What a module is called, reads and answers is its site's affair; everything else here is the same for all kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from shardembed.errors import ConfigError
from shardembed.journey.journey import Journey
from shardembed.modules.base import ShardedModule
from shardembed.modules.lookup import Lookup
from shardembed.tables.pooling import Pooling, kind_of
from shardembed.tables.table_config import Feature, Init, Loaded, TableConfig

Plain = nn.Embedding | nn.EmbeddingBag


@dataclass(frozen=True)
class Use:
    """One module's use of one weight.

    Attributes:
        path: the site's.
        name: what the table is called if this is its first use.
        module: has the weight and its settings.
        features: the names of the streams of ids, with their pooling.
        keys: every name the weight has in the model.
        start: gives the start of its rows, if they do not exist, and what a reset goes back to.
    """

    path: str
    name: str
    module: Plain
    features: dict[str, Pooling]
    keys: list[str]
    start: Callable[[], Init]


def pooling_of(module: Plain) -> Pooling:
    """Of torch's own modules.

    Raises:
        ConfigError: a mode that we have not.
    """
    return kind_of(module.mode).name if isinstance(module, nn.EmbeddingBag) else None


class Site(ABC):
    """One module of a model, and all the paths that lead to it; the first one names it. A subclass is a kind of module."""

    def __init__(self, module: Any, paths: list[str]) -> None:
        self.module, self.paths = module, paths

    @property
    def path(self) -> str:
        return self.paths[0]

    @classmethod
    @abstractmethod
    def of(cls, module: nn.Module, path: str) -> Self | None:
        """The site of `module`, if it is one of this kind."""

    def check(self) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse a module that its sharded twin would not be like.

        Raises:
            UnsupportedError: says how to keep it as it is.
        """

    @abstractmethod
    def uses(self) -> list[Use]:
        """Its uses of weights, in its own order."""

    @abstractmethod
    def sharded(self, journey: Journey, features: Mapping[str, Feature]) -> Lookup:
        """The module that takes its place, on a journey with all its tables."""

    @staticmethod
    @abstractmethod
    def restored(module: ShardedModule, weights: Mapping[str, nn.Parameter]) -> nn.Module | None:
        """The way back: the module that `module` took the place of, with weights by table. None for another kind's."""


@dataclass(frozen=True)
class Table:
    """One weight of a model.

    Attributes:
        uses: all of them; the first one names the table.
    """

    uses: list[Use]

    @property
    def weight(self) -> torch.Tensor:
        return self.uses[0].module.weight

    @property
    def name(self) -> str:
        return self.uses[0].name

    def config(self, exists: bool) -> TableConfig:
        """The same table for a collection. Rows that exist (on rank 0) are copied in later, so they are not drawn first."""
        module = self.uses[0].module
        pooling: dict[str, Pooling] = {feature: pooling for use in self.uses for feature, pooling in use.features.items()}
        return TableConfig(
            self.name,
            module.num_embeddings,
            module.embedding_dim,
            feature_names=list(pooling),
            pooling=pooling,
            dtype=self.weight.dtype,
            # On the meta device there are no rows to copy: the module's own start, drawn where the shards lie.
            init=Loaded(self.uses[0].start) if exists else self.uses[0].start(),
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            frozen=not self.weight.requires_grad,
            sparse=module.sparse,
            rounding="nearest",
        )


def tables_of(model: nn.Module, sites: Sequence[Site]) -> list[Table]:
    """The tables that the sites look up, in their order.

    Raises:
        ConfigError: a weight is shared with a module that is no table or has other settings, or has an optimizer already.
    """
    tables: dict[int, Table] = {}
    for site in sites:
        for use in site.uses():
            tables.setdefault(id(use.module.weight), Table([])).uses.append(use)
    _check_alone(model, list(tables.values()))
    for table in tables.values():
        if hasattr(table.weight, "_optimizer_classes"):  # what torch's and TorchRec's apply_optimizer_in_backward leave there
            raise ConfigError(
                f"{table.name}: its weight has an optimizer from apply_optimizer_in_backward, which a sharded table would lose; "
                f"leave that call out, and pass optimizer= to shard() instead"
            )
        for use in table.uses[1:]:
            _check_alike(table.uses[0], use)
    return list(tables.values())


def _check_alone(model: nn.Module, tables: list[Table]) -> None:
    """A weight that something else reads too, such as an output layer tied to its table, cannot leave it."""
    names = {key for table in tables for use in table.uses for key in use.keys}
    owners = {id(table.weight): table for table in tables}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        table = owners.get(id(parameter))
        if table is not None and name not in names:
            raise ConfigError(
                f"{table.name}: its weight is also {name!r}, which is no table and needs all of it on every rank; untie the "
                f"two, or keep this table as it is with skip=[{table.uses[0].path!r}]"
            )


SHARED = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


def _check_alike(one: Use, other: Use) -> None:
    for setting in SHARED:
        mine, theirs = getattr(one.module, setting), getattr(other.module, setting)
        if mine != theirs:
            raise ConfigError(
                f"{other.name} shares its weight with {one.name}, but has {setting}={theirs!r} instead of {mine!r}; give both the "
                f"same, or keep them as they are with skip=[{one.path!r}, {other.path!r}]"
            )


def swap(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
