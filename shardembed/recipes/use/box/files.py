"""What lies in the folder: numbers and texts that are mapped into memory, so that the system reads what is asked for, processes
share it, and it may be larger than memory.
"""

from __future__ import annotations

import json
import mmap
from bisect import bisect_left
from pathlib import Path
from typing import Any

import torch

DTYPES = {"<f4": torch.float32, "<i8": torch.int64}
SETTINGS = "serve.json"


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))


def mapped(path: Path) -> torch.Tensor:
    """A .npy file as a tensor. Bytes: magic, version, length of the header, header, data."""
    with path.open("rb") as file:
        start = file.read(10)
        if start[:7] != b"\x93NUMPY\x01":
            raise ValueError(f"{path} is not a .npy file of version 1")
        header = file.read(int.from_bytes(start[8:], "little")).decode("latin1")
    dtype = DTYPES[header.split("'descr': '")[1].split("'")[0]]
    shape = [int(size) for size in header.split("'shape': (")[1].split(")")[0].split(",") if size.strip()]
    raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return raw[10 + len(header) :].view(dtype).view(shape)


class Integers:
    """A .npy file of int64 whose numbers are read one by one, which takes a tensor twenty times as long."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            head = file.read(10)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._numbers = memoryview(self._map)[10 + int.from_bytes(head[8:], "little") :].cast("q")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> int:
        return self._numbers[place]

    def find(self, number: int) -> int:
        """The place of a number among these, which ascend; -1 where it is none of them."""
        place = bisect_left(self._numbers, number)
        return place if place < len(self._numbers) and self._numbers[place] == number else -1


class Texts:
    """Texts by their number, from a file of all their bytes and one of where each ends."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._ends = Integers(folder / f"{stem}.ends.npy")
        path = folder / f"{stem}.texts"
        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""

    def __getitem__(self, number: int) -> str:
        first = self._ends[number - 1] if number else 0
        return self._data[first : self._ends[number]].decode("utf-8")
