"""`shard(model)`: swap a model's plain tables for sharded ones, in place, names and weights kept.

All tables of the model live in one journey. Without `inputs` each module makes a call of its own when it is called; with
`inputs`, a hook looks up everything in one call just before the model's forward, and the modules hand out their parts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from shardembed.comm import Comm
from shardembed.convert.sites import PlainTable, find_tables, swap
from shardembed.errors import FeatureError, PlanError
from shardembed.ids import IdBatch
from shardembed.journey import Journey, Settings
from shardembed.layout import Shard
from shardembed.modules import Embedding, EmbeddingBag
from shardembed.modules.base import TableOptimizers, build_journey, eager
from shardembed.plan import Plan, PlanLike
from shardembed.tables import Feature, features_of

Model = TypeVar("Model", bound=nn.Module)
CHUNK_BYTES = 64 * 1024 * 1024
log = logging.getLogger("shardembed")


def shard(
    model: Model,
    *,
    optimizer: TableOptimizers | None = None,
    plan: PlanLike = "auto",
    inputs: Callable[..., Mapping[str, Any]] | None = None,
    skip: Sequence[str] = (),
    wire_dtype: torch.dtype | None = None,
    update: Literal["step", "backward"] = "step",
    gradient_reduction: Literal["mean", "sum"] = "mean",
    device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
    seed: int = 0,
    kernel: Literal["auto", "reference", "fbgemm"] = "auto",
    verbose: bool = True,
) -> Model:
    """Cut every `nn.Embedding` and `nn.EmbeddingBag` of `model` over the ranks, in place; returns the model. Collective.

    Weights are rank 0's, broadcast in pieces of 64 MiB, so that all ranks start alike whatever their seeds; the other ranks may
    have their tables on the meta device. Tables that rank 0 has there start from N(0, 1) as torch's would, drawn shard by shard.
    Beside the plain tables, which are let go one by one, a rank needs memory for its shards, their optimizer state and one piece.
    A table is named by the path of its module: in `plan`, in `optimizer` when it is a dict, in errors, and in the keys of
    `inputs`. Modules that share a weight become one table.

    Args:
        inputs: called with the arguments of the model's forward; returns, for each table's path, what that module is going to be
            called with: its ids, a tuple of its arguments (ids, offsets, weights), or a list of those, one a call. All tables then
            share one journey a step.
        skip: paths or patterns of tables to leave as they are.
        optimizer, plan, wire_dtype, update, gradient_reduction, device, process_group, seed, kernel: as in `EmbeddingCollection`.
        verbose: print on rank 0 what became of each table.

    Raises:
        ConfigError: there is no table to shard, the model is sharded or wrapped already, a table is more than torch's own module
            (a subclass with its own forward, a parametrization, hooks), or a weight is shared with what is no table.
        PlanError: the plan does not fit, or names a module that is not a table here.
    """
    found = find_tables(model, skip)
    _check_plan(plan, [table.name for table in found])
    settings = Settings(wire_dtype, update, gradient_reduction, seed, kernel)
    journey = build_journey([table.config() for table in found], optimizer, plan, device, process_group, settings)
    features = {feature.name: feature for feature in features_of(journey.tables)}
    modules: dict[str, Embedding | EmbeddingBag] = {}
    known = torch.tensor([not table.weight.is_meta for table in found], dtype=torch.uint8, device=journey.device)
    known = journey.comm.broadcast("say which weights exist", known).tolist()
    for table, exists in zip(found, known, strict=True):
        if exists:
            _load_from_rank_zero(journey, table, journey.comm)
        for site in table.sites:
            module = _sharded(journey, features[site.name], site.module)
            module.train(site.module.training)
            for path in site.paths:
                modules[path] = module
                swap(model, path, module)
        table.sites.clear()  # lets go of the plain weights
    if inputs is not None:
        model.register_forward_pre_hook(SharedLookup(journey, modules, inputs), with_kwargs=True)
    if verbose and journey.comm.rank == 0:
        print(summary(journey, shared=inputs is not None), file=sys.stderr)
    return model


def _sharded(journey: Journey, feature: Feature, plain: nn.Embedding | nn.EmbeddingBag) -> Embedding | EmbeddingBag:
    if isinstance(plain, nn.Embedding):
        return Embedding.on(journey, feature)
    module = EmbeddingBag.on(journey, feature)
    module.include_last_offset = plain.include_last_offset
    return module


def summary(journey: Journey, shared: bool) -> str:
    """What became of each table, a line each, and how they are called."""
    lines = [f"shardembed: {len(journey.tables)} table(s) over {journey.comm.world_size} rank(s)"]
    width = max(len(table.name) for table in journey.tables)
    for table, planned in zip(journey.tables, journey.plan.tables, strict=True):
        spec = next(s for s in journey.specs for lane in s.lanes if journey.tables[lane.table] is table)
        size = f"{table.num_embeddings:,} x {table.embedding_dim} {str(table.dtype).removeprefix('torch.')}"
        lines.append(f"  {table.name:<{width}}  {size}, {planned.kind}, {'frozen' if table.frozen else spec.optimizer.describe()}")
    if not shared and len(journey.tables) > 1:
        lines.append("  each module makes its own calls; inputs= lets all tables share one")
    return "\n".join(lines)


class SharedLookup:
    """A hook that looks up all tables in one call before each forward of the model."""

    def __init__(
        self, journey: Journey, modules: Mapping[str, Embedding | EmbeddingBag], inputs: Callable[..., Mapping[str, Any]]
    ) -> None:
        self._journey, self._modules, self._inputs = journey, modules, inputs

    @eager
    def __call__(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        modules, calls = self._modules, _calls(dict(self._inputs(*arguments, **named)))
        unknown = next((path for path, _ in calls if path not in modules), None)
        for module in modules.values():
            module.forget()

        def read() -> IdBatch:
            if unknown is not None:
                raise FeatureError(f"inputs= names {unknown!r}, which is not a sharded table here; they are {sorted(modules)}")
            return IdBatch.join(tuple(modules[path].read(*given) for path, given in calls))

        features = [modules[path].feature for path, _ in calls if path in modules]
        for (path, given), output in zip(calls, self._journey.forward(read, features), strict=True):
            modules[path].hand_out(given, output)


def _calls(given: Mapping[str, Any]) -> list[tuple[str, tuple[Any, ...]]]:
    """(path, arguments) of every call that is announced."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for path, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            calls.append((path, one if isinstance(one, tuple) else (one,)))
    return calls


def _load_from_rank_zero(journey: Journey, table: PlainTable, comm: Comm) -> None:
    """Copy rank 0's weights into the shards of all ranks, a piece at a time."""
    weight = table.weight.detach()
    elsewhere = weight.is_meta or comm.rank > 0  # only rank 0's weights are read
    mine = [local for slab in journey.slabs for local in slab.shards() if local.table == table.name]
    step = max(1, CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
    for first in range(0, weight.shape[0], step):
        piece = weight[first : first + step]
        piece = torch.empty_like(piece, device=journey.device) if elsewhere else piece.to(journey.device, copy=True)
        comm.broadcast("broadcast weights", piece)
        for local in mine:
            copy_part(local.weights, local.shard, piece, first)


def copy_part(out: torch.Tensor, shard: Shard, piece: torch.Tensor, first: int) -> None:
    """Copy what a shard holds of the whole rows `piece`, which begin at row `first`."""
    rows, columns = shard.rows, shard.columns
    begin = max(0, -(-(first - rows.start) // rows.step))
    inside = rows[begin : max(begin, -(-(first + piece.shape[0] - rows.start) // rows.step))]
    if inside:
        part = piece[inside.start - first : inside[-1] - first + 1 : rows.step, columns.start : columns.stop]
        out[begin : begin + len(inside)].copy_(part)


def _check_plan(plan: PlanLike, paths: list[str]) -> None:
    planned = {table.name for table in plan.tables} if isinstance(plan, Plan) else set(plan if isinstance(plan, Mapping) else ())
    if unknown := sorted(planned - set(paths)):
        raise PlanError(f"the plan names {unknown}, which are not tables of this model; its tables are {sorted(paths)}")
