"""`export_tables`: tables of a checkpoint into files that others read, by streaming."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shardembed._version import __version__
from shardembed.config.hints import nearest
from shardembed.embeddings.compared import Metric, Which
from shardembed.embeddings.formats import FORMATS, IDS, SCALE, Format, Shape, holds, writer_of
from shardembed.embeddings.narrowing import CHOICES, As, narrowed, written_dtype
from shardembed.embeddings.publish import new_folder, sync_file
from shardembed.embeddings.stored import BLOCK_BYTES, StoredTable, StoredTables
from shardembed.errors import ConfigError

INDEX = "export.json"
INDEX_FORMAT = 1
Progress = Callable[[int], None]  # is told how many bytes more have been written


@dataclass(frozen=True)
class ExportedTable:
    """A table that was written.

    Attributes:
        name: of the table, as it was found.
        key: that it has in the checkpoint.
        rows: how many were written.
        table_rows: how many it has in the checkpoint.
        columns: of what was written.
        dtype: of what was written.
        stored_dtype: of the table in the checkpoint.
        bytes: of all its files.
        files: their names in the export's folder.
        vectors: "rows" as they lie in the table, or those that the "model" makes of them.
        metric: by which the model compares these; None where it compares others or does not say.
        told: vectors and metric in words.
        names: the file of their ids and names; None where there are none.
    """

    name: str
    key: str
    rows: int
    table_rows: int
    columns: int
    dtype: str
    stored_dtype: str
    bytes: int
    files: tuple[str, ...]
    vectors: Which
    metric: Metric | None
    told: str
    names: str | None = None


@dataclass(frozen=True)
class Exported:
    """What `export_tables` has written; `export.json` in the folder says the same.

    Attributes:
        folder: where it lies.
        format: of the files.
        checkpoint: the name of the one that was read.
        step: of the checkpoint.
        tables: each that was written.
    """

    folder: Path
    format: Format
    checkpoint: str
    step: int
    tables: tuple[ExportedTable, ...]

    def as_json(self) -> dict[str, Any]:
        tables = {table.name: {**asdict(table), "files": list(table.files)} for table in self.tables}
        return {
            "format": INDEX_FORMAT,
            "shardembed": __version__,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "file_format": self.format,
            "tables": tables,
        }


def export_tables(
    folder: str | Path,
    out: str | Path,
    tables: Iterable[str] | None = None,
    *,
    rows: Mapping[str, Any] | None = None,
    format: Format = "safetensors",
    dtype: As = "stored",
    step: int | None = None,
    vectors: Which = "rows",
    block_bytes: int = BLOCK_BYTES,
    progress: Progress = lambda _: None,
) -> Exported:
    """Write tables of a checkpoint as files into the new folder `out`, block by block: a table may be larger than memory.

    The folder gets its name when all of it is on the disk. Needs no process group.

    Args:
        folder: of checkpoints (the newest counts), of one checkpoint, or of a run (its best weights count).
        tables: names of tables, in full or the end of it (`item` for `model.item`); all by default.
        rows: by table, the ids of the rows to write. They come in ascending order, each once, with their ids beside them; so do
            all rows of a dynamic table.
        format: "safetensors" (tensors `weight`, `scale`, `ids`), "npy" (files of these names), or "parquet" (columns `id`,
            `embedding`, `scale`).
        dtype: "stored" keeps it (NumPy and Parquet have no bfloat16: such tables become float32, which loses nothing), "float32",
            "float16", or "int8" with a float32 scale a row: `row = weight * scale`, each element within half a scale.
        step: the checkpoint of this step, rather than the newest.
        vectors: "rows" as they lie in the table, or what the "model" compares, which may first go through a tower or get one
            length; float32, and only where the checkpoint says how (those of `shardembed train` do).
        block_bytes: how much of a table is in memory at a time, as stored; converting and Parquet take about three times that.

    Raises:
        ConfigError, IdRangeError: a table, a row or a choice does not exist.
        CheckpointError: the checkpoint is missing or damaged.
        ExportError: `out` exists or cannot be written, or a number does not fit the dtype.
    """
    check_choices(format, dtype, block_bytes)
    with StoredTables(folder, step, vectors) as stored:
        found = [stored.find(name) for name in (stored.names if tables is None else tables)]
        if not found:
            raise ConfigError(f"{stored.path} has no tables to export")
        jobs = _jobs(stored, list(dict.fromkeys(table.key for table in found)), rows or {}, format, dtype)
        with new_folder(Path(out), sum(job.shape.nbytes for job in jobs)) as writing:
            written = tuple(_write(job, writing, format, block_bytes, progress) for job in jobs)
            done = Exported(Path(out), format, stored.path.name, stored.manifest.step, written)
            (writing / INDEX).write_text(json.dumps(done.as_json(), indent=1) + "\n", encoding="utf-8")
            sync_file(writing / INDEX)
    return done


@dataclass(frozen=True)
class _Job:
    table: StoredTable
    ids: torch.Tensor | None
    shape: Shape
    stem: str


def _jobs(stored: StoredTables, keys: list[str], rows: Mapping[str, Any], form: Format, dtype: As) -> list[_Job]:
    chosen = {}
    for name, ids in rows.items():
        key = stored.find(name).key
        if key not in keys:
            raise ConfigError(f"rows: table {name!r} is not one of the tables to export")
        chosen[key] = ids
    jobs: list[_Job] = []
    for key in keys:
        table = stored.find(key)
        ids = table.chosen(chosen[key]) if key in chosen else table.ids
        kind = written_dtype(table.dtype, dtype)
        kind = kind if holds(form, kind) else torch.float32
        shape = Shape(table.rows if ids is None else len(ids), table.columns, kind, kind == torch.int8, ids is not None)
        jobs.append(_Job(table, ids, shape, _stem(table.name, {job.stem for job in jobs})))
    return jobs


def _stem(name: str, taken: set[str]) -> str:
    """A name of a file for a table, whose own name may be anything."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".")[:200] or "table"
    stem, number = plain, 2
    while any(_files(stem) & _files(other) for other in taken):
        stem, number = f"{plain}-{number}", number + 1
    return stem


def _files(stem: str) -> set[str]:
    """A table called `user.scale` must not write over the scales of `user`."""
    return {stem, f"{stem}.{SCALE}", f"{stem}.{IDS}"}


def _write(job: _Job, folder: Path, form: Format, block_bytes: int, progress: Progress) -> ExportedTable:
    table, shape = job.table, job.shape
    stored, written = (str(each).removeprefix("torch.") for each in (table.dtype, shape.dtype))
    metadata = {"format": "pt", "table": table.name, "dtype": written, "stored_dtype": stored}
    metadata |= {"vectors": table.vectors, "metric": table.metric or "none", "told": table.told}
    writer = writer_of(form, folder, job.stem, shape, metadata)
    with writer:
        for block in table.blocks(job.ids, block_bytes):
            writer.put(narrowed(table.name, block, shape.dtype), block.ids)
            progress(block.values.nbytes)
    size = sum((folder / name).stat().st_size for name in writer.files)
    return ExportedTable(
        table.name,
        table.key,
        shape.rows,
        table.rows,
        table.columns,
        written,
        stored,
        size,
        tuple(writer.files),
        table.vectors,
        table.metric,
        table.told,
    )


def check_choices(form: str, dtype: str, block_bytes: int) -> None:
    """
    Raises:
        ConfigError: there is no such format or dtype, or a block has no room.
    """
    for what, value, choices in (("format", form, FORMATS), ("dtype", dtype, CHOICES)):
        if value not in choices:
            raise ConfigError(f"{what}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")
    if block_bytes < 1:
        raise ConfigError(f"block_bytes={block_bytes}: a block has at least one byte")
