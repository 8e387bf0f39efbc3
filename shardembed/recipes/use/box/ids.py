"""From names to rows, as training has made rows of them: XXH64 of texts, `se.Hashing` of ids, and the rows that ids begin with.

All in 64 bits; `shardembed.kernels.texts`, `inputs.hashing` and `kernels.starting` say the same in arrays.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from .files import Integers, mapped

MASK = (1 << 64) - 1
P1, P2, P3, P4, P5 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
GAMMA, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WHOLE = re.compile(r"(-?[0-9]{1,20})(?:\.0*)?")


class Refused(Exception):
    """What was asked cannot be answered. status: of HTTP."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0 (Collet, "xxHash", https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), as a signed integer."""
    length, place = len(data), 0
    if length >= 32:
        lanes = [(P1 + P2) & MASK, P2, 0, -P1 & MASK]
        while place + 32 <= length:
            for lane in range(4):
                lanes[lane] = _round(lanes[lane], int.from_bytes(data[place : place + 8], "little"))
                place += 8
        found = sum(_turned(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            found = ((found ^ _round(0, lane)) * P1 + P4) & MASK
    else:
        found = P5
    found = (found + length) & MASK
    while place + 8 <= length:
        found = (_turned(found ^ _round(0, int.from_bytes(data[place : place + 8], "little")), 27) * P1 + P4) & MASK
        place += 8
    if place + 4 <= length:
        found = (_turned(found ^ int.from_bytes(data[place : place + 4], "little") * P1 & MASK, 23) * P2 + P3) & MASK
        place += 4
    for byte in data[place:]:
        found = _turned(found ^ byte * P5 & MASK, 11) * P1 & MASK
    found = (found ^ found >> 33) * P2 & MASK
    found = (found ^ found >> 29) * P3 & MASK
    return _signed(found ^ found >> 32)


def _turned(x: int, by: int) -> int:
    return (x << by | x >> 64 - by) & MASK


def _round(lane: int, word: int) -> int:
    return _turned((lane + word * P2) & MASK, 31) * P1 & MASK


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def mix(x: int) -> int:
    """A step of SplitMix64."""
    x = (x + GAMMA) & MASK
    x = (x ^ x >> 30) * MIX_1 & MASK
    x = (x ^ x >> 27) * MIX_2 & MASK
    return x ^ x >> 31


def hashed(number: int, rows: int, seed: int, reserved: int) -> int:
    """The row that `se.Hashing` gives an integer."""
    return reserved + mix(mix(seed) ^ (number & MASK)) % (rows - reserved)


def id_of(value: Any, texts: bool, what: str) -> int:
    """The id of a name: of a text its hash, where names are texts, else the whole number that it is.

    Raises:
        Refused: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise Refused(f"{what} must be a text or a whole number, not {type(value).__name__}")
    if texts:
        try:
            return xxh64(str(value).encode())
        except UnicodeEncodeError:  # half a pair of surrogates, which JSON lets through
            raise Refused(f"{what} is no text: half of a character is missing") from None
    found = WHOLE.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str) and found is None:
        raise Refused(f"{what}: {value[:40]!r} is no whole number, as they all were in training")
    number = int(found[1]) if found else int(value)
    if not -(1 << 63) <= number < 1 << 64:
        raise Refused(f"{what}: {str(value)[:40]} does not fit 64 bits")
    return _signed(number & MASK)


class Rows:
    """Which ids have rows, by their place among these.

    Attributes:
        count: how many.
    """

    def __init__(self, folder: Path, stem: str, count: int) -> None:
        path = folder / f"{stem}.ids.npy"
        self._ids = Integers(path) if path.exists() else None  # else they are 0, 1, ...
        self.count = count

    def find(self, number: int) -> int:
        """-1 where it has none."""
        if self._ids is None:
            return number if 0 <= number < self.count else -1
        return self._ids.find(number)


class Start:
    """The rows that ids without one begin with."""

    def __init__(self, folder: Path, columns: int, settings: dict[str, Any]) -> None:
        self._columns = torch.arange(columns)
        self._kind, self._value = settings["kind"], settings.get("value", 0.0)
        self._dtype = getattr(torch, settings["dtype"])  # of the table, to which they are rounded
        self._base, self._scale, self._offset = (settings.get(name, 0) for name in ("base", "scale", "offset"))
        self._cubics = torch.tensor(settings["cubics"], dtype=torch.float64) if self._kind == "normal" else None
        self._first, self._inside = settings.get("first", 0), settings.get("inside", 0)

    def of(self, ids: list[int]) -> torch.Tensor:
        """float32 `[n, columns]`."""
        return self._drawn(ids).to(self._dtype).float()

    def _drawn(self, ids: list[int]) -> torch.Tensor:
        if self._kind == "constant":
            return torch.full((len(ids), len(self._columns)), self._value)
        numbers = torch.tensor(ids, dtype=torch.int64)
        hashes = _mixed(_mixed(numbers ^ self._base).unsqueeze(1) + self._columns * _signed(GAMMA))
        x = self._normal(hashes) if self._kind == "normal" else _shifted(hashes, 40).to(torch.float32) * 2.0**-24
        return x * self._scale + self._offset

    def _normal(self, hashes: torch.Tensor) -> torch.Tensor:
        assert self._cubics is not None
        bits = (_shifted(hashes, 11) | 1).to(torch.float64).view(torch.int64)
        t = (bits & ((1 << self._inside) - 1)).to(torch.float64) * 2.0**-self._inside
        c0, c1, c2, c3 = self._cubics[(bits >> self._inside) - self._first].unbind(-1)
        size = ((c3 * t + c2) * t + c1) * t + c0
        return torch.where((hashes & (1 << 10)) != 0, -size, size).to(torch.float32)


class Table:
    """Rows by id, and those of ids that have none."""

    def __init__(self, folder: Path, stem: str, settings: dict[str, Any]) -> None:
        self.weight = mapped(folder / f"{stem}.npy")
        self.rows = Rows(folder, stem, len(self.weight))
        self._start = Start(folder, self.weight.shape[1], settings["start"]) if settings.get("start") else None

    def of(self, ids: list[int]) -> torch.Tensor:
        """float32 `[n, columns]`; zeros, or the row to begin with, of ids without one."""
        places = [self.rows.find(number) for number in ids]
        found = (
            self.weight[torch.tensor(places, dtype=torch.int64).clamp(min=0)]
            if len(self.weight)
            else torch.zeros(len(ids), self.weight.shape[1])
        )
        strange = [place for place, row in enumerate(places) if row < 0]
        if strange:
            found[strange] = self._start.of([ids[place] for place in strange]) if self._start else 0.0
        return found


def _mixed(ids: torch.Tensor) -> torch.Tensor:
    ids = (ids ^ _shifted(ids, 30)) * _signed(MIX_1)
    ids = (ids ^ _shifted(ids, 27)) * _signed(MIX_2)
    return ids ^ _shifted(ids, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
