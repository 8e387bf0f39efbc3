"""Small checkpoints on disk for tests, written with the library's own writer: every kind of cut, several files, several dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch

from shardembed.checkpoint.format.blocks import Base, Block, Chunk, Entry, File, Kind, Update, chunk_name, update_names
from shardembed.checkpoint.format.manifest import Manifest
from shardembed.checkpoint.format.pieces import Part, write_file, write_state

Cut = tuple[int, range, range]  # rank, rows, columns
STATE = b'{"progress": null}'


@dataclass
class Writer:
    """Collects tensors and their cuts, then writes a step folder."""

    folder: Path
    base: Base | None = None
    plans: tuple[dict[str, object], ...] = ()
    previous: str | None = None
    nonfinite: tuple[str, ...] = ()
    parts: dict[str, list[Part]] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    owners: dict[str, list[tuple[str, str, range, range]]] = field(default_factory=dict)  # key -> file, part, rows, columns
    changed: dict[str, list[tuple[str, str, str, range]]] = field(default_factory=dict)

    def add(
        self, key: str, values: torch.Tensor, cuts: list[Cut] | None = None, kind: Kind = "table", of: str | None = None
    ) -> None:
        shape = tuple(values.shape)
        flat = values.reshape(shape[0] if shape else 1, prod(shape[1:]))
        self.entries[key] = Entry(key, kind, of or key, shape, values.dtype)
        for rank, rows, columns in cuts if cuts is not None else [(0, range(flat.shape[0]), range(flat.shape[1]))]:
            name, file = chunk_name(key, shape, rows, columns), f"rank-{rank:05d}.safetensors"
            data = flat[rows.start : rows.stop : rows.step, columns.start : columns.stop]
            self.parts.setdefault(file, []).append(Part(name, data, shape if name == key else None))
            self.owners.setdefault(key, []).append((file, name, rows, columns))

    def update(self, key: str, values: torch.Tensor, ids: torch.Tensor, columns: range, rank: int = 0) -> None:
        """`ids` of the table `values` have changed."""
        shape, file = tuple(values.shape), f"rank-{rank:05d}.safetensors"
        self.entries.setdefault(key, Entry(key, "table", key, shape, values.dtype))
        names = update_names(key, range(shape[0]), columns, shape[0])
        changed = values[ids, columns.start : columns.stop]
        self.parts.setdefault(file, []).extend([Part(names[0], ids.unsqueeze(1)), Part(names[1], changed)])
        self.changed.setdefault(key, []).append((file, *names, columns))

    def write(self, step: int = 1) -> Manifest:
        self.folder.mkdir(parents=True)
        blocks: dict[str, dict[str, Block]] = {}
        for file, parts in self.parts.items():
            blocks[file] = write_file(self.folder / file, parts, {"format": "pt"})
        state = write_state(self.folder / "state.json", STATE)
        entries: dict[str, Entry] = {}
        for key, entry in self.entries.items():
            chunks = [Chunk(rows, cols, blocks[file][name]) for file, name, rows, cols in self.owners.get(key, [])]
            updates = [Update(cols, blocks[file][ids], blocks[file][new]) for file, ids, new, cols in self.changed.get(key, [])]
            entries[key] = replace(entry, chunks=tuple(chunks), updates=tuple(updates))
        files = {path.name: File(path.stat().st_size) for path in sorted(self.folder.iterdir())}
        versions, created = {"shardembed": "0", "torch": "2"}, "2026-11-24T12:00:00+00:00"
        come = (self.base, self.previous, self.nonfinite)
        manifest = Manifest(step, 2, created, versions, entries, files, self.plans, state, *come)
        (self.folder / "manifest.json").write_bytes(manifest.to_bytes())
        return manifest


def numbered(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values that say where they belong."""
    return (torch.arange(rows).unsqueeze(1) * 16 + torch.arange(columns)).to(dtype)


def values() -> dict[str, torch.Tensor]:
    """What `small_checkpoint` holds."""
    return {
        "user.weight": numbered(50, 6),
        "user.weight.exp_avg": numbered(50, 6).neg(),
        "user.weight.step_sums": torch.arange(50.0),
        "item.weight": numbered(23, 4, torch.bfloat16),
        "tower.0.weight": torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4),
        "tower.0.bias": torch.arange(5.0),
        "tower.0.bias.momentum_buffer": torch.arange(5.0) + 0.5,
        "tower.scale": torch.tensor(3.0),
        "tower.mask": torch.tensor([True, False, True]),
        "tower.none": torch.empty(0, 3),
    }


def small_checkpoint(folder: Path) -> Manifest:
    """Two ranks; a table cut into a grid, one strided, whole tensors, state of each."""
    tensors, writer = values(), Writer(folder)
    grid = [(0, range(30), range(3)), (1, range(30, 50), range(3)), (1, range(50), range(3, 6))]
    writer.add("user.weight", tensors["user.weight"], grid)
    writer.add("user.weight.exp_avg", tensors["user.weight.exp_avg"], grid, "table_state", "user.weight")
    halves = [(0, range(30), range(1)), (1, range(30, 50), range(1))]
    writer.add("user.weight.step_sums", tensors["user.weight.step_sums"], halves, "table_state", "user.weight")
    thirds = [(0, range(0, 23, 3)), (1, range(1, 23, 3)), (0, range(2, 11, 3)), (1, range(11, 23, 3))]
    strided = [(rank, rows, range(4)) for rank, rows in thirds]
    writer.add("item.weight", tensors["item.weight"], strided)
    for key in ("tower.0.weight", "tower.0.bias", "tower.scale", "tower.mask", "tower.none"):
        writer.add(key, tensors[key], kind="dense")
    writer.add("tower.0.bias.momentum_buffer", tensors["tower.0.bias.momentum_buffer"], kind="dense_state", of="tower.0.bias")
    return writer.write()


def increment(folder: Path, base: Path, full: Manifest) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Some rows of `user.weight` changed since `base`, all dense tensors saved again; returns what it stands for too."""
    tensors, writer = values(), Writer(folder, Base(base.name, full.checksum))
    user = tensors["user.weight"]
    left, right = torch.tensor([0, 7, 29, 31, 49]), torch.tensor([3])
    user[left, :3] += 1000
    user[right, 3:] += 2000
    writer.update("user.weight", user, left, range(3))
    writer.update("user.weight", user, right, range(3, 6), rank=1)
    for key in ("user.weight.exp_avg", "user.weight.step_sums", "item.weight"):
        writer.entries[key] = replace(full.entries[key], chunks=())
    for key in ("tower.0.weight", "tower.0.bias", "tower.scale", "tower.mask", "tower.none"):
        tensors[key] = tensors[key] if key in ("tower.mask", "tower.none") else tensors[key] + 1
        writer.add(key, tensors[key], kind="dense")
    writer.add("tower.0.bias.momentum_buffer", tensors["tower.0.bias.momentum_buffer"], kind="dense_state", of="tower.0.bias")
    return writer.write(step=2), tensors


def load(folder: Path, manifest: Manifest) -> Mapping[str, torch.Tensor]:
    """Every tensor of a full checkpoint, as the reader gives it."""
    from shardembed.checkpoint.format.pieces import Copy, Files, run_copies

    loaded: dict[str, torch.Tensor] = {}
    with Files(folder, manifest) as files:
        copies = []
        for key, entry in manifest.entries.items():
            into = torch.zeros(entry.rows, entry.columns, dtype=entry.dtype)
            loaded[key] = into.reshape(entry.shape)
            for chunk in entry.chunks:
                rows, columns = chunk.rows, chunk.columns
                view = into[:, columns.start : columns.stop]
                target = slice(rows.start, rows.stop, rows.step)
                whole = range(len(rows))
                copies.append(Copy(files, chunk.block, entry.dtype, len(columns), whole, slice(None), view, target, key))
        run_copies(copies)
    return loaded
