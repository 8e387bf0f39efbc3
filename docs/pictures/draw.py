"""Draws the pictures of the page on sharding from the library's own layouts: `python docs/pictures/draw.py` writes them anew."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import shardembed as se  # noqa: E402
from shardembed.tables.layout import Layout  # noqa: E402
from shardembed.tables.placement import Cluster, Placement  # noqa: E402

ROWS, COLUMNS, RANKS, A_NODE = 16, 8, 4, 2
# Paul Tol's "light" scheme: dark text is read on all, and in print they differ in shade. Ranks are numbered too.
COLOURS = ("#77aadd", "#eedd88", "#ee8866", "#bbcc33")
PANELS = {
    "table_wise(1)": se.table_wise(1),
    "row_wise()": se.row_wise(),
    "row_wise(strided=False)": se.row_wise(strided=False),
    "column_wise()": se.column_wise(),
    "table_row_wise(node=1)": se.table_row_wise(1),
    "grid(2)": se.grid(2),
    "replicated()": se.replicated(),
}
STYLE = (
    "text{font-family:system-ui,-apple-system,'DejaVu Sans',sans-serif;fill:#222;font-size:13px}.m{text-anchor:middle}"
    ".s{font-size:11.5px;fill:#555}.b{font-weight:600}.c{font-family:ui-monospace,'DejaVu Sans Mono',monospace}"
)


def text(x: float, y: float, said: str, kind: str = "") -> str:
    said = said.replace("&", "&amp;").replace("<", "&lt;")
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{said}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="#fff" stroke-width="1.2"/>'


def picture(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    lines = [head, f"<title>{title}</title>", f"<style>{STYLE}</style>", box(0, 0, width, height, "#fff"), *parts, "</svg>"]
    return "\n".join(lines) + "\n"


def layout_of(placement: Placement) -> Layout:
    return placement.layout(ROWS, COLUMNS, Cluster(RANKS, A_NODE))


def panel(x: float, y: float, name: str, layout: Layout, cell: float) -> list[str]:
    """A table whose every element has the colour of its owner, and every shard its rank's number."""
    parts = [text(x, y - 8, name, "c")]
    if layout.copied:
        for copy in range(RANKS):
            left, top = x + copy * cell * 0.9, y + copy * cell * 0.9
            size = COLUMNS * cell - (RANKS - 1) * cell * 0.9, ROWS * cell - (RANKS - 1) * cell * 0.9
            parts += [box(left, top, *size, COLOURS[copy]), text(left + 2.5, top + 10, str(copy), "s")]
        return parts
    for shard in layout.shards:
        (rank,), runs = shard.ranks, shard.rows
        left, wide = x + shard.columns.start * cell, len(shard.columns) * cell
        tops = [(row, 1) for row in runs] if runs.step > 1 else [(runs.start, len(runs))]
        for row, height in tops:
            parts.append(box(left, y + row * cell, wide, height * cell, COLOURS[rank]))
        if runs.step == 1:
            parts.append(text(left + wide / 2, y + (runs.start + len(runs) / 2) * cell + 4.5, str(rank), "m b"))
        else:
            parts += [text(left + wide / 2, y + (row + 1) * cell - 1, str(rank), "m s") for row in runs]
    return parts


def cuts() -> str:
    cell, across, parts = 12.0, 4, []
    for number, (name, placement) in enumerate(PANELS.items()):
        x, y = 24 + (number % across) * 194, 46 + (number // across) * 250
        parts += panel(x, y, name, layout_of(placement), cell)
    x, y = 24 + 3 * 194, 46 + 250
    parts.append(text(x, y - 8, "who holds what", "b"))
    for rank in range(RANKS):
        parts.append(box(x, y + rank * 26, 22, 18, COLOURS[rank]))
        parts.append(text(x + 30, y + 13 + rank * 26, f"rank {rank}, on node {rank // A_NODE}"))
    parts += [text(x, y + 126, f"{ROWS} rows down,", "s"), text(x, y + 142, f"{COLUMNS} columns across", "s")]
    return picture(800, 512, "Seven ways to cut one table over four ranks on two nodes", parts)


BATCHES = {0: (2, 9, 2), 1: (12, 3)}


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="2" marker-end="url(#head)"/>'


def journey() -> str:
    """One batch on two ranks, a table cut by rows: who asks whom for which ids, and what comes back."""
    layout = se.row_wise(packing="unique").layout(ROWS, COLUMNS, Cluster(2, 2))
    parts = [
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>'
    ]
    stages = ("the batch", "distinct ids, by owner", "the owner's rows", "the vectors, in order")
    lefts = (24, 170, 395, 620)
    parts += [text(left, 24, said, "b") for left, said in zip(lefts, stages, strict=True)]
    parts += [text(302, 44, "ids", "m s"), text(548, 44, "vectors", "m s")]
    for rank in range(2):
        top = 60 + rank * 190
        shard = next(shard for shard in layout.shards if rank in shard.ranks)
        parts += [text(24, top + 12, f"rank {rank}", "b"), text(24, top + 36, ", ".join(map(str, BATCHES[rank])), "c")]
        parts.append(text(lefts[2], top + 12, f"rank {rank}: rows {shard.rows.start} to {shard.rows.stop - 1}", "s"))
        asked = sorted({number for batch in BATCHES.values() for number in batch if number in shard.rows})
        for place, number in enumerate(asked):
            parts += [
                box(lefts[2], top + 22 + place * 30, 96, 24, COLOURS[rank]),
                text(lefts[2] + 8, top + 39 + place * 30, f"row {number}", "c"),
            ]
        owners = {number: next(s.ranks[0] for s in layout.shards if number in s.rows) for number in BATCHES[rank]}
        for owner in range(2):
            ids = sorted(number for number in owners if owners[number] == owner)
            y = top + 22 + owner * 44
            parts += [
                box(170, y, 92, 30, COLOURS[owner]),
                text(178, y + 20, f"to {owner}:", "s"),
                text(218, y + 20, ", ".join(map(str, ids)) or "-", "c"),
            ]
            parts.append(arrow(264, y + 15, 390, 60 + owner * 190 + 50 + rank * 12, "#555"))
        for place, number in enumerate(BATCHES[rank]):
            y = top + 8 + place * 30
            parts += [box(620, y, 96, 24, COLOURS[owners[number]]), text(628, y + 17, f"of id {number}", "c")]
        for owner in range(2):
            parts.append(arrow(493, 60 + owner * 190 + 50 + rank * 12, 615, top + 30 + owner * 30, "#555"))
    parts.append(
        text(24, 416, "Gradients go the same way back: from the rank that looked an id up to the rank that owns its row.", "s")
    )
    return picture(800, 432, "A batch on two ranks: ids go to the owners of their rows, and vectors come back", parts)


PICTURES = {"cuts.svg": cuts, "journey.svg": journey}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8")
