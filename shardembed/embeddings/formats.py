"""Table files that are written block by block: safetensors, NumPy's .npy, and Parquet.

A writer is told beforehand what is to come, and then given blocks in order. Beside the values there may be a float32 scale a row
(for int8) and the ids of the rows (where not all were chosen).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, get_args

import numpy as np
import torch

from shardembed.checkpoint.format import header
from shardembed.config.optional import needed
from shardembed.embeddings.narrowing import Narrowed
from shardembed.embeddings.publish import sync_file

Format = Literal["safetensors", "npy", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
NUMPY = {torch.float32: "<f4", torch.float64: "<f8", torch.float16: "<f2", torch.int8: "|i1", torch.int64: "<i8"}
WEIGHT, SCALE, IDS, NAMES = "weight", "scale", "ids", "names"


@dataclass(frozen=True)
class Shape:
    """What is to be written.

    Attributes:
        rows: how many there will be.
        columns: of each row.
        dtype: of the values.
        scaled: each row has a scale, float32.
        listed: each row has its id beside it.
        named: each row has a name: in a column of a Parquet file, and beside the others' files in one of ids and names.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    scaled: bool
    listed: bool
    named: bool = False

    @property
    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {WEIGHT: (self.dtype, (self.rows, self.columns))}
        if self.scaled:
            found[SCALE] = torch.float32, (self.rows,)
        if self.listed:
            found[IDS] = torch.int64, (self.rows,)
        return found

    @property
    def nbytes(self) -> int:
        return self.rows * sum((shape[1] if len(shape) > 1 else 1) * dtype.itemsize for dtype, shape in self.parts.values())


class Writer(Protocol):
    """Writes a table; its files are whole, and on the disk, when the `with` has ended."""

    files: list[str]

    def __enter__(self) -> Writer: ...
    def __exit__(self, kind: Any, error: Any, trace: Any) -> None: ...
    def put(self, block: Narrowed, ids: torch.Tensor, names: Any = None) -> None: ...


def holds(form: Format, dtype: torch.dtype) -> bool:
    """Whether a file of this format can have numbers of this dtype: NumPy and Parquet have no bfloat16."""
    return form == "safetensors" or dtype in NUMPY


def writer_of(form: Format, folder: Path, stem: str, shape: Shape, metadata: Mapping[str, str]) -> Writer:
    """A writer of one table into `folder`, in files that are called `stem` and a suffix."""
    return _WRITERS[form](folder, stem, shape, metadata)


class NamesBeside(AbstractContextManager["NamesBeside"]):
    """A Parquet file of `id` and `name`, row by row those of the table beside it: formats of numbers hold no texts."""

    def __init__(self, path: Path) -> None:
        with needed("pyarrow", "train", "writing names"):
            import pyarrow as pa
            from pyarrow import parquet

        self._arrow, self._path = pa, path
        self._writer = parquet.ParquetWriter(path, pa.schema([("id", pa.int64()), ("name", pa.string())]))

    def put(self, ids: torch.Tensor, names: Any) -> None:
        self._writer.write_table(self._arrow.table({"id": ids.numpy(), "name": names}))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
        if error is None:
            sync_file(self._path)


class _Parts(AbstractContextManager["_Parts"]):
    """Weights, scales and ids that each grow at a place of their own: `_places` says in which file and where."""

    files: list[str]
    _places: dict[str, tuple[IO[bytes], int]]

    def __init__(self, folder: Path, stem: str, shape: Shape) -> None:
        self._stack = ExitStack()
        self._names = self._stack.enter_context(NamesBeside(folder / f"{stem}.{NAMES}.parquet")) if shape.named else None

    def _new(self, path: Path) -> IO[bytes]:
        return self._stack.enter_context(open(path, "xb", buffering=0))

    def put(self, block: Narrowed, ids: torch.Tensor, names: Any = None) -> None:
        if self._names is not None:
            self._names.put(ids, names)
        parts = {WEIGHT: block.values, SCALE: block.scale, IDS: ids}
        for name, (file, offset) in self._places.items():
            tensor = parts[name]
            assert tensor is not None
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            file.seek(offset)
            done = 0
            while done < len(data):  # a write may stop short, as it does when the disk is nearly full
                done += file.write(data[done:]) or 0
            self._places[name] = file, offset + len(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        files = {Path(file.name) for file, _ in self._places.values()}
        self._stack.close()
        if error is None:
            for path in files:
                sync_file(path)


class Safetensors(_Parts):
    """One file, with tensors `weight`, `scale` and `ids`."""

    def __init__(self, folder: Path, stem: str, shape: Shape, metadata: Mapping[str, str]) -> None:
        super().__init__(folder, stem, shape)
        self.files = [f"{stem}.safetensors"]
        tensors = sorted(((name, *part) for name, part in shape.parts.items()), key=lambda each: -each[1].itemsize)  # aligned
        head, offsets = header.encode(tensors, metadata)
        file = self._new(folder / self.files[0])
        file.write(head)
        self._places = {name: (file, offset) for (name, _, _), offset in zip(tensors, offsets, strict=True)}


class Npy(_Parts):
    """A file for each: `stem.npy`, `stem.scale.npy`, `stem.ids.npy`. `numpy.load(..., mmap_mode="r")` reads none of it yet."""

    def __init__(self, folder: Path, stem: str, shape: Shape, metadata: Mapping[str, str]) -> None:
        super().__init__(folder, stem, shape)
        self.files, self._places = [], {}
        for name, (dtype, size) in shape.parts.items():
            self.files.append(f"{stem}.npy" if name == WEIGHT else f"{stem}.{name}.npy")
            file = self._new(folder / self.files[-1])
            described = {"descr": NUMPY[dtype], "fortran_order": False, "shape": size}
            np.lib.format.write_array_header_1_0(file, described)
            self._places[name] = file, file.tell()


class Parquet:
    """One file: `id` int64, `name` where rows have one, `embedding` a list of fixed length, and `scale`; a row group a block."""

    def __init__(self, folder: Path, stem: str, shape: Shape, metadata: Mapping[str, str]) -> None:
        with needed("pyarrow", "train", "writing Parquet files"):
            import pyarrow as pa
            from pyarrow import parquet

        self._arrow, self._parquet = pa, parquet
        self.files = [f"{stem}.parquet"]
        self._path, self._columns = folder / self.files[0], shape.columns
        number = pa.from_numpy_dtype(np.dtype(NUMPY[shape.dtype]))
        fields = [pa.field("id", pa.int64(), nullable=False)]
        fields += [pa.field("name", pa.string(), nullable=False)] if shape.named else []
        fields.append(pa.field("embedding", pa.list_(pa.field("element", number, nullable=False), shape.columns), nullable=False))
        fields += [pa.field("scale", pa.float32(), nullable=False)] if shape.scaled else []
        self._schema = pa.schema(fields, metadata=dict(metadata))

    def __enter__(self) -> Parquet:
        # Embeddings hardly repeat: a dictionary of their values would only take memory.
        self._writer = self._parquet.ParquetWriter(self._path, self._schema, use_dictionary=False, write_statistics=["id"])
        return self

    def put(self, block: Narrowed, ids: torch.Tensor, names: Any = None) -> None:
        pa, schema = self._arrow, self._schema
        flat = pa.array(block.values.contiguous().view(-1).numpy())
        columns = [pa.array(ids.numpy())] + ([names] if names is not None else [])
        columns += [pa.FixedSizeListArray.from_arrays(flat, type=schema.field("embedding").type)]
        columns += [pa.array(block.scale.numpy())] if block.scale is not None else []
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema), row_group_size=max(1, len(ids)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
        if error is None:
            sync_file(self._path)


_WRITERS: dict[Format, Callable[[Path, str, Shape, Mapping[str, str]], Writer]] = {
    "safetensors": Safetensors,
    "npy": Npy,
    "parquet": Parquet,
}
