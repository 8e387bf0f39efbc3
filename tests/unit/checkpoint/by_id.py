"""Small checkpoints of one dynamic table, written with the library's own writer, also such as no save makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from shardembed.checkpoint.format.blocks import Base, Block, ById, Entry, File, Update, id_names
from shardembed.checkpoint.format.manifest import Manifest
from shardembed.checkpoint.format.pieces import Part, write_file, write_state
from tests.dynamic_oracle import bucket_of

KEY, COLUMNS, BUCKETS, STATE = "emb.item.weight", 3, 4, b'{"progress": null}'
HALVES = (range(0, BUCKETS, 2), range(1, BUCKETS, 2))

EVERYONE = [-(2**63), -(2**40), -9, -1, 0, *range(5, 60, 3), 2**31, 2**62, 2**63 - 1]


@dataclass(frozen=True)
class Shard:
    """ids: as they are written, be they right or not. dropped: likewise. strip: of the table's columns."""

    buckets: range
    ids: torch.Tensor
    dropped: torch.Tensor | None = None
    strip: range = range(COLUMNS)


def rows_of(ids: torch.Tensor, salt: int = 0) -> torch.Tensor:
    """A row an id, `[n, COLUMNS]`."""
    return (ids % 1009).to(torch.float32).unsqueeze(1) + torch.arange(COLUMNS) / 4 + salt


def write(folder: Path, shards: list[Shard], rows: int, base: Base | None = None, salt: int = 0) -> Manifest:
    """A checkpoint with a file a shard. rows: how many it says it has. base: it changes that one."""
    folder.mkdir(parents=True)
    files, updates, dropped = {}, [], []
    for number, shard in enumerate(shards):
        name = f"rank-{number:05d}.safetensors"
        names = id_names(KEY, shard.buckets, BUCKETS, shard.strip)
        values = rows_of(shard.ids, salt)[:, shard.strip.start : shard.strip.stop]
        parts = [Part(names[0], shard.ids.unsqueeze(1)), Part(names[1], values)]
        parts += [] if shard.dropped is None else [Part(names[2], shard.dropped.unsqueeze(1))]
        blocks = write_file(folder / name, parts, {"format": "shardembed"})
        files[name] = File((folder / name).stat().st_size)
        updates.append(Update(shard.strip, blocks[names[0]], blocks[names[1]], shard.buckets))
        dropped += [blocks[names[2]]] if shard.dropped is not None else []
    by_id = ById(500, BUCKETS, 7, 3, base is None)
    entry = Entry(KEY, "table", KEY, (rows, COLUMNS), torch.float32, (), tuple(updates), by_id, tuple(dropped))
    state = write_state(folder / "state.json", STATE)
    manifest = manifest_of(entry, files, state, base, int(folder.name[-3:]))
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    return manifest


def manifest_of(entry: Entry, files: dict[str, File], state: Block, base: Base | None, step: int) -> Manifest:
    everything = {**files, "state.json": File(state.bytes)}
    return Manifest(step, 2, "2026-01-01T00:00:00+00:00", {}, {entry.key: entry}, everything, (), state, base)


def of(buckets: range, ids: list[int]) -> torch.Tensor:
    """Those that fall into these buckets, ascending."""
    return torch.tensor(sorted(id_ for id_ in ids if bucket_of(id_, BUCKETS) in buckets), dtype=torch.int64)


def halves(ids: list[int], dropped: list[int] | None = None) -> list[Shard]:
    return [Shard(half, of(half, ids), None if dropped is None else of(half, dropped)) for half in HALVES]


def two_of_them(root: Path) -> None:
    """A full checkpoint, and an increment in which some have changed, some have come, and some are gone."""
    made = write(root / "step-0000000001", halves(EVERYONE[:-3]), len(EVERYONE) - 3)
    changed, gone = [-1, *EVERYONE[-3:]], EVERYONE[6:9]
    base = Base("step-0000000001", made.checksum)
    write(root / "step-0000000007", halves(changed, gone), len(EVERYONE) - 3, base, salt=100)


def expected(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids of the checkpoint of this step, and their rows."""
    if step == 1:
        ids = torch.tensor(EVERYONE[:-3])
        return ids, rows_of(ids)
    ids = torch.tensor([*EVERYONE[:6], *EVERYONE[9:]])
    return ids, rows_of(ids) + 100.0 * torch.isin(ids, torch.tensor([-1, *EVERYONE[-3:]])).unsqueeze(1)
