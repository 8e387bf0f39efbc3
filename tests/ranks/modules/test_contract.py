"""The whole contract of `nn.Embedding` and `nn.EmbeddingBag`, drawn: arguments, cuts, inputs and optimizers together.

What is compared, and with what, stands in `contract`.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import shardembed as se
from tests.amount import examples
from tests.ranks.contract import NAME, TORCH_OPTIMIZERS, Drawn, Given, Table, compare, give
from tests.ranks.journey.test_oracle_random import OPTIMIZERS, layouts

NORM_TYPES = (1, 2.0, 3.5, float("inf"))
MODES = ("sum", "mean", "max")


@st.composite
def modules(draw: st.DrawFn, world_size: int, dtype: torch.dtype) -> Drawn:
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["Embedding", "EmbeddingBag", "EmbeddingBag"]))
    settings = draw(arguments(kind, rows, bits := dtype != torch.float64))
    optimizer = draw(OPTIMIZERS | st.sampled_from(sorted(TORCH_OPTIMIZERS)))
    if isinstance(optimizer, str):
        settings["sparse"] = {"SparseAdam": True, "Adam": False}.get(optimizer, draw(st.booleans()))
    else:
        settings["sparse"] = draw(st.booleans())
    rowwise = getattr(optimizer, "rowwise", False)
    limited = "max_norm" in settings
    apart = limited or settings.get("scale_grad_by_freq", False)
    layout = draw(layouts(rows, columns, world_size, alike=rowwise or limited, copies=world_size == 1 or not apart))
    packing = "unique" if bits else draw(st.sampled_from(["unique", "bag"]))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    start = torch.randn(rows, columns, generator=numbers, dtype=dtype) if draw(st.booleans()) else None
    weighted = kind == "EmbeddingBag" and settings["mode"] == "sum" and draw(st.booleans())
    shape = (1, 1) if bits else (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    table = Table(kind, rows, columns, settings, dtype, weighted)
    batches = [[[draw(batch(table, numbers)) for _ in range(world_size)] for _ in range(shape[1])] for _ in range(shape[0])]
    return Drawn(
        table,
        draw(st.sampled_from([False, False, False, True])),
        start,
        optimizer,
        se.TablePlan(NAME, layout, packing),
        batches,
        draw(st.sampled_from(["mean", "sum"])),
    )


@st.composite
def arguments(draw: st.DrawFn, kind: str, rows: int, bits: bool) -> dict[str, Any]:
    """torch's arguments, those that are left out included."""
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["padding_idx"] = draw(st.integers(-rows, rows - 1))
    if not bits and draw(st.integers(0, 2)) == 0:
        found["max_norm"] = draw(st.sampled_from([0, 0.5, 1.5]))
        found["norm_type"] = draw(st.sampled_from(NORM_TYPES))
    if kind == "EmbeddingBag":
        found["mode"] = draw(st.sampled_from(MODES))
        found["include_last_offset"] = draw(st.booleans())
    if found.get("mode") != "max" and draw(st.integers(0, 2)) == 0:
        found["scale_grad_by_freq"] = True
    return found


@st.composite
def batch(draw: st.DrawFn, table: Table, numbers: torch.Generator) -> Given:
    """One rank's: perhaps empty, perhaps all padding, of one length or of several, in 32 or 64 bits."""
    size, length = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    shape: tuple[int, ...] | None = None
    if table.kind == "Embedding":
        shape = draw(st.sampled_from([(), (size,), (size, length), (2, size, length)]))
    elif draw(st.booleans()):
        shape = (size, max(1, length))  # torch itself fails on a width of 0
    return give(
        numbers,
        table,
        shape,
        size,
        length,
        skew=draw(st.sampled_from([1.0, 3.0])),
        padding=draw(st.sampled_from([0.0, 0.3, 1.0])),
        dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )


def several(world_size: int, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[list[Drawn]]:
    return st.lists(modules(world_size, dtype), min_size=4, max_size=4)


@examples(16, HealthCheck.data_too_large)
@given(several(1))
def test_one_rank_trains_as_torch_does(drawn: list[Drawn]) -> None:
    compare(drawn)


@examples(16, HealthCheck.data_too_large)
@given(several(2))
def test_two_ranks_train_as_torch_does(drawn: list[Drawn]) -> None:
    compare(drawn)


@examples(8, HealthCheck.data_too_large)
@given(several(3))
def test_three_ranks_train_as_torch_does(drawn: list[Drawn]) -> None:
    compare(drawn)


@examples(6, HealthCheck.data_too_large)
@given(several(4))
def test_four_ranks_train_as_torch_does(drawn: list[Drawn]) -> None:
    compare(drawn)


@examples(10, HealthCheck.data_too_large)
@given(several(2, torch.float32))
def test_forward_has_the_bits_of_torch(drawn: list[Drawn]) -> None:
    """With packing "unique", in float32, as long as max_norm is not used: its norms are taken in float64 here."""
    compare(drawn)
