"""Small state as JSON: what `state_dict()` of schedulers, loaders and optimizers gives, and random states; never a pickle.

JSON's own values stand for themselves. All else is a mapping with the single key "!": a kind, and what makes it again.
"""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

from shardembed.checkpoint.format.blocks import DTYPES
from shardembed.errors import CheckpointError

MARK = "!"
MAX_DEPTH = 64
MAX_DIGITS = 4096  # hexadecimal, of an int
MAX_ALIKE = 64  # distinct keys of one hash; by chance there are two or three
MAX_TENSOR_BYTES = 64 << 20  # what is larger belongs into the model


def encode(value: Any, where: str, depth: int = 0) -> Any:
    """`value` as JSON. Knows JSON's own values, tuples, sets, dicts of any keys, bytes, tensors and NumPy's arrays.

    Raises:
        CheckpointError: something else is in it; `where` says whose state it is, and the path what it is.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where}: nested more than {MAX_DEPTH} deep")
    if type(value) is int and abs(value) >> 63:  # no JSON of ours
        return {MARK: ["int", hex(value)]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, bool | int | float | str):  # enums and the like: their plain value
        return _plain(value)
    if type(value) is list:
        return [encode(one, f"{where}[{number}]", depth + 1) for number, one in enumerate(value)]
    if isinstance(value, Mapping):
        return _encode_mapping(value, where, depth)
    if isinstance(value, list | tuple | set | frozenset):
        kind = "set" if isinstance(value, set | frozenset) else "tuple"
        return {MARK: [kind, [encode(one, f"{where}[{number}]", depth + 1) for number, one in enumerate(value)]]}
    if isinstance(value, bytes | bytearray):
        return {MARK: ["bytes", base64.b64encode(value).decode()]}
    if isinstance(value, np.generic):
        return encode(value.item(), where, depth + 1)
    if isinstance(value, torch.Tensor | np.ndarray):
        return {MARK: ["array" if isinstance(value, np.ndarray) else "tensor", _encode_tensor(value, where)]}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be written without pickling it; state "
        "must be made of numbers, strings, bytes, tensors, lists and dicts"
    )


def _plain(value: bool | int | float | str) -> Any:
    return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))


def _encode_mapping(value: Mapping[Any, Any], where: str, depth: int) -> Any:
    if all(type(key) is str for key in value) and MARK not in value:
        return {key: encode(one, f"{where}.{key}", depth + 1) for key, one in value.items()}
    pairs = [[encode(key, f"{where} key", depth + 1), encode(one, f"{where}[{key!r}]", depth + 1)] for key, one in value.items()]
    return {MARK: ["dict", pairs]}


def _encode_tensor(value: torch.Tensor | np.ndarray, where: str) -> list[Any]:
    try:
        tensor = torch.as_tensor(value).detach()
    except TypeError as error:
        raise CheckpointError(f"{where}: {error}") from None
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES or tensor.layout != torch.strided:
        raise CheckpointError(f"{where}: tensors of {tensor.dtype} and {tensor.layout} are not written")
    if tensor.numel() * tensor.element_size() > MAX_TENSOR_BYTES:
        raise CheckpointError(
            f"{where}: a tensor of {tensor.numel() * tensor.element_size()} bytes is no small state (at most {MAX_TENSOR_BYTES}); "
            "make it a parameter or buffer of the model"
        )
    raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [name, list(tensor.shape), base64.b64encode(raw).decode()]


def decode(value: Any, where: str, depth: int = 0) -> Any:
    """What `encode` was given.

    Raises:
        CheckpointError: `value` is not what `encode` makes.
    """
    if depth > 2 * MAX_DEPTH + 2:
        raise CheckpointError(f"{where}: nested too deep")
    if isinstance(value, list):
        return [decode(one, where, depth + 1) for one in value]
    if not isinstance(value, dict):
        return value
    if MARK not in value:
        return {key: decode(one, f"{where}.{key}", depth + 1) for key, one in value.items()}
    try:
        kind, content = value[MARK]
        return _decode_marked(kind, content, where, depth)
    except (TypeError, ValueError, KeyError, IndexError, binascii.Error, RuntimeError) as error:
        raise CheckpointError(f"{where}: malformed ({type(error).__name__}: {error})") from None


def _decode_marked(kind: str, content: Any, where: str, depth: int) -> Any:
    if kind == "dict":
        keys = [decode(key, where, depth + 1) for key, _ in content]
        _check_hashes(keys)
        return dict(zip(keys, (decode(one, where, depth + 1) for _, one in content), strict=True))
    if kind in ("tuple", "set"):
        found = tuple(decode(one, where, depth + 1) for one in content)
        if kind == "tuple":
            return found
        _check_hashes(found)
        return set(found)
    if kind == "int" and len(content) <= MAX_DIGITS:
        return int(content, 16)
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind in ("tensor", "array"):
        name, shape, text = content
        raw = bytearray(base64.b64decode(text, validate=True))
        flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        # A byte that is neither 0 nor 1 is no boolean, and no tensor may hold it.
        flat = flat.ne(0) if DTYPES[name] == torch.bool else flat.view(DTYPES[name])
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("a size is no whole number")
        tensor = flat.reshape(shape)
        return tensor.numpy() if kind == "array" else tensor
    raise CheckpointError(f"{where}: {kind!r:.80} is no kind of state that this version knows")


def _check_hashes(keys: Collection[Any]) -> None:
    """Raise ValueError where so many keys share a hash that a dict of them would take for ever: Python's hash of an int is the int
    modulo 2^61 - 1, so anybody can write such keys.
    """
    _, most = Counter(map(hash, keys)).most_common(1)[0] if keys else (0, 0)
    if most > MAX_ALIKE:
        raise ValueError(f"{most:,} keys of one dict or set share a hash")
