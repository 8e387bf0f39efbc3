"""Rows that two cuts share, against sets; chunks that tile a tensor, against counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardembed.checkpoint.format.regions import common
from shardembed.checkpoint.format.tiling import check_tiling

RANGES = st.builds(range, st.integers(0, 40), st.integers(0, 80), st.integers(1, 12))


@given(RANGES, RANGES)
def test_common_rows_are_the_intersection(a: range, b: range) -> None:
    shared = sorted(set(a) & set(b))
    found = common(a, b)
    if found is None:
        assert not shared
        return
    in_a, in_b = found
    assert [a[i] for i in in_a] == shared
    assert [b[i] for i in in_b] == shared


def test_common_rows_of_very_long_cuts_need_no_search() -> None:
    found = common(range(2, 2**62, 3), range(1, 2**62, 7))
    assert found is not None
    in_a, in_b = found
    a, b = range(2, 2**62, 3), range(1, 2**62, 7)
    assert (a[in_a[0]], a[in_a[1]], b[in_b[0]], b[in_b[1]]) == (8, 29, 8, 29)
    assert len(in_a) == len(in_b) == len(range(8, 2**62, 21))
    assert common(range(0, 2**62, 4), range(1, 2**62, 6)) is None


def edges(length: int, data: st.DataObject) -> list[int]:
    inner = data.draw(st.sets(st.integers(1, length - 1), max_size=3)) if length > 1 else set()
    return [0, *sorted(inner), length]


def cuts_of(rows: int, columns: int, data: st.DataObject) -> list[tuple[range, range]]:
    """Strips, each cut into blocks or residues, which are cut further."""
    cuts = []
    for first, stop in itertools.pairwise(edges(columns, data)):
        step = data.draw(st.integers(1, 5))
        for residue in range(min(step, rows)):
            line = range(residue, rows, step)
            cuts += [(line[i:j], range(first, stop)) for i, j in itertools.pairwise(edges(len(line), data))]
    return data.draw(st.permutations(cuts))


@given(st.integers(1, 20), st.integers(1, 5), st.data())
def test_chunks_are_accepted_exactly_when_they_tile(rows: int, columns: int, data: st.DataObject) -> None:
    cuts = cuts_of(rows, columns, data)
    check_tiling(rows, columns, cuts)
    at = data.draw(st.integers(0, len(cuts) - 1))
    cut_rows, cut_columns = cuts[at]
    moved = range(cut_rows.start + 1, cut_rows.stop + 1, cut_rows.step)
    changed = data.draw(
        st.sampled_from(
            [
                cuts[:at] + cuts[at + 1 :],
                [*cuts, cuts[at]],
                [*cuts[:at], (cut_rows[:-1], cut_columns), *cuts[at + 1 :]],
                [*cuts[:at], (moved, cut_columns), *cuts[at + 1 :]],
                [*cuts[:at], (cut_rows, cut_columns[:-1]), *cuts[at + 1 :]],
                [*cuts[:at], (range(cut_rows.start, cut_rows.stop + 1), cut_columns), *cuts[at + 1 :]],
            ]
        )
    )
    held = np.zeros((2 * rows + 10, columns + 1), dtype=int)
    for some_rows, some_columns in changed:
        held[np.ix_(some_rows, some_columns)] += 1
    empty = any(not some_rows or not some_columns for some_rows, some_columns in changed)
    tiles = (held[:rows, :columns] == 1).all() and held.sum() == rows * columns and not empty
    if not tiles:
        with pytest.raises(ValueError, match=r"rows|columns|chunk"):
            check_tiling(rows, columns, changed)


@pytest.mark.parametrize(
    ("cuts", "says"),
    [
        ([], "columns up to 0, the tensor has 4"),
        ([(range(6), range(3))], "columns up to 3"),
        ([(range(6), range(4)), (range(6), range(2))], "columns from 0 on are in no chunk, or in two"),
        ([(range(6), range(2)), (range(6), range(1, 4))], "columns from 1 on"),
        ([(range(3), range(4)), (range(4, 6), range(4))], "from 3 on are in no chunk"),
        ([(range(5), range(4))], "up to 4, the tensor has 6"),
        ([(range(0, 6, 2), range(4))], "1 of 2 residues"),
        ([(range(0, 6, 2), range(4)), (range(1, 5, 2), range(4))], "up to 3"),
        ([(range(0, 6, 2), range(4)), (range(1, 6, 3), range(4))], "several steps"),
        ([(range(0), range(4)), (range(6), range(4))], "empty"),
    ],
)
def test_what_does_not_tile_is_named(cuts: list[tuple[range, range]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_tiling(6, 4, cuts)


def test_a_tensor_without_elements_has_no_chunk_or_one() -> None:
    for rows, columns in [(0, 3), (5, 0), (0, 0)]:
        check_tiling(rows, columns, [])
        check_tiling(rows, columns, [(range(rows), range(columns))])
        with pytest.raises(ValueError, match="no element"):
            check_tiling(rows, columns, [(range(1), range(1))])


def test_sizes_of_numbers_do_not_matter() -> None:
    # With work in proportion to rows or steps, this test would not end.
    most = 2**63 - 1
    with pytest.raises(ValueError, match=f"1 of {most - 1} residues"):
        check_tiling(most, 1, [(range(0, most, most - 1), range(1))])
    blocks = [(range(i * 10**12, (i + 1) * 10**12), range(7)) for i in range(100_000)]
    check_tiling(10**17, 7, blocks)
    check_tiling(10**17, 7, [(range(i, 10**17, 100_000), range(7)) for i in range(100_000)])
