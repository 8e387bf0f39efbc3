"""The header of a safetensors file: a length of eight bytes, then JSON with each tensor's dtype, shape and place in the data.

Written with spaces at the end, so that data begins at a multiple of 64 bytes. Read from anybody.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from shardembed.checkpoint.format.blocks import CODES
from shardembed.checkpoint.format.checks import MOST
from shardembed.checkpoint.format.strict import loads, refuse_pickle
from shardembed.errors import CheckpointError

LIMIT = 100_000_000  # bytes of JSON, as in the safetensors library
A_TENSOR, SPARE = 16 << 10, 1 << 20  # bytes that a tensor's description, and all else, may take
ALIGNED = 64
_LENGTH = 8
_SIZES = {code: dtype.itemsize for dtype, code in CODES.items()}


@dataclass(frozen=True, slots=True, order=True)
class Stored:
    """One tensor of a file.

    Attributes:
        first: its first byte, counted from the file's start.
        stop: the byte behind its last.
        code: of its dtype, as safetensors has it.
        elements: how many there are.
        name: that the header gives it.
    """

    first: int
    stop: int
    code: str
    elements: int
    name: str


def encode(tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The header for `tensors` (name, dtype, shape), which lie one after the other; and where in the file each begins."""
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    edge, edges = 0, []
    for name, dtype, shape in tensors:
        if name in described or name == "__metadata__":
            raise CheckpointError(f"two tensors of one file are called {name!r}: give their modules different names")
        end = edge + prod(shape) * dtype.itemsize
        described[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [edge, end]}
        edges.append(edge)
        edge = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH + len(text)) % ALIGNED)
    begin = _LENGTH + len(text)
    return len(text).to_bytes(_LENGTH, "little") + text, [begin + edge for edge in edges]


def read(descriptor: int, size: int, where: str, tensors: int) -> list[Stored]:
    """The tensors of an open file of `size` bytes, in the order of their bytes; there should be as many as `tensors`.

    Raises:
        CheckpointError: it is no safetensors file, or its tensors do not fill it exactly.
    """
    start = os.pread(descriptor, _LENGTH, 0)
    refuse_pickle(start, where)
    length = int.from_bytes(start, "little")
    if len(start) < _LENGTH or length > min(LIMIT, SPARE + tensors * A_TENSOR, size - _LENGTH):
        raise CheckpointError(f"{where} is not a safetensors file, or its header is damaged: it cannot have {length} bytes")
    text = os.pread(descriptor, length, _LENGTH)
    if len(text) < length:
        raise CheckpointError(f"{where} ends inside its header: restore the file, or load an older checkpoint with step=")
    found = loads(text, f"the header of {where}")
    try:
        return _tensors(found, _LENGTH + length, size)
    except ValueError as error:
        raise CheckpointError(f"the header of {where} is damaged: {error}") from error


def _tensors(found: Any, begin: int, size: int) -> list[Stored]:
    if not isinstance(found, dict):
        raise ValueError("it is not an object")
    tensors = [_tensor(name, data, begin) for name, data in found.items() if name != "__metadata__"]
    edge = begin
    for tensor in sorted(tensors):
        if tensor.first != edge:
            raise ValueError(f"tensor {tensor.name!r:.200} begins at byte {tensor.first}, and {edge} is where one should")
        edge = tensor.stop
    if edge != size:
        raise ValueError(f"its tensors end at byte {edge}, the file at {size}")
    return sorted(tensors)


def _tensor(name: str, data: Any, begin: int) -> Stored:
    if not isinstance(data, dict) or data.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r:.200} is not described by dtype, shape and data_offsets")
    code, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(code, str) or code not in _SIZES:
        raise ValueError(f"tensor {name!r:.200} has an unknown dtype {code!r:.40}")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r:.200} has no shape or no two offsets")
    if not all(type(number) is int and 0 <= number <= MOST for number in [*shape, *offsets]):
        raise ValueError(f"tensor {name!r:.200} has a size that is not a whole number")
    first, stop = offsets
    if stop - first != prod(shape) * _SIZES[code]:
        raise ValueError(f"tensor {name!r:.200} has {stop - first} bytes, its shape needs {prod(shape) * _SIZES[code]}")
    return Stored(begin + first, begin + stop, code, prod(shape), name)
