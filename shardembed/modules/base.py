"""What all sharded modules share: a journey, reading and loading rows, and a state dict that does not lose them silently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from shardembed import comm as comms
from shardembed.errors import ConfigError, FeatureError, PickleError
from shardembed.ids import IdBatch
from shardembed.journey import Journey, Settings
from shardembed.modules import retrieval
from shardembed.optim import RowwiseAdagrad, TableOptimizer
from shardembed.placement import Cluster
from shardembed.plan import Plan, PlanLike, resolve
from shardembed.slab import LocalShard
from shardembed.tables import Feature, TableConfig, features_of

TableOptimizers = TableOptimizer | Mapping[str, TableOptimizer]


class TableHandle:
    """Stands for a sharded table in a state dict. It has no values of its own and refuses to be pickled."""

    def __init__(self, table: str) -> None:
        self.table = table

    def __repr__(self) -> str:
        return f"TableHandle({self.table!r}, sharded over the ranks)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PickleError(
            f"table {self.table!r} lies cut over the ranks, so torch.save cannot write it: no rank has all of it. Read its rows "
            "with rows(table, ids), or leave the sharded tables out of what you save"
        )


class ShardedModule(nn.Module):
    """Base of the sharded modules: `tables` of a journey, and what can be done with their rows.

    Attributes:
        journey: of all the tables that are looked up together. tables: those that belong to this module.
    """

    def __init__(self, journey: Journey, tables: Sequence[TableConfig]) -> None:
        super().__init__()
        self.journey = journey
        self.tables = tuple(tables)

    @property
    def plan(self) -> Plan:
        """How the tables are cut."""
        return self.journey.plan

    def local_shards(self) -> Iterator[LocalShard]:
        """The shards this rank holds: views of weights and optimizer state."""
        own = {table.name for table in self.tables}
        for slab in self.journey.slabs:
            yield from (local for local in slab.shards() if local.table in own)

    @torch.no_grad()
    def rows(self, table: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` (any shape) of a table as they are now, `[*ids.shape, embedding_dim]`. Collective: every rank asks for
        its own.

        Raises:
            FeatureError: there is no such table.
            InputError: on every rank, when the ids of any are malformed.
        """
        feature = Feature("rows", self._table(table), None)
        return self.journey.forward(lambda: IdBatch.of({"rows": ids}, [feature], self.journey.device), [feature])[0]

    @torch.no_grad()
    def load_rows(self, table: str, source: Any) -> None:
        """Overwrite a table's weights from `source` `[num_embeddings, embedding_dim]`: a tensor, or anything that slices like a
        NumPy array (a memory-mapped file too). Each rank reads its own rows and columns only; optimizer state stays. Not
        collective.

        Raises:
            ConfigError: the source has another shape.
            FeatureError: there is no such table.
        """
        config = self.journey.tables[self._table(table)]
        shape = (config.num_embeddings, config.embedding_dim)
        if tuple(source.shape) != shape:
            raise ConfigError(f"table {table!r} is {shape}, the source has shape {tuple(source.shape)}")
        for local in self.local_shards():
            if local.table == table:
                rows, columns = local.shard.rows, local.shard.columns
                part = source[rows.start : rows.stop : rows.step, columns.start : columns.stop]
                local.weights.copy_(torch.as_tensor(part))

    @torch.no_grad()
    def topk(self, queries: torch.Tensor, k: int, table: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The k rows of `table` with the largest dot product with each query, exactly. Collective.

        Args:
            queries: this rank's own, `[Q, embedding_dim]`; Q may differ between ranks and may be 0.
            k: at most num_embeddings.

        Returns:
            (scores `[Q, k]`, ids `[Q, k]`), best first; of equal scores the lower id comes first.

        Raises:
            FeatureError: there is no such table. ConfigError: k or the shape of the queries is wrong.
        """
        return retrieval.topk(self.journey, self._table(table), queries, k)

    def _table(self, name: str) -> int:
        names = [table.name for table in self.tables]
        if name not in names:
            raise FeatureError(f"there is no table {name!r}; the tables are {names}")
        return [table.name for table in self.journey.tables].index(name)

    def _weight_keys(self) -> dict[str, str]:
        """State dict keys below this module's prefix, with the table of each."""
        return {f"{table.name}.weight": table.name for table in self.tables}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, table in self._weight_keys().items():
            destination[prefix + key] = TableHandle(table)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take whole tables from a plain model's state dict; a handle stands for the weights that are here already."""
        for key, table in self._weight_keys().items():
            value = state_dict.get(prefix + key)
            if isinstance(value, torch.Tensor):
                self.load_rows(table, value)
        kept = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *kept)
        for key in (prefix + key for key in self._weight_keys()):
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            if key not in state_dict:
                missing_keys.append(key)

    def extra_repr(self) -> str:
        own = {table.name for table in self.tables}
        return "\n".join(
            f"{t.name}: {t.num_embeddings} x {t.embedding_dim}, {t.kind} over {len(t.layout.ranks)} rank(s)"
            for t in self.plan.tables
            if t.name in own
        )


def build_journey(
    tables: Sequence[TableConfig | Any],
    optimizer: TableOptimizers | None,
    plan: PlanLike,
    device: torch.device | str | None,
    process_group: dist.ProcessGroup | None,
    settings: Settings,
) -> Journey:
    """Settle every default and build the shards of this rank. Collective: ranks check that they were given the same.

    Raises:
        ConfigError, PlanError: settings that do not fit. DisagreementError: on all ranks, when they differ between ranks.
    """
    configs = tuple(TableConfig.of(table) for table in tables)
    features_of(configs)
    optimizers = _per_table(configs, optimizer)
    comm = comms.Comm.of(process_group)
    cluster = Cluster(comm.world_size, comms.ranks_per_node(comm.world_size))
    where = torch.device(device) if device is not None else comms.default_device()
    return Journey(configs, resolve(configs, plan, cluster), optimizers, settings, comm, where)


def _per_table(tables: Sequence[TableConfig], optimizer: TableOptimizers | None) -> list[TableOptimizer]:
    """One optimizer a table: one for all, or a mapping by table name."""
    chosen: list[TableOptimizer] = []
    if isinstance(optimizer, Mapping):
        unknown = sorted(set(optimizer) - {table.name for table in tables})
        if unknown:
            raise ConfigError(f"optimizers are given for {unknown}, which are not tables here: {[table.name for table in tables]}")
    for table in tables:
        one = optimizer.get(table.name) if isinstance(optimizer, Mapping) else optimizer
        one = RowwiseAdagrad() if optimizer is None else one
        if not isinstance(one, TableOptimizer):
            raise ConfigError(
                f"table {table.name!r}: the optimizer must be one of se.optim (SGD, Adagrad, RowwiseAdagrad, Adam, AdamW, FTRL), "
                f"not {type(one).__name__}"
            )
        chosen.append(one)
    return chosen
