"""What a slab asks of the kernel that serves it, and what a kernel is told of the slab.

A new kernel is a class of this shape, what it cannot serve, and an entry in `kernels.choose`.

Legend: E entries, S segments, U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from shardembed.kernels.formulas import Step
from shardembed.kernels.rounding import Blocks, Named
from shardembed.optim import TableOptimizer

if TYPE_CHECKING:
    from shardembed.kernels.gradients import Gradients
    from shardembed.kernels.triton.order import Order  # Triton may be absent


@dataclass(frozen=True)
class SlabFacts:
    """What decides which kernel serves a slab.

    Attributes:
        optimizer: its settings.
        dtype: of the rows.
        width: columns of a row.
        rows: how many this rank has.
        device: where they lie.
        shares_squares: updates are told the mean of g^2 of each row, of which this slab has some columns only.
        rounds_at_random: to the dtype of the rows; else to the nearest.
        dynamic: rows move when their table grows, and belong to one id after the other.
    """

    optimizer: TableOptimizer
    dtype: torch.dtype
    width: int
    rows: int
    device: torch.device
    shares_squares: bool = False
    rounds_at_random: bool = False
    dynamic: bool = False

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.width} {self.dtype}"


@dataclass(frozen=True)
class SlabData:
    """The memory of a slab, which stays where it is for good.

    Attributes:
        weights: `[rows, W]`.
        state: of the optimizer by name, `[rows, W]` or `[rows]`, in the compute dtype; empty where nothing learns.
        optimizer: its settings.
        compute_dtype: what sums and updates are made in.
        blocks: where the rows come from, if they are rounded at random; else to the nearest.
    """

    weights: torch.Tensor
    state: dict[str, torch.Tensor]
    optimizer: TableOptimizer
    compute_dtype: torch.dtype
    blocks: Blocks | Named | None = None


@dataclass(frozen=True)
class Rows:
    """Single rows that nobody has gathered yet, so that a message of several parts gets them without a copy on the way.

    Attributes:
        weights: where they lie, `[rows, W]`, contiguous.
        rows_E: which, int64 `[E]`.
    """

    weights: torch.Tensor
    rows_E: torch.Tensor

    def gathered(self) -> torch.Tensor:
        """`[E, W]`."""
        return self.weights.index_select(0, self.rows_E)

    def to(self, dtype: torch.dtype) -> torch.Tensor | Rows:
        """As `Tensor.to`: gathered where a cast is needed."""
        return self if self.weights.dtype == dtype else self.gathered().to(dtype)


Source = torch.Tensor | Rows


def gathered(source: Source) -> torch.Tensor:
    return source.gathered() if isinstance(source, Rows) else source


class Kernel(Protocol):
    """Lookup, merge and update of one slab.

    Attributes:
        name: as `kernel=` takes it.
        fuses: `update` takes gradients that have not been merged, too.
        orders: `merge` and `update` take an order of the rows, which may be found out before the gradients come.
    """

    name: ClassVar[str]
    fuses: ClassVar[bool]
    orders: ClassVar[bool]

    def lookup(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> Source:
        """The sum of each segment's rows, `[S, W]` in the compute dtype; the rows themselves, in the table's dtype, where `offsets`
        is None and so every segment is a single row. These may be left to be gathered (`Rows`).
        """
        ...

    def merge(self, waiting: Gradients, order: Order | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Distinct rows `[U]`, ascending, and the sum of the gradients of each, `[U, W]`, in the order of arrival."""
        ...

    def update(self, waiting: Gradients, order: Order | None, merged: bool, step: Step, factor: float) -> None:
        """Apply one optimizer step to the summed gradients of each row times `factor`, in place; `waiting` may be written over.

        Args:
            order: of `waiting`, by `triton.order.orders`, or None where nobody has asked for it.
            merged: `waiting` is what `merge` answers. Always so where the kernel does not fuse, and with `step.mean_square_U`.
            step: `mean_square_U` (`factor` included) is there where whole rows lie on several ranks, or must be summed in one order
                whatever the plan; by default it is of the rows as they are.
        """
        ...


def lacks(formulas: Container[type[TableOptimizer]], optimizer: TableOptimizer) -> str | None:
    """Why a kernel with these formulas cannot update such a slab, or None where it can. Subclasses have no formula."""
    if not optimizer.stepped or type(optimizer) in formulas:
        return None
    return f"it has no update for {type(optimizer).__name__}"
