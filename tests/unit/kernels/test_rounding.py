"""Stochastic rounding: one of two neighbours, unbiased, and the same whoever rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shardembed.kernels.rounding import Origins, stochastic

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def origins(rows: int, first: int = 0, table: int = 0x1234_5678_9ABC_DEF, column: int = 0) -> Origins:
    return Origins(torch.full((rows,), table), torch.arange(first, first + rows), torch.full((rows,), column))


def every(dtype: torch.dtype) -> torch.Tensor:
    """All that 16 bits can be."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@NARROW
def test_what_the_dtype_holds_stays_what_it_is(dtype: torch.dtype) -> None:
    values = every(dtype)
    rows = values.float().unsqueeze(1)
    for step in range(20):
        rounded = stochastic(rows, dtype, origins(len(rows)), step).squeeze(1)
        same = (rounded == values) | (rounded.isnan() & values.isnan())
        assert same.all(), f"{values[~same]} became {rounded[~same]}"


@NARROW
def test_a_value_becomes_one_of_its_neighbours(dtype: torch.dtype) -> None:
    values = every(dtype).float()
    below = values[values.isfinite()].sort().values.unique()
    below, above = below[:-1], below[1:]
    for share in (0.001, 0.3, 0.5, 0.999):
        between = below + (above - below) * share
        rounded = stochastic(between.unsqueeze(1), dtype, origins(len(between)), 3).squeeze(1).float()
        wrong = (rounded != below) & (rounded != above)
        assert not wrong.any(), f"{between[wrong][:3]} became {rounded[wrong][:3]}"


@NARROW
@pytest.mark.parametrize("scale", [1.0, -1.0, 3e-6, -3e-6, 1e-7, 200.0])
def test_rounding_keeps_the_mean(dtype: torch.dtype, scale: float) -> None:
    """For float16 3e-6 lies below the normal numbers, and 1e-7 near the least."""
    rows, width = 4000, 25
    generator = torch.Generator().manual_seed(0)
    values = scale * (1 + torch.rand(7, generator=generator))
    nearest = values.to(dtype)
    spacing = (torch.nextafter(nearest, torch.full_like(nearest, torch.inf)).float() - nearest.float()).abs()
    for value, step in zip(values, spacing, strict=True):
        rounded = stochastic(value.expand(rows, width), dtype, origins(rows), 1).double()
        # Two neighbours a step apart: a deviation of half a step at most, over the root of the count; five of those.
        error = float((rounded.mean() - value.double()).abs())
        assert error < 5 * 0.5 * float(step) / (rows * width) ** 0.5, f"{float(value)} became {float(rounded.mean())} on average"
    assert float((rounded == rounded[0, 0]).double().mean()) < 1.0


@NARROW
def test_infinity_and_nan_stay(dtype: torch.dtype) -> None:
    special = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]])
    for step in range(50):
        rounded = stochastic(special, dtype, origins(1, step), step)
        assert torch.equal(rounded.float().nan_to_num(nan=7.0), special.nan_to_num(nan=7.0))


@NARROW
def test_beyond_the_range_stands_infinity(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    spacing = largest - float(torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    for sign in (1.0, -1.0):
        values = sign * torch.tensor([[largest + 0.4 * spacing, largest + 3 * spacing]])
        for step in range(50):
            rounded = stochastic(values, dtype, origins(1, step), step)
            assert float(rounded[0, 0]) == sign * largest
            assert float(rounded[0, 1]) == sign * torch.inf


@NARROW
def test_noise_does_not_know_how_a_table_is_cut(dtype: torch.dtype) -> None:
    whole = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    rounded = stochastic(whole, dtype, origins(40), 9)
    for rows, columns in ((slice(0, 40, 3), slice(0, 12)), (slice(7, 8), slice(5, 6)), (slice(20, 40), slice(4, 9))):
        at = origins(40, column=columns.start)
        part = Origins(at.tables_U[rows], at.rows_U[rows], at.columns_U[rows])
        assert torch.equal(stochastic(whole[rows, columns], dtype, part, 9), rounded[rows, columns])


def test_noise_differs_by_table_row_column_and_step() -> None:
    value = torch.full((64, 8), 1.0 + 2.0**-8)  # half a step of bfloat16 above 1
    base = origins(64)
    others = [
        (base, 2),
        (origins(64, first=64), 1),
        (replace(base, tables_U=base.tables_U + 1), 1),
        (replace(base, columns_U=base.columns_U + 8), 1),
    ]
    rounded = stochastic(value, torch.bfloat16, base, 1)
    assert 0.4 < float((rounded > 1).double().mean()) < 0.6
    for other, step in others:
        share = float((stochastic(value, torch.bfloat16, other, step) == rounded).double().mean())
        assert 0.4 < share < 0.6, f"{share:.0%} alike"
    rows_alike = (rounded[1:] == rounded[:-1]).double().mean()
    columns_alike = (rounded[:, 1:] == rounded[:, :-1]).double().mean()
    assert 0.4 < float(rows_alike) < 0.6
    assert 0.4 < float(columns_alike) < 0.6
