"""Ids to small numbers, against a dict, from the compiled kernel and from plain torch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shardembed.errors import UnsupportedError
from shardembed.kernels import grouping
from shardembed.kernels.interning import Interned, intern, words_of
from shardembed.kernels.mixing import secret
from tests.unit.kernels.crafted import LEAST, MOST, hard_ids
from tests.unit.kernels.idmap_cases import distances

IDS = st.integers(LEAST, MOST) | st.integers(-4, 4) | st.sampled_from([LEAST, MOST])


def in_plain_torch(ids: torch.Tensor, first: int | None) -> Interned:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        return intern(ids, first)


def check(found: Interned, ids: list[int], first: int | None, wanted: list[int]) -> None:
    """wanted: the distinct ids, in order."""
    assert {part.dtype for part in (found.ids_U, found.numbers_N, found.counts_U)} == {torch.int64}
    assert found.ids_U.tolist() == wanted
    numbers = {each: number for number, each in enumerate(wanted)}
    assert found.numbers_N.tolist() == [numbers[each] for each in ids]
    counts = Counter(ids)
    assert found.counts_U.tolist() == [counts[each] for each in wanted]
    if first is not None:
        assert found.ids_U[0] == first


@given(st.lists(IDS, max_size=80), st.none() | IDS)
@example([], None)
@example([], 7)
@example([MOST, LEAST, -1, MOST], -1)
@example(list(range(3)), 5)
def test_ids_are_numbered_as_a_dict_numbers_them(ids: list[int], first: int | None) -> None:
    tensor = torch.tensor(ids, dtype=torch.int64)
    ahead = [] if first is None else [first]
    ascending = ahead + [each for each in sorted(set(ids)) if each != first]
    check(in_plain_torch(tensor, first), ids, first, ascending)
    met = list(dict.fromkeys(ahead + ids))
    check(intern(tensor, first), ids, first, ascending if grouping.missing() else met)


def test_many_ids_are_numbered() -> None:
    """More than are looked ahead, and many of them again."""
    numbers = torch.Generator().manual_seed(5)
    ids = torch.randint(LEAST, MOST, (3000,), generator=numbers)[torch.randint(0, 3000, (20_000,), generator=numbers)]
    met = list(dict.fromkeys(ids.tolist()))
    check(intern(ids), ids.tolist(), None, sorted(met) if grouping.missing() else met)


def test_ids_that_are_not_contiguous_are_numbered_as_they_read() -> None:
    ids = torch.tensor([[3, 1], [3, 2], [-9, 2]])
    assert intern(ids[:, 0]).counts_U.tolist() == ([1, 2] if grouping.missing() else [2, 1])


def test_no_ids_are_hard() -> None:
    for kind, ids in hard_ids(2000).items():
        found = intern(torch.cat([ids, ids.flip(0)]))
        assert torch.equal(found.ids_U[found.numbers_N], torch.cat([ids, ids.flip(0)])), kind
        assert found.counts_U.tolist() == [2] * 2000, kind


@pytest.mark.skipif(grouping.missing() is not None, reason="needs numba")
def test_searches_are_short_whatever_the_ids() -> None:
    """Of ids that look drawn, a search reads 1.5 words on average in a table that is half full."""
    from shardembed.kernels.numba import hashing

    for kind, ids in hard_ids(30_000).items():
        words = torch.full((words_of(30_000),), -1)
        ids_U, _, _ = hashing.intern(words.numpy(), ids.numpy(), torch.empty(0, dtype=torch.int64).numpy(), tuple(secret()))
        read = distances(words, torch.from_numpy(ids_U), secret())
        assert read.numel() == 30_000
        assert read.double().mean() < 2.5, kind
        assert read.max() < 200, kind


def test_a_batch_without_end_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"2,147,483,648 ids cannot be numbered"):
        intern(torch.zeros(1, dtype=torch.int64).expand(2**31))
