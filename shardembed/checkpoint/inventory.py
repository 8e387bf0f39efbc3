"""What of a model lies on this rank, by the keys it has in a checkpoint: the same for every plan and number of ranks.

Weights have the keys of the unsharded model's `state_dict`; optimizer state s of weight K has the key `K.s`. Every tensor is seen
as rows x columns: its first dimension, and all the others. A region is a cut-out of it that lies here, as a view.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardembed.checkpoint.format.blocks import ById, Kind
from shardembed.checkpoint.living import IdRegion, Members
from shardembed.errors import UnsupportedError
from shardembed.journey.journey import Journey
from shardembed.modules.base import ShardedModule
from shardembed.modules.handle import TableHandle
from shardembed.store.slab import LocalShard, Slab
from shardembed.store.wrappers import is_distributed
from shardembed.tables.layout import Shard
from shardembed.tables.table_config import TableConfig

if TYPE_CHECKING:  # importing it takes most of a second, and a model that has any has done so
    from torch.distributed.tensor import DTensor

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Region:
    """Part of a tensor that lies here.

    Attributes:
        rows: of the tensor.
        columns: of the tensor.
        data: `[len(rows), len(columns)]`, a view of what training uses, or a copy (see `home`).
        ranks: those that have it, of which one saves it; empty where another region stands for it.
        home: where `data` is a copy, what it goes back into when it has been loaded.
        touched: bool `[len(rows)]`: rows changed since the last full checkpoint; None where that is not known.
    """

    rows: range
    columns: range
    data: torch.Tensor
    ranks: tuple[int, ...]
    home: torch.Tensor | None = None
    touched: torch.Tensor | None = None

    def come_home(self) -> None:
        if self.home is not None:
            self.home.copy_(self.data.view(self.home.shape))


@dataclass(frozen=True)
class Item:
    """A tensor of the model, and what of it lies here.

    Attributes:
        key: in the state dict of the unsharded model.
        kind: what it is to the model.
        of: the key of the weight it belongs to.
        shape: of the whole tensor.
        dtype: of its elements.
        regions: of it that lie on this rank.
        by_id: of a dynamic table, what is known of it; None: rows have numbers. Its `shape` then has as many rows as ids may have.
        living: of a dynamic table, in place of `regions`, what lies on this rank.
    """

    key: str
    kind: Kind
    of: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    regions: tuple[Region, ...]
    by_id: ById | None = None
    living: tuple[IdRegion, ...] = ()


@dataclass(frozen=True)
class Table:
    """A sharded table of the model.

    Attributes:
        key: in the state dict of the unsharded model.
        name: in its journey.
        journey: that looks it up.
        slabs: in which it has lanes.
    """

    key: str
    name: str
    journey: Journey
    slabs: tuple[Slab, ...]

    @property
    def config(self) -> TableConfig:
        """What the user said of it."""
        return next(one for one in self.journey.tables if one.name == self.name)


@dataclass(frozen=True)
class Inventory:
    """What a model holds here.

    Attributes:
        items: all tensors, by key.
        tables: the sharded ones, by key.
        parameters: all that the model has, by key; shards of tables without an optimizer of ours are among them.
        plain: what its `state_dict` has beside tensors.
    """

    items: dict[str, Item]
    tables: dict[str, Table]
    parameters: dict[str, nn.Parameter]
    plain: dict[str, Any] = field(default_factory=dict)


def take(model: nn.Module, rank: int, world_size: int) -> Inventory:
    """List weights, table state and buffers. Views only: nothing is copied, but for dense tensors that are not contiguous."""
    clean = _cleaner(model)
    tables: dict[str, Table] = {}
    seen: set[tuple[int, str]] = set()
    own: set[str] = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, ShardedModule):
            continue
        for key, name in module.weight_keys.items():
            full = clean(f"{prefix}.{key}" if prefix else key)
            own.add(full)
            if (id(module.journey), name) not in seen:  # a table that several modules look up goes by its first key
                seen.add((id(module.journey), name))
                tables[full] = Table(full, name, module.journey, _slabs_of(module.journey, name))
    parameters = {clean(name): parameter for name, parameter in model.named_parameters()}  # ShardParameters too, which are tables'
    items = {item.key: item for table in tables.values() for item in _table_items(table)}
    plain: dict[str, Any] = {}
    storages: set[tuple[int, torch.Size]] = set()
    for raw, value in model.state_dict().items():
        key = clean(raw)
        if isinstance(value, TableHandle) or key in own:
            continue
        if not isinstance(value, torch.Tensor):
            plain[raw] = value
            continue
        # By memory, since torch lists a tied weight under each of its names.
        here = (local(value).data_ptr(), value.shape)
        if not value.numel() or here not in storages:  # tied weights are saved once
            storages.add(here)
            # Buffers may differ between ranks, and belong together: rank 0's, as everybody saves them.
            ranks = tuple(range(world_size)) if key in parameters else (0,)
            items[key] = dense_item(key, "dense", key, value, rank, ranks)
    return Inventory(items, tables, parameters, plain)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DistributedDataParallel and its kind."""
    while True:
        inner = next((getattr(model, name) for name in WRAPPERS if _wraps(model, name)), None)
        if inner is None:
            return model
        model = inner


def _wraps(module: nn.Module, name: str) -> bool:
    """`module` is a wrapper that calls the wrapped one `name`."""
    if name == "module":
        return isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel)
    return name in module._modules


def _cleaner(model: nn.Module) -> Any:
    """Takes the names that wrappers add out of a key."""
    added = [
        f"{prefix}.{name}." if prefix else f"{name}."
        for prefix, module in model.named_modules()
        for name in WRAPPERS
        if _wraps(module, name)
    ]
    added.sort(key=len, reverse=True)  # the innermost first: what is outside of it does not change its place

    def clean(key: str) -> str:
        for prefix in added:
            if key.startswith(prefix):
                key = key[: prefix.rstrip(".").rfind(".") + 1] + key[len(prefix) :]
        return key

    return clean


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies here."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def two_dimensional(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) as which a tensor of any shape is saved."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def dense_item(key: str, kind: Kind, of: str, tensor: torch.Tensor, rank: int, ranks: tuple[int, ...]) -> Item:
    """A tensor that all `ranks` have alike, or a DTensor cut by its first dimension, of which each has its part.

    Raises:
        UnsupportedError: the DTensor is cut in another way.
    """
    mine = local(tensor.detach())
    rows, columns = two_dimensional(tuple(tensor.shape))
    first = 0
    if is_distributed(tensor):
        first, saved = _place_of(key, tensor)
        ranks = (rank,) if saved else ()
        rows = mine.shape[0] if mine.dim() else 1
    home = None if mine.is_contiguous() else mine
    data = mine.contiguous().view(rows, columns) if mine.numel() else mine.new_empty(rows, columns)
    regions = (Region(range(first, first + rows), range(columns), data, ranks, home),) if rows and columns else ()
    return Item(key, kind, of, tuple(tensor.shape), tensor.dtype, regions)


def _place_of(key: str, tensor: DTensor) -> tuple[int, bool]:
    """The first row of this rank's part of a DTensor, and whether this rank saves it (of copies, the first does)."""
    coordinate = tensor.device_mesh.get_coordinate()
    chunks = tensor.__create_chunk_list__()
    whole = tuple(tensor.shape[1:])
    if coordinate is None or any(tuple(chunk.sizes)[1:] != whole for chunk in chunks) or len(chunks) > 1:
        raise UnsupportedError(
            f"{key!r} is a DTensor placed as {tensor.placements}; checkpoints hold those cut by their first dimension, as "
            "fully_shard cuts them"
        )
    copies = [place for place, kind in zip(coordinate, tensor.placements, strict=True) if kind.is_replicate()]
    first = int(chunks[0].offsets[0]) if chunks and len(chunks[0].offsets) else 0
    return first, not any(copies)


def _slabs_of(journey: Journey, name: str) -> tuple[Slab, ...]:
    return tuple(slab for slab in journey.slabs if any(slab.table_of(lane) == name for lane in slab.spec.lanes))


def _table_items(table: Table) -> Iterator[Item]:
    """A table's weights, then its optimizer state."""
    config = table.config
    if config.dynamic is not None:
        yield from _dynamic_items(table)
        return
    rows, columns = config.num_embeddings, config.embedding_dim
    held = [(slab, shard) for slab in table.slabs for shard in slab.shards() if shard.table == table.name]
    weights = tuple(_region(slab, shard, shard.weights) for slab, shard in held)
    yield Item(table.key, "table", table.key, (rows, columns), config.dtype, weights)
    spec = table.slabs[0].spec
    for name, shape in spec.optimizer.state.items() if not spec.policy.frozen else ():
        regions = tuple(_region(slab, shard, shard.state[name]) for slab, shard in held)
        if shape == "row":
            regions = tuple(_of_rows(region) for region in regions)
        whole = (rows, columns) if shape == "element" else (rows,)
        yield Item(f"{table.key}.{name}", "table_state", table.key, whole, spec.compute_dtype, regions)


def _dynamic_items(table: Table) -> Iterator[Item]:
    """Rows and optimizer state of the ids that have some, their last steps and counts, and likewise of the candidates."""
    config, key, spec = table.config, table.key, table.slabs[0].spec
    rows, columns, dtype = config.num_embeddings, config.embedding_dim, spec.compute_dtype
    parts = [(slab, Members(slab, slab.dynamic.census, config.cut_rows)) for slab in table.slabs if slab.dynamic is not None]
    by_id = ById(None if config.grows else rows, config.cut_rows, table.journey.steps, parts[0][1].keys.seed)

    def item(name: str, kind: Kind, shape: tuple[int, ...], dtype: torch.dtype, living: Iterable[IdRegion]) -> Item:
        return Item(name, kind, key, shape, dtype, (), by_id, tuple(living))

    yield item(key, "table", (rows, columns), config.dtype, (_living(one, lambda slab: slab.weights) for _, one in parts))
    for name, shape in spec.optimizer.state.items() if not spec.policy.frozen else ():
        get = partial(_state, name)
        whole = (rows, columns) if shape == "element" else (rows,)
        yield item(f"{key}.{name}", "table_state", whole, dtype, (_living(one, get, shape == "row") for _, one in parts))
    yield from _census_items(item, f"{key}.ids", rows, [one for _, one in parts])
    waiting = [Members(slab, slab.dynamic.candidates, config.cut_rows) for slab, _ in parts if slab.dynamic.candidates is not None]
    if waiting:
        yield from _census_items(item, f"{key}.candidates", rows, waiting)


def _census_items(item: Callable[..., Item], key: str, rows: int, parts: list[Members]) -> Iterator[Item]:
    """When ids were touched last, and where it is kept, how often they have occurred."""
    names = {"last": lambda one: one.census.lasts_S, "count": lambda one: one.census.counts_S}
    for name, get in names.items() if parts[0].census.policy.counts else [("last", names["last"])]:
        living = (_living(one, lambda _, one=one, get=get: get(one), True) for one in parts)
        yield item(f"{key}.{name}", "table_ids", (rows,), torch.int32, living)


def _state(name: str, slab: Slab) -> torch.Tensor:
    return slab.state[name]


def _living(members: Members, get: Callable[[Slab], torch.Tensor], of_rows: bool = False) -> IdRegion:
    """of_rows: one number a row, which all strips of columns have alike, so that the first one stands for all."""
    slab = members.slab
    (lane,) = slab.spec.lanes
    blocks = tuple(block.shard.rows for block in lane.blocks if slab.rank in block.shard.ranks and block.shard.rows)
    if of_rows:
        return IdRegion(members, blocks, range(1), lane.columns.start == 0, lambda: get(slab).unsqueeze(1))
    return IdRegion(members, blocks, lane.columns, True, lambda: get(slab))


def _region(slab: Slab, held: LocalShard, data: torch.Tensor) -> Region:
    shard: Shard = held.shard
    touched = None
    if slab.touched is not None and slab.spec.optimizer.stepped:
        touched = slab.touched[held.first_key : held.first_key + len(shard.rows)]
    return Region(shard.rows, shard.columns, data, shard.ranks, touched=touched)


def _of_rows(region: Region) -> Region:
    """State with one number a row: strips of columns have the same, so the first one stands for all."""
    ranks = region.ranks if region.columns.start == 0 else ()
    return replace(region, columns=range(1), data=region.data.unsqueeze(1), ranks=ranks)
