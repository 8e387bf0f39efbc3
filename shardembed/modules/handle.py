"""What stands for the weight of a sharded table: a tensor of the whole table's shape that holds this rank's shards only.

`torch.distributed.checkpoint` asks a tensor which boxes (offsets and sizes) it has here, and saves and loads each of them by
itself, so a checkpoint fits every plan and number of ranks. Nothing else can be computed with a handle: no rank has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from shardembed.errors import PickleError, UnsupportedError
from shardembed.layout import Shard
from shardembed.tables import TableConfig

if TYPE_CHECKING:  # importing them takes most of a second, and whoever calls for them has done so
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

STRIDED_ROWS = 4096  # every n-th row is no box: each row is one, and the checkpoint's index lists them all


@dataclass(frozen=True)
class Held:
    """A shard that this rank holds. `first`: of several copies, this is the one that is saved."""

    shard: Shard
    weights: torch.Tensor
    first: bool


@dataclass(frozen=True)
class _Box:
    offsets: torch.Size
    weights: torch.Tensor
    first: bool

    @property
    def chunk(self) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return ChunkStorageMetadata(self.offsets, self.weights.shape)


class TableHandle(torch.Tensor):
    """A sharded table in a state dict, and as `weight` of its module. Copies (`clone`, `copy.deepcopy`) hold copies of this
    rank's shards.
    """

    table: TableConfig
    held: tuple[Held, ...]
    touch: Callable[[], None]

    @staticmethod
    def of(table: TableConfig, held: Sequence[Held], device: torch.device, touch: Callable[[], None] = lambda: None) -> TableHandle:
        """`touch` is called when somebody is about to write the weights that it stands for."""
        shape = (table.num_embeddings, table.embedding_dim)
        handle = torch.Tensor._make_wrapper_subclass(TableHandle, shape, dtype=table.dtype, device=device)
        handle.table, handle.held, handle.touch = table, tuple(held), touch
        return handle

    def load(self, other: TableHandle) -> None:
        """Copy the weights of another handle of the same cut.

        Raises:
            UnsupportedError: it is cut differently.
        """
        if self.shape != other.shape or [one.shard for one in self.held] != [one.shard for one in other.held]:
            raise UnsupportedError(
                f"table {self.table.name!r} is not cut as the one the state dict was taken from; save that with "
                "torch.distributed.checkpoint and load it here, or give both models one plan"
            )
        self.touch()
        for mine, theirs in zip(self.held, other.held, strict=True):
            mine.weights.copy_(theirs.weights)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TableHandle:
        held = [replace(one, weights=change(one.weights)) for one in self.held]
        device = change(torch.empty(0, dtype=self.dtype, device=self.device)).device
        return TableHandle.of(self.table, held, device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handle: TableHandle = next(arg for arg in args if isinstance(arg, TableHandle))
        given = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return handle._map(lambda weights: func(weights, **given))
        if func is torch.ops.aten._to_copy.default and given.get("dtype") in (None, handle.dtype):
            return handle._map(lambda weights: func(weights, **given))
        handle._refuse(func.name())

    def __deepcopy__(self, memo: dict[int, Any]) -> TableHandle:
        return self.clone()  # type: ignore[return-value]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        size = f"{self.table.num_embeddings} x {self.table.embedding_dim} {self.dtype}"
        return f"TableHandle({self.table.name!r}, {size}, {len(self.held)} shard(s) here)"

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
        raise UnsupportedError(
            f"{call}: table {self.table.name!r} lies cut over the ranks, so there is no weight tensor to compute with; "
            "read rows with rows(table, ids), write them with load_rows(table, source), or get a plain module from se.unshard()"
        )

    def _boxes(self) -> list[_Box]:
        """What this rank holds, as boxes of the whole table."""
        boxes: list[_Box] = []
        for one in self.held:
            rows, columns = one.shard.rows, one.shard.columns
            if rows.step == 1:
                boxes.append(_Box(torch.Size((rows.start, columns.start)), one.weights, one.first))
                continue
            if self.table.num_embeddings > STRIDED_ROWS:
                raise UnsupportedError(
                    f"table {self.table.name!r}: torch.distributed.checkpoint holds boxes, and each of the "
                    f"{self.table.num_embeddings} rows of a strided cut would be one (at most {STRIDED_ROWS} rows are written "
                    "so); cut it with strided=False"
                )
            parts = zip(rows, one.weights.split(1), strict=True)
            boxes += [_Box(torch.Size((row, columns.start)), part, one.first) for row, part in parts]
        return boxes

    # What torch.distributed.checkpoint asks of a tensor (torch.distributed._checkpointable).

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, box.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(box.chunk, properties, self.size()),
            )
            for box in self._boxes()
            if box.first
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [box.chunk for box in self._boxes()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for box in self._boxes():
            if box.offsets == index.offset:
                self.touch()  # to be saved, or to be loaded into
                return box.weights
        raise UnsupportedError(f"table {self.table.name!r}: this rank holds nothing that begins at {index.offset}")
