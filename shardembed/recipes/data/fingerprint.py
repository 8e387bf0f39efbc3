"""What rows are known by, and later passes that are held to what the first one saw.

A fingerprint sees every value, which values stand in one row, and the order of the rows. All arithmetic is modulo 2^64:

    row     mix(sum over its columns c of fold(value) * K_c), where fold(v) = v ^ v >> 32, and a float is its 32 bits
    rows    sum over i of row_i * G^(n - 1 - i)

So the fingerprint of rows that follow each other comes from those of the parts (`+`), and does not depend on how rows are cut into
blocks, files or the shares of ranks. It is no cryptographic hash: it tells of accidents, not of somebody who looks for collisions.

A first pass notes the fingerprint of every BLOCK_ROWS rows of a part; a later one compares each block before it gives it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np

from shardembed.errors import DataError
from shardembed.inputs.hashing import U64, mix
from shardembed.recipes.data.stream import Join, Rows, rechunked

BLOCK_ROWS = 1 << 16  # compared at once; 8 bytes are kept of each
PIECE_ROWS = 1 << 13  # hashed at once: what that takes stays in the cache
BITS = (1 << 64) - 1
BASE = 0x9E3779B97F4A7C15
NAN = np.uint32(0x7FC00000)  # whatever the bits of a missing number are
AGAIN = (
    "the data have changed under the run. Bring them back as they were and give the same command again, which goes on from the "
    "newest checkpoint, or begin a new run with --fresh"
)


class Columns(Rows, Protocol):
    """Rows with their values."""

    def columns(self) -> Sequence[np.ndarray]:
        """All of them, each `[n]` or `[n, k]`: integers, or float32."""
        ...


ColumnsT = TypeVar("ColumnsT", bound=Columns)


@dataclass(frozen=True)
class Fingerprint:
    """What rows are known by; of several after another the sum, in their order.

    Attributes:
        rows: how many these are.
        value: 64 bits.
    """

    rows: int = 0
    value: int = 0

    @staticmethod
    def of(rows: Columns) -> Fingerprint:
        found = Fingerprint()
        for start in range(0, len(rows), PIECE_ROWS):
            found += _piece(rows[start : start + PIECE_ROWS].columns())
        return found

    def __add__(self, after: Fingerprint) -> Fingerprint:
        moved = self.value * pow(BASE, after.rows, 1 << 64)
        return Fingerprint(self.rows + after.rows, (moved + after.value) & BITS)

    def __str__(self) -> str:
        return f"{self.value:016x}"


def _piece(columns: Sequence[np.ndarray]) -> Fingerprint:
    count = len(columns[0])
    total = np.zeros(count, U64)
    place = 0
    for column in columns:
        words = _words(column) if column.ndim > 1 else _words(column)[:, None]
        factors = _factors(place + words.shape[1])[place:]
        total += (words ^ words >> U64(32)) @ factors
        place += words.shape[1]
    rows = mix(total)
    return Fingerprint(count, int((rows * _powers()[PIECE_ROWS - count :]).sum(dtype=U64)))


def _words(column: np.ndarray) -> np.ndarray:
    if column.dtype == np.float32:
        bits = (column + np.float32(0)).view(np.uint32)  # there is one zero
        return np.where(np.isnan(column), NAN, bits).astype(U64)
    return column.astype(np.int64).view(U64)


@lru_cache(maxsize=16)
def _factors(count: int) -> np.ndarray:
    """Odd, so that no bit of a value is lost."""
    return mix(np.arange(1, count + 1, dtype=U64)) | U64(1)


@lru_cache(maxsize=1)
def _powers() -> np.ndarray:
    """BASE to the power of PIECE_ROWS - 1, ..., 1, 0."""
    found = np.full(PIECE_ROWS, BASE, U64)
    found[0] = 1
    return np.cumprod(found, dtype=U64)[::-1].copy()


@dataclass(frozen=True)
class Seen:
    """What a first pass saw of one part of a source.

    Attributes:
        rows: how many.
        blocks: the fingerprint of each BLOCK_ROWS of them, uint64.
    """

    rows: int
    blocks: np.ndarray

    @property
    def whole(self) -> Fingerprint:
        """That of all its rows."""
        found = Fingerprint()
        for number, value in enumerate(self.blocks.tolist()):
            found += Fingerprint(self._size(number), value)
        return found

    def to_json(self) -> tuple[int, str]:
        return self.rows, self.blocks.astype("<u8").tobytes().hex()

    @staticmethod
    def from_json(told: Sequence[Any]) -> Seen:
        rows, blocks = told
        return Seen(rows, np.frombuffer(bytes.fromhex(blocks), "<u8").astype(U64))

    def _size(self, number: int) -> int:
        return min(BLOCK_ROWS, self.rows - number * BLOCK_ROWS)

    def check(self, number: int, block: Columns, name: str) -> None:
        """
        Raises:
            DataError: block `number` is not what it was.
        """
        first = number * BLOCK_ROWS
        if first + len(block) > self.rows:
            raise DataError(f"{name}: there are more rows than the {self.rows:,} of the first pass: {AGAIN}")
        if len(block) < self._size(number):
            self.ended(first + len(block), name)
        if Fingerprint.of(block).value != int(self.blocks[number]):
            raise DataError(
                f"{name}: rows {first + 1:,} to {first + len(block):,} are not what they were in the first pass: {AGAIN}"
            )

    def ended(self, rows: int, name: str) -> None:
        """
        Raises:
            DataError: the part has fewer rows than it had.
        """
        if rows < self.rows:
            raise DataError(f"{name}: there are only {rows:,} rows, and were {self.rows:,} in the first pass: {AGAIN}")


def fingerprint_of(parts: Iterable[Seen]) -> Fingerprint:
    """That of all rows of all parts."""
    return sum((one.whole for one in parts), Fingerprint())


class FirstPass:
    """Makes what there is to know of a part, while it is read for the first time."""

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._open = Fingerprint()

    def see(self, rows: Columns) -> None:
        """The rows that come next."""
        start = 0
        while start < len(rows):
            some = rows[start : start + BLOCK_ROWS - self._open.rows]
            self._open += Fingerprint.of(some)
            start += len(some)
            if self._open.rows == BLOCK_ROWS:
                self._blocks.append(self._open.value)
                self._open = Fingerprint()

    @property
    def seen(self) -> Seen:
        last = [self._open.value] * bool(self._open.rows)
        return Seen(len(self._blocks) * BLOCK_ROWS + self._open.rows, np.array(self._blocks + last, U64))


def held_to(seen: Seen, read: Callable[[], Iterable[ColumnsT]], name: str, join: Join[ColumnsT]) -> Iterator[ColumnsT]:
    """The rows that `read` gives, in blocks, each of which is what the first pass saw; name: the part's, for messages.

    Raises:
        DataError: they have changed, or cannot be read any more; no row of a block that changed has been given out.
    """
    rows = 0
    for number, block in enumerate(rechunked(_read_again(read), BLOCK_ROWS, join)):
        seen.check(number, block, name)
        rows += len(block)
        yield block
    seen.ended(rows, name)


def _read_again(read: Callable[[], Iterable[ColumnsT]]) -> Iterator[ColumnsT]:
    try:
        yield from read()
    except DataError as error:
        raise DataError(f"{error}. The first pass could read all of it: {AGAIN}") from error
