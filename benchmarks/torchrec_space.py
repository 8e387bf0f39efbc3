"""TorchRec's planning problem as ours: its own options, rated by its own classes, none of them rewritten.

TorchRec's enumerator lists every table's ways to be sharded, and its estimators say what each shard takes in time and memory. Its
planner rates a plan by the slowest rank's sum over its shards (`NoopPerfModel`): a problem of a single phase in our terms. TorchRec
counts milliseconds and leaves the input exchange out of `Perf.total`; we take its number as it is.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shardembed import optim
from shardembed.errors import UnsupportedError
from shardembed.planner.problem import Array, Choice, Item, Option, Problem
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.placement import Packing
from shardembed.tables.plan import Plan, TablePlan

KINDS = ("data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard")  # those that both sides have
KERNELS = ("fused", "dense")  # rows in device memory; "dense" is what TorchRec copies use
MOST_NODE_SETS = 128  # of a grid: beyond, the kind is left out for both planners
PER_NODE = 8
# An H100 SXM, its NVLink and one 400 Gb/s adapter a GPU, in one direction; TorchRec wants bytes a millisecond.
HBM_BANDWIDTH, INTRA_BANDWIDTH, INTER_BANDWIDTH = 3.35e12 / 1e3, 450e9 / 1e3, 50e9 / 1e3
GIB = 1 << 30

Assigned = Mapping[str, tuple[str, Sequence[int]]]  # table -> (sharding type, the rank of each shard)


@dataclass(frozen=True, eq=False)
class Space:
    """What TorchRec's planner may choose from for a workload on `ranks` ranks of `memory` bytes each.

    least_columns: the narrowest column shard (TorchRec's `min_partition`); None is TorchRec's own default, 128.
    """

    workload: Workload
    ranks: int
    memory: int
    least_columns: int | None = None

    @cached_property
    def topology(self) -> Any:
        from torchrec.distributed.planner import Topology

        return Topology(
            world_size=self.ranks,
            compute_device="cuda",
            local_world_size=min(PER_NODE, self.ranks),
            hbm_cap=self.memory,
            hbm_mem_bw=HBM_BANDWIDTH,
            intra_host_bw=INTRA_BANDWIDTH,
            inter_host_bw=INTER_BANDWIDTH,
        )

    @cached_property
    def batch_size(self) -> int:
        return self.workload.global_batch_size // self.ranks

    @cached_property
    def module(self) -> Any:
        """The tables on the meta device, marked with the optimizer whose state TorchRec's storage estimator counts."""
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

        configs = [
            EmbeddingBagConfig(
                name=load.table.name,
                num_embeddings=load.table.num_embeddings,
                embedding_dim=load.table.embedding_dim,
                feature_names=_features(load),
            )
            for load in self.workload.tables
        ]
        module: Any = EmbeddingBagCollection(tables=configs, device="meta")  # pyright: ignore[reportArgumentType]
        for load in self.workload.tables:
            module.embedding_bags[load.table.name].weight._optimizer_classes = [_optimizer_class(load)]
        return module

    @cached_property
    def sharders(self) -> list[Any]:
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

        return [EmbeddingBagCollectionSharder()]

    @cached_property
    def constraints(self) -> dict[str, Any]:
        """The ids a sample, and the kinds and kernels that both planners have."""
        from torchrec.distributed.planner import ParameterConstraints

        return {
            load.table.name: ParameterConstraints(
                sharding_types=[kind for kind in KINDS if kind != "grid_shard" or self._grid_is_listed(load)],
                compute_kernels=list(KERNELS),
                min_partition=self.least_columns,
                pooling_factors=list(load.ids_per_sample),
            )
            for load in self.workload.tables
        }

    def _grid_is_listed(self, load: TableLoad) -> bool:
        """A grid takes whole nodes, one for each column shard."""
        from torchrec.distributed.sharding_plan import _get_block_size_for_cw_shard

        width = load.table.embedding_dim
        nodes, wanted = self.ranks // PER_NODE, width // _get_block_size_for_cw_shard(width, self.least_columns)
        return nodes > 1 and 1 < wanted <= nodes and len(list(itertools.combinations(range(nodes), wanted))) <= MOST_NODE_SETS

    @cached_property
    def reserved(self) -> Any:
        """The topology less what TorchRec's default reservation keeps back: 15 percent, and 20 copies of a batch's ids."""
        from torchrec.distributed.planner.storage_reservations import HeuristicalStorageReservation

        with quiet():
            reservation = HeuristicalStorageReservation(percentage=0.15)
            return reservation.reserve(self.topology, self.batch_size, self.module, self.sharders, self.constraints)

    @property
    def capacity(self) -> int:
        return self.reserved.devices[0].storage.hbm

    @cached_property
    def listed(self) -> dict[str, dict[str, Any]]:
        """TorchRec's `ShardingOption`s with their costs, by table and sharding type."""
        from torchrec.distributed.planner.enumerators import EmbeddingEnumerator

        with quiet():
            enumerator = EmbeddingEnumerator(self.topology, self.batch_size, constraints=self.constraints)
            found: dict[str, dict[str, Any]] = {load.table.name: {} for load in self.workload.tables}
            for option in enumerator.enumerate(self.module, self.sharders):
                found[option.name][option.sharding_type] = option
        return found

    @cached_property
    def problem(self) -> Problem:
        shared: dict[tuple[object, ...], tuple[Option, ...]] = {}
        items = []
        for load in self.workload.tables:
            alike = (load.table.num_embeddings, load.table.embedding_dim, load.table.dtype, load.ids_per_sample)
            if alike not in shared:
                shared[alike] = self._options(self.listed[load.table.name])
            items.append(Item(load.table.name, shared[alike]))
        return Problem(("step",), self.ranks, float(self.capacity), tuple(items), ranks_per_node=min(PER_NODE, self.ranks))

    def _options(self, listed: Mapping[str, Any]) -> tuple[Option, ...]:
        return tuple(option for kind in KINDS if kind in listed for option in _options_of(listed[kind], self.ranks))

    def choices(self, assigned: Assigned) -> tuple[Choice, ...]:
        """A plan of TorchRec's as choices of `problem`."""
        return tuple(_choice_of(item, *assigned[item.name]) for item in self.problem.items)

    def assigned(self, choices: Sequence[Choice]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Choices of `problem` as TorchRec's sharding type and ranks of every table."""
        found = {}
        for item, choice in zip(self.problem.items, choices, strict=True):
            option = item.options[choice.option]
            ranks = choice.ranks
            if option.divisible:
                ranks = tuple(r for rank, share in zip(ranks, choice.shares or (), strict=True) for r in [rank] * share)
            elif not option.parts:
                ranks = tuple(range(self.ranks))
            found[item.name] = (str(option.key), ranks)
        return found

    def proposal(self, assigned: Assigned) -> list[Any]:
        """A plan as TorchRec has it: its sharding options, with a rank for every shard."""
        options = [copy.deepcopy(self.listed[name][kind]) for name, (kind, _) in assigned.items()]
        for option, (_, ranks) in zip(options, assigned.values(), strict=True):
            for shard, rank in zip(option.shards, ranks, strict=True):
                shard.rank = rank
        return options

    def rate(self, assigned: Assigned) -> tuple[float, bool]:
        """TorchRec's rating of a plan in milliseconds, and whether it fits into the memory that its planner would allow."""
        from torchrec.distributed.planner.perf_models import NoopPerfModel
        from torchrec.distributed.planner.types import Storage

        proposal = self.proposal(assigned)
        held = [Storage(0, 0) for _ in range(self.ranks)]
        for option in proposal:
            for shard in option.shards:
                held[shard.rank] += shard.storage
        fits = all(used.fits_in(device.storage) for used, device in zip(held, self.reserved.devices, strict=True))
        return float(NoopPerfModel(self.topology).rate(proposal)), fits

    def plan(self, assigned: Assigned, packings: Mapping[str, Packing]) -> Plan:
        """The same shards as a plan of ours."""
        tables = []
        for load in self.workload.tables:
            name, rows, columns = load.table.name, load.table.num_embeddings, load.table.embedding_dim
            kind, ranks = assigned[name]
            if kind == "data_parallel":
                shards = [Shard(range(rows), range(columns), tuple(range(self.ranks)))]
            else:
                shards = [
                    Shard(range(y, y + height), range(x, x + width), (rank,))
                    for (height, width), (y, x), rank in _rectangles(self.listed[name][kind], ranks)
                    if height and width
                ]
            tables.append(TablePlan(name, Layout(rows, columns, tuple(shards)), packings[name]))
        return Plan(tuple(tables), self.ranks)


def least_capacity(problem: Problem) -> float:
    """A limit below which no plan fits: at it, each table has an option whose parts fit, and the lightest of these fit together."""
    sizes = [
        [(float(o.memory.max(initial=o.common_memory)), _bytes(o, problem.ranks)) for o in item.options] for item in problem.items
    ]

    def may_fit(limit: float) -> bool:
        least = [min((total for part, total in options if part <= limit), default=np.inf) for options in sizes]
        return sum(least) <= limit * problem.ranks

    low, high = 0.0, max(total for options in sizes for _, total in options) * len(sizes)
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if may_fit(middle) else (middle, high)
    return high


def memory_for(space: Space, capacity: float) -> int:
    """The memory of a rank that leaves `capacity` bytes after the reservation (which is a share of it, and a constant)."""
    constant = 0.85 * space.memory - space.capacity
    return round((capacity + constant) / 0.85) + 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TorchRec warns of itself, and logs each call."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _optimizer_class(load: TableLoad) -> type:
    """TorchRec's optimizer of the same state, which is what its storage estimator looks at."""
    import torchrec.optim as theirs

    same = {
        optim.SGD: theirs.SGD,
        optim.Adagrad: theirs.Adagrad,
        optim.RowwiseAdagrad: theirs.RowWiseAdagrad,
        optim.Adam: theirs.Adam,
    }
    if type(load.optimizer) not in same:
        raise UnsupportedError(f"table {load.table.name!r}: TorchRec's planner knows no {type(load.optimizer).__name__}")
    return same[type(load.optimizer)]


def _features(load: TableLoad) -> list[str]:
    return [f"{load.table.name}_{i}" for i in range(len(load.ids_per_sample))]


def _rectangles(option: Any, ranks: Sequence[int]) -> Iterator[tuple[list[int], list[int], int]]:
    for shard, rank in zip(option.shards, ranks, strict=True):
        yield shard.size, shard.offset, rank


def _bytes(option: Option, ranks: int) -> float:
    held = float(option.memory[0]) if option.divisible else float(option.memory.sum())
    return held + ranks * option.common_memory


def _options_of(listed: Any, ranks: int) -> list[Option]:
    kind: str = listed.sharding_type
    loads = np.array([[shard.perf.total / 1e3] for shard in listed.shards])
    memory = np.array([float(shard.storage.hbm) for shard in listed.shards])
    nothing = np.zeros(1)
    node = min(PER_NODE, ranks)
    if kind == "data_parallel":
        return [Option(kind, np.zeros((0, 1)), np.zeros(0), loads.max(0), float(memory.max()))]
    if kind == "row_wise":
        return [Option(kind, loads, memory, nothing, ranks=tuple(range(ranks)))]
    if kind == "column_wise":
        # Equal shards, which TorchRec may lay several to a rank. A single one is the whole table: table_wise says that.
        count = len(memory)
        return [] if count == 1 else [_divisible(kind, loads, memory, count)]
    if kind == "table_row_wise":
        if node == ranks:
            return [Option(kind, loads, memory, nothing, ranks=tuple(range(ranks)))]
        return [Option(kind, loads, memory, nothing, node=True)]
    if kind == "grid_shard":
        nodes = itertools.combinations(range(ranks // node), len(memory) // node)
        return [Option(kind, loads, memory, nothing, ranks=_all_ranks(chosen, node)) for chosen in nodes]
    return [Option(kind, loads, memory, nothing)]


def _divisible(kind: str, loads: Array, memory: Array, count: int) -> Option:
    return Option(kind, loads.sum(0, keepdims=True), memory.sum(keepdims=True), np.zeros(1), divisible=count)


def _all_ranks(nodes: Sequence[int], per_node: int) -> tuple[int, ...]:
    return tuple(rank for node in nodes for rank in range(node * per_node, (node + 1) * per_node))


def _choice_of(item: Item, kind: str, ranks: Sequence[int]) -> Choice:
    if kind == "column_wise" and len(ranks) == 1:
        kind = "table_wise"
    for number, option in enumerate(item.options):
        if option.key != kind:
            continue
        if option.divisible:
            owners = sorted(set(ranks))
            return Choice(number, tuple(owners), tuple(list(ranks).count(rank) for rank in owners))
        if not option.parts:
            return Choice(number, ())
        if option.ranks is None or set(option.ranks) == set(ranks):
            return Choice(number, tuple(ranks))
    raise ValueError(f"table {item.name!r}: {kind} on ranks {tuple(ranks)} is not among its options")
