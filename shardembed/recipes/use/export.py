"""The vectors that a run's model compares, as files for others: ids and names beside them, and the metric with them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.embeddings.export import INDEX, Exported, ExportedTable, check_choices
from shardembed.embeddings.formats import NAMES, Format, Shape, Writer, writer_of
from shardembed.embeddings.narrowing import As, narrowed, written_dtype
from shardembed.embeddings.publish import new_folder, sync_file, told
from shardembed.embeddings.stored import BLOCK_BYTES, Block
from shardembed.errors import IdRangeError
from shardembed.recipes.together import on_all
from shardembed.recipes.use.opened import Opened
from shardembed.recipes.use.vectors import SIDES, Maker, maker


def export_vectors(
    opened: Opened,
    out: Path,
    sides: tuple[str, ...] = SIDES,
    *,
    rows: dict[str, torch.Tensor] | None = None,
    format: Format = "safetensors",
    dtype: As = "float32",
    block_bytes: int = BLOCK_BYTES,
) -> Exported:
    """Write vectors into the new folder `out`, which is whole or not there. Collective; rank 0 writes, and the others hear of each
    failure, since they wait for its next block.

    Args:
        rows: by side, ids of those to write, int64; all by default.
        format, dtype: as `shardembed.embeddings.export_tables` has them.

    Raises:
        ConfigError: a choice does not exist. IdRangeError: an id has no row. ExportError: `out` exists, or cannot be written. And
            as `maker`. All on all ranks.
    """
    check_choices(format, dtype, block_bytes)
    comm = Comm.of()
    chosen = [_chosen(comm, opened, side, (rows or {}).get(side), dtype) for side in dict.fromkeys(sides)]
    with ExitStack() as stack:
        writing = on_all(comm, "make the folder", lambda: _folder(stack, out, sum(one.shape.nbytes for one in chosen)))
        written = tuple(_write(comm, one, writing, format, block_bytes) for one in chosen)
        done = Exported(out, format, opened.checkpoint.name, opened.step, written)
        on_all(comm, "write the index", lambda: _index(done, writing))
        on_all(comm, "finish the export", stack.close)
    return done


@dataclass(frozen=True)
class _Chosen:
    """What is written of a side.

    Attributes:
        side: which.
        made: makes its vectors.
        places: in the catalog, ascending, int64 `[n]`.
        shape: of what is written.
    """

    side: str
    made: Maker
    places: np.ndarray
    shape: Shape


def _chosen(comm: Comm, opened: Opened, side: str, ids: torch.Tensor | None, dtype: As) -> _Chosen:
    made = maker(opened, side)
    places = on_all(comm, "choose rows", lambda: _places(made, side, ids))
    kind = written_dtype(torch.float32, dtype)
    shape = Shape(len(places), made.columns, kind, kind == torch.int8, listed=True, named=made.catalog.names is not None)
    return _Chosen(side, made, places, shape)


def _places(made: Maker, side: str, rows: torch.Tensor | None) -> np.ndarray:
    if rows is None:
        return np.arange(len(made.catalog))
    ids = np.unique(rows.numpy())
    places = made.catalog.numbers_of(ids)
    if (places < 0).any():
        raise IdRangeError(f"{side} {int(ids[places < 0][0])}: none of the {len(made.catalog):,} ids that have a vector")
    return places


def _folder(stack: ExitStack, out: Path, needed: int) -> Path | None:
    return stack.enter_context(new_folder(out, needed)) if Comm.of().rank == 0 else None


def _index(done: Exported, folder: Path | None) -> None:
    if folder is not None:
        with told("the index"):
            (folder / INDEX).write_text(json.dumps(done.as_json(), indent=1) + "\n", encoding="utf-8")
            sync_file(folder / INDEX)


def _write(comm: Comm, one: _Chosen, folder: Path | None, form: Format, block_bytes: int) -> ExportedTable:
    shape, catalog = one.shape, one.made.catalog
    written = str(shape.dtype).removeprefix("torch.")
    metadata = {
        "format": "pt",
        "table": one.side,
        "dtype": written,
        "stored_dtype": "float32",
        "vectors": "model",
        "metric": one.made.metric,
        "told": one.made.compared,
    }
    with ExitStack() as stack:
        writer = on_all(comm, "begin the files", lambda: _begun(stack, one, folder, form, metadata))
        first = 0
        for some, values in one.made.blocks(one.places, block_bytes):
            block = Block(first, torch.from_numpy(catalog.ids[some]), values)
            names = catalog.named(some) if shape.named else None
            first += len(some)
            on_all(comm, "write vectors", partial(_put, writer, one, block, names))
        on_all(comm, "finish the files", lambda: _ended(stack, one))
    files = tuple(writer.files) if writer is not None else ()
    return ExportedTable(
        name=one.side,
        key=f"tables.{one.side}.weight",
        rows=shape.rows,
        table_rows=len(catalog),
        columns=shape.columns,
        dtype=written,
        stored_dtype="float32",
        bytes=sum((folder / name).stat().st_size for name in files) if folder is not None else 0,
        files=files,
        vectors="model",
        metric=one.made.metric,
        told=one.made.compared,
        names=(f"{one.side}.{NAMES}.parquet" if form != "parquet" else f"{one.side}.parquet") if shape.named else None,
    )


def _begun(stack: ExitStack, one: _Chosen, folder: Path | None, form: Format, metadata: dict[str, str]) -> Writer | None:
    if folder is None:
        return None
    with told(f"vectors of {one.side}s"):
        return stack.enter_context(writer_of(form, folder, one.side, one.shape, metadata))


def _put(writer: Writer | None, one: _Chosen, block: Block, names: Any) -> None:
    if writer is not None:
        with told(f"vectors of {one.side}s"):
            writer.put(narrowed(one.side, block, one.shape.dtype), block.ids, names)


def _ended(stack: ExitStack, one: _Chosen) -> None:
    with told(f"vectors of {one.side}s"):
        stack.close()
