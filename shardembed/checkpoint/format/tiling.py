"""Whether chunks hold each element of a tensor exactly once. Untrusted numbers: the work depends on how many chunks there are.

As in a layout, chunks are column strips that tile the columns, and each strip is cut by rows on its own: into blocks of rows, or
into progressions of one step, which may be cut further.
"""

from __future__ import annotations

from collections.abc import Sequence


def check_tiling(rows: int, columns: int, cuts: Sequence[tuple[range, range]]) -> None:
    """Raise ValueError unless the (rows, columns) of `cuts` tile `rows` x `columns`."""
    if rows * columns == 0:
        if cuts and list(cuts) != [(range(rows), range(columns))]:
            raise ValueError(f"a tensor of {rows} x {columns} has no element to cut")
        return
    strips: dict[tuple[int, int], list[range]] = {}
    for cut_rows, cut_columns in cuts:
        if not cut_rows or not cut_columns:
            raise ValueError("a chunk is empty")
        strips.setdefault((cut_columns.start, cut_columns.stop), []).append(cut_rows)
    edge = 0
    for first, stop in sorted(strips):
        if first != edge:
            raise ValueError(f"columns from {min(first, edge)} on are in no chunk, or in two")
        edge = stop
    if edge != columns:
        raise ValueError(f"chunks hold columns up to {edge}, the tensor has {columns}")
    for (first, stop), cut in strips.items():
        _check_strip(rows, cut, f"of columns {first} to {stop - 1}")


def _check_strip(total: int, cut: list[range], which: str) -> None:
    """Progressions of one step fall apart into residues, and each residue is a line of blocks."""
    steps = {rows.step for rows in cut if len(rows) > 1 and rows.step > 1}
    contiguous = any(len(rows) > 1 and rows.step == 1 for rows in cut)
    if len(steps) + contiguous > 1:
        raise ValueError(f"rows {which} are cut with several steps ({', '.join(map(str, sorted(steps)[:5]))})")
    step = next(iter(steps), 1)
    lines: dict[int, list[tuple[int, int]]] = {}
    for rows in cut:
        lines.setdefault(rows.start % step, []).append((rows.start, rows[-1]))
    if len(lines) != min(step, total):
        raise ValueError(f"rows {which} are held of {len(lines)} of {min(step, total)} residues of step {step}")
    # In order of first rows, each block must begin where the last one ended: sorting is all the work, whatever the sizes are.
    for residue, line in lines.items():
        edge = residue
        for first, last in sorted(line):
            if first != edge:
                raise ValueError(f"rows {which} from {min(first, edge)} on are in no chunk, or in two")
            edge = last + step
        if edge < total or edge - step >= total:
            raise ValueError(f"chunks hold rows {which} up to {edge - step}, the tensor has {total} rows")
