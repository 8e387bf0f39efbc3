"""The map from ids to slots on a CUDA device, against a dict and against sorted ids in plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import UnsupportedError
from shardembed.kernels import grouping, idmap, triton
from shardembed.kernels.idmap import DeviceIds, IdMap, SortedIds
from shardembed.kernels.mixing import Secret
from shardembed.kernels.triton import idmap as device
from tests.unit.kernels.crafted import hard_ids
from tests.unit.kernels.idmap_cases import CALLS, IDS, KNOWN, NEIGHBOURS, Pair, busy, tried
from tests.unit.kernels.triton_cases import DEVICE


def made(chosen: Secret | None = None) -> IdMap:
    """A map as it is made for a CUDA device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        patch.setattr(triton, "serves", lambda device: True)
        if chosen is not None:
            patch.setattr(idmap, "secret", lambda: chosen)
        map = IdMap.on(DEVICE)
    assert isinstance(map, DeviceIds)
    return map


@given(st.lists(st.tuples(st.sampled_from(CALLS), st.lists(IDS, max_size=60)), max_size=8), st.data())
def test_it_answers_as_a_dict_does(calls: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    tried(Pair(made(), device=DEVICE), calls, data)


@given(st.lists(st.tuples(st.sampled_from(CALLS), st.lists(st.sampled_from(NEIGHBOURS), max_size=60)), max_size=8), st.data())
def test_it_answers_as_a_dict_does_in_runs_around_the_end(calls: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    tried(Pair(made(KNOWN), device=DEVICE), calls, data)


def test_it_answers_as_a_dict_does_when_much_comes_and_goes() -> None:
    """So much that the table is built anew without growing."""
    busy(Pair(made(), 600, DEVICE), turns=24, most=400)


def test_no_ids_are_hard_and_sorted_ids_say_the_same() -> None:
    for kind, ids in hard_ids(300).items():
        ids, slots = ids.to(DEVICE), torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        ids_S = torch.empty_like(ids).index_copy_(0, slots, ids)
        one, other = made(), SortedIds(DEVICE)
        for map in (one, other):
            map.insert(slots[:200], ids_S)
            map.erase(slots[:200:3], ids_S)
            map.insert(slots[200:], ids_S)
        found = one.find(ids, ids_S)
        assert torch.equal(found, other.find(ids, ids_S)), kind
        assert (found >= 0).sum() == len(one) == len(other), kind


def test_who_comes_first_leaves_no_trace() -> None:
    """Neighbours that all want the same few places, entered in two orders."""
    ids_S = torch.tensor(NEIGHBOURS, device=DEVICE)
    slots = torch.arange(len(NEIGHBOURS), device=DEVICE)
    tables = [torch.full((2 * len(NEIGHBOURS),), -1, device=DEVICE) for _ in range(3)]
    for words, order in zip(tables, (slots, slots.flip(0), slots.roll(50)), strict=True):
        device.insert(words, order.contiguous(), ids_S, KNOWN)
    assert all(torch.equal(words, tables[0]) for words in tables)
    assert sorted((tables[0][tables[0] >= 0] >> 32).tolist()) == slots.tolist()


def test_nothing_is_found_inserted_and_erased() -> None:
    map, none = made(), torch.empty(0, dtype=torch.int64, device=DEVICE)
    map.insert(none, none)
    map.erase(none, none)
    assert map.find(none, none).tolist() == []
    assert map.find(torch.tensor([0, -1], device=DEVICE), none).tolist() == [-1, -1]


def test_too_many_slots_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="2,147,483,649 ids"):
        made().insert(torch.tensor([0]), torch.zeros(1, dtype=torch.int64).expand(2**31 + 1))
