"""What reading a file takes of memory: as much as a block of it, however large the file is."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.recipes.data.opened import open_files
from shardembed.recipes.data.wanted import Wanted
from tests.amount import exhaustive

ROWS = 1_000_000
LINE = b"1234567,7654321,1700000000\n"
WANTED = [Wanted("u", "key", "data.user"), Wanted("i", "key", "data.item"), Wanted("t", "time", "data.time")]
MOST = 45 << 20  # bytes; the columns of all rows take 32 MB beside 27 MB of text, and 72 MB of Parquet


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """Arrow's memory, counted from here on."""
    before = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counted)
    yield counted
    pa.set_memory_pool(before)


@pytest.mark.parametrize("form", ["csv", exhaustive("bad"), "parquet"])
def test_a_file_of_many_rows_takes_no_more_than_a_block(tmp_path: Path, form: str, pool: pa.MemoryPool) -> None:
    path = tmp_path / f"log.{'parquet' if form == 'parquet' else 'csv'}"
    if form == "parquet":
        draw = np.random.default_rng(0)  # nothing is there to compress
        parquet.write_table(pa.table({name: draw.integers(0, 1 << 62, 3 * ROWS) for name in "uit"}), path, row_group_size=3 * ROWS)
    else:
        bad = b"x,y\n" * (form == "bad")
        path.write_bytes(b"u,i,t\n" + (LINE * (ROWS // 10) + bad) * 10)
    began, rows = pool.bytes_allocated(), 0
    tracemalloc.start()
    try:
        for read in open_files([str(path)], WANTED, True, "data.path").chunks(0):
            rows += len(read.columns[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == ROWS * (3 if form == "parquet" else 1)
    taken = peak + (pool.max_memory() or 0) - began
    assert taken < MOST, f"{taken / 2**20:.0f} MiB"
