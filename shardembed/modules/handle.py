"""What stands for the weight of a sharded table: a tensor of the whole table's shape that holds this rank's shards only.

`torch.distributed.checkpoint` asks a tensor which boxes (offsets and sizes) it has here (`boxes`), and saves and loads each of
them by itself, so a checkpoint fits every plan and number of ranks. Nothing else can be computed with a handle: no rank has the
table. The handle of a dynamic table holds nothing: its rows have no numbers, and move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from shardembed.errors import PickleError, UnsupportedError
from shardembed.modules import boxes
from shardembed.modules.boxes import Box, Held, Owners
from shardembed.tables.table_config import TableConfig

if TYPE_CHECKING:  # importing them takes most of a second, and whoever calls for them has done so
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


@dataclass(frozen=True)
class Live:
    """What can be done to a table through its module's `weight`.

    Attributes:
        learns: says whether it does.
        freeze: makes it stop (True), or learn again.
    """

    learns: Callable[[], bool]
    freeze: Callable[[bool], None]


_REQUIRES_GRAD: Any = torch.Tensor.requires_grad  # a C descriptor, which type checkers take for a plain attribute
WRITE = "write its rows with load_rows(table, source)"


class TableHandle(torch.Tensor):
    """A sharded table in a state dict, and as `weight` of its module. Copies (`clone`, `copy.deepcopy`) hold copies of this
    rank's shards.
    """

    table: TableConfig
    held: tuple[Held, ...]
    owners: Owners
    boxes: Sequence[Box]  # as torch.distributed.checkpoint was told last
    touch: Callable[[], None]
    live: Live | None  # None in a state dict, where a weight is detached from its module

    @staticmethod
    def of(
        table: TableConfig,
        held: Sequence[Held],
        owners: Owners,
        device: torch.device,
        touch: Callable[[], None] = lambda: None,
        live: Live | None = None,
    ) -> TableHandle:
        """`touch` is called when somebody is about to write the weights that it stands for."""
        shape = (table.num_embeddings, table.embedding_dim)
        handle = torch.Tensor._make_wrapper_subclass(TableHandle, shape, dtype=table.dtype, device=device)
        handle.table, handle.held, handle.owners, handle.boxes = table, tuple(held), owners, ()
        handle.touch, handle.live = touch, live
        handle._is_param = live is not None  # so that torch takes it for a Parameter, and what it would do with one is refused
        return handle

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.live.learns() if self.live else _REQUIRES_GRAD.__get__(self)

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if self.live:
            self.live.freeze(not value)
        else:
            _REQUIRES_GRAD.__set__(self, value)

    def requires_grad_(self, requires_grad: bool = True) -> TableHandle:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise UnsupportedError(f"table {self.table.name!r}: .data cannot be assigned; {WRITE}")

    @property
    def grad(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._refuse_grad("has no .grad")
        return None

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._refuse_grad("has no .grad that could be assigned")

    @property
    def is_leaf(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._refuse_grad("is no leaf of autograd, and no torch optimizer can step it")  # which ask for it first
        return True

    def register_hook(self, hook: Callable[..., Any]) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._refuse_grad("takes no hooks", always=True)
        raise AssertionError

    def register_post_accumulate_grad_hook(self, hook: Callable[..., Any]) -> NoReturn:
        self.register_hook(hook)

    def _refuse_grad(self, what: str, always: bool = False) -> None:
        if self.live or always:
            raise UnsupportedError(
                f"table {self.table.name!r} {what}: gradients of tables with an optimizer of ours wait with the rows' owners until "
                "se.Optimizer.step(); clip them with se.clip_grad_norm_, drop them with zero_grad(), or leave out optimizer= to "
                "have Parameters"
            )

    def load(self, other: TableHandle) -> None:
        """Copy the weights of another handle of the same cut.

        Raises:
            UnsupportedError: it is cut differently, or dynamic.
        """
        self._check_numbered("load_state_dict")
        if self.shape != other.shape or [one.shard for one in self.held] != [one.shard for one in other.held]:
            raise UnsupportedError(
                f"table {self.table.name!r} is not cut as the one the state dict was taken from; save that with "
                "torch.distributed.checkpoint and load it here, or give both models one plan"
            )
        self.touch()
        for mine, theirs in zip(self.held, other.held, strict=True):
            mine.weights.copy_(theirs.weights)

    def _check_numbered(self, call: str) -> None:
        """Raises UnsupportedError where rows have no numbers, by which all who know matrices alone would take them."""
        if self.table.dynamic is not None:
            raise UnsupportedError(
                f"{call}: table {self.table.name!r} is dynamic, so its rows have no numbers and are no matrix; save and load "
                "it with se.save_checkpoint and se.load_checkpoint, get a plain module from se.unshard(model), or read and "
                "write rows by id: ids(table), rows(table, ids), load_rows(table, ids, values)"
            )

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TableHandle:
        held = [replace(one, weights=change(one.weights)) for one in self.held]
        device = change(torch.empty(0, dtype=self.dtype, device=self.device)).device
        return TableHandle.of(self.table, held, self.owners, device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            inputs = (kwargs or {}).get("inputs", args[1] if len(args) > 1 else ())
            for one in inputs if isinstance(inputs, list | tuple) else [inputs]:
                if isinstance(one, TableHandle):
                    one._refuse_grad("is no input of autograd", always=True)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handle: TableHandle = next(arg for arg in args if isinstance(arg, TableHandle))
        given = kwargs or {}
        if func is not torch.ops.aten.detach.default:
            handle._check_numbered(func.name())
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return handle._map(lambda weights: func(weights, **given))
        if func is torch.ops.aten._to_copy.default and given.get("dtype") in (None, handle.dtype):
            return handle._map(lambda weights: func(weights, **given))
        handle._refuse(func.name())

    def __deepcopy__(self, memo: dict[int, Any]) -> TableHandle:
        return self.clone()  # type: ignore[return-value]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        size = f"{self.table.num_embeddings} x {self.table.embedding_dim} {self.dtype}"
        held = f"{len(self.held)} shard(s) here" if self.table.dynamic is None else "dynamic"
        return f"TableHandle({self.table.name!r}, {size}, {held})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse_file("torch.save")

    def untyped_storage(self) -> NoReturn:
        """What writers of safetensors ask for first, such as save_pretrained of transformers.

        Raises:
            PickleError: always.
        """
        self._refuse_file("a writer of whole tensors (save_pretrained, safetensors)")

    storage = untyped_storage

    def _refuse_file(self, writer: str) -> NoReturn:
        raise PickleError(
            f"table {self.table.name!r} lies cut over the ranks, so {writer} cannot write it: no rank has all of it. Save "
            "with se.save_checkpoint(folder, model), or the state dict with torch.distributed.checkpoint.save, on all ranks; get "
            "plain tables from se.unshard(model, rank=0), or read rows with rows(table, ids)"
        )

    def numpy(self, *, force: bool = False) -> NoReturn:
        """Raises UnsupportedError."""
        self._refuse("numpy()")

    def tolist(self) -> NoReturn:
        """Raises UnsupportedError."""
        self._refuse("tolist()")

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("numpy.asarray()")

    def _refuse(self, call: str) -> NoReturn:
        self._check_numbered(call)
        raise UnsupportedError(
            f"{call}: table {self.table.name!r} lies cut over the ranks, so there is no weight tensor to compute with; "
            "read rows with rows(table, ids), write them with load_rows(table, source), or get a plain module from se.unshard()"
        )

    # What torch.distributed.checkpoint asks of a tensor (torch.distributed._checkpointable).

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        """Collective where rows are dealt out, which `torch.distributed.checkpoint.save` on all ranks is too."""
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        self._check_numbered("torch.distributed.checkpoint.save")
        properties = TensorProperties(dtype=self.dtype)
        self.boxes = boxes.to_save(self.held, self.owners, self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, box.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(_chunk(box), properties, self.size()),
            )
            for box in self.boxes
            if box.first
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        self._check_numbered("torch.distributed.checkpoint.load")
        self.boxes = boxes.to_load(self.held, self.owners.layout)
        return [_chunk(box) for box in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for box in self.boxes:
            if box.offsets == index.offset:
                self.touch()  # to be saved, or to be loaded into
                return box.tensor
        raise UnsupportedError(f"table {self.table.name!r}: this rank holds nothing that begins at {index.offset}")


def _chunk(box: Box) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(box.offsets, box.tensor.shape)
