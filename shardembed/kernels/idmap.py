"""Which slot an id has: a map from any int64 to numbers, as a slab of a dynamic table needs one. It is a hash table, on a CPU
where Numba is installed and on a CUDA device where Triton is, and elsewhere sorted ids in plain torch, which are the truth.

Legend: E keys, U slots that come or go, S slots that there are.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.errors import UnsupportedError
from shardembed.kernels import triton
from shardembed.kernels.grouping import Kernels, compiled
from shardembed.kernels.memory import on_huge_pages
from shardembed.kernels.mixing import secret

MOST_SLOTS = 2**31
LEAST_WORDS = 64


class IdMap(ABC):
    """A map from ids to slots. What lies where in it never shows: all of these give the same answers.

    The ids themselves lie with the caller, by slot: `ids_S`, int64 `[S]`, contiguous, handed to each call. The id of a slot that is
    in the map must not change.
    """

    @staticmethod
    def on(device: torch.device) -> IdMap:
        """An empty map for tensors there."""
        if (kernels := compiled(device)) is not None:
            return HashedIds(kernels, device)
        if triton.serves(device):
            return DeviceIds(device)
        return SortedIds(device)

    @abstractmethod
    def find(self, keys_E: torch.Tensor, ids_S: torch.Tensor) -> torch.Tensor:
        """The slot whose id each key is, -1 where there is none. int64 `[E]`; keys may repeat.

        Raises:
            IndexError: `ids_S` has fewer slots than the map knows; said by a CPU's hash table alone.
        """

    @abstractmethod
    def insert(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        """Add these slots, int64 `[U]`, whose ids must be distinct and absent: nobody looks whether they are.

        Raises:
            UnsupportedError: there are more than 2^31 slots.
            IndexError: there is no such slot; not said by a CUDA device's hash table.
        """

    @abstractmethod
    def erase(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        """Take these slots out, int64 `[U]`, which must be there, each once; their ids still lie in `ids_S`.

        Raises:
            IndexError: there is no such slot; not said by a CUDA device's hash table.
            KeyError: a slot is not in the map, which then holds nobody knows what; likewise.
        """

    @abstractmethod
    def clear(self) -> None:
        """Take out all, and give the memory back."""

    @abstractmethod
    def __len__(self) -> int:
        """How many slots are in the map."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the map takes, without `ids_S`."""


class SortedIds(IdMap):
    """In plain torch: ids in order, and a binary search. A change goes through all of them."""

    def __init__(self, device: torch.device) -> None:
        self._ids = self._slots = torch.empty(0, dtype=torch.int64, device=device)

    def find(self, keys_E: torch.Tensor, ids_S: torch.Tensor) -> torch.Tensor:
        if not len(self):
            return torch.full_like(keys_E, -1)
        place_E = torch.searchsorted(self._ids, keys_E).clamp_(max=len(self) - 1)
        return torch.where(self._ids[place_E] == keys_E, self._slots[place_E], -1)

    def insert(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        check_slots(ids_S)
        check_range(slots_U, ids_S)
        ids, order = torch.sort(torch.cat([self._ids, ids_S[slots_U]]))
        self._ids, self._slots = ids, torch.cat([self._slots, slots_U])[order]

    def erase(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        check_range(slots_U, ids_S)
        there_U = self.find(ids_S[slots_U], ids_S) == slots_U
        if not bool(there_U.all()):
            raise not_there(slots_U[~there_U][0], ids_S)
        stays = torch.ones(len(self), dtype=torch.bool, device=self._ids.device)
        stays[torch.searchsorted(self._ids, ids_S[slots_U])] = False
        self._ids, self._slots = self._ids[stays], self._slots[stays]

    def clear(self) -> None:
        self._ids = self._slots = self._ids[:0].clone()

    def __len__(self) -> int:
        return self._ids.numel()

    @property
    def nbytes(self) -> int:
        return self._ids.nbytes + self._slots.nbytes


class TableOfIds(IdMap):
    """A hash table of words, each a slot and 32 bits of its id's hash, or empty (`kernels/numba/hashing.py`)."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._secret = device, secret()
        self.clear()

    def clear(self) -> None:
        self._words = self._empty(LEAST_WORDS)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        return self._words.nbytes

    def _empty(self, words: int) -> torch.Tensor:
        return on_huge_pages(torch.empty(words, dtype=torch.int64, device=self._device)).fill_(-1)


class HashedIds(TableOfIds):
    """The table on a CPU, by compiled kernels."""

    def __init__(self, kernels: Kernels, device: torch.device) -> None:
        self._hashing = kernels.hashing
        super().__init__(device)

    def find(self, keys_E: torch.Tensor, ids_S: torch.Tensor) -> torch.Tensor:
        if ids_S.numel() < self._slots_end:
            raise IndexError(f"the map knows slots up to {self._slots_end - 1:,}, and was given the ids of {ids_S.numel():,}")
        slots_E = torch.empty_like(keys_E, memory_format=torch.contiguous_format)
        self._hashing.find(self._words.numpy(), _array(keys_E), _array(ids_S), tuple(self._secret), slots_E.numpy())
        return slots_E

    def insert(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        check_slots(ids_S)
        highest = check_range(slots_U, ids_S)
        self._make_room(self._count + slots_U.numel())
        self._hashing.insert(self._words.numpy(), _array(slots_U), _array(ids_S), tuple(self._secret))
        self._count += slots_U.numel()
        self._slots_end = max(self._slots_end, highest + 1)

    def erase(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        check_range(slots_U, ids_S)
        erased = self._hashing.erase(self._words.numpy(), _array(slots_U), _array(ids_S), tuple(self._secret))
        self._count -= erased
        if erased < slots_U.numel():
            raise not_there(slots_U[erased], ids_S)

    def clear(self) -> None:
        super().clear()
        self._slots_end = 0

    def _make_room(self, entries: int) -> None:
        words = words_for(entries, self._words.numel())
        if words > self._words.numel():
            larger = self._empty(words)
            self._hashing.move(self._words.numpy(), larger.numpy())
            self._words = larger


class DeviceIds(TableOfIds):
    """The table on a CUDA device, by Triton. Nothing waits for the device, so nobody looks whether slots are there."""

    def __init__(self, device: torch.device) -> None:
        self._kernels: Any = importlib.import_module("shardembed.kernels.triton.idmap")  # Triton may be absent
        super().__init__(device)

    def find(self, keys_E: torch.Tensor, ids_S: torch.Tensor) -> torch.Tensor:
        return self._kernels.find(self._words, keys_E.contiguous(), ids_S.contiguous(), self._secret)

    def insert(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        check_slots(ids_S)
        if not slots_U.numel():
            return
        self._make_room(slots_U.numel())
        self._kernels.insert(self._words, slots_U.contiguous(), ids_S.contiguous(), self._secret)
        self._count += slots_U.numel()

    def erase(self, slots_U: torch.Tensor, ids_S: torch.Tensor) -> None:
        if slots_U.numel():
            self._kernels.erase(self._words, slots_U.contiguous(), ids_S.contiguous(), self._secret)
        self._count -= slots_U.numel()
        self._gone += slots_U.numel()

    def clear(self) -> None:
        super().clear()
        self._gone = 0  # at most so many words are neither empty nor an entry

    def _make_room(self, more: int) -> None:
        """Build the table anew, without gaps, when those would take up the room that is asked for."""
        entries, words = self._count + more, self._words.numel()
        if fits(entries + self._gone, words):
            return
        others = self._empty(max(words, 2 * entries))
        self._kernels.move(self._words, others)
        self._words, self._gone = others, 0


def fits(entries: int, words: int) -> bool:
    """Whether searches are short in a table that is so full: three quarters at most."""
    return 4 * entries <= 3 * words


def words_for(entries: int, words: int) -> int:
    """The size of a table of so many words once it is to hold so many entries. Where it would be too full, it grows until it is
    half full: by half and more, so that adding one by one takes time in proportion, and to 16 bytes an entry.
    """
    return words if fits(entries, words) else 2 * entries


def check_slots(ids_S: torch.Tensor) -> None:
    if ids_S.numel() > MOST_SLOTS:
        raise UnsupportedError(
            f"a rank cannot hold {ids_S.numel():,} ids of dynamic tables in one slab: at most {MOST_SLOTS:,} are served, so spread "
            "the table over more ranks or lower its num_embeddings"
        )


def check_range(slots_U: torch.Tensor, ids_S: torch.Tensor) -> int:
    """The highest of these slots, -1 where there are none; all of them must be of those that there are."""
    if not slots_U.numel():
        return -1
    low, high = (int(bound) for bound in slots_U.aminmax())
    if low < 0 or high >= ids_S.numel():
        raise IndexError(f"slots from {low:,} to {high:,} are to come or go, and there are {ids_S.numel():,}, from 0 on")
    return high


def not_there(slot: torch.Tensor, ids_S: torch.Tensor) -> KeyError:
    return KeyError(f"slot {int(slot)} (id {int(ids_S[slot])}) is to leave the map and is not in it")


def _array(tensor: torch.Tensor) -> NDArray[np.int64]:
    return tensor.contiguous().numpy()
