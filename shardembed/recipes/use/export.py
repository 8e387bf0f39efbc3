"""The vectors that a run's model compares, as files for others: ids and names beside them, and the metric with them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.embeddings.export import INDEX, Exported, ExportedTable
from shardembed.embeddings.formats import NAMES, Format, Shape, writer_of
from shardembed.embeddings.narrowing import As, narrowed, written_dtype
from shardembed.embeddings.publish import new_folder, sync_file
from shardembed.embeddings.stored import BLOCK_BYTES, Block
from shardembed.errors import ExportError, IdRangeError
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
    """Write vectors into the new folder `out`, which is whole or not there. Collective; rank 0 writes.

    Args:
        rows: by side, ids of those to write; all by default.
        format, dtype: as `shardembed.embeddings.export_tables` has them.

    Raises:
        IdRangeError: an id has no row. ExportError: `out` exists, or cannot be written. And as `maker`. All on all ranks.
    """
    comm = Comm.of()
    makers = {side: maker(opened, side) for side in sides}
    places = {
        side: on_all(comm, "choose rows", lambda one=one, side=side: _places(one, side, rows)) for side, one in makers.items()
    }
    shapes = {side: _shape(one, len(places[side]), dtype) for side, one in makers.items()}
    with ExitStack() as stack:
        writing = on_all(comm, "make the folder", lambda: _folder(stack, out, sum(map(_nbytes, shapes.values()))))
        written = tuple(
            _write(opened, side, one, places[side], shapes[side], writing, format, block_bytes) for side, one in makers.items()
        )
        done = Exported(out, format, opened.checkpoint.name, opened.step, written)
        on_all(comm, "write the index", lambda: _index(done, writing))
        on_all(comm, "finish the export", stack.close)
    return done


def _places(made: Maker, side: str, rows: dict[str, torch.Tensor] | None) -> np.ndarray:
    if rows is None or side not in rows:
        return np.arange(len(made.catalog))
    ids = np.unique(rows[side].numpy())
    places = made.catalog.numbers_of(ids)
    if (places < 0).any():
        raise IdRangeError(f"{side} {int(ids[places < 0][0])}: none of the {len(made.catalog):,} ids that have a vector")
    return places


def _shape(made: Maker, rows: int, dtype: As) -> Shape:
    kind = written_dtype(torch.float32, dtype)
    return Shape(rows, made.columns, kind, kind == torch.int8, listed=True, named=made.catalog.names is not None)


def _nbytes(shape: Shape) -> int:
    return shape.nbytes


def _folder(stack: ExitStack, out: Path, needed: int) -> Path | None:
    return stack.enter_context(new_folder(out, needed)) if Comm.of().rank == 0 else None


def _index(done: Exported, folder: Path | None) -> None:
    if folder is not None:
        (folder / INDEX).write_text(json.dumps(done.as_json(), indent=1) + "\n", encoding="utf-8")
        sync_file(folder / INDEX)


def _write(
    opened: Opened, side: str, made: Maker, places: np.ndarray, shape: Shape, folder: Path | None, form: Format, block_bytes: int
) -> ExportedTable:
    comm = Comm.of()
    written = str(shape.dtype).removeprefix("torch.")
    told = f"the vectors that the model compares, by metric {made.metric}: {made.told}"
    metadata = {
        "format": "pt",
        "table": side,
        "dtype": written,
        "stored_dtype": "float32",
        "vectors": "model",
        "metric": made.metric,
    }
    with ExitStack() as stack:
        writer: Any = None
        if folder is not None:
            writer = stack.enter_context(writer_of(form, folder, side, shape, {**metadata, "told": told}))
        first = 0
        for some, values in made.blocks(places, block_bytes):
            ids = torch.from_numpy(made.catalog.ids[some])
            names = made.catalog.named(some) if shape.named else None
            block = Block(first, ids, values)
            first += len(some)
            on_all(comm, "write vectors", lambda block=block, names=names: _put(writer, side, block, shape, names))
    files = tuple(writer.files) if writer is not None else ()
    names = (f"{side}.{NAMES}.parquet" if form != "parquet" else f"{side}.parquet") if shape.named else None
    size = sum((folder / name).stat().st_size for name in files) if folder is not None else 0
    return ExportedTable(
        side,
        f"tables.{side}.weight",
        shape.rows,
        len(made.catalog),
        shape.columns,
        written,
        "float32",
        size,
        files,
        "model",
        made.metric,
        told,
        names,
    )


def _put(writer: Any, side: str, block: Block, shape: Shape, names: Any) -> None:
    if writer is None:
        return
    try:
        writer.put(narrowed(side, block, shape.dtype), block.ids, names)
    except OSError as error:
        raise ExportError(f"vectors of {side}s cannot be written: {error.strerror or error}") from error
