"""What the tests of maps from ids to slots share: a map beside the dict that it is to be, and what is done to the two."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from shardembed.kernels.idmap import LEAST_WORDS, IdMap
from shardembed.kernels.mixing import Secret, tags_of
from tests.unit.kernels.crafted import LEAST, MOST, tensor_of, untagged

IDS = st.integers(LEAST, MOST) | st.integers(-6, 6) | st.sampled_from([LEAST, MOST])
CALLS = ["insert", "erase", "check"]
SLOTS = 200  # of the maps that examples are tried on
OTHERS = [77, 78]  # ids that lie in slots that are not in the map
CPU = torch.device("cpu")
KNOWN = Secret(12345, 0x2468ACF, MOST)  # a secret that tests may know

# Ids whose searches all begin at a few words around the end of a table, as who knew the secret could choose them.
NEIGHBOURS = [
    int(number)
    for tag in (0, 1, 0x0FFFFFFF, 0xF0000000, 0xFFFFFFFE, 0xFFFFFFFF)
    for number in tensor_of(untagged((np.uint64(tag) << np.uint64(32)) | np.arange(20, dtype=np.uint64), KNOWN))
]


class Pair:
    """A map, and the dict that it is to be."""

    def __init__(self, map: IdMap, slots: int = SLOTS, device: torch.device = CPU) -> None:
        self.map, self.device = map, device
        self.ids_S = torch.full((slots,), OTHERS[0], device=device)
        self.known: dict[int, int] = {}
        self.free = list(range(slots))

    def tensor(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def insert(self, ids: list[int]) -> None:
        new = [each for each in dict.fromkeys(ids) if each not in self.known][: len(self.free)]
        slots = [self.free.pop(each % len(self.free)) for each in new]
        self.ids_S[self.tensor(slots)] = self.tensor(new)
        self.map.insert(self.tensor(slots), self.ids_S)
        self.known |= zip(new, slots, strict=True)

    def erase(self, ids: list[int]) -> None:
        slots = [self.known.pop(each) for each in dict.fromkeys(ids) if each in self.known]
        self.map.erase(self.tensor(slots), self.ids_S)
        self.ids_S[self.tensor(slots)] = OTHERS[1]
        self.free += slots

    def clear(self) -> None:
        self.map.clear()
        assert self.map.nbytes <= 8 * LEAST_WORDS
        self.known, self.free = {}, list(range(self.ids_S.numel()))

    def check(self, ids: list[int]) -> None:
        found = self.map.find(self.tensor(ids), self.ids_S)
        assert found.dtype == torch.int64
        assert found.tolist() == [self.known.get(each, -1) for each in ids]
        assert len(self.map) == len(self.known)
        assert self.map.nbytes <= max(8 * LEAST_WORDS, 16 * self.ids_S.numel())


def distances(words: torch.Tensor, ids: torch.Tensor, chosen: Secret) -> torch.Tensor:
    """How many words of a hash table a search reads that finds its id, for each entry, counted from the table alone.

    ids: by the number in the word.
    """
    place = torch.nonzero(words >= 0).squeeze(1)
    tags = words[place] & 0xFFFFFFFF
    assert torch.equal(tags, tags_of(ids[words[place] >> 32], chosen))
    return (place - (tags * words.numel() >> 32)) % words.numel() + 1


def tried(pair: Pair, calls: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    """Do all that to the map, and now and then to ids that are in it."""
    for call, ids in calls:
        some = data.draw(st.lists(st.sampled_from(sorted(pair.known)), max_size=40)) if pair.known else []
        getattr(pair, call)(ids + some)
        pair.check([*pair.known, *ids, *some, *OTHERS])


def busy(pair: Pair, turns: int, most: int) -> None:
    """Of few ids, so that what is erased comes again, in a table that is as full as it gets."""
    numbers = np.random.default_rng(3)
    for turn in range(turns):
        ids = numbers.integers(-most, most, most // 6).tolist()
        (pair.insert if turn % 3 else pair.erase)(ids)
        pair.check([*ids, *numbers.integers(LEAST, MOST, 10).tolist(), *OTHERS])
    pair.check([*pair.known])
    pair.clear()
    pair.check([1, 2, *OTHERS])
    pair.insert([5, 6])
    pair.check([5, 6, 7])
