"""Dynamic tables and batches for them, for hypothesis: few ids, the hardest among them, that meet in few places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import shardembed as se

EXTREMES = (-1, -2, 2**63 - 1, -(2**63))
FEW = (*EXTREMES, 0, 1, 2**31, -(2**31) - 1, *range(100, 112))


@st.composite
def dynamics(draw: st.DrawFn, grows: bool = False) -> se.Dynamic:
    """All settings with each other. grows: of a table without a limit."""
    steps = st.integers(1, 4)
    evictions: list[st.SearchStrategy[Any]] = [st.none(), st.builds(se.TTL, steps)]
    if not grows:
        evictions += [st.just(se.LRU()), st.builds(se.LFU, st.none() | steps)]
    admissions = (
        st.none() | st.builds(se.MinCount, st.integers(1, 4)) | st.builds(se.Probability, st.sampled_from([0.25, 0.5, 1.0]))
    )
    return se.Dynamic(draw(st.one_of(evictions)), draw(admissions), draw(st.sampled_from(["start", "zeros"])))


@st.composite
def dynamic_configs(draw: st.DrawFn, columns: int = 2, **settings: Any) -> se.TableConfig:
    """A table that is soon full, or has several buckets, or grows. settings: of `TableConfig`, for all that are drawn."""
    rows = draw(st.none() | st.integers(1, 6) | st.sampled_from([200, 300, 1000]))
    padding = draw(st.none() | st.sampled_from(FEW))
    chosen = {"padding_idx": padding, "dtype": torch.float64, "dynamic": draw(dynamics(rows is None)), **settings}
    return se.TableConfig("item", rows, columns, **chosen)


@dataclass(frozen=True)
class Learned:
    """A micro-batch of one rank: bags of ids, some empty, some with an id several times. seed: of its gradients."""

    bags: tuple[tuple[int, ...], ...]
    seed: int

    @property
    def ids(self) -> list[int]:
        """Of all bags, one after the other."""
        return [id_ for bag in self.bags for id_ in bag]

    @property
    def given(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As a collection takes it: ids, int64 `[n]`, and offsets, int64 `[bags + 1]`."""
        lengths = torch.tensor([0, *map(len, self.bags)])
        return torch.tensor(self.ids, dtype=torch.int64), lengths.cumsum(0)

    def grads_nD(self, columns: int, lines: int | None = None) -> torch.Tensor:
        """Of each occurrence, float64 `[n, columns]`, in eighths, so that sums are exact in any order. lines: so many instead."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = len(self.ids) if lines is None else lines, columns
        return torch.randint(-16, 17, shape, generator=generator).to(torch.float64) / 8


def batches(ids: tuple[int, ...] = FEW) -> st.SearchStrategy[Learned]:
    """One micro-batch of one rank, which may be empty."""
    bags = st.lists(st.lists(st.sampled_from(ids), max_size=4).map(tuple), max_size=5).map(tuple)
    return st.builds(Learned, bags, st.integers(0, 2**16))


def steps_of_ids(ids: tuple[int, ...] = FEW, most: int = 8, parts: int = 2) -> st.SearchStrategy[list[list[Learned]]]:
    """`[step][part]`: some steps of a few micro-batches or ranks each, some without any."""
    return st.lists(st.lists(batches(ids), max_size=parts), min_size=1, max_size=most)
