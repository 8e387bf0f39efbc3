"""Whether ids are numbers from 0 on, before anything is made that has a place for every id up to the largest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shardembed.errors import DataError
from shardembed.recipes.data.source import Source, all_chunks

ALWAYS = 1 << 20  # ids below are taken whatever the data
RARE = 1000  # ids for each row of data from which on they are not numbered from 0
LARGE = 1 << 24  # ids that are counted without a look at the memory that is free
MEMORY = Path("/proc/meminfo")
ADVICE = (
    "a table and its counts have a row for every id up to the largest. Number them from 0, as docs/training.md shows, or give "
    "values rows by se.Vocabulary or se.Hashing beforehand"
)


class Plausible:
    """Looks at ids while they are read for the first time; asks for no memory by their size itself.

    columns: the places of what is looked at among the columns of the source: 0 users, 1 items.
    """

    def __init__(self, source: Source, columns: Sequence[int] = (0, 1)) -> None:
        self._source, self._columns = source, columns
        self._looked = False
        self._counted = 0  # the largest id for which there was memory

    def check(self, largest: Sequence[int], rows: int, whole: bool = False) -> None:
        """
        Args:
            largest: the largest id of each column so far, in `rows` rows. whole: they are all.

        Raises:
            DataError: ids go much further than rows do, or counting them takes more memory than is free; says where the largest is.
        """
        if not self._looked and _scattered(largest, rows) is not None:
            # Only all rows together tell; they are read for that once.
            self._looked = True
            rows, largest = (rows, largest) if whole else self._look()
            if (place := _scattered(largest, rows)) is not None:
                where = self._source.place(self._columns[place], largest[place])
                raise DataError(f"{where}: id {largest[place]:,} is the largest of only {rows:,} rows, but {ADVICE}")
        if max(largest) >= max(LARGE, 2 * self._counted):  # by when arrays grow again
            self._check_memory(largest)
            self._counted = max(largest)

    def _look(self) -> tuple[int, Sequence[int]]:
        rows, largest = 0, [0] * len(self._columns)
        for chunk in all_chunks(self._source):
            rows += len(chunk)
            if len(chunk):
                found = (int((chunk.users, chunk.items)[column].max()) for column in self._columns)
                largest = [max(pair) for pair in zip(largest, found, strict=True)]
        return rows, largest

    def _check_memory(self, largest: Sequence[int]) -> None:
        needed = max(largest) * 8 * 4 * 2  # at most four arrays of 8 bytes an id, which double when they grow
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if (free := free_memory()) < needed * here:
            place = max(range(len(largest)), key=lambda one: largest[one])
            where = self._source.place(self._columns[place], largest[place])
            raise DataError(
                f"{where}: id {largest[place]:,}: counting ids up to it takes {needed / 1e9:,.1f} GB on each of {here} ranks, but "
                f"this machine has {free / 1e9:,.1f} GB free: {ADVICE}"
            )


def _scattered(largest: Sequence[int], rows: int) -> int | None:
    """Which of the columns goes furthest beyond what `rows` can fill."""
    place = max(range(len(largest)), key=lambda one: largest[one])
    return place if largest[place] >= max(ALWAYS, RARE * rows) else None


def free_memory() -> float:
    """Bytes that this machine can give to processes; all that it has where the system does not say."""
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        lines = []
    free = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return free if free is not None else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
