"""Mixed ids: the numbers that are published, and the same from compiled kernels and from plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels import grouping
from shardembed.kernels.mixing import MIX_1, MIX_2, Secret, buckets_of, mixed, secret, tags_of

LEAST, MOST = -(2**63), 2**63 - 1
IDS = st.lists(st.integers(LEAST, MOST) | st.integers(-3, 3) | st.sampled_from([LEAST, MOST]), max_size=40)
MASK = 2**64 - 1


def of_python(number: int) -> int:
    """splitmix64's finalizer, with whole numbers of any size; unsigned."""
    number &= MASK
    number = (number ^ (number >> 30)) * (MIX_1 & MASK) & MASK
    number = (number ^ (number >> 27)) * (MIX_2 & MASK) & MASK
    return number ^ (number >> 31)


def bucket_of_python(number: int, buckets: int) -> int:
    return (of_python(number) >> 32) * buckets >> 32


def as_tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)


def test_mixed_ids_are_those_of_splitmix64() -> None:
    """The first outputs of the generator with seed 0, as its authors' code prints them."""
    gamma = 0x9E3779B97F4A7C15
    seeds = [(n * gamma + 2**63) % 2**64 - 2**63 for n in (1, 2, 3)]
    assert [number & MASK for number in mixed(as_tensor(seeds)).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@given(IDS)
def test_mixed_ids_are_the_same_in_python(ids: list[int]) -> None:
    assert [number & MASK for number in mixed(as_tensor(ids)).tolist()] == [of_python(number) for number in ids]


@given(IDS, st.integers(1, 2**32) | st.sampled_from([1, 2, 3, 2**31, 2**32]))
def test_buckets_are_the_same_everywhere(ids: list[int], buckets: int) -> None:
    wanted = [bucket_of_python(number, buckets) for number in ids]
    assert all(0 <= bucket < buckets for bucket in wanted)
    assert buckets_of(as_tensor(ids), buckets).tolist() == wanted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        assert buckets_of(as_tensor(ids), buckets).tolist() == wanted


@pytest.mark.skipif(grouping.missing() is not None, reason="needs numba")
@given(IDS, st.tuples(*[st.integers(LEAST, MOST)] * 3))
def test_compiled_kernels_mix_as_torch_does(ids: list[int], drawn: tuple[int, int, int]) -> None:
    from shardembed.kernels.numba import hashing

    chosen = Secret(drawn[0], drawn[1] | 1, drawn[2] | 1)
    assert [hashing.mixed_of(number) for number in ids] == mixed(as_tensor(ids)).tolist()
    tags = tags_of(as_tensor(ids), chosen).tolist()
    assert [hashing.tag_of(number, *chosen) for number in ids] == tags
    for size in (1, 48, 3 * 2**29, 2**32):  # also where the product has 64 bits
        assert [hashing.home_of(tag, size) for tag in tags] == [tag * size >> 32 for tag in tags]


def test_equal_shares_of_ids_fall_into_buckets() -> None:
    for ids in (torch.arange(100_000), torch.arange(100_000) * 64 + LEAST, torch.arange(100_000) << 40):
        counts = torch.bincount(buckets_of(ids, 100), minlength=100)
        assert counts.numel() == 100
        # 1,000 in each, with a deviation of 32; six of those.
        assert counts.min() > 800
        assert counts.max() < 1200


def test_a_process_keeps_its_secret_and_draws_it() -> None:
    assert secret() is secret()
    drawn = {Secret.drawn() for _ in range(20)}
    assert len(drawn) == 20
    for flip, *factors in drawn:
        assert all(LEAST <= number <= MOST for number in (flip, *factors))
        assert all(factor % 2 for factor in factors)
