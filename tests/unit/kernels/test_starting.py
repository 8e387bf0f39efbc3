"""Numbers that rows start from: the same bits however they are drawn, and of the distribution that was asked for."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels import grouping, quantiles
from shardembed.kernels.starting import Distribution, draw, plain

MASK = (1 << 64) - 1
INT64 = st.sampled_from([0, 1, -1, -2, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)
KINDS = pytest.mark.parametrize("normal", [False, True], ids=["uniform", "normal"])
UNIFORM, NORMAL = Distribution(-(2**62) - 12345, False, 1.0, 0.0), Distribution(-(2**62) - 12345, True, 1.0, 0.0)


def drawn(ids: torch.Tensor, columns: range, numbers: Distribution) -> torch.Tensor:
    out = torch.empty(ids.numel(), len(columns))
    draw(out, ids, columns.start, numbers)
    return out


def mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def slow(id_: int, column: int, numbers: Distribution) -> np.float32:
    """One number from the description."""
    base = mixed((numbers.table ^ 0x676E697472617473) & MASK)
    h = mixed((mixed(base ^ (id_ & MASK)) + column * 0x9E3779B97F4A7C15) & MASK)
    x = np.float32((h >> 40) / 2**24)
    if numbers.normal:
        mantissa, exponent = math.frexp(h >> 11 | 1)  # of a number from 1/2 to 1
        segment, t = divmod((mantissa * 2 - 1) * 32, 1.0)
        c0, c1, c2, c3 = quantiles.quantile_table()[(exponent - 1) * 32 + int(segment)].tolist()
        size = ((c3 * t + c2) * t + c1) * t + c0
        x = np.float32(-size if h >> 10 & 1 else size)
    return x * np.float32(numbers.scale) + np.float32(numbers.offset)


@given(
    st.lists(INT64, min_size=1, max_size=9),
    INT64,
    st.booleans(),
    st.floats(-10, 10, width=32),
    st.floats(-10, 10, width=32),
    st.integers(0, 5),
    st.integers(1, 40),
)
def test_every_way_gives_the_bits_of_the_description(
    ids: list[int], table: int, normal: bool, scale: float, offset: float, first: int, width: int
) -> None:
    numbers, columns, ids_N = Distribution(table, normal, scale, offset), range(first, first + width), torch.tensor(ids)
    expected = torch.tensor(np.array([[slow(one, c, numbers) for c in columns] for one in ids]))
    assert expected.dtype == torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        without_numba = drawn(ids_N, columns, numbers)
    for found in (drawn(ids_N, columns, numbers), without_numba, plain(ids_N, columns, numbers)):
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@KINDS
def test_parts_are_those_of_the_whole(normal: bool) -> None:
    """Of a batch that plain torch draws in pieces, too."""
    numbers = Distribution(17, normal, 0.1, 0.3)
    ids = torch.randint(-(2**63), 2**63 - 1, (1500,), generator=torch.Generator().manual_seed(0))
    whole = drawn(ids, range(50), numbers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        assert torch.equal(drawn(ids, range(50), numbers), whole)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(1))[:700]
    assert torch.equal(drawn(ids[order], range(7, 31), numbers), whole[order, 7:31])
    assert torch.equal(drawn(ids[::3], range(50), numbers), whole[::3])
    assert drawn(ids[:0], range(50), numbers).shape == (0, 50)
    assert drawn(ids, range(0), numbers).shape == (1500, 0)


def test_numbers_are_the_same_for_ever() -> None:
    ids = torch.tensor([0, -1, 2**63 - 1])
    uniform, normal = (drawn(ids, range(1, 3), Distribution(-7, kind, 1.0, 0.0)) for kind in (False, True))
    assert uniform.tolist() == [
        [0.5090115666389465, 0.945155143737793],
        [0.5861294865608215, 0.6116300821304321],
        [0.5247918367385864, 0.6262667179107666],
    ]
    assert normal.tolist() == [
        [-0.6603775024414062, 0.06879204511642456],
        [0.5444533824920654, -0.5077479481697083],
        [-0.635976254940033, 0.4869880974292755],
    ]


def ids_that_are(kind: str, count: int) -> torch.Tensor:
    if kind == "counted":
        return torch.arange(count) - count // 2
    if kind == "high bits":
        return torch.arange(count) << 44
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["counted", "high bits", "random"])
@KINDS
def test_a_million_numbers_follow_the_distribution(normal: bool, kind: str) -> None:
    """Moments within five of their standard errors; Kolmogorov and Smirnov's distance below what chance exceeds in 1 of 10^6."""
    numbers = drawn(ids_that_are(kind, 62_500), range(16), NORMAL if normal else UNIFORM).double().flatten()
    count = numbers.numel()
    centred = (numbers if normal else (numbers - 0.5) * 12**0.5).numpy()
    # Of x, x^2, x^3, x^4: the mean, and the variance of a single one.
    moments = [(0, 1), (1, 2), (0, 15), (3, 96)] if normal else [(0, 1), (1, 0.8), (0, 27 / 7), (1.8, 5.76)]
    for power, (mean, variance) in enumerate(moments, start=1):
        assert abs((centred**power).mean() - mean) < 5 * (variance / count) ** 0.5, f"moment {power}"
    ascending = np.sort(numbers.numpy())
    shares = torch.special.ndtr(torch.from_numpy(ascending)).numpy() if normal else ascending
    places = np.arange(count)
    distance = max((shares - places / count).max(), ((places + 1) / count - shares).max())
    assert distance < (math.log(2 / 1e-6) / (2 * count)) ** 0.5


def test_tails_are_as_heavy_as_they_should_be() -> None:
    """Of 6.4 million numbers, beyond 3, 4 and 4.5 on both sides."""
    numbers = drawn(ids_that_are("random", 100_000), range(64), NORMAL).flatten()
    for bound in (3.0, 4.0, 4.5):
        expected = numbers.numel() * NormalDist().cdf(-bound)
        for found in ((numbers > bound).sum(), (numbers < -bound).sum()):
            assert abs(int(found) - expected) < 5 * expected**0.5, f"beyond {bound}"
    assert 4.9 < float(numbers.abs().max()) < 6.5


def test_the_table_has_the_quantiles_everywhere() -> None:
    """From the middle out to 8.2, and joined where segments meet."""
    table = quantiles.quantile_table()
    t = np.array([0.0, 0.17, 0.5, 0.83])
    found = ((table[:, 3:] * t + table[:, 2:3]) * t + table[:, 1:2]) * t + table[:, :1]
    numbers, normal = np.arange(len(table)), NormalDist()
    shares = (1 + (numbers[:, None] % 32 + t) / 32) * 2.0 ** (numbers[:, None] // 32 - 54)
    expected = np.array([[-normal.inv_cdf(share) for share in row] for row in shares])
    assert np.abs(found - expected).max() < 1e-8
    assert expected.max() > 8.2
    assert np.abs(table.sum(1)[:-1] - table[1:, 0]).max() < 1e-15
    assert abs(table[-1].sum()) < 1e-15


def test_another_logarithm_would_give_the_same_table() -> None:
    """Some thousand last bits more or less would round no quantile to another multiple of the grain."""
    grains = np.array(quantiles.knots()) / quantiles.GRAIN
    from_the_middle = np.abs(grains - np.floor(grains) - 0.5) * quantiles.GRAIN
    assert from_the_middle.min() > 1000 * 2.0**-50


@KINDS
def test_tables_ids_and_columns_that_are_neighbours_do_not_correlate(normal: bool) -> None:
    """Nor those that differ in one bit; five standard errors of a correlation."""
    first = Distribution(1, normal, 1.0, 0.0)
    ids = ids_that_are("counted", 4096)
    numbers = drawn(ids, range(33), first)
    others = {
        "the next column": (numbers[:, :-1], numbers[:, 1:]),
        "the next id": (numbers[:-1], numbers[1:]),
        "the next table": (numbers, drawn(ids, range(33), Distribution(2, normal, 1.0, 0.0))),
        "the negative id": (numbers, drawn(~ids, range(33), first)),
    }
    others |= {
        f"bit {bit}": (numbers, drawn(ids ^ (-1 << 63 if bit == 63 else 1 << bit), range(33), first)) for bit in (0, 7, 31, 63)
    }
    for name, (one, other) in others.items():
        x, y = one.double().flatten(), other.double().flatten()
        correlation = float(((x - x.mean()) * (y - y.mean())).mean() / (x.std() * y.std()))
        assert abs(correlation) < 5 / x.numel() ** 0.5, name
        assert float((x == y).double().mean()) < 1e-3, name
