"""Ids that are no numbers from 0 on are refused, with their place, before anything is made by their size."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.errors import DataError
from shardembed.recipes.config import DataConfig
from shardembed.recipes.data import interactions, plausible, sequences, text
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.ids_config import InteractionIdsConfig
from shardembed.recipes.sequence_config import SequenceDataConfig

LAST = (1 << 32) - 1

NUMBERED = InteractionIdsConfig(kind="numbered")


def write(path: Path, users: list[int], items: list[int]) -> None:
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"user_id": pa.array(users, pa.int64()), "item_id": items}), path, row_group_size=1000)
    else:
        path.write_text("user_id,item_id\n\n" + "".join(f"{user},{item}\n" for user, item in zip(users, items, strict=True)))


def scan(kind: str, *paths: Path) -> None:
    names = tuple(map(str, paths))
    if kind == "pairs":
        interactions.scan(open_source(DataConfig(path=names, on_bad_row="skip", ids=NUMBERED)), 0)
    else:
        sequences.scan(open_source(SequenceDataConfig(path=names, time=None, on_bad_row="skip", ids=NUMBERED)))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("users", "items", "column", "row", "largest"),
    [
        ([1 << 31, (1 << 31) + 1], [0, 1], "user_id", 1, "2,147,483,649 is the largest of only 2 rows"),
        ([0, 0, 0, 1], [1 << 31, 1, 2, 3], "item_id", 0, "2,147,483,648 is the largest of only 4 rows"),
        ([3] * 3001, [5] * 1234 + [LAST] + [7] * 1766, "item_id", 1234, "4,294,967,295 is the largest of only 3,001 rows"),
        ([3] * 9, [5] * 8 + [1 << 20], "item_id", 8, "1,048,576 is the largest of only 9 rows"),
    ],
)
@pytest.mark.parametrize("kind", ["pairs", "sequences"])
def test_ids_far_beyond_the_rows_are_refused_without_memory_for_them(
    tmp_path: Path,
    kind: str,
    users: list[int],
    items: list[int],
    column: str,
    row: int,
    largest: str,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "sequences" and column == "user_id":
        return  # any int64 is a user there
    monkeypatch.setattr(text, "BLOCK_BYTES", 1000)
    first, path = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write(first, [0, 0, 0], [0, 1, 2])
    write(path, users, items)
    place = f"{path}:{row + 3}:" if suffix == ".csv" else rf"{path}: row {row} \(from 0\),"
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"^{place} column '{column}': id {largest}, but a table and its counts have a"):
            scan(kind, path)
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(DataError, match=rf"^{place} column '{column}': id"):  # whichever of several files it is in
        scan(kind, first, path)


def test_large_ids_that_come_before_the_rows_which_they_are_numbered_for_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids may descend; only all rows together tell whether they are too large."""
    monkeypatch.setattr(plausible, "ALWAYS", 50)
    monkeypatch.setattr(plausible, "RARE", 2)
    monkeypatch.setattr(text, "BLOCK_BYTES", 64)
    path = tmp_path / "a.csv"
    write(path, list(range(200, 0, -1)), [row % 7 for row in range(200)])
    data = interactions.scan(open_source(DataConfig(path=(str(path),), ids=NUMBERED)), 0)
    assert (data.users, data.items) == (201, 7)
    np.testing.assert_array_equal(data.user_counts, [0] + [1] * 200)
    write(path, list(range(600, 400, -1)), [row % 7 for row in range(200)])
    with pytest.raises(DataError, match=rf"{path}:3: column 'user_id': id 600 is the largest of only 200 rows"):
        scan("pairs", path)


@pytest.mark.parametrize("ranks", [1, 8])
def test_ids_whose_counts_do_not_fit_the_memory_that_is_free_are_refused(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(plausible, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(plausible, "LARGE", 1000)
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemAvailable: 200 kB\n")
    path = tmp_path / "a.csv"
    write(path, [0, 1, 2000], [1, 2, 3])
    if ranks == 1:
        return scan("pairs", path)
    with pytest.raises(DataError, match=rf"{path}:5: column 'user_id': id 2,000: counting ids up to it takes 0.0 GB on each of"):
        scan("pairs", path)
