"""Rows for raw ids by hashing: no vocabulary to build, to keep or to agree on, at the price of values that share a row.

What is computed, so that another language can compute it too, all in unsigned 64-bit arithmetic:

    mix(x)          x += 0x9E3779B97F4A7C15; x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9; x = (x ^ x >> 27) * 0x94D049BB133111EB;
                    x ^ x >> 31
    hash(integer)   mix(mix(seed) ^ integer), negative ones in two's complement
    hash(text)      h = mix(mix(seed) ^ TEXT ^ bytes of it); for each 8 bytes of its UTF-8, little-endian and filled up with zeros:
                    h = mix(h ^ word)
    row             reserved + hash mod (num_embeddings - reserved)

`mix` is a step of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). It keeps no
secrets: whoever knows the seed can make values that share a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shardembed.config.scalars import integer
from shardembed.errors import ConfigError, DtypeError, InputError

TEXT = 0x74786574  # keeps texts apart from integers
WORD = 8
U64 = np.uint64


@dataclass(frozen=True)
class Hashing:
    """From raw values to rows of a table: `se.Hashing(1_000_000, seed=1)(["a", "b"])`.

    The same in every process, on every platform and in every version.

    Args:
        num_embeddings: rows of the table.
        seed: another seed sends other values to the same row.
        reserved: the first so many rows are never given: room for missing values, for padding.

    Raises:
        ConfigError: sizes that leave no row.
    """

    num_embeddings: int
    seed: int = 0
    reserved: int = 0

    def __post_init__(self) -> None:
        for name in ("num_embeddings", "seed", "reserved"):
            value = integer(getattr(self, name))
            if value is None:
                raise ConfigError(f"Hashing: {name} must be an integer, not {getattr(self, name)!r}")
            object.__setattr__(self, name, value)
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"Hashing: seed {self.seed} must be from 0 to 2**64 - 1")
        if self.reserved < 0 or not self.reserved < self.num_embeddings < 1 << 63:
            raise ConfigError(
                f"Hashing: num_embeddings {self.num_embeddings} with {self.reserved} reserved leaves no row; "
                "num_embeddings must be larger than reserved"
            )

    def __call__(self, values: Any) -> Any:
        """The rows of `values`, int64 in their shape: a torch tensor (on its device) for a torch tensor, else a numpy array.

        Args:
            values: integers as a tensor or array of any integer dtype; texts as an array or an arrow array; or a list of either.

        Raises:
            DtypeError: what is neither integers nor texts, or both. InputError: a value is missing.
        """
        raw = Raw.of(values, "Hashing")
        words = raw.integers.astype(U64) if raw.integers is not None else None
        hashes = hash_integers(words, self.seed) if words is not None else hash_texts(raw.encoded(), self.seed)
        room = U64(self.num_embeddings - self.reserved)
        return raw.like((hashes % room).astype(np.int64) + self.reserved)


@dataclass(frozen=True)
class Raw:
    """Values as a user gave them, flat.

    Attributes:
        given: the values themselves, for an answer of their type.
        shape: of the answer.
        integers: `[n]` of some integer dtype; None where the values are texts.
        texts: `n` of them, where the values are no integers.
    """

    given: Any
    shape: tuple[int, ...]
    integers: np.ndarray | None = None
    texts: Sequence[Any] = ()

    @staticmethod
    def of(values: Any, who: str) -> Raw:
        """Read `values`.

        Raises:
            DtypeError, InputError: see `Hashing.__call__`; `who` stands at the head of the message.
        """
        if isinstance(values, torch.Tensor):
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise DtypeError(f"{who}: values must be integers or texts, not {values.dtype}")
            return Raw(values, tuple(values.shape), values.detach().cpu().numpy().reshape(-1))
        if isinstance(values, str | bytes):
            raise DtypeError(f"{who}: a single {type(values).__name__}; pass a list or an array of values")
        array = as_array(values, who)
        if array.dtype.kind in "iu":
            return Raw(values, array.shape, array.reshape(-1))
        if array.dtype.kind in "US":
            return Raw(values, array.shape, texts=array.reshape(-1).tolist())
        if array.dtype.kind == "O":
            return _read_objects(values, array, who)
        if not array.size:  # numpy makes floats of an empty list
            return Raw(values, array.shape, np.empty(0, np.int64))
        raise DtypeError(f"{who}: values must be integers or texts, not {array.dtype}")

    def encoded(self) -> list[bytes]:
        return [text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass") for text in self.texts]

    def like(self, rows: np.ndarray) -> Any:
        """`rows` `[n]` in the shape and kind of what was given."""
        shaped = rows.reshape(self.shape)
        return torch.from_numpy(shaped).to(self.given.device) if isinstance(self.given, torch.Tensor) else shaped


def hash_integers(values: np.ndarray, seed: int) -> np.ndarray:
    """uint64 `[n]` of uint64 `[n]`."""
    return mix(mix(np.array([seed], U64)) ^ values)


def hash_texts(texts: Sequence[bytes], seed: int) -> np.ndarray:
    """uint64 `[n]`, all texts at once, word by word."""
    count = len(texts)
    lengths = np.fromiter(map(len, texts), np.int64, count)
    words = -(-lengths // WORD)
    starts = np.cumsum(words) - words
    padded = np.zeros(int(words.sum()) * WORD, np.uint8)
    joined = np.frombuffer(b"".join(texts), np.uint8)
    # Where each byte goes: as far from its text's first word as it is from its first byte.
    padded[np.arange(len(joined)) + np.repeat(starts * WORD - (np.cumsum(lengths) - lengths), lengths)] = joined
    # Little endian whatever the machine: rows must be the same everywhere.
    stream = padded.view("<u8").astype(U64)
    # Long texts first, so that those which still have a word are always the first ones.
    order = np.argsort(-words, kind="stable")
    starts, descending = starts[order], -words[order]
    hashes = mix(mix(np.array([seed], U64)) ^ U64(TEXT) ^ lengths[order].astype(U64))
    for word in range(-int(descending[0]) if count else 0):
        some = int(np.searchsorted(descending, -word, side="left"))  # texts that have so many words
        hashes[:some] = mix(hashes[:some] ^ stream[starts[:some] + word])
    found = np.empty(count, U64)
    found[order] = hashes
    return found


def mix(x: np.ndarray) -> np.ndarray:
    """A step of SplitMix64 for each of uint64 `[n]`."""
    x = x + U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def as_array(values: Any, who: str) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray):  # what is masked is missing, whatever lies below the mask
        if not np.ma.is_masked(values):
            return values.data
        objects = values.data.astype(object)
        objects[values.mask] = None
        return objects
    if isinstance(values, np.ndarray):
        return values
    if hasattr(values, "type") and hasattr(values, "to_numpy"):  # arrow's, which is not imported here
        return np.asarray(values.to_pylist(), dtype=object) if values.null_count else np.asarray(values.to_numpy(False))
    if not isinstance(values, Iterable):
        raise DtypeError(f"{who}: values must be a tensor, an array or a list, not {type(values).__name__}")
    listed = list(values)
    # As objects where there is any text, or numpy would turn the integers among them into texts.
    return (
        np.asarray(listed, dtype=object) if any(not isinstance(one, int | np.integer | list) for one in listed) else _plain(listed)
    )


def _plain(listed: list[Any]) -> np.ndarray:
    try:
        array = np.asarray(listed)
    except (ValueError, OverflowError):  # ragged, or an integer of more than 64 bits
        array = np.empty(0, object)
    return array if array.dtype.kind in "iuUS" and array.size else np.asarray(listed, dtype=object)


def _read_objects(given: Any, array: np.ndarray, who: str) -> Raw:
    flat = array.reshape(-1).tolist()
    kinds = set(map(type, flat))
    if not kinds:
        return Raw(given, array.shape, np.empty(0, np.int64))
    if kinds == {str} or kinds == {bytes}:
        return Raw(given, array.shape, texts=flat)
    missing = next((place for place, value in enumerate(flat) if value is None or value != value), None)
    if missing is not None:
        raise InputError(
            f"{who}: value {missing} is missing ({flat[missing]}); give missing values a row yourself, or fill them in"
        )
    if all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        for place, value in enumerate(flat):
            if not -(1 << 63) <= value < 1 << 63:
                raise InputError(f"{who}: value {place}, {str(value)[:40]}, does not fit into 64 bits; pass it as a text")
        return Raw(given, array.shape, np.array(flat, np.int64))
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise DtypeError(f"{who}: values must be all integers or all texts; these are {names}")
