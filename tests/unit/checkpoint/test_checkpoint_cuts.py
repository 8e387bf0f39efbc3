"""Any layout, saved whole or as an increment, loads into any other: drawn layouts, real files, no processes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.checkpoint import chance, writing
from shardembed.checkpoint.format.blocks import Base
from shardembed.checkpoint.inventory import Item, Region
from shardembed.checkpoint.reader import Reader
from shardembed.checkpoint.sharing import parts_of
from shardembed.checkpoint.snapshot import Snapshot
from shardembed.tables.layout import Layout
from tests.amount import examples
from tests.unit.drawn import layouts

SMALL: dict[str, Any] = {
    "progress": None,
    "optimizer": {"class": None, "groups": [], "tables": {}, "skipped": 0},
    "has_optimizer": False,
    "steps": {},
    "stateful": {},
    "model": {},
}


def items_of(layout: Layout, table: torch.Tensor, rows: torch.Tensor, rank: int, touched: torch.Tensor | None) -> dict[str, Item]:
    """A table and a state of one number a row, as `rank` holds them; `touched` is over the whole table."""
    held = [shard for shard in layout.shards if rank in shard.ranks]

    def noted(shard_rows: range) -> torch.Tensor | None:
        return None if touched is None else touched[list(shard_rows)]

    weights = tuple(
        Region(s.rows, s.columns, table[list(s.rows)][:, list(s.columns)].clone(), s.ranks, touched=noted(s.rows)) for s in held
    )
    state = tuple(
        Region(
            s.rows,
            range(1),
            rows[list(s.rows)].unsqueeze(1).clone(),
            s.ranks if s.columns.start == 0 else (),
            touched=noted(s.rows),
        )
        for s in held
    )
    return {
        "t.weight": Item("t.weight", "table", "t.weight", tuple(table.shape), table.dtype, weights),
        "t.weight.sum": Item("t.weight.sum", "table_state", "t.weight", tuple(rows.shape), rows.dtype, state),
    }


def save(root: Path, step: int, layout: Layout, ranks: int, tensors: Any, touched: torch.Tensor | None, base: Base | None) -> Base:
    """What the ranks of a job would write together."""
    saving = root / f".saving-{step}"
    saving.mkdir()
    reports = []
    snapshots = []
    for rank in range(ranks):
        items = items_of(layout, *tensors, rank, touched)
        parts = parts_of(items.values(), rank, incremental=base is not None)
        snapshots.append(Snapshot(step, items, parts, SMALL, {}, chance.capture(), [], frozenset()))
        report: dict[str, Any] = {"parts": [], "bytes": 0, "scalars": {}, "random": snapshots[-1].random}
        if parts:
            file = saving / f"rank-{rank:05d}.safetensors"
            report["parts"] = writing._write_parts(file, parts, ())
            report["file"], report["bytes"] = file.name, file.stat().st_size
        reports.append(report)
    said = writing._publish(
        root, saving, snapshots[0], reports, ranks, writing.Terms(keep=None, base=base, previous=None, finite=False)
    )
    name, checksum, _ = json.loads(said)
    return Base(name, checksum)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Layout, int, Layout, int, list[bool]]:
    rows, columns = draw(st.integers(1, 25)), draw(st.integers(1, 5))
    before, after = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    touched = draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    return draw(layouts(rows, columns, before)), before, draw(layouts(rows, columns, after)), after, touched


@examples(15)
@given(cuts(), st.sampled_from([8, 64, 8 << 20]))
def test_every_element_arrives_whatever_the_cuts(drawn: tuple[Layout, int, Layout, int, list[bool]], piece: int) -> None:
    before, ranks, after, ranks_after, marks = drawn
    size = (before.num_embeddings, before.embedding_dim)
    tensors = torch.randn(size), torch.randn(size[0])
    touched = torch.tensor(marks)
    newer = tuple(torch.where(touched.view(-1, *[1] * (one.dim() - 1)), one + 1, one) for one in tensors)
    with tempfile.TemporaryDirectory() as folder, _pieces(piece):
        root = Path(folder)
        full = save(root, 1, before, ranks, tensors, None, None)
        increment = save(root, 2, before, ranks, newer, touched, full)
        for name, expected in ((full.folder, tensors), (increment.folder, newer)):
            for rank in range(ranks_after):
                items = items_of(after, torch.full(size, torch.nan), torch.full(size[:1], torch.nan), rank, None)
                with Reader(root / name) as reader:
                    reader.copy([(item, key) for key, item in items.items()], {})
                for key, item in items.items():
                    for found, wanted in zip(item.regions, items_of(after, *expected, rank, None)[key].regions, strict=True):
                        assert torch.equal(found.data, wanted.data), (name, key, rank)


class _pieces:
    """Pieces of so many bytes, so that small tables have several."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __enter__(self) -> None:
        from shardembed.checkpoint import sharing
        from shardembed.checkpoint.format import pieces

        self._before = pieces.PIECE_BYTES
        pieces.PIECE_BYTES = sharing.PIECE_BYTES = self._size

    def __exit__(self, *error: object) -> None:
        from shardembed.checkpoint import sharing
        from shardembed.checkpoint.format import pieces

        pieces.PIECE_BYTES = sharing.PIECE_BYTES = self._before
