"""Tables without an optimizer of ours: this rank's shards as Parameters, for the user's own torch optimizer.

A Parameter shares its memory with the slab, so what an optimizer does to it in place is what the next lookup reads. For autograd it
is an input of the lookup (`journey.autograd`), and each backward gives its gradient, merged over duplicates and over all ranks:
dense or sparse COO. What else takes Parameters and their gradients (wrappers, clipping, GradScaler) is told of them in
`store.wrappers` and `store.guarded`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn
from weakref import ReferenceType, WeakMethod, ref

import torch
from torch import nn

from shardembed.comm.comm import Comm
from shardembed.errors import UnsupportedError
from shardembed.optim import NoOptimizer
from shardembed.store.guarded import DRAWS, NORM, PART, CopiedData, CutData, ShardGradient
from shardembed.store.reductions import reduce_copies
from shardembed.store.slab import LocalShard, Slab
from shardembed.tables.layout import Shard

Freeze = Callable[[frozenset[int], bool], None]
# Properties of torch's that are overridden below. They are C descriptors, which type checkers take for plain attributes.
_REQUIRES_GRAD: Any = torch.Tensor.requires_grad
_DATA: Any = torch.Tensor.data
_GRAD: Any = torch.Tensor.grad


class ShardParameter(nn.Parameter):
    """One shard's weights as a Parameter. `shard` says which part of which table; `copied`, whether every rank has it; `undivided`,
    whether the table lies in one piece, here or on another rank; `comm`, who has the rest.

    What torch does by putting other memory in a Parameter's place is done to the slab's memory, or refused.
    """

    # Not theirs: for mixed precision of DistributedDataParallel and torch.compile, and for FullyShardedDataParallel.
    _ddp_ignored = True
    _fsdp_flattened = True

    shard: LocalShard
    copied: bool
    undivided: bool
    comm: Comm
    _number: int
    _freeze: WeakMethod[Freeze]
    _lent: Sequence[ReferenceType[torch.Tensor]] = ()  # what `.data` gave

    @staticmethod
    def of(shard: LocalShard, copied: bool, undivided: bool, comm: Comm, number: int, freeze: WeakMethod[Freeze]) -> ShardParameter:
        """`freeze` is told, with the table's `number`, when somebody sets `requires_grad`."""
        exposed = torch.Tensor._make_subclass(ShardParameter, shard.weights, True)
        exposed.shard, exposed.copied, exposed.undivided, exposed.comm = shard, copied, undivided, comm
        exposed._number, exposed._freeze = number, freeze
        return exposed

    @property
    def cut(self) -> bool:
        """Ranks have different parts of the table, or it lies on one of them."""
        return self.comm.world_size > 1 and not self.copied

    @property
    def whole(self) -> bool:
        """It is all of the table, in a job of one rank."""
        return self.undivided and self.comm.world_size == 1

    @property
    def grad(self) -> torch.Tensor | None:
        """Of a table that is cut, one that knows it: see `guarded`."""
        found = _GRAD.__get__(self)
        if found is None or not self.cut or isinstance(found, ShardGradient):
            return found
        guarded = ShardGradient.of(found, self.shard.table, self.comm)
        if not found.requires_grad:  # then it belongs to a graph, which goes on from the tensor that autograd has made
            _GRAD.__set__(self, guarded)
        return guarded

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        _GRAD.__delete__(self)

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _REQUIRES_GRAD.__get__(self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        freeze = self._freeze()
        if freeze is None:  # the tables are gone, and this is all that is left of them
            self.learn(value)
        else:
            freeze(frozenset({self._number}), not value)

    def requires_grad_(self, requires_grad: bool = True) -> ShardParameter:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.requires_grad = requires_grad
        return self

    def learn(self, learns: bool) -> None:
        """What the table says: whether it is to have gradients."""
        _REQUIRES_GRAD.__set__(self, learns)

    @property
    def data(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        found = _DATA.__get__(self)
        if not self.whole:
            found = (CopiedData if self.copied or self.undivided else CutData).of(found, self.shard.table)
        self._lent = [*(lent for lent in self._lent if lent() is not None), ref(found)]
        return found

    @data.setter
    def data(self, value: torch.Tensor) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        mine = _DATA.__get__(self)
        if value.shape != mine.shape or value.dtype != mine.dtype:
            raise UnsupportedError(
                f"{self._name}: .data is {list(mine.shape)} {mine.dtype} and stays so; it was assigned {list(value.shape)} "
                f"{value.dtype}. {WRITE}"
            )
        # `p.data = p.data` changes nothing, and torch code does it.
        if value.data_ptr() == mine.data_ptr() and value.stride() == mine.stride():
            return
        # In torch the memory of before stays as it is, and is put back by who kept it (averages of weights do).
        before = mine.clone()
        new = value.clone() if value.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr() else value
        for lent in self._lent:
            kept = lent()
            if kept is not None and kept.data_ptr() == mine.data_ptr():
                kept.set_(before)  # pyright: ignore[reportArgumentType]
        self._lent = ()
        mine.copy_(new)

    def set_(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(f"{self._name}: set_ would give it memory that no lookup reads. {WRITE}")

    def _drawn(self, name: str, *arguments: Any, **options: Any) -> torch.Tensor:
        if not self.whole:
            raise UnsupportedError(f"{self._name}: {PART}")
        return getattr(torch.Tensor, name)(self, *arguments, **options)

    def norm(self, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As torch's. Raises UnsupportedError where it would be that of a part."""
        if self.cut and not self.undivided and dim is None:
            raise UnsupportedError(f"{self._name}: {NORM}")
        return torch.norm(self, p, dim, keepdim, dtype=dtype)

    @property
    def _name(self) -> str:
        return f"the weight of table {self.shard.table!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """A plain Parameter: a copy is no table's."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)


WRITE = "Write into it in place (copy_), or all rows with load_rows(table, source)"
for _name in DRAWS:
    # What draws numbers: ranks with one seed would draw the same for different rows, others different ones for copies of a row.
    setattr(ShardParameter, _name, lambda self, *args, _drawn=_name, **options: self._drawn(_drawn, *args, **options))


class OwnParameters:
    """The Parameters of one slab, in the order of its tables."""

    def __init__(self, slab: Slab, freeze: WeakMethod[Freeze], comm: Comm) -> None:
        assert isinstance(slab.spec.optimizer, NoOptimizer)
        self.slab, self.sparse, self._comm = slab, slab.spec.optimizer.sparse, comm
        self._of_table: dict[int, list[ShardParameter]] = {}
        for lane in slab.spec.lanes:
            if lane.table not in self._of_table:
                self._of_table[lane.table] = self._shards(lane.table, slab.table_of(lane), freeze)
        self.parameters = [shard for shards in self._of_table.values() for shard in shards]
        for parameter in self.parameters:
            parameter.learn(not slab.spec.policy.frozen)

    def _shards(self, number: int, table: str, freeze: WeakMethod[Freeze]) -> list[ShardParameter]:
        """The shards of one table; an empty one where this rank holds none, so that all ranks have it in autograd's graph, and
        a gradient for it.
        """
        lanes = [lane for lane in self.slab.spec.lanes if lane.table == number]
        undivided = len(lanes) == len(lanes[0].blocks) == 1 and self.slab.is_all(lanes[0])
        mine = [shard for shard in self.slab.shards() if shard.table == table]
        if not mine:
            nothing = LocalShard(table, Shard(range(0), lanes[0].columns, ()), 0, self.slab.weights[:0], {})
            return [ShardParameter.of(nothing, False, undivided, self._comm, number, freeze)]
        return [ShardParameter.of(shard, self.slab.spec.copied, undivided, self._comm, number, freeze) for shard in mine]

    def parameters_of(self, table: str) -> list[ShardParameter]:
        """The shards of one table, an empty one where this rank holds none; nothing if it has none here on any rank."""
        return [parameter for parameter in self.parameters if parameter.shard.table == table]

    def of_tables(self, numbers: Collection[int]) -> list[ShardParameter]:
        """The shards of these tables of the collection."""
        return [shard for table, shards in self._of_table.items() if table in numbers for shard in shards]

    def freeze(self, numbers: Collection[int], frozen: bool) -> None:
        """Let the shards of these tables say whether they are frozen."""
        for shard in self.of_tables(numbers):
            shard.learn(not frozen)

    def take(self, wanted: Sequence[ShardParameter]) -> dict[int, torch.Tensor]:
        """The waiting gradients of those shards of `wanted` that are here, by their id(); nothing waits then."""
        rows_U, grads_UW = self.slab.merged()
        self.slab.drop()
        own, found = {id(parameter) for parameter in self.parameters}, {}
        for shard in wanted:
            if id(shard) in own and shard.requires_grad:
                first = shard.shard.first_key
                edges = torch.tensor([first, first + shard.shape[0]], device=rows_U.device)
                start, stop = torch.searchsorted(rows_U, edges).tolist()
                found[id(shard)] = self._gradient(shard, rows_U[start:stop] - first, grads_UW[start:stop].to(shard.dtype))
        return found

    def _gradient(self, shard: ShardParameter, rows_U: torch.Tensor, grads_UW: torch.Tensor) -> torch.Tensor:
        if self.sparse:
            return torch.sparse_coo_tensor(rows_U.unsqueeze(0), grads_UW, shard.shape, is_coalesced=True, check_invariants=False)
        return torch.zeros_like(shard.detach()).index_add_(0, rows_U, grads_UW)


def expose(slabs: Sequence[Slab], freeze: WeakMethod[Freeze], comm: Comm) -> list[OwnParameters]:
    """The slabs whose tables have no optimizer of ours. `freeze` is told the number of a table that is to be frozen, or not."""
    return [OwnParameters(slab, freeze, comm) for slab in slabs if not slab.spec.optimizer.stepped]


def deliver(
    exposed: Sequence[OwnParameters], shards: Sequence[ShardParameter], comm: Comm, collection: int, reduced: bool
) -> list[torch.Tensor | None]:
    """This backward's gradients of `shards`, None for those that are frozen. Collective where a table is copied to every rank,
    unless copies have been `reduced`.
    """
    if not exposed:  # as in most jobs, at every backward
        return []
    if not reduced:
        reduce_copies([one.slab for one in exposed], comm, collection)
    found: dict[int, torch.Tensor] = {}
    for one in exposed:
        found.update(one.take(shards))
    return [found.get(id(shard)) for shard in shards]
