"""The parts of a manifest as JSON, and back. Reading checks types and bounds; their meaning is for `checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from shardembed.checkpoint.format.blocks import DTYPES, Block, ById, Chunk, Entry, File, Update
from shardembed.checkpoint.format.checks import MOST

BLOCK = {"file", "offset", "bytes", "rows_a_piece", "hashes"}


def block_json(block: Block) -> dict[str, Any]:
    return {
        "file": block.file,
        "offset": block.offset,
        "bytes": block.bytes,
        "rows_a_piece": block.rows_a_piece,
        "hashes": list(block.hashes),
    }


def entry_json(entry: Entry) -> dict[str, Any]:
    return {**_entry_json(entry), **_dynamic_json(entry)}


def _dynamic_json(entry: Entry) -> dict[str, Any]:
    if entry.by_id is None:
        return {}
    return {"by_id": asdict(entry.by_id), "dropped": [block_json(block) for block in entry.dropped]}


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "of": entry.of,
        "shape": list(entry.shape),
        "dtype": str(entry.dtype).removeprefix("torch."),
        "chunks": [
            {
                "rows": [chunk.rows.start, chunk.rows.stop, chunk.rows.step],
                "columns": [chunk.columns.start, chunk.columns.stop],
                **block_json(chunk.block),
            }
            for chunk in entry.chunks
        ],
        "updates": [
            {
                "columns": [update.columns.start, update.columns.stop],
                "ids": block_json(update.ids),
                "values": block_json(update.values),
                **({} if update.buckets is None else {"buckets": [update.buckets.start, update.buckets.stop, update.buckets.step]}),
            }
            for update in entry.updates
        ],
    }


def each(data: Any, what: str, one: str, build: Callable[[str, Any], Any]) -> dict[str, Any]:
    found = {}
    for name, value in read_object(data, what).items():
        try:
            found[name] = build(name, value)
        except ValueError as error:
            raise ValueError(f"{one} {name!r:.200}: {error}") from error
    return found


def read_file(name: str, data: Any) -> File:
    expect(data, {"bytes"})
    return File(number(data["bytes"], "bytes"))


def read_entry(key: str, data: Any) -> Entry:
    by_id = read_object(data, "an entry").get("by_id")
    expect(data, {"kind", "of", "shape", "dtype", "chunks", "updates"} | ({"by_id", "dropped"} if "by_id" in data else set()))
    dtype = DTYPES.get(text(data["dtype"], "dtype"))
    if dtype is None:
        raise ValueError(f"dtype {data['dtype']!r:.40} is none of {', '.join(DTYPES)}")
    chunks, updates = read_list(data["chunks"], "chunks"), read_list(data["updates"], "updates")
    return Entry(
        key=key,
        kind=text(data["kind"], "kind"),  # type: ignore[arg-type]  # compared with all kinds in `checks`
        of=text(data["of"], "of"),
        shape=tuple(number(size, "shape") for size in read_list(data["shape"], "shape")),
        dtype=dtype,
        chunks=tuple(_chunk(chunk) for chunk in chunks),
        updates=tuple(_update(update, by_id is not None) for update in updates),
        by_id=None if by_id is None else _by_id(by_id),
        dropped=tuple(read_block(block, BLOCK) for block in read_list(data.get("dropped", []), "dropped")),
    )


def _by_id(data: Any) -> ById:
    expect(data, {"capacity", "buckets", "now", "seed", "whole"})
    if type(data["whole"]) is not bool:
        raise ValueError(f"whole {data['whole']!r:.40} is neither true nor false")
    capacity = None if data["capacity"] is None else number(data["capacity"], "capacity")
    if type(data["seed"]) is not int or not -MOST <= data["seed"] <= 2 * MOST + 1:
        raise ValueError(f"seed {data['seed']!r:.40} is no whole number of 64 bits")
    return ById(capacity, number(data["buckets"], "buckets"), number(data["now"], "now"), data["seed"], data["whole"])


def _chunk(data: Any) -> Chunk:
    block = read_block(data, BLOCK | {"rows", "columns"})
    return Chunk(_rows(data["rows"], "rows"), _columns(data["columns"]), block)


def _update(data: Any, by_id: bool) -> Update:
    expect(data, {"columns", "ids", "values"} | ({"buckets"} if by_id else set()))
    buckets = _rows(data["buckets"], "buckets") if by_id else None
    return Update(_columns(data["columns"]), read_block(data["ids"], BLOCK), read_block(data["values"], BLOCK), buckets)


def _rows(data: Any, what: str) -> range:
    rows = read_list(data, what)
    if len(rows) != 3 or not all(type(number) is int and 0 <= number <= MOST for number in rows) or not rows[2]:
        raise ValueError(f"{what} {rows!r:.80} are not [start, stop, step]")
    return range(*rows)


def _columns(data: Any) -> range:
    columns = read_list(data, "columns")
    if len(columns) != 2 or not all(type(number) is int and 0 <= number <= MOST for number in columns):
        raise ValueError(f"columns {columns!r:.80} are not [start, stop]")
    return range(*columns)


def read_block(data: Any, wanted: set[str]) -> Block:
    expect(data, wanted)
    hashes = read_list(data["hashes"], "hashes")
    if not all(type(text) is str for text in hashes):
        raise ValueError("a hash is not text")
    return Block(
        text(data["file"], "file"),
        number(data["offset"], "offset"),
        number(data["bytes"], "bytes"),
        number(data["rows_a_piece"], "rows_a_piece"),
        tuple(hashes),
    )


def expect(data: Any, wanted: set[str], where: str = "") -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{where}{data!r:.60} should be an object with {', '.join(sorted(wanted))}")
    if data.keys() != wanted:
        raise ValueError(f"{where}{_listed(wanted - data.keys(), 'missing')}{_listed(data.keys() - wanted, 'unknown')}")


def _listed(names: Iterable[str], what: str) -> str:
    return "".join(f"field {name!r:.60} is {what}; " for name in sorted(names)[:5])


def read_object(data: Any, what: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{what} should be an object, not {data!r:.60}")
    return data


def read_list(data: Any, what: str) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError(f"{what} should be a list, not {data!r:.60}")
    return data


def text(data: Any, what: str) -> str:
    if not isinstance(data, str):
        raise ValueError(f"{what} should be text, not {data!r:.60}")
    return data


def number(data: Any, what: str) -> int:
    if type(data) is not int or not 0 <= data <= MOST:  # bool is an int too
        raise ValueError(f"{what} should be a whole number from 0 to {MOST}, not {data!r:.60}")
    return data
