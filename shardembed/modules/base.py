"""What all sharded modules share: a journey, reading and loading rows, and a state dict that does not lose them silently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import nn

from shardembed.errors import ConfigError, FeatureError, PickleError, ShardEmbedError, UnsupportedError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.journey import Journey
from shardembed.modules import by_id, retrieval
from shardembed.modules.boxes import Held, Owners
from shardembed.modules.handle import Live, TableHandle
from shardembed.modules.loading import load_shard, shape_of
from shardembed.modules.whole import TableModule, watch
from shardembed.store.own_parameters import ShardParameter
from shardembed.store.slab import LocalShard
from shardembed.store.wrappers import is_distributed
from shardembed.tables.plan import Plan
from shardembed.tables.table_config import Feature, TableConfig

Method = TypeVar("Method", bound=Callable[..., Any])


def eager(method: Method) -> Method:
    """Have torch.compile leave a method alone: it would trace routing for a minute to break its graph at every collective.

    Without a compiler at work the method is called as it is; torch's own decorator would import the compiler for that, which takes
    longer than all else that a first step does.
    """
    closed = torch._disable_dynamo(method)

    @wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        return closed(*args, **options) if torch.compiler.is_compiling() else method(*args, **options)

    return cast(Method, call)


class ShardedModule(TableModule):
    """Base of the sharded modules: `tables` of a journey, and what can be done with their rows.

    Attributes:
        journey: of all the tables that are looked up together.
        tables: those that belong to this module.
        weight_keys: state dict keys below this module's prefix, with the table of each.
    """

    def __init__(self, journey: Journey, tables: Sequence[TableConfig], weight_keys: Mapping[str, str]) -> None:
        super().__init__()
        self.journey = journey
        self.tables = tuple(tables)
        own = {table.name for table in tables}
        self._numbers = frozenset(number for number, table in enumerate(journey.tables) if table.name in own)
        self.weight_keys = dict(weight_keys)
        self._register_shards()
        watch()

    def _register_shards(self) -> None:
        """Tables without an optimizer of ours: their shards are Parameters, at least one a table so that optimizers can be built
        on every rank.
        """
        for key, table in self.weight_keys.items():
            mine = [parameter for own in self.journey.own_parameters for parameter in own.parameters_of(table)]
            for number, parameter in enumerate(mine):
                super().register_parameter(key.replace(".", "_") + (f"_{number}" if number else ""), parameter)
        self._shards_here = tuple(self._parameters)
        self._reserved = {*self._shards_here, *(key.replace(".", "_") for key in self.weight_keys)}
        self._known = self._found()

    def _found(self) -> list[int]:
        """What stands under the names of its shards, and in which memory."""
        shards: Any = [*map(self._parameters.get, self._shards_here)]
        return [*map(id, shards), *(shard.data_ptr() for shard in shards if shard is not None)]

    def check_shards(self) -> None:
        """Refuse to look up what is not what the module's Parameters hold.

        Raises:
            UnsupportedError: something else was put in the place of one (by `torch.func.functional_call`, say).
        """
        if self._known and self._found() != self._known:
            raise self._replaced("a weight")

    def _replaced(self, name: str) -> UnsupportedError:
        names = [table.name for table in self.tables]
        return UnsupportedError(
            f"{name} of table(s) {names} cannot be replaced: lookups read the shards that lie on the ranks, not the tensor that "
            "was to take their place. Write rows with load_rows(table, source); what computes weights anew in each call "
            "(functional_call, parametrizations, pruning) needs a plain table: keep it with skip=, or get one from se.unshard()"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_reserved", ()) and value is not self._parameters.get(name, self):
            if is_distributed(value):  # fully_shard asks for a module's own __setattr__
                raise UnsupportedError(
                    f"fully_shard was about to cut table(s) {[table.name for table in self.tables]}, which lie cut over the ranks "
                    "already: call fully_shard(module, ignored_params=se.ignored(module)), with the rest as before. No row has "
                    "changed"
                )
            raise self._replaced(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._reserved:
            raise self._replaced(name)
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in self._reserved or isinstance(param, ShardParameter | TableHandle):
            raise self._replaced(name)
        super().register_parameter(name, param)

    def check_thaw(self) -> None:
        self.journey.freezing.frozen.check_thaw(self._numbers)

    def freeze_tables(self, frozen: bool) -> None:
        self.journey.freezing.change(self._numbers, frozen)

    def freeze(self, table: str, frozen: bool = True) -> None:
        """Let a table learn no more, or again: `requires_grad_` for one table of several. Not collective, but call it on every
        rank. All modules that look up the table follow; its optimizer state stays, and steps without it do not count for it.

        Raises:
            FeatureError: there is no such table. UnsupportedError: it was made frozen, so it cannot learn.
        """
        self.journey.freezing.change(frozenset({self._table(table)}), frozen)

    def forget_gradients(self) -> None:
        self.journey.forget(self._numbers)

    def _apply(self, fn: Any, recurse: bool = True) -> ShardedModule:
        """`.to()`, `.half()` and their kin: fine where they change nothing.

        Raises:
            UnsupportedError: the tables would have to follow.
        """
        self.check_change(fn)
        return self

    def check_change(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Raises UnsupportedError where the tables would have to follow, naming what to pass at construction instead."""
        for table in self.tables:
            now = torch.empty(0, dtype=table.dtype, device=self.journey.device)
            then = fn(now)
            if then.dtype != now.dtype:
                raise UnsupportedError(
                    f"table {table.name!r} stays {now.dtype}: sharded tables do not change their dtype. Convert the model before "
                    f"shard(), or build the table with dtype={then.dtype}"
                )
            if then.device.type != now.device.type or (now.device.index or 0) != (then.device.index or 0):
                raise UnsupportedError(
                    f"table {table.name!r} lies on {now.device} and does not move to {then.device}: pass device= where it is built"
                )
            if then.device.type == "cpu" and then.is_shared():
                raise UnsupportedError(
                    f"table {table.name!r} does not move to shared memory: it lies cut over the ranks of this job"
                )

    @property
    def plan(self) -> Plan:
        """How the tables are cut."""
        return self.journey.plan

    def local_shards(self) -> Iterator[LocalShard]:
        """The shards this rank holds: views of weights and optimizer state. Dynamic tables, whose rows move, have none."""
        for local in self._shards():
            self._touch(local.table)  # whoever asks may write
            yield local

    def _shards(self) -> Iterator[LocalShard]:
        own = {table.name for table in self.tables}
        for slab in self.journey.slabs:
            yield from (local for local in slab.shards() if local.table in own)

    def _touch(self, table: str) -> None:
        """Note that all rows of a table may change here."""
        for slab in self.journey.slabs:
            for local in slab.shards() if slab.touched is not None else ():
                if local.table == table:
                    slab.touch(slice(local.first_key, local.first_key + len(local.shard.rows)))

    @torch.no_grad()
    def rows(self, table: str | torch.Tensor | None = None, ids: torch.Tensor | None = None) -> torch.Tensor:
        """The rows `ids` (any shape) of a table as they are now, `[*ids.shape, embedding_dim]`: `rows(table, ids)`, or
        `rows(ids)` of a module with one table. Of a dynamic table any int64 is an id; one without a row reads what evaluation
        reads (`Dynamic.unknown`). Collective: every rank asks for its own.

        Raises:
            FeatureError, InputError: on every rank, when any asked for a table that there is not, or with malformed ids.
        """
        name, ids = _name_and(table, ids)
        number, problem = self._find(name)
        feature = Feature("rows", number, None)

        def read() -> IdBatch:
            if problem is not None:
                raise problem
            return IdBatch.of({"rows": ids}, [feature], self.journey.device)

        return self.journey.forward(read, [feature], as_they_are=True).each[0]

    @torch.no_grad()
    def load_rows(self, table: Any = None, source: Any = None, values: Any = None) -> None:
        """Overwrite a table's weights from `source` `[num_embeddings, embedding_dim]`: a tensor, a NumPy array (memory-mapped too),
        a slice of a safetensors file (`safe_open(...).get_slice(name)`), or anything else that slices like these. Each rank reads
        its own rows and columns only, 64 MiB at a time; optimizer state stays. `load_rows(source)` is enough for a module with one
        table. Not collective.

        `load_rows(table, ids, values)` writes the rows of a dynamic table: distinct ids, int64 `[n]`, and as many rows `[n,
        embedding_dim]`, anything that `source` may be. Ids without a row get one, with fresh state, as if the last step had touched
        it; nobody leaves for them. Collective: every rank gives all of them.

        Raises:
            ConfigError: the source has another shape, or ids of a dynamic table find no place; then no row has changed.
            InputError: on every rank, when ids are malformed, or differ between ranks.
            FeatureError: there is no such table. StepError: gradients wait for a dynamic table.
        """
        if values is None:
            name, source = _name_and(table, source)
        else:
            name, source = table, (source, values)
        if not isinstance(name, str | None):  # load_rows(ids, values)
            name, source = None, (name, source)
        number = self._table(name)
        config = self.journey.tables[number]
        if config.dynamic is not None:
            by_id.load(self.journey, number, *(source if isinstance(source, tuple) else (source, None)))
            return
        if isinstance(source, tuple):
            raise by_id.not_dynamic(config, "load_rows(table, ids, values)")
        shape = (config.num_embeddings, config.embedding_dim)
        if shape_of(source) != shape:
            raise ConfigError(f"table {config.name!r} is {shape}, the source has shape {shape_of(source)}")
        for local in self.local_shards():
            if local.table == config.name:
                load_shard(local.weights, local.shard, source)

    @torch.no_grad()
    def topk(self, queries: torch.Tensor, k: int, table: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The k rows of `table` with the largest dot product with each query, exactly; of a dynamic table, among ids that have one.
        Collective.

        Args:
            queries: this rank's own, `[Q, embedding_dim]`; Q may differ between ranks and may be 0.
            k: at most num_embeddings, or the number of ids that live. table: may be left out where the module has one.

        Returns:
            (scores `[Q, k]`, ids `[Q, k]`), best first; of equal scores the lower id comes first.

        Raises:
            FeatureError, ConfigError: on every rank, when there is no such table on any, or its k or queries are wrong.
            DisagreementError: on every rank, when they name different tables or k.
        """
        number, problem = self._find(table)
        return retrieval.topk(self.journey, number, queries, k, problem)

    def ids(self, table: str | None = None) -> torch.Tensor:
        """The ids of a dynamic table that have a row, int64 `[n]`, ascending: on every rank all of them. Collective.

        Raises:
            FeatureError, ConfigError: on every rank, when there is no such table on any, or it is not dynamic.
        """
        return by_id.living(self.journey, *self._find(table), only_ids=True).ids

    def living(self, table: str | None = None) -> by_id.Living:
        """As `ids`, with each id's last step and count. Collective."""
        return by_id.living(self.journey, *self._find(table))

    def tally(self, table: str | None = None) -> by_id.TableTally:
        """How many ids of a dynamic table live, and what has become of the others, over all ranks. Collective.

        Raises:
            FeatureError, ConfigError: on every rank, when there is no such table on any, or it is not dynamic.
        """
        return by_id.tally(self.journey, *self._find(table))

    def _table(self, name: str | None) -> int:
        number, problem = self._find(name)
        if problem is not None:
            raise problem
        return number

    def _find(self, name: str | None) -> tuple[int, FeatureError | None]:
        """The number of a table in its journey, of the only one for None. In a collective call the error is for all to raise."""
        names = [table.name for table in self.tables]
        if name is None and len(names) > 1:
            return 0, FeatureError(f"there are {len(names)} tables, so name one of them: {names}")
        name = names[0] if name is None else name
        if name not in names:
            return 0, FeatureError(f"there is no table {name!r}; the tables are {names}")
        return [table.name for table in self.journey.tables].index(name), None

    def reset_parameters(self, seed: int | None = None) -> None:
        """Set all rows to their starting values again; optimizer state stays, and so do the ids of a dynamic table, with their
        counts. Not collective, but call it on every rank.

        Args:
            seed: another start than the first one, also of ids that have no row yet.
        """
        chosen = self.journey.settings.seed if seed is None else replace(self.journey.settings, seed=seed).seed
        for slab in self.journey.slabs:
            slab.fill([table.name for table in self.tables], chosen)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Shards without an optimizer of ours are Parameters of this rank alone; the handle of the whole table stands for them.
        for key, table in self.weight_keys.items():
            destination[prefix + key] = self._handle(table)

    def _live_handle(self, table: str) -> TableHandle:
        """What stands for a table's weight: it can be frozen through it."""
        number, freezing = self._table(table), self.journey.freezing
        live = Live(lambda: number not in freezing.frozen.tables, lambda frozen: freezing.change(frozenset({number}), frozen))
        return self._handle(table, live)

    def _handle(self, table: str, live: Live | None = None) -> TableHandle:
        shards = [local for local in self._shards() if local.table == table]
        held = [Held(local.shard, local.weights, local.shard.ranks[0] == self.journey.comm.rank) for local in shards]
        number, device = self._table(table), self.journey.device
        owners = Owners(self.journey.plan.tables[number].layout, self.journey.comm, device)
        return TableHandle.of(self.journey.tables[number], held, owners, device, partial(self._touch, table), live)

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
        """Take whole tables from a plain model's state dict, or shards from the handles of a sharded one's."""
        keys = {prefix + key: table for key, table in self.weight_keys.items()}
        for key, table in keys.items():
            if key not in state_dict:
                missing_keys.append(key)
                continue
            try:
                self._take(table, state_dict[key])
            except ShardEmbedError as error:  # torch collects what is wrong with each key
                error_msgs.append(f"{key}: {error}")
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in keys] if strict else []

    @torch.no_grad()
    def _take(self, table: str, value: Any) -> None:
        if isinstance(value, TableHandle):
            self._handle(table).load(value)
        else:
            self.load_rows(table, value)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PickleError(
            f"{type(self).__name__} cannot be pickled or deep-copied: its table(s) {[table.name for table in self.tables]} lie "
            "cut over the ranks of this job. Copy the model before shard(), or get plain modules from se.unshard()"
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        # Several threads of one process would make the ranks' calls at once.
        raise UnsupportedError(
            f"nn.DataParallel was about to copy table(s) {[table.name for table in self.tables]} into threads of one process, and "
            "they lie cut over the ranks of the job. Start a process a GPU with torchrun, and wrap the model in "
            "DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        own = {table.name: table for table in self.tables}
        lines = []
        for planned in self.plan.tables:
            if table := own.get(planned.name):
                rows = "any number" if table.grows else str(table.num_embeddings)
                said = [f"{rows} x {table.embedding_dim}", f"{planned.kind} over {len(planned.layout.ranks)} rank(s)"]
                said += [] if table.dynamic is None else [f"{table.dynamic}"]
                lines.append(f"{table.name}: {', '.join(said)}")
        return "\n".join(lines)


def _name_and(table: Any, value: Any) -> tuple[str | None, Any]:
    """Of a call with a table's name and a value, or with the value alone."""
    return (None, table) if value is None and not isinstance(table, str) else (table, value)
