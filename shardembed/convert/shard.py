"""`shard(model)`: swap a model's tables for sharded ones, in place, names and weights kept.

All tables of the model live in one journey. Without `inputs` each module makes a call of its own when it is called; with
`inputs`, a hook looks up everything in one call just before the model's forward, and the modules hand out their parts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from shardembed.comm.comm import Comm
from shardembed.config.shown import printable
from shardembed.convert.becoming import Becoming, row_ids
from shardembed.convert.find import find_sites
from shardembed.convert.left import Left
from shardembed.convert.resizing import explain_resizing
from shardembed.convert.sites import Table, swap, tables_of
from shardembed.errors import FeatureError, PlanError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.ahead import Ahead
from shardembed.journey.journey import Journey, Ticket
from shardembed.journey.prefetch import Sent, SentBatches, Target
from shardembed.modules.base import eager
from shardembed.modules.build import TableOptimizers, build_journey
from shardembed.modules.by_id import write
from shardembed.modules.loading import CHUNK_BYTES
from shardembed.modules.lookup import Lookup
from shardembed.tables.dynamic import Dynamic
from shardembed.tables.layout import Shard, meeting
from shardembed.tables.plan import Plan, PlanLike
from shardembed.tables.settings import Settings
from shardembed.tables.table_config import features_of

Model = TypeVar("Model", bound=nn.Module)


def shard(
    model: Model,
    *,
    optimizer: TableOptimizers | None = None,
    plan: PlanLike = "auto",
    inputs: Callable[..., Mapping[str, Any]] | None = None,
    skip: Sequence[str] = (),
    dynamic: Mapping[str, Dynamic] | None = None,
    capacity: Mapping[str, int | None] | None = None,
    fresh: Sequence[str] = (),
    wire_dtype: torch.dtype | None = None,
    update: Literal["step", "backward"] = "step",
    gradient_reduction: Literal["mean", "sum"] = "mean",
    device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
    seed: int = 0,
    kernel: Literal["auto", "reference", "numba", "triton", "fbgemm"] = "auto",
    deterministic: bool = False,
    verbose: bool = True,
) -> Model:
    """Cut every `nn.Embedding`, `nn.EmbeddingBag` and TorchRec `EmbeddingBagCollection` and `EmbeddingCollection` of `model` over
    the ranks, in place; returns the model. Collective.

    Weights are rank 0's, broadcast in pieces of 64 MiB, so that all ranks start alike whatever their seeds; the other ranks may
    have theirs on the meta device. Tables that rank 0 has there start from N(0, 1) as torch's would, or as TorchRec's config says,
    drawn shard by shard. Beside the plain modules, which are let go one by one, a rank needs memory for its shards, their
    optimizer state and one piece. A table is named by the path of its module, and in a collection by that and its own name
    (`sparse.ebc.t1`): in `plan`, in `optimizer` when it is a dict, and in errors. Modules that share a weight become one table.

    Args:
        inputs: called with the arguments of the model's forward; returns, for each module's path, what that module is going to be
            called with: its ids (a KeyedJaggedTensor for TorchRec's), a tuple of its arguments (ids, offsets, weights), or a list
            of those, one a call. All tables then share one journey a step.
        skip: paths or patterns of modules to leave as they are.
        dynamic: by name or pattern of tables, how ids come and go: such a table takes any int64 as an id. Row i becomes id i, with
            its weights (that of padding_idx is let go); other ids begin at a start that is drawn as for tables on the meta device.
        capacity: by name or pattern, how many ids a dynamic table has room for, None: any number. Default: num_embeddings of its
            module, which is too little for rows that become ids: they fall into buckets, unevenly.
        fresh: names or patterns of dynamic tables whose rows are let go: every id begins at its start.
        optimizer, plan, wire_dtype, update, gradient_reduction, device, process_group, seed, kernel, deterministic: as in
            `EmbeddingCollection`.
        verbose: print on rank 0 what became of each table.

    Lists, tuples and dicts in attributes of the model that hold plain modules hold the sharded ones afterwards. Who else still
    refers to a plain table or its weight (a list of Parameters, an optimizer made before, a function) is named in a
    `StaleReferenceWarning`.

    Raises:
        ConfigError: there is no table to shard, the model is sharded or wrapped already, a table is more than torch's own module
            (a subclass with its own forward, a parametrization, hooks), a weight is shared with what is no table, or rows find no
            place in a dynamic table.
        PlanError: the plan does not fit, or names a module that is not a table here.
    """
    sites = find_sites(model, skip)
    tables = tables_of(model, sites)
    names = [table.name for table in tables]
    _check_plan(plan, names)
    becoming = Becoming(dynamic or {}, capacity or {}, fresh)
    becoming.check(names)
    settings = Settings(wire_dtype, update, gradient_reduction, seed, kernel, deterministic)
    exists = _existing(tables, Comm.of(process_group))
    configs = [becoming.config(table, table.name in exists) for table in tables]
    exists -= {config.name for config in configs if config.dynamic is not None and not becoming.keeps(config.name)}
    journey = build_journey(configs, optimizer, plan, device, process_group, settings)
    features = {feature.name: feature for feature in features_of(journey.tables)}
    modules: dict[str, Lookup] = {}
    # Weak references, taken while the plain modules are still there.
    left = Left.of(sites, tables)
    # One site after the other, and each let go of before the next is read: beside the shards, memory for one plain table.
    while sites:
        site = sites.pop(0)
        _load_from_rank_zero(journey, tables, site.path, exists)
        module = site.sharded(journey, features)
        module.train(site.module.training)
        for path in site.paths:
            modules[path] = module
            swap(model, path, module)
        del site  # lets go of the plain weights
    left.settle(model, modules)
    if journey.freezing.frozen.learning and not journey.own_parameters:
        journey.freezing.watch(parameter for parameter in model.parameters() if parameter.requires_grad)
    if inputs is not None:
        model.register_forward_pre_hook(SharedLookup(journey, modules, inputs), with_kwargs=True)
    explain_resizing(model)
    if verbose and journey.comm.rank == 0:
        said = summary(journey, one_call=inputs is not None or len(set(modules.values())) == 1)
        print(printable(said), file=sys.stderr)
    return model


def summary(journey: Journey, one_call: bool) -> str:
    """What became of each table, a line each, and how they are called."""
    lines = [f"shardembed: {len(journey.tables)} table(s) over {journey.comm.world_size} rank(s)"]
    width = max(len(table.name) for table in journey.tables)
    for table, planned in zip(journey.tables, journey.plan.tables, strict=True):
        spec = next(s for s in journey.specs for lane in s.lanes if journey.tables[lane.table] is table)
        rows = "any number of ids" if table.grows else f"{table.num_embeddings:,}{' ids' if table.dynamic else ''}"
        size = f"{rows} x {table.embedding_dim} {str(table.dtype).removeprefix('torch.')}"
        lines.append(f"  {table.name:<{width}}  {size}, {planned.kind}, {'frozen' if table.frozen else spec.optimizer.describe()}")
    if not one_call:
        lines.append("  each module makes its own calls; inputs= lets all tables share one")
    return "\n".join(lines)


Calls = list[tuple[str, tuple[Any, ...]]]  # (path, arguments)


class SharedLookup(Target):
    """A hook that looks up all tables in one call before each forward of the model."""

    def __init__(self, journey: Journey, modules: Mapping[str, Lookup], inputs: Callable[..., Mapping[str, Any]]) -> None:
        self.journey, self._modules, self._inputs = journey, modules, inputs
        self.sent_batches = SentBatches()

    @eager
    def __call__(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls, ticket = self.sent_batches.take(arguments, named) or self._send(arguments, named)
        for module in self._modules.values():
            module.forget()
        # Contiguous, as these modules answered before: a model may have relied on it.
        outputs = iter([output.contiguous() for output in self.journey.outputs(ticket).each])
        for path, given in calls:
            self._modules[path].hand_out(given, list(islice(outputs, len(self._modules[path].features))))

    def send_ahead(self, arguments: tuple[Any, ...], ahead: Ahead) -> Sent:
        calls, ticket = self._send(arguments, {}, ahead)
        return Sent(ticket, (calls, ticket))

    def _send(self, arguments: tuple[Any, ...], named: dict[str, Any], ahead: Ahead | None = None) -> tuple[Calls, Ticket]:
        modules = self._modules
        calls: Calls = []
        problem: Exception | None = None
        try:
            calls = _calls(dict(self._inputs(*arguments, **named)))
        except Exception as error:  # whatever inputs= raises: for all ranks to hear of
            problem = error
        unknown = next((path for path, _ in calls if path not in modules), None)

        def read() -> IdBatch:
            if problem is not None:
                raise problem
            if unknown is not None:
                raise FeatureError(f"inputs= names {unknown!r}, which is not a sharded module here; they are {sorted(modules)}")
            return IdBatch.join(tuple(part for path, given in calls for part in modules[path].checked(*given)))

        features = [feature for path, _ in calls if path in modules for feature in modules[path].features]
        return calls, self.journey.send(read, features, ahead=ahead)


def _calls(given: Mapping[str, Any]) -> Calls:
    """Every call that is announced."""
    calls: Calls = []
    for path, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            calls.append((path, one if isinstance(one, tuple) else (one,)))
    return calls


def _load_from_rank_zero(journey: Journey, tables: list[Table], path: str, exists: set[str]) -> None:
    """Load the tables that are first used at `path`, where rank 0 has their weights, and let go of them."""
    while tables and tables[0].uses[0].path == path:
        table = tables.pop(0)
        if table.name in exists:
            _broadcast(journey, table, journey.comm)


def _existing(tables: Sequence[Table], comm: Comm) -> set[str]:
    """The tables whose weights rank 0 has; the others may have theirs on the meta device."""
    mine = json.dumps([table.name for table in tables if not table.weight.is_meta])
    return set(json.loads(comm.gather_texts("control", "shard: say which weights exist", mine)[0]))


def _broadcast(journey: Journey, table: Table, comm: Comm) -> None:
    """Copy rank 0's weights into the shards of all ranks, a piece at a time."""
    weight = table.weight.detach()
    elsewhere = weight.is_meta or comm.rank > 0  # only rank 0's weights are read
    mine = [local for slab in journey.slabs for local in slab.shards() if local.table == table.name]
    number = next(number for number, config in enumerate(journey.tables) if config.name == table.name)
    config = journey.tables[number]
    step = max(1, CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
    for first in range(0, weight.shape[0], step):
        piece = weight[first : first + step]
        piece = torch.empty_like(piece, device=journey.device) if elsewhere else piece.to(journey.device, copy=True)
        comm.broadcast("shard: broadcast weights", piece)
        for local in mine:
            copy_part(local.weights, local.shard, piece, first)
        if config.dynamic is not None:
            ids = row_ids(config, first, first + piece.shape[0], journey.device)
            write(journey, number, ids, piece[ids - first])


def copy_part(out: torch.Tensor, shard: Shard, piece: torch.Tensor, first: int) -> None:
    """Copy what a shard holds of the whole rows `piece`, which begin at row `first`."""
    if met := meeting(shard.rows, first, first + piece.shape[0]):
        given, taken = met
        out[taken].copy_(piece[given, shard.columns.start : shard.columns.stop])


def _check_plan(plan: PlanLike, paths: list[str]) -> None:
    planned = {table.name for table in plan.tables} if isinstance(plan, Plan) else set(plan if isinstance(plan, Mapping) else ())
    if unknown := sorted(planned - set(paths)):
        raise PlanError(f"the plan names {unknown}, which are not tables of this model; its tables are {sorted(paths)}")
