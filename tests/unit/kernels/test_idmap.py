"""The map from ids to slots against a dict: all kinds of it alike, whatever comes and goes; and how far its searches go."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import UnsupportedError
from shardembed.kernels import grouping, idmap
from shardembed.kernels.idmap import LEAST_WORDS, HashedIds, IdMap, SortedIds, words_for
from shardembed.kernels.mixing import Secret, secret
from tests.unit.kernels.crafted import LEAST, MOST, hard_ids, tensor_of, untagged
from tests.unit.kernels.idmap_cases import CALLS, CPU, IDS, KNOWN, NEIGHBOURS, Pair, busy, distances, tried

MAKERS: dict[str, Callable[[], IdMap]] = {"plain torch": lambda: SortedIds(CPU)}
if not grouping.missing():
    MAKERS["numba"] = lambda: IdMap.on(CPU)
NUMBERS = np.random.default_rng(11)
DRAWN = [Secret(*(int(number) | 1 for number in NUMBERS.integers(LEAST, MOST, 3))) for _ in range(20)]
each_kind = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
compiled_only = pytest.mark.skipif(grouping.missing() is not None, reason="needs numba")


def knowing(chosen: Secret) -> IdMap:
    """A map whose secret a test has chosen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idmap, "secret", lambda: chosen)
        return IdMap.on(CPU)


@each_kind
@given(st.lists(st.tuples(st.sampled_from(CALLS), st.lists(IDS, max_size=60)), max_size=12), st.data())
def test_it_answers_as_a_dict_does(make: Callable[[], IdMap], calls: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    tried(Pair(make()), calls, data)


@compiled_only
@given(st.lists(st.tuples(st.sampled_from(CALLS), st.lists(st.sampled_from(NEIGHBOURS), max_size=60)), max_size=12), st.data())
def test_it_answers_as_a_dict_does_in_runs_around_the_end(calls: list[tuple[str, list[int]]], data: st.DataObject) -> None:
    tried(Pair(knowing(KNOWN)), calls, data)


@each_kind
def test_it_answers_as_a_dict_does_when_much_comes_and_goes(make: Callable[[], IdMap]) -> None:
    busy(Pair(make(), 3000), turns=60, most=2500)


@each_kind
def test_no_ids_are_hard(make: Callable[[], IdMap]) -> None:
    for kind, ids in hard_ids(3000).items():
        map, slots = make(), torch.randperm(3000, generator=torch.Generator().manual_seed(1))
        ids_S = torch.empty_like(ids).index_copy_(0, slots, ids)
        map.insert(slots, ids_S)
        assert torch.equal(map.find(ids, ids_S), slots), kind
        map.erase(slots[::2], ids_S)
        wanted = slots.clone()
        wanted[::2] = -1
        assert torch.equal(map.find(ids, ids_S), wanted), kind


@each_kind
def test_what_does_not_fit_is_refused(make: Callable[[], IdMap]) -> None:
    map, ids_S = make(), torch.arange(10)
    with pytest.raises(UnsupportedError, match=r"2,147,483,649 ids of dynamic tables in one slab: at most 2,147,483,648"):
        map.insert(torch.tensor([0]), torch.zeros(1, dtype=torch.int64).expand(2**31 + 1))
    for slots in ([10], [-1], [3, 2**40]):
        with pytest.raises(IndexError, match="there are 10, from 0 on"):
            map.insert(torch.tensor(slots), ids_S)
        with pytest.raises(IndexError, match="there are 10, from 0 on"):
            map.erase(torch.tensor(slots), ids_S)
    map.insert(torch.tensor([2, 5]), ids_S)
    with pytest.raises(KeyError, match=r"slot 3 \(id 3\) is to leave the map and is not in it"):
        map.erase(torch.tensor([3]), ids_S)


@compiled_only
def test_ids_that_are_missing_are_not_read() -> None:
    map, ids_S = IdMap.on(CPU), torch.arange(10)
    map.insert(torch.tensor([2, 5]), ids_S)
    with pytest.raises(IndexError, match="the map knows slots up to 5, and was given the ids of 5"):
        map.find(torch.tensor([2]), ids_S[:5])


@each_kind
def test_nothing_is_found_inserted_and_erased(make: Callable[[], IdMap]) -> None:
    map, none = make(), torch.empty(0, dtype=torch.int64)
    map.insert(none, none)
    map.erase(none, none)
    assert map.find(none, none).tolist() == []
    assert map.find(torch.tensor([0, -1]), none).tolist() == [-1, -1]
    assert len(map) == 0


@each_kind
def test_an_id_takes_no_more_than_32_bytes_with_the_callers_16(make: Callable[[], IdMap]) -> None:
    map, ids_S = make(), torch.arange(20_000) * 3
    map.insert(torch.arange(1000), ids_S)
    for slot in range(1000, 1500):  # one by one
        map.insert(torch.tensor([slot]), ids_S)
        assert 16 + map.nbytes / len(map) <= 32
    for begin in range(1500, 20_000, 100):
        map.insert(torch.arange(begin, begin + 100), ids_S)
        assert 16 + map.nbytes / len(map) <= 32


def test_a_table_grows_seldom_and_is_never_too_full() -> None:
    words, grown = LEAST_WORDS, 0
    for entries in range(1, 100_000):
        larger = words_for(entries, words)
        assert entries / larger <= 3 / 4
        grown += larger != words
        words = larger
    assert grown <= 20, "48 entries to 100,000 is 19 times by half"


def inserted(ids: torch.Tensor, chosen: Secret) -> torch.Tensor:
    map = knowing(chosen)
    # Three quarters full, which is as full as it gets.
    first = ids.numel() * 2 // 3
    slots = torch.arange(ids.numel())
    map.insert(slots[:first], ids)
    map.insert(slots[first:], ids)
    assert len(map) / (map.nbytes / 8) > 0.74
    assert isinstance(map, HashedIds)
    return distances(map._words, ids, chosen)


@compiled_only
def test_searches_are_short_whatever_the_ids() -> None:
    """Of ids that look drawn, a search that ends well reads 2.5 words on average in a table that is three quarters full."""
    for kind, ids in hard_ids(21_000).items():
        for chosen in (secret(), *DRAWN):
            read = inserted(ids, chosen)
            assert read.double().mean() < 4, (kind, chosen)
            assert read.max() < 500, (kind, chosen)


@compiled_only
def test_who_knew_the_secret_could_make_them_long() -> None:
    """So that the test above can fail: ids whose hashes are neighbours lie in one run."""
    ids = untagged((np.uint64(9) << np.uint64(32)) | np.arange(3000, dtype=np.uint64), KNOWN)
    assert inserted(tensor_of(ids), KNOWN).max() == 3000
