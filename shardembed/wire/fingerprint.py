"""A set of tables as one number that ranks can compare: a bit for each table, or a checksum where a bit would not fit."""

from __future__ import annotations

import zlib

MASKED = 62  # tables of a collection up to which each has a bit


def fingerprint(tables: frozenset[int]) -> int:
    """The set, below 2^63; 0 where it is empty."""
    if max(tables, default=0) < MASKED:
        return sum(1 << number for number in tables)
    return 1 << MASKED | zlib.crc32(repr(sorted(tables)).encode())


def described(number: int) -> str:
    """What a fingerprint says of the tables of a collection."""
    if number >> MASKED:
        return "others of these"
    tables = [str(table) for table in range(MASKED) if number >> table & 1]
    return f"table number {', '.join(tables)} of these" if tables else "none of these"
